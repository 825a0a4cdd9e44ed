"""FSDP2 models with `lars_tree.torch.Lars`, compared with dense models. See test_distributed."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from distributed_worker import communication, compare, gathered, raised
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import LayerNorm, Linear, Sequential

from lars_tree.torch import Lars, param_groups

STEPS = 3
OPTIONS = {
    "plain": {"momentum": 0.0},
    "momentum": {"weight_decay": 0.01},
    "nesterov": {"weight_decay": 0.01, "nesterov": True, "trust_clip": True},
    "joint": {"weight_decay": 0.3, "joint_norm": True, "trust_clip": True},
    "dampened": {"dampening": 0.5, "maximize": True, "eps": 0.1},
    "layers": {"layer_axis": 0, "weight_decay": 0.01},  # the sharded axis, so each layer is whole
    "across": {"layer_axis": -1, "weight_decay": 0.01},
}


def model(dtype, mesh=None, tensor_parallel=None):
    """A model that has uneven shards, and empty shards in some processes."""
    torch.manual_seed(0)
    made = Sequential(Linear(5, 7), LayerNorm(7), Linear(7, 4), Linear(4, 1)).to(dtype)
    if tensor_parallel is not None:
        made = parallelize_module(
            made, tensor_parallel, {"2": ColwiseParallel(), "3": RowwiseParallel()}
        )
    if mesh is not None:
        for layer in (made[0], made[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
    return made


def optimizer(of, options, **more):
    given = {"lr": 0.05, "trust_coefficient": 0.5, **options, **more}
    axis = given.pop("layer_axis", None)
    groups = param_groups(of)
    groups[0]["layer_axis"] = axis
    return Lars(groups, **given)


def train(sharded, plain, ours, theirs, seed, watched=False):
    """Step both models with the gradients of the sharded model.

    With `watched`, the sharded model steps under a dispatch mode, so torch operations replace the
    kernel. Return the numbers of all-reduces and of gloo operations in its step.
    """
    torch.manual_seed(seed)
    dtype = next(plain.parameters()).dtype
    ours.zero_grad()
    (sharded(torch.randn(6, 5, dtype=dtype)) - 1).square().sum().backward()
    for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        other.grad = one.grad.full_tensor()
    with communication() as counts, CommDebugMode() if watched else nullcontext():
        ours.step()
    theirs.step()
    sent = sum(count for name, count in counts.items() if name.startswith("gloo:"))
    return counts["all_reduce"], sent


def buffers(of, by):
    return [by.state[p]["momentum_buffer"] for p in of.parameters() if by.state[p]]


def compared(sharded, plain, ours, theirs):
    params = list(sharded.parameters())
    moving = buffers(sharded, ours)
    expected = [*plain.parameters(), *buffers(plain, theirs)]
    return compare(
        [*params, *moving], [x.detach() for x in expected], params + params[: len(moving)]
    )


def case(dtype, options, mesh, tensor_parallel=None, watched=False, wrap=lambda x: x):
    """Train a sharded and a dense model; `wrap` is applied to the optimizer of the sharded one."""
    sharded, plain = model(dtype, mesh, tensor_parallel), model(dtype)
    ours, theirs = wrap(optimizer(sharded, options)), optimizer(plain, options)
    counts = [train(sharded, plain, ours, theirs, seed, watched) for seed in range(STEPS)]
    sent = [max(column) for column in zip(*counts, strict=True)]
    kind = str(dtype).removeprefix("torch.")
    facts = {"kind": kind, "all_reduces": sent[0], "collectives": sent[1]}
    return {**facts, **compared(sharded, plain, ours, theirs)}


def resumed(dtype, mesh, way):
    """Take two steps, save the state, load it into another optimizer and take a third step."""
    options = OPTIONS["momentum"]
    sharded, plain = model(dtype, mesh), model(dtype)
    ours, theirs = (optimizer(of, options) for of in (sharded, plain))
    for seed in range(2):
        train(sharded, plain, ours, theirs, seed)
    fresh = optimizer(sharded, options, lr=9.0)  # loading replaces the rate
    ours.zero_grad()
    if way == "of torch.optim":
        fresh.load_state_dict(ours.state_dict())
        names = []
    else:
        how = StateDictOptions(full_state_dict=way == "full", cpu_offload=way == "full")
        saved = get_optimizer_state_dict(sharded, ours, options=how)
        names = sorted(saved.get("state", {}))  # if full, empty in all processes but the first
        how = StateDictOptions(full_state_dict=way == "full", broadcast_from_rank0=way == "full")
        set_optimizer_state_dict(sharded, fresh, saved, options=how)
    train(sharded, plain, fresh, theirs, 2)
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in buffers(sharded, fresh)})
    kind = str(dtype).removeprefix("torch.")
    facts = {"kind": kind, "names": gathered(names)[0], "buffers": dtypes}
    return {**facts, **compared(sharded, plain, fresh, theirs)}


def refused(mesh):
    """One parameter is refused; the two valid parameters beside it are not written."""
    whole = torch.arange(1.0, 13).reshape(4, 3)

    def spread(placement):
        return distribute_tensor(whole.clone(), mesh, [placement], src_data_rank=None)

    def partial():
        return DTensor.from_local(whole.clone(), mesh, [Partial()])

    for name, x, grad, buffer in (
        ("plain gradient", spread(Shard(0)), whole.clone(), None),
        ("plain buffer", spread(Shard(0)), spread(Shard(0)), whole.clone()),
        ("turned buffer", spread(Shard(0)), spread(Shard(0)), spread(Shard(1))),
        ("partial parameter", partial(), partial(), None),
    ):
        params = [torch.nn.Parameter(x) for x in (whole.clone(), spread(Shard(0)), x)]
        for p, g in zip(params, (whole, spread(Shard(0)), grad), strict=True):
            p.grad = g
        for momentum in (0.9, 0.0) if buffer is None else (0.9,):
            for foreach in (None, False):
                ours = Lars(params, 0.1, momentum, foreach=foreach)
                if buffer is not None:
                    ours.state[params[2]]["momentum_buffer"] = buffer
                found = raised(ours.step)
                same = [torch.equal(params[0], whole), torch.equal(params[1].full_tensor(), whole)]
                yield f"{name}, {momentum}, {foreach}", {"raised": found, "same": gathered(same)}


def redundant():
    """Compare `Lars` in a ZeroRedundancyOptimizer, which shards the state, with `Lars` alone."""
    whole, spread = model(torch.float64), model(torch.float64)
    given = {"lr": 0.05, "trust_coefficient": 0.5, "weight_decay": 0.01, "adapt": "decayed"}
    ours = ZeroRedundancyOptimizer(param_groups(spread), optimizer_class=Lars, **given)
    theirs = Lars(param_groups(whole), **given)
    for seed in range(STEPS):
        for each, by in ((spread, ours), (whole, theirs)):
            torch.manual_seed(seed)
            by.zero_grad()
            (each(torch.randn(6, 5, dtype=torch.float64)) - 1).square().sum().backward()
            by.step()
    pairs = zip(spread.parameters(), whole.parameters(), strict=True)
    return gathered([all(torch.equal(p, q) for p, q in pairs), len(ours.optim.state)])


def measure(world):
    yield "zero redundancy", redundant()
    line = init_device_mesh("cpu", (world,))
    for name, found in refused(line):
        yield f"refused, {name}", found
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for name in OPTIONS if dtype == torch.float64 else ("momentum", "nesterov"):
            yield f"{name}, {dtype}", case(dtype, OPTIONS[name], line)
    yield "watched", case(torch.float64, OPTIONS["momentum"], line, watched=True)
    for dtype in (torch.float64, torch.bfloat16):
        for way in ("of torch.optim", "sharded", "full"):
            yield f"resumed, {way}, {dtype}", resumed(dtype, line, way)
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    for name in ("momentum", "across"):
        yield f"hybrid {name}", case(torch.float64, OPTIONS[name], grid)
        found = case(torch.float64, OPTIONS[name], grid["replicas"], grid["shards"])
        yield f"tensor parallel {name}", found
