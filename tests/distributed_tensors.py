"""DTensor in `lars_update` and `Lars`, compared with dense tensors. See test_distributed."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from conftest import unit_lars as Lars
from distributed_worker import (
    all_reduces,
    communication,
    compare,
    distribute,
    error,
    gathered,
    local,
    raised,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lars_tree import lars_update

R, S0, S1 = Replicate(), Shard(0), Shard(1)


class LeafCase(NamedTuple):
    """One array of a tree: its shape, placements and options."""

    shape: tuple[int, ...]
    placements: list[Any] | None
    gradient: Any = "as w"  # or a list of placements, a number or None
    adapt: bool = True
    layer_axis: int | None = None


MIXED = {
    "rows": LeafCase((7, 3), [S0]),
    "columns": LeafCase((4, 9), [S1]),
    "of_one_process": LeafCase((1, 5), [S0]),
    "of_none": LeafCase((0, 3), [S0]),
    "everywhere": LeafCase((5,), [R]),
    "number": LeafCase((), [R]),
    "plain": LeafCase((6, 2), None),
    "sgd": LeafCase((5, 2), [S0], adapt=False),
    "frozen": LeafCase((4, 2), [S0], gradient=None),
    "constant": LeafCase((3, 4), [S1], gradient=0.5),
    "layers": LeafCase((6, 5), [S0], layer_axis=0),
    "layers_of_one_process": LeafCase((1, 6), [S0], layer_axis=0),
    "layers_across": LeafCase((5, 6), [S0], layer_axis=-1),
    "stack": LeafCase((3, 5, 2), [S1], layer_axis=0),
}
LAYERS_ALONE = {name: MIXED[name] for name in ("layers", "layers_of_one_process")}
REPLICATED = {name: MIXED[name] for name in ("everywhere", "number", "plain")}
TURNED = {
    "rows_by_columns": LeafCase((7, 3), [S0], gradient=[S1]),
    "rows_everywhere": LeafCase((7, 3), [S0], gradient=[R]),
    "everywhere_by_rows": LeafCase((5,), [R], gradient=[S0]),
    "columns_by_rows": LeafCase((4, 9), [S1], gradient=[S0], layer_axis=0),
}
HYBRID = {
    "rows": LeafCase((7, 3), [R, S0]),
    "columns": LeafCase((4, 9), [R, S1]),
    "of_one_process": LeafCase((1, 5), [R, S0]),
    "layers": LeafCase((6, 5), [R, S0], layer_axis=0),
    "everywhere": LeafCase((5,), [R, R]),
}
CROSSED = {
    # Only two processes hold elements of this first leaf. All processes must nevertheless reduce
    # the leaves below in the same order.
    "layers_of_two_processes": LeafCase((1, 4), [S0, S1], layer_axis=0),
    "rows_twice": LeafCase((7, 3), [S0, S0]),
    "rows_and_columns": LeafCase((5, 3), [S0, S1]),
    "columns_and_rows": LeafCase((3, 5), [S1, S0]),
    "rows_everywhere": LeafCase((6, 2), [S0, R]),
    "of_one_process": LeafCase((1, 1), [S0, S1]),
    "layers": LeafCase((4, 5), [S0, S1], layer_axis=1),
    "plain": LeafCase((6, 2), None),
    "turned": LeafCase((6, 4), [S0, S1], gradient=[S1, S0]),
}

# For each kind: the dtype and the scales of weights and gradients. Scales other than 1 have squares
# out of range.
KINDS = {
    "float32": (torch.float32, 1.0, 1.0),
    "bfloat16": (torch.bfloat16, 1.0, 1.0),
    "float64": (torch.float64, 1.0, 1.0),
    "complex128": (torch.complex128, 1.0, 1.0),
    "large": (torch.float64, 1e200, 1e200),
    "small": (torch.float64, 1e-200, 1e-200),
    "large by small": (torch.float64, 1e200, 1e-200),
    "small by large": (torch.float64, 1e-200, 1e200),
}
WAYS = ("new", "in place", "other out", "momentum", "momentum in place")


def random(name, leaf, dtype, factor, what):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {what}".encode()))
    return (torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * factor).to(dtype)


def trees(leaves, kind, mesh, numbers=True):
    """Weights and gradients, sharded over the mesh and then as dense tensors.

    With numbers=False no gradient is a number, because `Lars` requires the shapes of the weights.
    """
    dtype, of_w, of_dcdw = KINDS[kind]
    found = {}, {}, {}, {}
    for name, leaf in leaves.items():
        w = random(name, leaf, dtype, of_w, "w")
        dcdw: Any = random(name, leaf, dtype, of_dcdw, "dcdw")
        given = leaf.gradient
        if isinstance(given, float) and not numbers:
            given = "as w"
        spread = leaf.placements if given == "as w" else given
        if spread is None or isinstance(spread, float):
            is_plain = given == "as w"
            dcdw = dcdw if is_plain else spread and spread * of_dcdw
            parts = dcdw
        else:
            parts = distribute(dcdw, mesh, spread)
        row = distribute(w, mesh, leaf.placements), parts, w, dcdw
        for tree, x in zip(found, row, strict=True):
            tree[name] = x
    return found


def stepped(way, w, dcdw, options):
    """The weights, the velocities if any, and the number of steps taken."""
    if way == "new":
        return lars_update(w, dcdw, 0.1, **options), {}, 1
    if not way.startswith("momentum"):
        out = w if way == "in place" else {name: torch.zeros_like(x) for name, x in w.items()}
        assert lars_update(w, dcdw, 0.1, out=out, **options) is out
        return out, {}, 1
    optimizer = Lars(0.1, momentum=0.5, nesterov=way == "momentum", **options)
    state = optimizer.init(w)
    for _ in range(2):
        out = w if way == "momentum in place" else None
        w, state = optimizer.update(w, dcdw, state, out=out)
    assert int(state.step) == 2
    return w, state.velocity, 2


def case(leaves, kind, mesh, way, options):
    """The error of one case, its collectives per step, and whether the placements are right."""
    w, dcdw, plain_w, plain_dcdw = trees(leaves, kind, mesh, "momentum" not in way)
    options = {
        "decay_lambda": 0.0 if "by" in kind else 0.01,
        "adapt": {name: leaf.adapt for name, leaf in leaves.items()},
        "layer_axis": {name: leaf.layer_axis for name, leaf in leaves.items()},
        **options,
    }
    like = {name: x.detach() for name, x in w.items()}
    with communication() if kind == "float64" else all_reduces() as counts:
        new, moving, steps = stepped(way, w, dcdw, options)
    expected, velocities, _ = stepped(way, plain_w, plain_dcdw, options)
    names = [*new, *moving]
    found = compare(
        [*new.values(), *moving.values()],
        [*expected.values(), *velocities.values()],
        [like[name] for name in names],
    )
    return {**found, "sent": {name: count / steps for name, count in counts.items()}}


def nonfinite(mesh):
    """Only the last process has a NaN gradient; with adapt=False, only it has a NaN result."""
    leaves = {name: MIXED[name] for name in ("rows", "everywhere", "plain")}
    leaves |= {"columns": LeafCase((4, 8), [S1]), "sgd": LeafCase((8, 2), [S0], adapt=False)}
    options = {"adapt": {name: leaf.adapt for name, leaf in leaves.items()}}
    for name in ("rows", "columns", "sgd"):
        w, dcdw, *_ = trees(leaves, "float64", mesh)
        if dist.get_rank() == dist.get_world_size() - 1:
            local(dcdw[name])[0, 0] = torch.nan
        before = [local(x).clone() for x in w.values()]

        def same(tree, before=before):
            pairs = zip(tree.values(), before, strict=True)
            return all(torch.equal(local(x), old) for x, old in pairs)

        optimizer = Lars(0.1, nonfinite="skip", **options)
        moved, state = optimizer.update(w, dcdw, optimizer.init(w))
        kept = [same(lars_update(w, dcdw, 0.1, nonfinite="skip", **options)), same(moved)]
        counts = [int(state.step), int(state.skipped)]
        yield f"skip, {name}", {"same": gathered(kept), "counts": gathered(counts)}
        given = {"nonfinite": "raise", "out": w, **options}
        refused = raised(lambda w=w, g=dcdw, given=given: lars_update(w, g, 0.1, **given))
        yield f"raise, {name}", {"same": gathered(same(w)), "raised": refused}


def faults(mesh):
    """One leaf is refused; nothing is written, not even the valid leaf `columns`."""
    leaves = {name: MIXED[name] for name in ("columns", "rows")}
    w, dcdw, whole_w, whole_dcdw = trees(leaves, "float64", mesh)
    rows = whole_w["rows"]
    optimizer = Lars(0.1)

    def update(out=None, **others):
        return lambda: lars_update({"a": {**w, **others}}, {"a": dcdw}, 0.1, out=out)

    def update_by(x):
        return lambda: lars_update({"a": w}, {"a": {**dcdw, "rows": x}}, 0.1)

    def move(velocity):
        state = optimizer.init({"a": w})
        state.velocity.a.rows = velocity
        return lambda: optimizer.update({"a": w}, {"a": dcdw}, state, out={"a": w})

    partial = DTensor.from_local(rows, mesh, [Partial()])
    yield "partial w", {"raised": raised(update(rows=partial))}
    yield "partial dcdw", {"raised": raised(update_by(partial))}
    yield "partial state", {"raised": raised(move(partial))}
    yield "plain dcdw", {"raised": raised(update_by(whole_dcdw["rows"]))}
    yield "turned state", {"raised": raised(move(distribute(rows, mesh, [S1])))}
    yield from rates(w, whole_w, dcdw, whole_dcdw, mesh)
    yield "w after faults", {"same": gathered(all(_same(x, whole_w[k]) for k, x in w.items()))}
    for name, x in {
        "partial": partial,
        "plain": rows.clone(),
        "turned": distribute(rows, mesh, [S1]),
        "replicated": distribute(rows, mesh, [R]),
    }.items():
        out = {"columns": distribute(whole_w["columns"], mesh, [S1]), "rows": x}
        refused = raised(update(out={"a": out}))
        same = all(_same(x, whole_w[key]) for key, x in out.items() if x is not partial)
        yield f"{name} out", {"raised": refused, "same": gathered(same)}


def rates(w, whole_w, dcdw, whole_dcdw, mesh):
    """Rates that are arrays, and sharded arguments for dense weights."""
    one = torch.tensor(0.1, dtype=torch.float64)
    given = {"of no axes": distribute(one, mesh, [R]), "of one axis": one.reshape(1)}
    expected = lars_update(whole_w, whole_dcdw, 0.1)
    for name, lr in {**given, "in each process": one.clone()}.items():
        new = lars_update(w, dcdw, lr)
        close = [torch.allclose(local(x), _local_like(expected[key], x)) for key, x in new.items()]
        yield f"lr {name}", {"same": gathered(all(close))}

    def update(out=None, lr=0.1, g=whole_dcdw["rows"]):
        plain = {"columns": whole_w["columns"], "plain": whole_w["rows"]}
        grads = {"columns": whole_dcdw["columns"], "plain": g}
        return lambda: lars_update({"a": plain}, {"a": grads}, lr, out=out)

    each = {"a": {"columns": 0.1, "rows": torch.full((7, 1), 0.1)}}
    refused = raised(lambda: lars_update({"a": w}, {"a": dcdw}, each))
    yield "lr for each row", {"raised": refused}
    yield "dcdw for plain w", {"raised": raised(update(g=dcdw["rows"]))}
    each = torch.arange(7.0).reshape(7, 1)
    ways = [{"a": {"columns": 0.1, "plain": lr}} for lr in (distribute(each, mesh, [S0]), each)]
    one, other = (update(lr=lr)()["a"]["plain"] for lr in ways)
    yield "lr for plain w", {"same": gathered(torch.equal(one, other))}
    columns = whole_w["columns"].clone()
    out = {"a": {"columns": columns, "plain": distribute(whole_w["rows"], mesh, [S0])}}
    refused = raised(update(out=out))
    same = torch.equal(columns, whole_w["columns"])
    yield "out for plain w", {"raised": refused, "same": gathered(same)}


def _local_like(whole, like):
    return local(distribute(whole, like.device_mesh, like.placements))


def _same(x, whole):
    if isinstance(x, DTensor):
        whole = distribute(whole, x.device_mesh, x.placements)
    return torch.equal(local(x), local(whole))


def of_some_processes(world):
    """The errors, and the sizes of local tensors, for a mesh of half of the processes."""
    mesh = DeviceMesh("cpu", list(range(world // 2)))
    leaves = {name: MIXED[name] for name in ("rows", "columns", "layers_across")}
    w, dcdw, *plain = trees(leaves, "float64", mesh)
    options = {"layer_axis": {name: leaf.layer_axis for name, leaf in leaves.items()}}
    new, expected = (lars_update(*pair, 0.1, **options) for pair in ((w, dcdw), plain))
    parts = {name: distribute(x, mesh, leaves[name].placements) for name, x in expected.items()}
    errors = [error(local(x), local(parts[name])) for name, x in new.items()]
    sizes = [local(x).numel() for x in new.values()]
    return {"errors": gathered(errors), "sizes": gathered(sizes)}


def cases(world):
    """Trees, each with a mesh, the number of all-reduces in a step, kinds and ways."""
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2))
    yield "mixed", MIXED, line, 1, KINDS, WAYS
    for name, tree in (("layers alone", LAYERS_ALONE), ("replicated", REPLICATED)):
        yield name, tree, line, 0, ("float64",), WAYS[-1:]
    yield "turned", TURNED, line, 1, KINDS, WAYS[-2:]
    yield "hybrid", HYBRID, grid, 1, KINDS, WAYS[-2:]
    yield "crossed", CROSSED, grid, 2, KINDS, WAYS[-2:]


def measure(world):
    for name, leaves, mesh, count, kinds, ways in cases(world):
        for i, kind in enumerate(kinds):
            for j, way in enumerate(ways):
                clips = (i + j) % 2 == 1 and "by" not in kind
                options = (
                    {"trust_clip": True, "grad_scale": 4.0, "joint_norm": True} if clips else {}
                )
                found = case(leaves, kind, mesh, way, options)
                moves = any(isinstance(leaf.gradient, list) for leaf in leaves.values())
                facts = {"kind": kind, "all_reduces": count, "redistributes": moves}
                yield f"{name}, {kind}, {way}, {options}", {**facts, **found}
    line = init_device_mesh("cpu", (world,))
    yield from nonfinite(line)
    yield from faults(line)
    yield "some processes", of_some_processes(world)
