"""torch DTensor, as in FSDP2 and tensor parallelism: each process updates its own shards.

Norms are computed over whole parameters: each process computes the squared norms of its shards, and
one all-reduce per step and dimension of the device mesh adds them up. No other communication is
needed. This module uses multi-tensor operations; most shards in CPU memory are updated by the
native engine instead (`shards.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree._backends.base import Leaf, Sharding, StepResult
from lars_tree._backends.torch import tensors
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Measured, Norm

# Squares of float64 numbers may overflow or underflow, so they are summed once with each of
# these scales; the sums show which scale to use (Blue 1978, doi:10.1145/355769.355771).
SCALES = (1.0, 2.0**-600, 2.0**600)
SAFE_SUM = (2.0**-900, 2.0**1000)


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


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


def step_shards(given: list[tuple[Leaf, StepResult]]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors to write to, and their new values, for leaves with DTensor weights."""
    with torch.no_grad():
        shards = [_joined(_shard(*pair)) for pair in given]
        return tensors.step_layers(_with_norms(shards), _WholeNorms)


def measure_shards(leaves: list[Leaf]) -> list[Measured]:
    """The norms and ratios of leaves with DTensor weights, the same in all processes."""
    # Norms are reported even for leaves whose rule does not adapt.
    shards = [_shard(leaf, StepResult(leaf.w))._replace(needs_norms=True) for leaf in leaves]
    with torch.no_grad():
        measured = list(tensors.measure_layers(_with_norms(map(_joined, shards)), _WholeNorms))
        if any(formula.is_joint(leaf.rule) for leaf in leaves):
            # The joint norm is not the norm of the gradient, so measure the gradient separately.
            separate = tensors.measure_layers(_with_norms(shards), _WholeNorms)
            pairs = zip(measured, separate, strict=True)
            measured = [joint._replace(g_norm=each.g_norm) for joint, each in pairs]
        found = iter(measured)
        local = [list(islice(found, len(shard.layers))) for shard in shards]
        return [_gathered(*pair) for pair in zip(leaves, local, strict=True)]


def _joined(shard: _Shard) -> _Shard:
    """The shard, with gradients replaced by joint gradients where `joint_norm` applies."""
    return shard._replace(layers=[_total(layer) for layer in shard.layers])


def _total(layer: tensors.Layer) -> tensors.Layer:
    rule = layer.rule
    if not formula.is_joint(rule):
        return layer
    w, dcdw = (x.to(tensors.wide(layer)) for x in (layer.w, layer.dcdw))
    decay = torch.as_tensor(rule.decay_lambda * rule.grad_scale, dtype=w.dtype, device=w.device)
    gradient = -dcdw if rule.maximize else dcdw
    total = formula.multiply_add(tensors.TorchOps(torch), gradient, decay, w)
    return layer._replace(dcdw=total, rule=formula.without_decay(rule))


def _gathered(leaf: Leaf, measured: list[Measured]) -> Measured:
    """The measurements of all layers of a leaf; NaN in processes outside of its device mesh."""
    w, axis = leaf.w, leaf.rule.layer_axis
    if w.device_mesh.get_coordinate() is None:
        shape = () if axis is None else (w.shape[axis],)
        return Measured(*[torch.full(shape, torch.nan, device=w.device)] * 4)
    if axis is None:
        return measured[0]
    tensor = sys.modules["torch.distributed.tensor"]
    empty = [torch.zeros(0, dtype=torch.float64, device=w.device)] * 4
    vectors = tensors.of_leaf(measured, leaf.rule) if measured else Measured(*empty)
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


class _Shard(NamedTuple):
    """The layers of one leaf in this process, and the process groups that share them."""

    layers: list[tensors.Layer]
    groups: list[Any]
    needs_norms: bool


def _shard(leaf: Leaf, new: StepResult) -> _Shard:
    groups = groups_of(leaf.w, leaf.rule.layer_axis)
    return _Shard(layers_here(leaf, new), groups, leaf.rule.adapt and is_in_mesh(leaf.w))


def is_in_mesh(w: Any) -> bool:
    return w.device_mesh.get_coordinate() is not None


def layers_here(leaf: Leaf, new: StepResult) -> list[tensors.Layer]:
    """The layers of a leaf in this process; results are written to the shards of `new`."""
    if not is_in_mesh(leaf.w):
        return []
    options = leaf.rule._asdict().items()
    # An option may be a DTensor with one element.
    numbers = {
        name: whole(torch.as_tensor(x)).reshape(()) for name, x in options if hasattr(x, "shape")
    }
    rule, gradient = leaf.rule._replace(**numbers), _gradient_of(leaf.dcdw, leaf.w)
    shard = leaf._replace(w=shard_of(leaf.w), dcdw=gradient, rule=rule)
    return tensors.layers(shard, StepResult(*map(shard_of, new)))


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


def _with_norms(shards: Iterable[_Shard]) -> Iterator[tuple[tensors.Layer, Tensor | None]]:
    """Each layer with the norms of w and dcdw over all processes; None if they are not needed."""
    shards = list(shards)
    # This includes shards without layers in this process: all processes of a group must call the
    # same all-reduces.
    adapting = [shard for shard in shards if shard.needs_norms]
    given = [layer for shard in adapting for layer in shard.layers]
    squares = _squares(given)
    add_up(squares, [(len(shard.layers), shard.groups) for shard in adapting])
    norms = iter(_roots(squares))
    for shard in shards:
        for layer in shard.layers:
            yield layer, next(norms) if shard.needs_norms else None


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
        if len(indices) == len(rows):
            torch.distributed.all_reduce(rows, group=groups[name])
        elif indices:
            packed = rows[indices]
            torch.distributed.all_reduce(packed, group=groups[name])
            rows[indices] = packed


def _squares(given: list[tensors.Layer]) -> Tensor:
    """A tensor of squared norms; its axes are the layer, the array (w or dcdw), and the scale."""
    device = given[0].w.device if given else None
    table = torch.zeros(len(given), 2, len(SCALES), dtype=torch.float64, device=device)
    ops = tensors.TensorsOps(torch)
    for dtype in {tensors.wide(layer) for layer in given}:
        alike = [i for i, layer in enumerate(given) if tensors.wide(layer) == dtype]
        here = [i for i in alike if given[i].w.numel()]
        for column, name in enumerate(("w", "dcdw") if here else ()):
            xs = tensors.Tensors([getattr(given[i], name).to(dtype) for i in here])
            norm = ops.scaled_norm(xs, None)
            for k, scale in enumerate(SCALES):
                scaled = norm.scaled.double() * (norm.scale.double() * scale)
                table[here, column, k] = scaled * scaled
    return table


def _roots(squares: Tensor) -> Tensor:
    unscaled, of_large, of_small = squares.unbind(-1)
    is_safe = (unscaled > SAFE_SUM[0]) & (unscaled < SAFE_SUM[1])
    large, small = of_large.sqrt() / SCALES[1], of_small.sqrt() / SCALES[2]
    return torch.where(is_safe, unscaled.sqrt(), torch.where(of_large > SAFE_SUM[0], large, small))


class _WholeNorms(tensors.TensorsOps):
    """Operations for layers whose norms of w and dcdw are known."""

    def __init__(self, norms: list[Any]) -> None:
        super().__init__(torch)
        self.known = norms

    def norms(self, w: Any, dcdw: Any, layer_axis: int | None) -> tuple[Norm, Norm]:
        dtype = w.tensors[0].dtype
        one, other = (self._scaled(norm, dtype) for norm in torch.stack(self.known).unbind(1))
        return one, other

    def _scaled(self, norm: Tensor, dtype: torch.dtype) -> Norm:
        # The scale must be finite in the dtype even if the norm is not.
        limits = torch.finfo(dtype)
        scale = self.power_of_two(norm.clamp(max=limits.max / 4))
        scale = torch.where(norm > 0, scale.clamp(min=limits.tiny), scale)
        return Norm((norm / scale).to(dtype), scale.to(dtype))
