"""Compiled steps of FSDP2 models and DTensors, compared with one process. See test_distributed."""

from __future__ import annotations

import torch
from distributed_models import OPTIONS, case
from distributed_tensors import CROSSED, KINDS, MIXED, trees
from distributed_worker import all_reduces, compare, distribute, gathered, local, raised
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

from lars_tree.torch import Lars

LARGE = [name for name, (dtype, *_) in KINDS.items() if dtype == torch.float64]
TURNED, MANY = ("rows_everywhere", "turned"), ("rows_twice", "layers_of_two_processes", "plain")
SOME = ("of_one_process", "everywhere", "sgd", "frozen", "layers_across", "number")
COMPLEX = ("rows", "columns", "layers_across")


def compiled(optimizer, backend="eager", fullgraph=True):
    """Compile the step of an optimizer; with fullgraph=True, a graph break is an error.

    "aot_eager" also traces the collectives, which takes longer.
    """
    torch.compiler.reset()
    counters.clear()
    optimizer.step = torch.compile(optimizer.step, backend=backend, fullgraph=fullgraph)
    return optimizer


def graphs():
    return counters["stats"]["unique_graphs"]


def models(grid):
    for name, meshes in (("momentum", [grid]), ("joint", [grid["replicas"], grid["shards"]])):
        found = case(torch.float64, OPTIONS[name], *meshes, wrap=compiled)
        yield f"{name} over {len(meshes)} meshes", {**found, "graphs": gathered(graphs())}


def lars(w, dcdw, leaves, **options):
    """An optimizer with a group for each leaf, and its parameters."""
    params = [Parameter(x) for x in w.values()]
    for p, grad in zip(params, dcdw.values(), strict=True):
        p.grad = grad
    groups = [
        {"params": [p], "layer_axis": leaves[name].layer_axis, "adapt": leaves[name].adapt}
        for p, name in zip(params, w, strict=True)
    ]
    rate = torch.tensor(0.1, dtype=torch.float64)
    options = {"weight_decay": 0.01, "trust_coefficient": 1.0, **options}
    return Lars(groups, rate, 0.5, **options), params


def steps(leaves, kinds, mesh, compiles=True):
    """Two steps of DTensors beside dense tensors; the kinds have one dtype and share the graphs."""
    ours = params = None
    for kind in kinds:
        w, dcdw, *plain = trees(leaves, kind, mesh, numbers=False)
        theirs, expected = lars(*plain, leaves)
        if ours is None:
            ours, params = lars(w, dcdw, leaves)
            if compiles:
                compiled(ours)
        for p, x, grad in zip(params, w.values(), dcdw.values(), strict=True):
            local(p).copy_(local(x))
            if grad is not None:
                local(p.grad).copy_(local(grad))
        ours.state.clear()
        for rate in (0.1, 0.2):  # a new rate does not need a new graph
            for by in (ours, theirs):
                for group in by.param_groups:
                    group["lr"].fill_(rate)
                by.step()
        moving = [p for p in params if p.grad is not None]
        found = [*params, *(ours.state[p]["momentum_buffer"] for p in moving)]
        wanted = [*expected, *(x["momentum_buffer"] for x in theirs.state.values())]
        facts = compare(found, [x.detach() for x in wanted], [*params, *moving])
        counts = gathered(graphs() if compiles else None)
        yield f"{len(leaves)} tensors, {kind}", {"kind": kind, **facts, "graphs": counts}


def of_some_processes():
    """In the second step, only the first process finds infinity and keeps its shards."""
    mesh = DeviceMesh("cpu", [0, 1])
    leaves = {name: MIXED[name] for name in ("rows", "layers_across")}
    w, dcdw, *plain = trees(leaves, "float64", mesh)
    ours, params = lars(w, dcdw, leaves, fused=True)
    theirs, expected = lars(*plain, leaves)
    compiled(ours, "aot_eager")
    for infinite in (False, True):
        before = [local(p).clone() for p in params]
        ours.found_inf = torch.tensor(float(infinite and mesh.get_rank() == 0))
        ours.step()
        theirs.step()
    kept = all(torch.equal(local(p), x) for p, x in zip(params, before, strict=True))
    parts = [local(distribute(x.detach(), mesh, [Shard(0)])) for x in expected]
    pairs = zip(params, parts, strict=True)
    close = all(torch.allclose(local(p), x, rtol=1e-12, atol=0) for p, x in pairs)
    return gathered([kept, close, graphs()])


def faults(mesh):
    """Invalid layouts are refused as without compiling: before anything is sent or written."""
    whole = torch.arange(1.0, 13).reshape(4, 3)

    def spread(placement, x=whole):
        return distribute(x, mesh, [placement])

    def partial():
        return DTensor.from_local(whole.clone(), mesh, [Partial()])

    row = torch.ones(1, 3)  # the first process has all of it
    for name, x, grad, buffer in (
        ("plain gradient", spread(Shard(0), row), row, None),
        ("partial gradient", spread(Shard(0)), partial(), None),
        ("plain buffer", spread(Shard(0)), spread(Shard(0)), whole),
        ("turned buffer", spread(Shard(0)), spread(Shard(0)), spread(Shard(1))),
        ("partial buffer", spread(Replicate()), spread(Replicate()), partial()),
    ):
        params = [Parameter(x) for x in (whole.clone(), spread(Shard(0)), x)]
        for p, g in zip(params, (whole, spread(Shard(0)), grad), strict=True):
            p.grad = g
        ours = Lars(params, 0.1)
        if buffer is not None:
            ours.state[params[2]]["momentum_buffer"] = buffer
        before = [local(p).clone() for p in params]
        with all_reduces() as counts:
            found = raised(compiled(ours, fullgraph=False).step)
        same = all(torch.equal(local(p), old) for p, old in zip(params, before, strict=True))
        is_kept = list(map(len, ours.state.values())) == ([] if buffer is None else [1])
        facts = {"same": gathered(same and is_kept), "sent": counts["all_reduce"]}
        yield name, {"raised": found, **facts}


def measure(world):
    """Four processes form a grid, three a line; neither suite takes too long."""
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        yield from steps({name: CROSSED[name] for name in (*TURNED, *MANY)}, LARGE, grid)
        yield from models(grid)
        return
    line = init_device_mesh("cpu", (world,))
    for name, found in faults(line):
        yield f"refused, {name}", found
    yield "some processes", of_some_processes()
    # Processes that compile the step communicate with processes that do not.
    some, others = ({name: MIXED[name] for name in names} for names in (SOME, COMPLEX))
    yield from steps(some, ["bfloat16"], line, compiles=line.get_rank() > 0)
    yield from steps(others, ["complex128"], line)
