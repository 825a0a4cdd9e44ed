"""The functions of Dask's tasks: they compute the phases of a step for one chunk of a leaf.

`dask.py` builds the graph of these tasks. The norms of a layer are combined from those of its
chunks. The functions use numpy's protocols, so a chunk may also be an array of another library that
supports these protocols, such as CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from dask.core import flatten

from lars_tree._backends.arrays import NamespaceOps
from lars_tree._numerics import formula
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._numerics.formula import Measured, Norm, Rule

Chunk = Any

# A sum of squares in this range is not scaled: no square overflowed, and underflow did not change
# the sum. The norm is near enough to 1 for `formula.scaled_coefficients`.
_MODERATE = (2.0**-64, 2.0**64)


class Ops(NamespaceOps):
    """The functions of numpy or dask.array."""

    def is_complex(self, x: Any) -> bool:
        return bool(x.dtype.kind == "c")


class _ChunkOps(Ops):
    """Operations on a chunk; the norms and largest magnitudes of whole layers are given.

    Args:
        largest: The largest magnitudes of w and of dcdw.
        norms: The results of `norms`, in the order of the calls.
    """

    def __init__(self, largest: Any = (), *norms: Iterable[Norm]) -> None:
        super().__init__(np)
        self._largest, self._norms = iter(largest), iter(norms)

    def norms(self, w: Chunk, dcdw: Chunk, layer_axis: int | None) -> tuple[Norm, Norm]:
        w_norm, dcdw_norm = next(self._norms)
        return w_norm, dcdw_norm

    def unscaled_norms(self, w: Chunk, dcdw: Chunk, layer_axis: int | None) -> tuple[Chunk, Chunk]:
        w_norm, dcdw_norm = self.norms(w, dcdw, layer_axis)
        return w_norm.scaled, dcdw_norm.scaled

    def largest(self, x: Chunk, layer_axis: int | None) -> Chunk:
        return next(self._largest)

    def where(self, condition: Chunk, a: Any, b: Any) -> Chunk:
        return np.where(condition, a, b)

    def maximum(self, a: Any, b: Any) -> Chunk:
        return np.where(a > b, a, b)

    def like(self, number: Any, x: Chunk) -> Any:
        return x.real.dtype.type(number) if isinstance(number, (int, float)) else number

    def one(self, x: Chunk) -> Any:
        return x.dtype.type(1)


def widen(x: Chunk) -> Chunk:
    """Convert a chunk or a lazy array to the dtype in which the step is computed."""
    dtype = np.result_type(np.complex128 if x.dtype.kind == "c" else np.float64, x.dtype)
    return x if x.dtype == dtype else x.astype(dtype)


def _widened(
    rule: Rule, w: Chunk, dcdw: Chunk, numbers: dict[str, Chunk]
) -> tuple[Chunk, Chunk, Rule]:
    """The arguments in the dtype in which the step is computed; dcdw gets the shape of w."""
    rule = rule._replace(**{name: widen(x) for name, x in numbers.items()})
    return widen(w), np.broadcast_to(widen(dcdw), w.shape), rule


def largest(rule: Rule, w: Chunk, dcdw: Chunk, **numbers: Chunk) -> Chunk:
    """The largest magnitudes of w and of dcdw in a chunk."""
    w, dcdw, _ = _widened(rule, w, dcdw, numbers)
    return np.stack([_largest(x, rule.layer_axis) for x in (w, dcdw)])


def _largest(x: Chunk, layer_axis: int | None) -> Chunk:
    ops = Ops(np)
    # An empty chunk has no maximum; its sum is 0.
    return ops.largest(x, layer_axis) if x.size else ops.norm(x, layer_axis)


def largest_of(chunks: Any, axis: Any, keepdims: bool) -> Chunk:
    return np.max(np.stack(list(flatten([chunks]))), axis=0)


@without_warnings
def squares(
    rule: Rule, in_range: bool, w: Chunk, dcdw: Chunk, largest: Any = (), **numbers: Chunk
) -> Chunk:
    """The sums of squares of w and of the gradient in a chunk: for both, the sum and its scale."""
    w, dcdw, rule = _widened(rule, w, dcdw, numbers)
    dcdw, _ = formula.joint(_ChunkOps(largest), w, dcdw, rule, in_range)
    return np.stack([_scaled_squares(x, rule.layer_axis, in_range) for x in (w, dcdw)], 1)


def _scaled_squares(x: Chunk, layer_axis: int | None, in_range: bool) -> Chunk:
    """The sum of squares of x / scale, and the scale, a power of two: 1 if x is in range."""
    ops = Ops(np)
    total = ops.squares(x, layer_axis)
    if in_range or ((total > _MODERATE[0]) & (total < _MODERATE[1])).all():
        return np.stack([total, np.ones_like(total)])
    scale = ops.power_of_two(_largest(x, layer_axis))
    return np.stack([ops.squares(x / scale, layer_axis), scale])


@without_warnings
def squares_of(chunks: Any, axis: Any, keepdims: bool) -> Chunk:
    """Add up results of `squares`."""
    totals, scales = np.stack(list(flatten([chunks])), 1)
    scales = np.where(totals == 0, 0, scales)
    scale = np.max(scales, axis=0)
    scale = np.where(scale == 0, 1, scale)
    factors = scales / scale  # not squared, as 0 times an infinite sum would be NaN
    return np.stack([np.sum(totals * factors * factors, axis=0), scale])


def norms_of(chunks: Any, axis: Any, keepdims: bool) -> tuple[Norm, Norm]:
    """The norms of w and of the gradient from results of `squares`."""
    totals, scales = squares_of(chunks, axis, keepdims)
    w_norm, dcdw_norm = map(Norm, np.sqrt(totals), scales)
    return w_norm, dcdw_norm


def same(chunk: Chunk, axis: Any, keepdims: bool) -> Chunk:
    return chunk


@without_warnings
def step(
    rule: Rule,
    in_range: bool,
    w: Chunk,
    dcdw: Chunk,
    norms: Any = None,
    largest: Any = (),
    velocity: Chunk | None = None,
    **numbers: Chunk,
) -> Any:
    """The new weights of a chunk, or a tuple of the new weights and the new velocity."""
    wide = _widened(rule, w, dcdw, numbers)
    moving = None if velocity is None else widen(velocity)
    new_w, new_velocity = formula.step(_ChunkOps(largest, norms), *wide, moving, in_range)
    new_w = new_w.astype(w.dtype)
    return new_w if velocity is None else (new_w, new_velocity.astype(velocity.dtype))


@without_warnings
def measure(
    rule: Rule,
    in_range: bool,
    norms: tuple[Norm, Norm],
    largest: Any = (),
    joint_norms: Any = None,
    **numbers: Chunk,
) -> Measured:
    """The norms and ratios of a layer, or vectors of them, without the other axes."""
    shape = () if rule.layer_axis is None else (-1,)
    one = norms[0].scaled.dtype.type(1)  # stands for w and dcdw, of which only the norms are used
    rule = _widened(rule, one, one, numbers)[2]
    pairs = [[_reshaped(norm, shape) for norm in pair] for pair in (norms, joint_norms) if pair]
    ops = _ChunkOps((x.reshape(shape) for x in largest), *pairs)
    return formula.measure(ops, one, one, rule, in_range)


def _reshaped(norm: Norm, shape: tuple[int, ...]) -> Norm:
    return Norm(*(x.reshape(shape) for x in norm))


def item(index: int, items: tuple[Chunk, ...]) -> Chunk:
    return items[index]


def all_of(**flags: Any) -> Any:
    return np.all(np.stack(list(flags.values())))


def call(function: Callable[..., Any], names: tuple[str, ...], *chunks: Any) -> Any:
    """Call a function with chunks as keyword arguments; Dask passes chunks by position."""
    return function(**dict(zip(names, chunks, strict=True)))
