"""torch DTensor, as in FSDP2 and tensor parallelism: each process updates its own shards.

Norms are computed over whole parameters: each process computes the squared norms of its shards, and
one all-reduce per step and dimension of the device mesh adds them up. No other communication is
needed. Most shards in CPU memory are updated by the native engine (`shards.py`), all others by the
engines of `multi_tensor.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lars_tree._backends.base import Leaf, Sharding, StepResult
from lars_tree._backends.torch import tensors
from lars_tree._backends.torch.layers import Layer, layers, of_leaf
from lars_tree._backends.torch.transfers import index
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Measured


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor; imports nothing."""
    # The attribute is missing while another thread imports the module.
    return isinstance(x, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def sharding_of(x: Any) -> Sharding | None:
    """The device mesh and placements of a DTensor; None for any other object."""
    return Sharding(x.device_mesh, x.placements) if is_sharded(x) else None


def partial_fault(x: Any) -> str | None:
    """Why LARS cannot compute with a DTensor; None if it can."""
    if any(placement.is_partial() for placement in x.placements):
        return "a DTensor of partial sums: redistribute it first"
    return None


def shard_of(x: Any) -> Tensor:
    """The shard of a DTensor that this process holds; any other object unchanged.

    The result is not tracked by autograd. Like torch's optimizers, this avoids `to_local`, which
    takes longer than the update of a small shard.
    """
    if not is_sharded(x):
        return x
    shard = x._local_tensor
    wait = getattr(shard, "wait", None)  # for a collective that is still running
    return shard if wait is None else wait()


def whole(x: Any) -> Tensor:
    """A DTensor as one full tensor; any other tensor unchanged."""
    return x.full_tensor() if is_sharded(x) else x


def gathered(leaf: Leaf, measured: list[Measured]) -> Measured:
    """The measurements of all layers of a leaf; NaN in processes outside of its device mesh."""
    w, axis = leaf.w, leaf.rule.layer_axis
    if not is_in_mesh(w):
        shape = () if axis is None else (w.shape[axis],)
        return Measured(*[torch.full(shape, torch.nan, device=w.device)] * 4)
    if axis is None:
        return measured[0]
    tensor = sys.modules["torch.distributed.tensor"]
    empty = [torch.zeros(0, dtype=torch.float64, device=w.device)] * 4
    vectors = of_leaf(measured, leaf.rule) if measured else Measured(*empty)
    placements = [
        _along_axis_0(placement)
        if getattr(placement, "dim", None) == axis % w.ndim
        else tensor.Replicate()
        for placement in w.placements
    ]
    shape = torch.Size(w.shape[axis : axis + 1 or None])
    return Measured(
        *(
            tensor.DTensor.from_local(
                x.double(), w.device_mesh, placements, run_check=False, shape=shape, stride=(1,)
            ).full_tensor()
            for x in vectors
        )
    )


def _along_axis_0(placement: Any) -> Any:
    # Strided placements (FSDP combined with tensor parallelism) also have a split factor.
    factor = getattr(placement, "split_factor", None)
    return type(placement)(0) if factor is None else type(placement)(0, split_factor=factor)


def is_in_mesh(w: Any) -> bool:
    """Whether this process is in the device mesh of a DTensor."""
    return w.device_mesh.get_coordinate() is not None


def layers_here(leaf: Leaf, new: StepResult) -> list[Layer]:
    """The layers of a leaf in this process; results are written to the shards of `new`."""
    if not is_in_mesh(leaf.w):
        return []
    options = leaf.rule._asdict().items()
    # An option may be a DTensor with one element.
    numbers = {
        name: whole(torch.as_tensor(x)).reshape(()) for name, x in options if hasattr(x, "shape")
    }
    rule = leaf.rule._replace(**numbers) if numbers else leaf.rule
    gradient = _gradient_of(leaf.dcdw, leaf.w)
    shard = leaf._replace(w=shard_of(leaf.w), dcdw=gradient, rule=rule)
    return layers(shard, StepResult(*map(shard_of, new)))


def groups_of(w: Any, layer_axis: int | None = None) -> list[Any]:
    """The process groups that share layers of w with this process."""
    mesh, axis = w.device_mesh, None if layer_axis is None else layer_axis % w.ndim
    if not is_in_mesh(w):
        return []
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(w.placements)
        # Shards along the layer axis consist of whole layers. `is_shard()` is not used here,
        # because it is False for strided placements.
        if not placement.is_replicate() and placement.dim != axis
    ]


def _gradient_of(dcdw: Any, w: Any) -> Tensor:
    """The shard of a gradient, redistributed to the placements of w."""
    if not is_sharded(dcdw):  # a scalar, the same in all processes
        return dcdw
    dcdw = dcdw.expand(w.shape)
    if dcdw.placements != w.placements:
        dcdw = dcdw.redistribute(w.device_mesh, w.placements)
    return shard_of(dcdw)


def add_up(rows: Tensor, parts: Iterable[tuple[int, list[Any]]]) -> None:
    """Replace rows by their sums over processes, with one all-reduce for each process group.

    `parts` has, for each leaf, its number of rows (the same in all processes) and its groups.
    """
    members: dict[str, list[int]] = {}
    groups: dict[str, Any] = {}
    start = 0
    for count, some in parts:
        for group in some:
            groups[group.group_name] = group
            members.setdefault(group.group_name, []).extend(range(start, start + count))
        start += count
    for name, indices in members.items():
        if not indices:
            continue
        if len(indices) == len(rows):
            torch.distributed.all_reduce(rows, group=groups[name])
        else:
            at = index(indices, rows.device)
            packed = rows[at]
            torch.distributed.all_reduce(packed, group=groups[name])
            rows[at] = packed


def complete(norms: Tensor, order: list[int], parts: list[tuple[int, list[Any]]]) -> None:
    """Replace norms of shards, in a table of `layers.py`, by norms of whole layers.

    `order` has the rows to replace in leaf order, which is the same in all processes. `parts` has,
    for each leaf, its number of rows and its process groups.
    """
    rows = None if order == list(range(len(norms))) else index(order, norms.device)
    given = norms if rows is None else norms[rows]
    squares = torch.stack(
        [given[..., 0] * (given[..., 1] * scale) for scale in formula.SCALES], -1
    ).square()
    add_up(squares, parts)
    found = formula.norm_of_sums(tensors.TorchOps(torch), *squares.unbind(-1))
    if rows is None:
        norms.copy_(torch.stack(found, -1))
    else:
        norms[rows] = torch.stack(found, -1)
