"""The kernel updates shards to the same bits as in one process. See test_distributed."""

from __future__ import annotations

from unittest import mock

import torch
from conftest import unit_lars
from distributed_worker import all_reduces, compare, distribute, gathered, local, raised
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter

from lars_tree import lars_update
from lars_tree.torch import Lars

# The norms of each shard and of the whole vector are integers, so sums of squares and roots are
# exact in any order. The shards are uneven, and the shard of "empty" in the last process is empty.
VECTORS = {"uneven": [5, 10, 10, 12, 16], "empty": [7]}  # for two processes
OPTIONS = {
    "plain": {},
    "joint": {"joint_norm": True, "trust_clip": True},
    "other": {"eps": 1e-3, "nonfinite": "raise"},
}
WAYS = ("new", "in place", "momentum", "momentum in place", "torch momentum")
AXES = {"layers": 0, "across": -1}


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wholes(dtype):
    """Dense weights and gradients. All norms that are summed over shards are exact."""
    w, dcdw = {"frozen": random((4, 2), 7)}, {"frozen": None}
    for seed, name in enumerate(("uneven", "empty", "across", "odd")):
        vector = VECTORS.get(name, VECTORS["uneven"])
        column = torch.tensor(vector, dtype=torch.float64)[:, None]
        w[name] = column * random((len(vector), 4), seed).sign()
        dcdw[name] = w[name] / 8  # so the norm of dcdw + decay * w is exact too
    for name, shape in {"layers": (7, 3), "everywhere": (5, 2), "dense": (6, 3)}.items():
        w[name], dcdw[name] = random(shape, 5), random(shape, 6)
    return [{k: None if x is None else x.to(dtype) for k, x in tree.items()} for tree in (w, dcdw)]


def spread(tree, mesh, turns=False):
    """The tree as DTensors.

    With `turns`, the first process has its shard of `odd` in another memory order, so only that
    process takes the general path.
    """
    others = {"everywhere": [Replicate()], "dense": None}
    found = dict(tree)
    for name, x in tree.items():
        if x is not None:
            found[name] = distribute(x, mesh, others.get(name, [Shard(0)]))
    if turns and mesh.get_rank() == 0:
        odd = found["odd"]
        turned = local(odd).T.contiguous().T
        shape, stride = odd.shape, odd.stride()
        found["odd"] = DTensor.from_local(turned, mesh, odd.placements, shape=shape, stride=stride)
    return found


def pair(mesh, dtype=torch.float32):
    w, dcdw = wholes(dtype)
    return spread(w, mesh, turns=True), spread(dcdw, mesh)


def stepped(way, w, dcdw, options):
    """The weights after a step, and the velocities if there are any."""
    axes = {name: AXES.get(name) for name in w}
    moving = {}
    if "momentum" in way:
        dtype = torch.promote_types(next(iter(w.values())).dtype, torch.float32)
        moving = {name: (x / 4).to(dtype) for name, x in w.items()}
    if way.startswith("torch"):
        optimizer, params = torch_lars(w, dcdw, weight_decay=0.5, **options)
        for name, velocity in moving.items():
            optimizer.state[params[name]]["momentum_buffer"] = velocity
        optimizer.step()
        return params, moving
    momentum = 0.5 if moving else 0.0
    optimizer = unit_lars(0.1, decay_lambda=0.5, momentum=momentum, layer_axis=axes, **options)
    state = optimizer.init(w)
    for name, velocity in moving.items():
        state.velocity[name] = velocity
    w, state = optimizer.update(w, dcdw, state, out=w if "in place" in way else None)
    return w, state.velocity if moving else {}


def torch_lars(w, dcdw, **options):
    params = {name: Parameter(x) for name, x in w.items()}
    for name, p in params.items():
        p.grad = dcdw[name]
    groups = [{"params": [p], "layer_axis": AXES.get(name)} for name, p in params.items()]
    return Lars(groups, 0.1, 0.5, nesterov=True, trust_coefficient=1.0, **options), params


def bits(mesh):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for way in WAYS:
            for name, options in OPTIONS.items():
                whole = stepped(way, *wholes(dtype), options)
                like = spread(wholes(dtype)[0], mesh)
                trees = pair(mesh, dtype)
                with all_reduces() as counts:
                    found = stepped(way, *trees, options)
                names = [name for tree in found for name in tree]
                xs, expected = (
                    [x.detach() for tree in both for x in tree.values()] for both in (found, whole)
                )
                case = compare(xs, expected, [like[name] for name in names])
                yield f"{dtype}, {way}, {name}", {**case, "sent": counts["all_reduce"]}


def versions(mesh):
    """Whether a step increases `_version` of weights, velocities and their local tensors."""
    w, dcdw = pair(mesh)
    optimizer = unit_lars(0.1, momentum=0.5)
    state = optimizer.init(w)
    written = [x for tree in (w, state.velocity) for name, x in tree.items() if name != "frozen"]
    written += [x._local_tensor for x in written if isinstance(x, DTensor)]
    before = [x._version for x in written]
    optimizer.update(w, dcdw, state, out=w)
    return gathered(all(x._version > old for x, old in zip(written, before, strict=True)))


def skipped(mesh):
    """Only the last process has a NaN gradient; with adapt=False, only it has a NaN result."""
    for name in ("uneven", "across", "odd"):
        w, dcdw = pair(mesh)
        if mesh.get_rank() == mesh.size() - 1:
            local(dcdw[name])[-1, -1] = torch.nan
        before = [local(x).clone() for x in w.values()]
        optimizer, _ = torch_lars(w, dcdw, nonfinite="skip", adapt=name != "uneven")
        optimizer.step()
        same = all(torch.equal(local(x), old) for x, old in zip(w.values(), before, strict=True))
        found = {"same": gathered(same), "skipped": gathered(optimizer.skipped)}
        out = {key: torch.zeros_like(x) for key, x in w.items()}
        lars_update(w, dcdw, 0.1, out=out, nonfinite="skip", layer_axis=AXES.get(name))
        pairs = zip(out.values(), before, strict=True)
        found["kept"] = gathered(all(torch.equal(local(x), old) for x, old in pairs))
        yield f"skipped, {name}", found


def amp(mesh):
    """If only one process finds infinity, only that process skips the step; none hangs."""
    w, dcdw = ({name: tree[name] for name in ("uneven", "layers")} for tree in pair(mesh))
    before = local(w["uneven"]).clone()
    optimizer, _ = torch_lars(w, dcdw, fused=True)
    optimizer.found_inf = torch.tensor(float(mesh.get_rank() == 0))
    optimizer.step()
    return gathered(torch.equal(local(w["uneven"]), before))


def faults(mesh):
    """Invalid memory is refused before anything is sent or written."""
    w, dcdw = pair(mesh)
    ones = [distribute(torch.ones(8, 3), mesh, [Shard(0)]) for _ in range(2)]
    local(ones[0]).untyped_storage().resize_(0)
    first = w["uneven"]
    tied = DTensor.from_local(local(first), mesh, [Shard(0)], shape=first.shape, stride=(4, 1))
    for name, x, grad in (("tied", tied, dcdw["uneven"]), ("freed", *ones)):
        tree, grads = {**w, name: x}, {**dcdw, name: grad}
        before = [local(x).clone() for x in w.values()]
        with all_reduces() as counts:
            found = raised(lambda tree=tree, grads=grads: lars_update(tree, grads, 0.1, out=tree))
        same = all(torch.equal(local(x), old) for x, old in zip(w.values(), before, strict=True))
        yield name, {"raised": found, "same": gathered(same), "sent": counts["all_reduce"]}


def measure(world):
    mesh = init_device_mesh("cpu", (world,))
    with mock.patch(
        "lars_tree._backends.torch.multi_tensor.prepare", side_effect=AssertionError("slow")
    ):
        yield from bits(mesh)
        yield "versions", versions(mesh)
        yield from skipped(mesh)
        yield from faults(mesh)
    yield "amp", amp(mesh)
