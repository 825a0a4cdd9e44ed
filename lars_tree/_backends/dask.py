"""Dask arrays: the update stays lazy and keeps the chunks of the weights.

An update has one task per chunk and phase. The first phase adds up the squares in each chunk of w
and dcdw, and one tree reduction combines the sums of both. The last phase computes the step of each
chunk, given the norms of the whole layer. With `joint_norm`, the largest elements are found first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import dask
import dask.array as da
import numpy as np
from dask.utils import funcname

from lars_tree._backends import dask_chunks as chunks
from lars_tree._backends.arrays import ArraysBackend
from lars_tree._backends.base import Facts, StepResult, Values, kind_of_numpy
from lars_tree._backends.memory import NumpyArray
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Measured, Rule

_MAX_AXES = 32  # Dask cannot rechunk arrays with more axes
_FAN_IN = 16  # chunks that one task of a tree reduction combines


class DaskBackend(ArraysBackend):
    """Lazy arrays; an update does not compute them."""

    name = "dask"
    ops = chunks.Ops(da)

    def facts(self, x: da.Array) -> Facts:
        return Facts(x.shape, kind_of_numpy(x.dtype), x.dtype, None)

    def values(self, x: da.Array) -> Values:
        return Values.TRACED

    def fetch(self, xs: list[da.Array]) -> list[NumpyArray]:
        return [np.asarray(x) for x in dask.compute(*xs)]

    def full(self, number: complex, like: da.Array) -> da.Array:
        is_complex = isinstance(number, complex) or like.dtype.kind == "c"
        return da.asarray(np.asarray(number, np.complex128 if is_complex else np.float64))

    def copy(self, x: da.Array, stop_gradients: bool) -> da.Array:
        return x.copy()

    def zeros(self, w: da.Array, dtype: Any) -> da.Array:
        return da.zeros(w.shape, dtype=dtype, chunks=w.chunks)

    def counter(self, w: da.Array) -> da.Array:
        return da.zeros((), dtype=np.int64)

    def fault(self, x: da.Array) -> str | None:
        if any(math.isnan(length) for length in x.shape):
            return "a dask array of unknown shape: call its compute_chunk_sizes() first"
        if x.ndim > _MAX_AXES:
            return f"a dask array of {x.ndim} axes, where Dask computes with {_MAX_AXES} at most"
        return None

    def out_fault(self, x: da.Array) -> str | None:
        return "a dask array, which is immutable: leave out `out` and use the returned value"

    def widen(self, x: Any, w: da.Array) -> da.Array:
        return chunks.widen(da.asarray(x))

    def step(
        self, w: da.Array, dcdw: da.Array, rule: Rule, velocity: da.Array | None = None
    ) -> StepResult:
        """The new weights in the dtype of w, and the new velocity in the dtype of `velocity`."""
        if 0 in w.shape:
            return StepResult(self.copy(w, rule.stop_gradients), velocity)
        leaf = _Leaf(w, dcdw, rule)
        in_range = self.is_short(w, dcdw, rule)
        given = leaf.norms(leaf.rule, in_range) if rule.adapt else {}
        if velocity is not None:
            leaf.arrays["velocity"] = leaf.aligned(velocity)
        both = leaf.map(partial(chunks.step, leaf.rule, in_range), **given)
        if velocity is None:
            return StepResult(both)
        return StepResult(_item(both, 0, w), _item(both, 1, velocity))

    def measure_leaf(self, w: da.Array, dcdw: da.Array, rule: Rule) -> Measured:
        """The norms and ratios of the step of one leaf."""
        if 0 in w.shape:
            return super().measure_leaf(w, dcdw, rule)
        leaf = _Leaf(w, dcdw, rule)
        in_range = self.is_short(w, dcdw, rule)
        given = leaf.norms(leaf.rule._replace(joint_norm=False), in_range)
        if formula.is_joint(leaf.rule):
            joint = leaf.norms(leaf.rule, in_range)
            given = {**joint, "norms": given["norms"], "joint_norms": joint["norms"]}
        return leaf.measured(given, in_range)

    def all_finite(self, xs: list[da.Array]) -> da.Array:
        flags = {str(i): (da.isfinite(x).all(), ()) for i, x in enumerate(xs)}
        return _map(chunks.all_of, (), flags, np.empty((), bool))

    def choose(self, flag: Any, a: da.Array, b: da.Array) -> da.Array:
        # `da.where` would unify the chunks of all operands.
        return super().choose(flag, a, b.rechunk(a.chunks))


Arrays = dict[str, da.Array]


class _Leaf:
    """The arrays of a leaf, with the chunks of w.

    Attributes:
        rule: The rule, with None for the numbers that are arrays.
        numbers: These numbers by name.
        arrays: All arrays by name.
        axes: The axes of w.
        layer: The layer axis, if there is one.
    """

    def __init__(self, w: da.Array, dcdw: da.Array, rule: Rule) -> None:
        self.w, self.axes = w, tuple(range(w.ndim))
        self.layer = () if rule.layer_axis is None else (rule.layer_axis % w.ndim,)
        given = {name: getattr(rule, name) for name in formula.ALL_NUMBERS}
        given = {name: da.asarray(x) for name, x in given.items() if not isinstance(x, float)}
        self.rule: Rule = rule._replace(**cast(Any, dict.fromkeys(given)))
        self.numbers: Arrays = {name: self.aligned(x) for name, x in given.items()}
        self.arrays: Arrays = {"w": w, "dcdw": self.aligned(dcdw), **self.numbers}

    def aligned(self, x: da.Array) -> da.Array:
        """Give x the chunks of w, except along axes along which it is broadcast."""
        pairs = zip(x.chunks, self.w.chunks[self.w.ndim - x.ndim :], strict=True)
        wanted = tuple(own if own == (1,) else of_w for own, of_w in pairs)
        return x if x.chunks == wanted else x.rechunk(wanted)

    def norms(self, rule: Rule, in_range: bool) -> Arrays:
        """What a step needs to know of its layers: norms, and largest magnitudes for `joint`."""
        given: Arrays = {}
        if formula.is_joint(rule) and not in_range:
            found = self.map(partial(chunks.largest, rule))
            given["largest"] = self._combined(found, chunks.largest_of, chunks.largest_of)
        squares = self.map(partial(chunks.squares, rule, in_range), **given)
        return {**given, "norms": self._combined(squares, chunks.squares_of, chunks.norms_of)}

    def map(self, function: partial[Any], **given: da.Array) -> da.Array:
        """Call a function for each chunk, with what is given for its layers."""
        layers = {name: (x, self.layer) for name, x in given.items()}
        arrays = {name: (x, self.axes[self.w.ndim - x.ndim :]) for name, x in self.arrays.items()}
        return _map(function, self.axes, {**arrays, **layers}, self.w)

    def measured(self, given: Arrays, in_range: bool) -> Measured:
        """The norms and ratios of each layer, from what is given for it."""
        numbers, axes = self.numbers.copy(), tuple(x for x in self.axes if x not in self.layer)
        rates = numbers.get("lr_before_momentum")
        if rates is not None and rates.ndim:  # report the ratio for the largest rate
            rates = da.broadcast_to(rates, self.w.shape, chunks=self.w.chunks)
            numbers["lr_before_momentum"] = rates.max(axis=axes)
        arrays = {name: (x, self.layer[: x.ndim]) for name, x in {**given, **numbers}.items()}
        like = chunks.widen(self.w).real
        all_four = _map(partial(chunks.measure, self.rule, in_range), self.layer, arrays, like)
        return Measured(*(_item(all_four, i, like) for i in range(4)))

    def _combined(
        self, x: da.Array, combine: Callable[..., Any], aggregate: Callable[..., Any]
    ) -> da.Array:
        """Combine the results of `map` for each layer, in a tree."""
        return da.reduction(
            x,
            chunks.same,
            aggregate,
            combine=combine,
            axis=tuple(axis for axis in self.axes if axis not in self.layer),
            concatenate=False,
            split_every=_FAN_IN,
            dtype=x.dtype,
            meta=da.utils.meta_from_array(x, ndim=len(self.layer)),
        )


def _map(
    function: Callable[..., Any],
    axes: tuple[int, ...],
    arrays: Mapping[str, tuple[da.Array, tuple[int, ...]]],
    like: Any,
) -> da.Array:
    """Call a function for each chunk, with the chunks of the arrays, given with their axes.

    The result is said to be an array of the type and dtype of `like`, but its chunks may be any
    objects.
    """
    pairs = [argument for pair in arrays.values() for argument in pair]
    named = partial(chunks.call, function, tuple(arrays))
    meta = da.utils.meta_from_array(like, ndim=len(axes))
    options = {"meta": meta, "dtype": meta.dtype, "align_arrays": False}
    return da.blockwise(named, axes, *pairs, **options, token=f"lars-{funcname(function)}")


def _item(x: da.Array, index: int, like: da.Array) -> da.Array:
    """The arrays with this index, where the chunks of x are tuples of arrays."""
    axes = tuple(range(x.ndim))
    return _map(partial(chunks.item, index), axes, {"items": (x, axes)}, like)


BACKEND = DaskBackend()
