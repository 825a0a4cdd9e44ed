"""Steps under `torch.compile`: operations that the compiler traces and fuses, leaf by leaf.

Each process traces the operations on its own shards of DTensors. As in `sharded.py`, one all-reduce
for each process group adds up the squared norms of all shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree._backends.base import Leaf
from lars_tree._backends.torch import sharded
from lars_tree._backends.torch.backend import BACKEND
from lars_tree._backends.torch.layers import as_real
from lars_tree._backends.torch.tensors import TorchOps
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Norm, Rule


def supports(leaf: Leaf) -> bool:
    """Whether the parameter, gradient and buffer fit, and are sharded alike, or dense.

    A gradient with other placements is redistributed. Shared memory is not found.
    """
    w, dcdw, velocity, axis = leaf.w, leaf.dcdw, leaf.velocity, leaf.rule.layer_axis
    if dcdw.shape != w.shape or not (axis is None or -w.ndim <= axis < w.ndim):
        return False
    if velocity is not None:
        if not isinstance(velocity, Tensor) or velocity.shape != w.shape:
            return False
        if (velocity.dtype, velocity.device) != (BACKEND.velocity_dtype(w), w.device):
            return False
    if not sharded.is_sharded(w):
        return not (sharded.is_sharded(dcdw) or sharded.is_sharded(velocity))
    given = [w, dcdw] if velocity is None else [w, dcdw, velocity]
    if not all(sharded.is_sharded(x) and x.device_mesh == w.device_mesh for x in given):
        return False
    moves_alike = velocity is None or velocity.placements == w.placements
    return moves_alike and not any(sharded.partial_fault(x) for x in given)


def step_in_place(leaves: list[Leaf], unless: Tensor | None = None) -> None:
    """Write the new values to the tensors of the leaves; of a DTensor, this process's shard.

    `unless` is a number on a device; if it is not 0, nothing changes.
    """
    given = [_layers(leaf) for leaf in leaves if _is_here(leaf.w)]
    outs: list[Tensor] = []
    values: list[Tensor] = []
    for layers, ops in zip(given, _operations(given), strict=True):
        if layers.w.numel():
            w, dcdw, velocity = layers.w, layers.dcdw, layers.velocity
            new = formula.step(ops, w, dcdw, layers.rule, velocity, layers.is_in_range)
            outs += [out for out in layers.outs if out is not None]
            values += [x for x in new if x is not None]
    if unless is not None:
        kept = [unless.to(x.device, non_blocking=True) != 0 for x in outs]
        pairs = zip(kept, outs, values, strict=True)
        values = [torch.where(keep, old, new.to(old.dtype)) for keep, old, new in pairs]
    # On CUDA, inductor fuses `torch._foreach_copy_` with reads of the old values, which is wrong.
    for out, value in zip(outs, values, strict=True):
        out.copy_(value)


class _Layers(NamedTuple):
    """The layers of one leaf in this process, in the precision of the step.

    Attributes:
        outs: The parameter and the buffer to write to, in their own precision.
        groups: The process groups that share the layers; None if the leaf is not sharded.
        is_in_range: Whether the step needs no scaling: see `formula.step`.
    """

    w: Tensor
    dcdw: Tensor
    velocity: Tensor | None
    rule: Rule
    outs: tuple[Tensor, Tensor | None]
    groups: list[Any] | None
    is_in_range: bool

    @property
    def layer_count(self) -> int:
        axis = self.rule.layer_axis
        return 1 if axis is None else self.w.shape[axis]


def _is_here(w: Tensor) -> bool:
    return not sharded.is_sharded(w) or sharded.is_in_mesh(w)


def _layers(leaf: Leaf) -> _Layers:
    w, dcdw, axis = leaf.w, leaf.dcdw, leaf.rule.layer_axis
    groups = None
    if sharded.is_sharded(w):
        groups = sharded.groups_of(w, axis)
        if dcdw.placements != w.placements:
            dcdw = dcdw.redistribute(w.device_mesh, w.placements)
    rule = leaf.rule._replace(layer_axis=None if axis is None else axis % w.ndim)
    outs = _local(w), None if leaf.velocity is None else _local(leaf.velocity)
    wide, wide_dcdw, velocity = (
        None if x is None else BACKEND.widen(x, w) for x in (outs[0], _local(dcdw), outs[1])
    )
    is_short = BACKEND.bits(wide) >= 64 and BACKEND.is_short(outs[0], leaf.dcdw, rule)
    numbers = {name: getattr(rule, name) for name in formula.ALL_NUMBERS}
    rule = rule._replace(
        **{name: _widened(x, wide) for name, x in numbers.items() if isinstance(x, Tensor)}
    )
    if groups is not None:
        wide_dcdw, rule = formula.joint(_WholeNorms(None), wide, wide_dcdw, rule)
    is_in_range = is_short and groups is None  # the norms of `_WholeNorms` are scaled
    return _Layers(wide, wide_dcdw, velocity, rule, outs, groups, is_in_range)


def _local(x: Tensor) -> Tensor:
    x = x.detach()
    return as_real(x.to_local() if sharded.is_sharded(x) else x)


def _widened(number: Tensor, like: Tensor) -> Tensor:
    """An option, which may be a DTensor with one element, in the precision of the step."""
    return sharded.whole(number).detach().reshape(()).to(like.device, like.dtype)


def _operations(given: list[_Layers]) -> Iterator[TorchOps]:
    """The operations for each leaf, with the norms of whole layers for shards."""
    adapting = [layers for layers in given if layers.groups is not None and layers.rule.adapt]
    tables: Iterator[Tensor] = iter(())
    if adapting:
        sums = torch.cat([_squares(layers) for layers in adapting])
        counts = [layers.layer_count for layers in adapting]
        groups = [layers.groups or [] for layers in adapting]
        sharded.add_up(sums, zip(counts, groups, strict=True))
        tables = iter(sums.split(counts))
    for layers in given:
        if layers.groups is None or not layers.rule.adapt:
            yield TorchOps(torch)
        else:
            yield _WholeNorms(next(tables))


def _squares(layers: _Layers) -> Tensor:
    """The squared norms here; the axes are the layer, the array (w or dcdw), and the scale."""
    axes = tuple(axis for axis in range(layers.w.ndim) if axis != layers.rule.layer_axis)
    arrays = layers.w.double(), layers.dcdw.double()
    sums = [[(x * scale).square() for scale in formula.SCALES] for x in arrays]
    ops = TorchOps(torch)
    rows = [torch.stack([ops.sum(x, axes).reshape(-1) for x in xs], -1) for xs in sums]
    return torch.stack(rows, 1)


class _WholeNorms(TorchOps):
    """Operations on shards of layers; `sums` has the squared norms of the whole layers."""

    def __init__(self, sums: Tensor | None) -> None:
        super().__init__(torch)
        self.sums = sums

    def norms(self, w: Tensor, dcdw: Tensor, layer_axis: int | None) -> tuple[Norm, Norm]:
        assert self.sums is not None
        shape = [1] * w.ndim
        if layer_axis is not None:
            shape[layer_axis] = -1
        one, other = (
            formula.norm_of_sums(self, *(x.reshape(shape) for x in sums.unbind(1)))
            for sums in self.sums.unbind(1)
        )
        return _in(one, w.dtype), _in(other, w.dtype)

    def largest(self, x: Tensor, layer_axis: int | None) -> Tensor:
        """1, so that all processes scale their shards of the joint gradient in the same way."""
        return self.one(x)


def _in(norm: Norm, dtype: torch.dtype) -> Norm:
    # The scale must be finite in the dtype even if the norm is not, and must not be 0.
    limits = torch.finfo(dtype)
    scale = norm.scale.clamp(limits.tiny, 1 / limits.tiny)
    return Norm((norm.scaled * (norm.scale / scale)).to(dtype), scale.to(dtype))
