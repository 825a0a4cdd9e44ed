"""Backends that compute with whole arrays, through a namespace that follows the array API standard.

They serve arrays that the kernel cannot read: traced and sharded JAX arrays, lazy Dask arrays, and
arrays on accelerators. `formula.step` computes the step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import reduce
from typing import Any

import numpy as np

from lars_tree._backends.base import Backend, Leaf, NativeArray, StepResult, Writes
from lars_tree._numerics import formula
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._numerics.formula import Measured, Norm, Rule


class NamespaceOps:
    """`formula.Ops` by the functions of an array namespace."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def over(self, mesh_axes: frozenset[Any]) -> NamespaceOps:
        """The same operations, with sums and maxima also over these mesh axes."""
        return self

    def norms(self, w: NativeArray, dcdw: NativeArray, layer_axis: int | None) -> tuple[Norm, Norm]:
        return self.scaled_norm(w, layer_axis), self.scaled_norm(dcdw, layer_axis)

    def unscaled_norms(
        self, w: NativeArray, dcdw: NativeArray, layer_axis: int | None
    ) -> tuple[NativeArray, NativeArray]:
        return self.norm(w, layer_axis), self.norm(dcdw, layer_axis)

    def scaled_norm(self, x: NativeArray, layer_axis: int | None) -> Norm:
        """The norm of x, computed from x scaled to a largest magnitude of about 1."""
        scale = self.power_of_two(self.largest(x, layer_axis))
        return Norm(self.norm(x / scale, layer_axis), scale)

    def norm(self, x: NativeArray, layer_axis: int | None) -> NativeArray:
        """The 2-norm over all axes but layer_axis, with keepdims; its derivative at 0 is 0."""
        return self.root(self.squares(x, layer_axis))

    def root(self, total: NativeArray) -> NativeArray:
        """The square root, whose derivative at 0 is defined as 0."""
        positive = total > 0
        root = self.xp.sqrt(self.xp.where(positive, total, self.one(total)))
        return self.xp.where(positive, root, total)

    def squares(self, x: NativeArray, layer_axis: int | None) -> NativeArray:
        """The sum of squares over all axes but layer_axis, with keepdims."""
        squares = self.xp.real(x) ** 2 + self.xp.imag(x) ** 2 if self.is_complex(x) else x * x
        return self.sum(squares, other_axes(x, layer_axis))

    def largest(self, x: NativeArray, layer_axis: int | None) -> NativeArray:
        return self.max(self.xp.abs(self.constant(x)), other_axes(x, layer_axis))

    def power_of_two(self, x: NativeArray) -> NativeArray:
        x = self.constant(x)
        usable = (x > 0) & self.xp.isfinite(x)
        x = self.xp.where(usable, x, self.one(x))
        return self.round_to_power_of_two(x)

    def round_to_power_of_two(self, x: NativeArray) -> NativeArray:
        mantissa, _ = self.xp.frexp(x)
        return x / (2 * mantissa)

    def upper_half(self, x: NativeArray) -> NativeArray:
        bits = 1 - round(math.log2(float(self.xp.finfo(x.dtype).eps)))
        spread = x * (2.0 ** ((bits + 1) // 2) + 1)  # Veltkamp
        return spread - (spread - x)

    def finite_or(self, x: NativeArray, other: NativeArray) -> NativeArray:
        return self.xp.where(self.xp.isfinite(x), x, other)

    def where(self, condition: NativeArray, a: Any, b: Any) -> NativeArray:
        like = b if _is_number(a) else a
        return self.xp.where(condition, self.like(a, like), self.like(b, like))

    def maximum(self, a: Any, b: Any) -> NativeArray:
        like = b if _is_number(a) else a
        a, b = self.like(a, like), self.like(b, like)
        return self.xp.where(a > b, a, b)

    def sqrt(self, x: NativeArray) -> NativeArray:
        return self.xp.sqrt(x)

    def like(self, number: Any, x: NativeArray) -> NativeArray:
        return self.one(x) * number if _is_number(number) else number

    def one(self, x: NativeArray) -> NativeArray:
        return self.xp.ones((), dtype=x.dtype)

    def is_complex(self, x: NativeArray) -> bool:
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def constant(self, x: NativeArray) -> NativeArray:
        """The values of x, without gradient."""
        return x

    def sum(self, x: NativeArray, axes: tuple[int, ...]) -> NativeArray:
        """The sum over these axes, with keepdims; x itself if there are no axes."""
        return self.xp.sum(x, axis=axes, keepdims=True) if axes else x

    def max(self, x: NativeArray, axes: tuple[int, ...]) -> NativeArray:
        """The maximum over these axes, with keepdims; x itself if there are no axes."""
        return self.xp.max(x, axis=axes, keepdims=True) if axes else x


def other_axes(x: NativeArray, layer_axis: int | None) -> tuple[int, ...]:
    layer_axis = None if layer_axis is None else layer_axis % x.ndim
    return tuple(axis for axis in range(x.ndim) if axis != layer_axis)


class ArraysBackend(Backend):
    """A library whose arrays are updated by `formula.step`, leaf by leaf."""

    ops: NamespaceOps

    @abstractmethod
    def widen(self, x: Any, w: NativeArray) -> NativeArray:
        """Convert x, an array or an option, to the dtype in which the step of w is computed."""

    def narrow(self, x: NativeArray, w: NativeArray) -> NativeArray:
        """Convert x to the dtype of w."""
        return x.astype(w.dtype)

    def namespace(self, x: NativeArray) -> Any:
        return self.ops.xp

    def bits(self, x: NativeArray) -> int:
        """The number of bits of a real number, or of a part of a complex number."""
        bits: int = 8 * x.dtype.itemsize
        return bits // 2 if self.ops.is_complex(x) else bits

    def is_short(self, w: NativeArray, dcdw: NativeArray, rule: Rule) -> bool:
        """Whether a step that is computed in double needs no scaling: see `formula.step`."""
        if max(self.bits(w), self.bits(dcdw)) > 32:
            return False
        return all(self._is_moderate(getattr(rule, name)) for name in formula.ALL_NUMBERS)

    def _is_moderate(self, option: Any) -> bool:
        if isinstance(option, float):
            return formula.is_moderate(option)
        if isinstance(option, np.ndarray):
            return all(map(formula.is_moderate, option.flat))
        return self.bits(option) <= 32

    @without_warnings  # for libraries that are based on numpy
    def step(
        self, w: NativeArray, dcdw: NativeArray, rule: Rule, velocity: NativeArray | None = None
    ) -> StepResult:
        """The new weights in the dtype of w, and the new velocity in the dtype of `velocity`."""
        if 0 in w.shape:
            return StepResult(self.copy(w, rule.stop_gradients), velocity)
        return self.compute(w, dcdw, rule, velocity, self.is_short(w, dcdw, rule))

    def compute(
        self,
        w: NativeArray,
        dcdw: NativeArray,
        rule: Rule,
        velocity: NativeArray | None,
        is_short: bool,
    ) -> StepResult:
        """The results of `step`, for arrays that are not empty."""
        wide = None if velocity is None else self.widen(velocity, w)
        ops = self.ops.over(formula.mesh_axes(rule))
        given = self._widened(w, dcdw, rule)
        in_range = is_short and self.bits(given[0]) >= 64
        new = formula.step(ops, *given, wide, in_range)
        return StepResult(
            self.narrow(new[0], w), None if velocity is None else self.narrow(new[1], velocity)
        )

    def _widened(
        self, w: NativeArray, dcdw: NativeArray, rule: Rule
    ) -> tuple[NativeArray, NativeArray, Rule]:
        """The arguments in the dtype in which the step is computed; dcdw gets the shape of w."""
        values = {name: getattr(rule, name) for name in formula.ALL_NUMBERS}
        numbers: dict[str, Any] = {
            name: value if isinstance(value, float) else self.widen(value, w)
            for name, value in values.items()
        }
        lr = numbers["lr_before_momentum"]
        if 0 < getattr(lr, "ndim", 0) < w.ndim:  # libraries may refuse operands of other ranks
            ones = (1,) * (w.ndim - lr.ndim)
            numbers["lr_before_momentum"] = self.ops.xp.reshape(lr, (*ones, *lr.shape))
        dcdw = self.ops.xp.broadcast_to(self.widen(dcdw, w), w.shape)
        return self.widen(w, w), dcdw, rule._replace(**numbers)

    @without_warnings
    def measure_leaf(self, w: NativeArray, dcdw: NativeArray, rule: Rule) -> Measured:
        """The norms and ratios of the step of one leaf."""
        return self.compute_norms(w, dcdw, rule, self.is_short(w, dcdw, rule))

    def compute_norms(
        self, w: NativeArray, dcdw: NativeArray, rule: Rule, is_short: bool
    ) -> Measured:
        """The results of `measure_leaf`."""
        axis = rule.layer_axis
        shape = () if axis is None else (w.shape[axis],)
        w, dcdw, rule = self._widened(w, dcdw, rule)
        ops = self.ops.over(formula.mesh_axes(rule))
        lr = rule.lr_before_momentum
        if getattr(lr, "ndim", 0):  # with trust_clip, the ratio for the largest rate is reported
            largest = ops.max(ops.xp.broadcast_to(lr, w.shape), other_axes(w, axis))
            rule = rule._replace(lr_before_momentum=largest)
        if 0 in w.shape:  # no maximum exists; the norms are 0, so the ratio is 1
            zeros = ops.xp.reshape(ops.sum(abs(w), other_axes(w, axis)), shape)
            return Measured(zeros, zeros, zeros + 1, zeros + 1)
        measured = formula.measure(ops, w, dcdw, rule, is_short and self.bits(w) >= 64)
        return Measured(*(ops.xp.reshape(x, shape) for x in measured))

    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        return [self.measure_leaf(leaf.w, leaf.dcdw, leaf.rule) for leaf in leaves]

    def update(self, leaves: list[Leaf], writes: Writes) -> list[StepResult]:
        results = [self.step(leaf.w, leaf.dcdw, leaf.rule, leaf.velocity) for leaf in leaves]
        return [writes.result(leaf, new) for leaf, new in zip(leaves, results, strict=True)]

    def all_finite(self, xs: list[NativeArray]) -> Any:
        flags = [self.ops.xp.all(self.ops.xp.isfinite(x)) for x in xs]
        return reduce(lambda a, b: a & b, flags)

    def choose(self, flag: Any, a: NativeArray, b: NativeArray) -> NativeArray:
        if isinstance(flag, bool):
            return a if flag else b
        return self.ops.xp.where(flag, a, b)

    def write(self, out: NativeArray, x: NativeArray) -> None:
        out[...] = x


def _is_number(x: Any) -> bool:
    """Whether x is a Python number; torch.compile traces these as numbers without a dtype."""
    return isinstance(x, (int, float, complex))
