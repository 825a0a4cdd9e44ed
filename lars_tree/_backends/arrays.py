"""Backends that compute with whole arrays, through a namespace that follows the array API standard.

Serves what has no memory that a CPU kernel could walk: traced and sharded JAX arrays, lazy Dask
arrays, arrays on accelerators. The formula is `_rule.step`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import _rule
from lars_tree._backends.base import Array, Backend, Leaf, New
from lars_tree._rule import Measured, Norm, Rule

if TYPE_CHECKING:
    from lars_tree._writes import Writes


class NamespaceOps:
    """`_rule.Ops` in terms of an array namespace."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def over(self, mesh_axes: frozenset[Any]) -> NamespaceOps:
        """The same, with sums and maxima also over these mesh axes."""
        return self

    def norms(self, w: Array, dcdw: Array, layer_axis: int | None) -> tuple[Norm, Norm]:
        return self.scaled_norm(w, layer_axis), self.scaled_norm(dcdw, layer_axis)

    def scaled_norm(self, x: Array, layer_axis: int | None) -> Norm:
        """Of x whose largest magnitude is scaled to about 1."""
        scale = self.power_of_two(self.largest(x, layer_axis))
        return Norm(self.norm(x / scale, layer_axis), scale)

    def norm(self, x: Array, layer_axis: int | None) -> Array:
        """2-norm over all axes but layer_axis, these kept with length 1; derivative 0 at 0."""
        squares = self.xp.real(x) ** 2 + self.xp.imag(x) ** 2 if self.is_complex(x) else x * x
        total = self.sum(squares, _other_axes(x, layer_axis))
        positive = total > 0
        root = self.xp.sqrt(self.xp.where(positive, total, self.one(total)))
        # The derivative of the root at 0 is infinite; that of this expression is 0.
        return self.xp.where(positive, root, total)

    def largest(self, x: Array, layer_axis: int | None) -> Array:
        """Largest magnitude over the same axes, a constant to differentiation."""
        return self.max(self.xp.abs(self.constant(x)), _other_axes(x, layer_axis))

    def power_of_two(self, x: Array) -> Array:
        x = self.constant(x)
        usable = (x > 0) & self.xp.isfinite(x)
        x = self.xp.where(usable, x, self.one(x))
        return self.round_to_power_of_two(x)

    def round_to_power_of_two(self, x: Array) -> Array:
        mantissa, _ = self.xp.frexp(x)
        return x / (2 * mantissa)

    def upper_half(self, x: Array) -> Array:
        finfo = getattr(self.xp, "finfo", np.finfo)  # Dask has the dtypes of numpy
        bits = 1 - round(math.log2(float(finfo(x.dtype).eps)))
        spread = x * (2.0 ** ((bits + 1) // 2) + 1)  # Veltkamp
        return spread - (spread - x)

    def finite_or(self, x: Array, other: Array) -> Array:
        return self.xp.where(self.xp.isfinite(x), x, other)

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        like = b if _is_number(a) else a
        return self.xp.where(condition, self.like(a, like), self.like(b, like))

    def maximum(self, a: Any, b: Any) -> Array:
        like = b if _is_number(a) else a
        a, b = self.like(a, like), self.like(b, like)
        return self.xp.where(a > b, a, b)

    def like(self, number: Any, x: Array) -> Array:
        """A number as a 0-d array that does not change the dtype of x; an array as it is."""
        return self.one(x) * number if _is_number(number) else number

    def one(self, x: Array) -> Array:
        return self.xp.ones((), dtype=x.dtype)

    def is_complex(self, x: Array) -> bool:
        return bool(self.xp.isdtype(x.dtype, "complex floating"))

    def constant(self, x: Array) -> Array:
        """x, cut off from differentiation."""
        return x

    def sum(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum over these axes, kept with length 1; no axes means no sum."""
        return self.xp.sum(x, axis=axes, keepdims=True) if axes else x

    def max(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The maximum over these axes, kept with length 1."""
        return self.xp.max(x, axis=axes, keepdims=True) if axes else x


def _other_axes(x: Array, layer_axis: int | None) -> tuple[int, ...]:
    layer_axis = None if layer_axis is None else layer_axis % x.ndim
    return tuple(axis for axis in range(x.ndim) if axis != layer_axis)


class ArraysBackend(Backend):
    """A library whose update is made of `_rule.step`, leaf by leaf."""

    @abstractmethod
    def ops(self, x: Array) -> NamespaceOps:
        """The operations on arrays like x."""

    @abstractmethod
    def widen(self, x: Any, w: Array) -> Array:
        """X (an array, or a number where the rule has one) in the type to compute with for w."""

    @abstractmethod
    def narrow(self, x: Array, w: Array) -> Array:
        """X in the dtype of w."""

    def namespace(self, x: Array) -> Any:
        return self.ops(x).xp

    def step(self, w: Array, dcdw: Array, rule: Rule, velocity: Array | None = None) -> New:
        """The weights after one step in the dtype of w, and the velocity in its own."""
        if 0 in w.shape:
            return New(self.copy(w, rule.stop_gradients), velocity)
        wide = None if velocity is None else self.widen(velocity, w)
        ops = self.ops(w).over(_rule.mesh_axes(rule))
        with np.errstate(all="ignore"):  # for libraries that are made of numpy
            new = _rule.step(ops, *self._widened(w, dcdw, rule), wide)
        return New(
            self.narrow(new[0], w), None if velocity is None else self.narrow(new[1], velocity)
        )

    def _widened(self, w: Array, dcdw: Array, rule: Rule) -> tuple[Array, Array, Rule]:
        """All in the type to compute with, the gradient in the shape of w."""
        names = (*_rule.NUMBERS, *_rule.MOMENTUM_NUMBERS)
        values = {name: getattr(rule, name) for name in names}
        numbers: dict[str, Any] = {
            name: value if isinstance(value, float) else self.widen(value, w)
            for name, value in values.items()
        }
        dcdw = self.ops(w).xp.broadcast_to(self.widen(dcdw, w), w.shape)
        return self.widen(w, w), dcdw, rule._replace(**numbers)

    def measure_leaf(self, w: Array, dcdw: Array, rule: Rule) -> Measured:
        """What the step of one leaf is made of."""
        axis = rule.layer_axis
        shape = () if axis is None else (w.shape[axis],)
        w, dcdw, rule = self._widened(w, dcdw, rule)
        ops = self.ops(w).over(_rule.mesh_axes(rule))
        lr = rule.lr_before_momentum
        if getattr(lr, "ndim", 0):  # trust_clip reports one ratio: that of the largest rate
            largest = ops.max(ops.xp.broadcast_to(lr, w.shape), _other_axes(w, axis))
            rule = rule._replace(lr_before_momentum=largest)
        if 0 in w.shape:  # a maximum over nothing is an error; their norms are 0, and so ratio is 1
            zeros = ops.xp.reshape(ops.sum(abs(w), _other_axes(w, axis)), shape)
            return Measured(zeros, zeros, zeros + 1, zeros + 1)
        with np.errstate(all="ignore"):
            measured = _rule.measure(ops, w, dcdw, rule)
        return Measured(*(ops.xp.reshape(x, shape) for x in measured))

    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        return [self.measure_leaf(leaf.w, leaf.dcdw, leaf.rule) for leaf in leaves]

    def update(self, leaves: list[Leaf], writes: Writes) -> list[New]:
        news = [self.step(leaf.w, leaf.dcdw, leaf.rule, leaf.velocity) for leaf in leaves]
        return [writes.result(leaf, new) for leaf, new in zip(leaves, news, strict=True)]

    def all_finite(self, xs: list[Array]) -> Any:
        flags = [self.ops(x).xp.all(self.ops(x).xp.isfinite(x)) for x in xs]
        return reduce(lambda a, b: a & b, flags)

    def choose(self, flag: Any, a: Array, b: Array) -> Array:
        if isinstance(flag, bool):
            return a if flag else b
        return self.ops(a).xp.where(flag, a, b)

    def write(self, out: Array, x: Array) -> None:
        out[...] = x


def _is_number(x: Any) -> bool:
    """Whether x is a number of Python, or one that torch.compile traces, which has no dtype."""
    return isinstance(x, (int, float, complex))
