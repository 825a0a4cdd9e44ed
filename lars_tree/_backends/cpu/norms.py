"""The norms of arrays in CPU memory, for `twin.py`; the arrays are read in pieces.

Squares are added by the same operations in the same order as in `_native/kernel.hpp`, so the
norms have the same bits; `tests/test_native.py` compares them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lars_tree._backends.memory import NumpyArray
from lars_tree._numerics import bfloat16, formula
from lars_tree._numerics.double_double import (
    SPLITTER,
    DoubleDouble,
    fast_two_sum,
    two_product,
    two_sum,
)
from lars_tree._numerics.formula import Rule

Precision = type[np.floating[Any]]  # the type in which to compute: float64 or longdouble

_LANES = 16
_MIN_CHUNK = 1 << 14
_MAX_CHUNKS = 1 << 14

# If a sum of squares is in this range, no square overflowed, and underflow did not change the sum.
_SAFE_SUM = (2.0**-900, 2.0**1000)

# A joint gradient is scaled so that its largest element has about this exponent. The square of the
# largest element then does not overflow, and small elements keep their digits.
_JOINT_EXPONENT = 480


def precision_for(*arrays: NumpyArray) -> Precision:
    is_long = any(x.dtype.itemsize > (16 if x.dtype.kind == "c" else 8) for x in arrays)
    return np.longdouble if is_long else np.float64


class Norms(NamedTuple):
    """The norms of a layer; None if the rule does not adapt.

    Attributes:
        number: The type of the norms and coefficients: float or DoubleDouble.
        w: The norm of w.
        dcdw: The norm of dcdw; with `joint_norm` the norm of the joint gradient.
        joint: The joint gradient; None without `joint_norm`.
    """

    number: Any
    w: Any = None
    dcdw: Any = None
    joint: JointGradient | None = None

    def numbers(self, rule: Rule) -> Rule:
        """The rule with its numbers converted to the type of the norms."""
        names = (*formula.NUMBERS, "lr_after_momentum")
        return rule._replace(**{name: self.number(getattr(rule, name)) for name in names})

    def trust_ratio(self, rule: Rule, clip: bool = True) -> Any:
        numbers, one = self.numbers(rule), self.number(1)
        choose = lambda condition, a, b: a if condition else b  # noqa: E731
        return formula.trust_ratio(self.w, self.dcdw, numbers, choose, one, clip)


def norms_of(w: Any, dcdw: Any, precision: Precision, rule: Rule) -> Norms:
    if not rule.adapt:
        return Norms(DoubleDouble)
    number, is_joint = _number_type(w, dcdw, rule), formula.is_joint(rule)
    is_short = _is_short(w) and _is_short(dcdw) and not is_joint  # a joint gradient is in double
    w_norm = _norm(w, precision, number, is_short)
    if not is_joint:
        return Norms(number, w_norm, _norm(dcdw, precision, number, is_short))
    joint = JointGradient(w, dcdw, precision, rule)
    if number is float:
        return Norms(number, w_norm, _norm(joint, precision, number, is_short), joint)
    scaled = joint.scaled()
    if scaled is None:  # an element is infinite or NaN
        square, _ = _sum_of_squares(joint, precision, is_short)
        return Norms(number, w_norm, DoubleDouble(math.sqrt(square)), joint)
    norm = _from_pair(_sum_of_squares(scaled, precision, is_short)).sqrt().scaled(scaled.exponent)
    return Norms(number, w_norm, norm, scaled)


class JointGradient:
    """dcdw + decay_lambda * grad_scale * w, whose norm `joint_norm` uses; computed piece by piece.

    Each element is rounded once, even if the two terms cancel. The joint gradient is the computed
    sum times 2**exponent; the exponent is 0 unless the sum was scaled to stay in range.
    """

    def __init__(
        self, w: Any, dcdw: Any, precision: Precision, rule: Rule, exponent: int | None = None
    ) -> None:
        self.arrays = w, dcdw, precision, rule
        self.dtype = dtype_of(w)
        self.exponent = exponent or 0
        self.decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale)
        self.shifts, shift = (0, 0), self.decay.exponent
        if exponent is not None:
            self.shifts, shift = (self.decay.exponent - exponent, -exponent), 0
        self.high, self.low = (np.ldexp(x, shift) for x in (self.decay.high, self.decay.low))

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, piece: slice) -> NumpyArray:
        *arrays, precision, rule = self.arrays
        w, dcdw = (read_piece(x, piece, precision) for x in arrays)
        if any(self.shifts):
            w, dcdw = np.ldexp(w, self.shifts[0]), np.ldexp(dcdw, self.shifts[1])
        splitter = SPLITTER if precision is np.float64 else 2.0**32 + 1
        product, error = two_product(self.high, w, splitter)
        total, rest = two_sum(-dcdw if rule.maximize else dcdw, product)
        exact: NumpyArray = total + (rest + (error + self.low * w))
        return np.where(np.isfinite(exact), exact, total)

    def scaled(self) -> JointGradient | None:
        """The same sum, scaled against overflow and underflow; None if an element is not finite."""
        *arrays, precision, _ = self.arrays
        largest = [_largest(x, precision) for x in arrays]
        if not np.isfinite(largest).all():
            return None
        bounds = zip(largest, (self.decay.exponent + 1, 0), strict=True)
        exponents = [int(np.frexp(x)[1]) + exponent for x, exponent in bounds if x]
        exponent = max(exponents, default=0) - _JOINT_EXPONENT
        return JointGradient(*self.arrays, exponent=exponent)


def _number_type(w: Any, dcdw: Any, rule: Rule) -> Any:
    names = (*formula.NUMBERS, *(["lr_after_momentum"] if rule.trust_clip else []))
    values = (getattr(rule, name) for name in names)
    short = _is_short(w) and _is_short(dcdw)
    # Then coefficients in double do not overflow or underflow, and errors do not change the result.
    return float if short and all(map(formula.is_moderate, values)) else DoubleDouble


def _is_short(flat: Any) -> bool:
    """Whether the elements (or their real and imaginary parts) have fewer bits than float64."""
    dtype = dtype_of(flat)
    return dtype.itemsize <= (8 if dtype.kind == "c" else 4)


def _norm(flat: Any, precision: Precision, number: Any, is_short: bool) -> Any:
    total = _sum_of_squares(flat, precision, is_short)
    if number is float:
        return math.sqrt(total[0])
    if _SAFE_SUM[0] < total[0] < _SAFE_SUM[1]:
        return _from_pair(total).sqrt()
    largest = _largest(flat, precision)
    if not np.isfinite(largest):
        return DoubleDouble(float(largest))
    exponent = int(np.frexp(largest)[1])
    total = _sum_of_squares(flat, precision, is_short, -exponent)
    return _from_pair(total).sqrt().scaled(exponent)


def _largest(flat: Any, precision: Precision) -> Any:
    largest = precision(0)
    for piece in pieces(flat):
        values = np.abs(read_piece(flat, piece, precision))
        largest = np.maximum(largest, np.max(values))
    return largest


def _sum_of_squares(
    flat: Any, precision: Precision, is_short: bool, exponent: int = 0
) -> tuple[Any, Any]:
    """Multiply the elements by 2**exponent; return the sum of squares and its rounding error.

    Within a chunk, rows of 16 elements are added. Then the 16 sums are added in pairs, and the sums
    of the chunks in order. These last two steps also add up the rounding errors. `is_short`: all
    arrays of the layer are shorter than double.
    """
    total = (precision(0), precision(0))
    for piece in pieces(flat):
        values = read_piece(flat, piece, precision)
        if exponent:
            values = np.ldexp(values, exponent)
        groups = np.zeros((-(-values.size // (4 * _LANES)), 4, _LANES), precision)
        np.square(values, out=groups.reshape(-1)[: values.size])
        high, low = _sum_of_rows(groups, is_short)
        while len(high) > 1:
            high, low = _add((high[0::2], low[0::2]), (high[1::2], low[1::2]))
        total = _add(total, (high[0], low[0]))
    # If the sum is infinite or NaN, the rounding error is NaN.
    return fast_two_sum(*total) if np.isfinite(total[0]) else (total[0], precision(0))


def _sum_of_rows(groups: NumpyArray, is_short: bool) -> tuple[NumpyArray, NumpyArray]:
    """The sums of the lanes, and their rounding errors; a group has four rows of 16 squares.

    If all arrays are short, rows are added in order, and the errors are neglected. Otherwise each
    group is added by pairwise summation, and the groups by compensated summation.
    """
    if is_short:
        rows = groups.reshape(-1, _LANES)
        return np.add.reduce(rows), np.zeros(_LANES, rows.dtype)
    sums = (groups[:, 0] + groups[:, 1]) + (groups[:, 2] + groups[:, 3])
    before = np.zeros((len(sums) + 1, _LANES), sums.dtype)
    np.add.accumulate(sums, out=before[1:])
    _, errors = two_sum(before[:-1], sums)
    return before[-1], np.add.reduce(errors, initial=0.0)


def _add(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    total, error = two_sum(a[0], b[0])
    return total, error + (a[1] + b[1])


def _from_pair(pair: tuple[Any, Any]) -> DoubleDouble:
    """The sum of two numbers of any precision; the second number must be far smaller."""
    mantissa, exponent = np.frexp(pair[0])
    high = float(mantissa)
    low = float((mantissa - high) + np.ldexp(pair[1], -exponent))
    return DoubleDouble(*fast_two_sum(high, low), int(exponent))


def pieces(flat: Any) -> Iterator[slice]:
    """One slice for each chunk; the largest arrays have larger chunks, as in the kernel."""
    parts = 2 if dtype_of(flat).kind == "c" else 1
    size, chunk = len(flat) * parts, _MIN_CHUNK
    while size // chunk > _MAX_CHUNKS:
        chunk *= 2
    chunk //= parts
    return (slice(i, i + chunk) for i in range(0, len(flat), chunk))


def dtype_of(flat: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = flat.base.dtype if isinstance(flat, np.flatiter) else flat.dtype
    return dtype


def read_piece(flat: Any, piece: slice, precision: Precision) -> NumpyArray:
    """A piece converted to this precision, with complex elements as pairs of real numbers."""
    x: NumpyArray = flat[piece]
    if x.dtype.kind == "u":
        return np.asarray(bfloat16.decode(x), precision)
    if x.dtype.kind == "c":
        return x.astype(np.result_type(precision, np.complex64)).view(precision)
    return np.asarray(x, precision)
