"""The norms of arrays in CPU memory, read in pieces, for `cpu.py`.

Sums are made in the order of `_native/kernel.hpp`, by the same operations: both give the same bits.
`tests/test_native.py` holds them to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _rule
from lars_tree._backends import bfloat16
from lars_tree._backends.wide import SPLITTER, DoubleDouble, fast_two_sum, two_product, two_sum
from lars_tree._rule import Rule

Array = np.ndarray[Any, Any]
Precision = type[np.floating[Any]]  # the type in which to compute: float64 or longdouble

_LANES = 16
_SMALLEST_CHUNK = 1 << 14
_MOST_CHUNKS = 1 << 14

# A sum of squares between these lost nothing to overflow, and nothing that counts to underflow.
_SAFE_SUM = (2.0**-900, 2.0**1000)

# Norms of numbers shorter than double, and options like these, make no coefficient that leaves the
# range of double, and none whose rounding errors a result could show.
_MODERATE = (2.0**-100, 2.0**100)

# Where scaled sums have their largest elements: squares are in range, and small elements too.
_TOTAL_EXPONENT = 480


def precision_for(w: Array, dcdw: Array) -> Precision:
    return np.longdouble if is_long(w.dtype) or is_long(dcdw.dtype) else np.float64


class Norms(NamedTuple):
    """The norms of a layer, and the kind of number that they are and its coefficients are to be.

    With `joint_norm` that of dcdw is the norm of `total`; without adaptation there are none.
    """

    number: Any
    w: Any = None
    dcdw: Any = None
    total: Total | None = None

    def numbers(self, rule: Rule) -> Rule:
        """The rule in such numbers."""
        names = (*_rule.NUMBERS, "lr_after_momentum")
        return rule._replace(**{name: self.number(getattr(rule, name)) for name in names})


def norms_of(w: Any, dcdw: Any, precision: Precision, rule: Rule) -> Norms:
    number = _number(w, dcdw, rule)
    if not rule.adapt:
        return Norms(DoubleDouble)
    w_norm = _norm(w, precision, number)
    if not _rule.is_joint(rule):
        return Norms(number, w_norm, _norm(dcdw, precision, number))
    total = Total(w, dcdw, precision, rule)
    return Norms(number, w_norm, *_norm_of_total(total, number))


class Total:
    """dcdw + decay_lambda * grad_scale * w, of which `joint_norm` takes the norm; read in pieces.

    As if each element was rounded once, also where the two cancel. It is to be multiplied by
    2**exponent, which is 0 unless the sum was scaled to stay in range.
    """

    def __init__(
        self, w: Any, dcdw: Any, precision: Precision, rule: Rule, exponent: int | None = None
    ) -> None:
        self.arrays = w, dcdw, precision, rule
        self.precision = precision
        self.dtype = dtype_of(w)
        decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale)
        self.shifts, self.exponent = (0, 0), exponent or 0
        if exponent is not None:
            self.shifts = decay.exponent - exponent, -exponent
            decay = decay.scaled(-decay.exponent)
        self.high, self.low = (np.ldexp(x, decay.exponent) for x in (decay.high, decay.low))

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, piece: slice) -> Array:
        *arrays, precision, rule = self.arrays
        w, dcdw = (read_piece(x, piece, precision) for x in arrays)
        w, dcdw = (
            np.ldexp(x, shift) if shift else x
            for x, shift in zip((w, dcdw), self.shifts, strict=True)
        )
        splitter = SPLITTER if precision is np.float64 else 2.0**32 + 1
        product, error = two_product(self.high, w, splitter)
        total, rest = two_sum(-dcdw if rule.maximize else dcdw, product)
        exact: Array = total + (rest + (error + self.low * w))
        return np.where(np.isfinite(exact), exact, total)

    def scaled(self) -> Total | None:
        """The same sum without overflow or underflow; None where elements are not finite."""
        *arrays, precision, rule = self.arrays
        largest = [_largest(x, precision) for x in arrays]
        if not np.isfinite(largest).all():
            return None
        decay = DoubleDouble(rule.decay_lambda) * DoubleDouble(rule.grad_scale)
        bounds = zip(largest, (decay.exponent + 1, 0), strict=True)
        exponents = [int(np.frexp(x)[1]) + exponent for x, exponent in bounds if x]
        return Total(*self.arrays, exponent=max(exponents, default=0) - _TOTAL_EXPONENT)


def _norm_of_total(total: Total, number: Any) -> tuple[Any, Total]:
    if number is float:
        return _norm(total, total.precision, float), total
    scaled = total.scaled()
    if scaled is None:  # infinite, or NaN
        return DoubleDouble(
            math.sqrt(_sum_of_squares(total, total.precision, lambda x: x)[0])
        ), total
    squares = _sum_of_squares(scaled, scaled.precision, lambda x: x)
    return _double_double(squares).sqrt().scaled(scaled.exponent), scaled


def _number(w: Any, dcdw: Any, rule: Rule) -> Any:
    """The kind of number to compute norms and coefficients in."""
    names = (*_rule.NUMBERS, *(["lr_after_momentum"] if rule.trust_clip else []))
    short = all(dtype_of(x).itemsize <= (8 if dtype_of(x).kind == "c" else 4) for x in (w, dcdw))
    is_moderate = all(_is_moderate(getattr(rule, name)) for name in names)
    return float if short and is_moderate else DoubleDouble


def _is_moderate(x: float) -> bool:
    return x == 0 or _MODERATE[0] < x < _MODERATE[1]


def choose(condition: bool, a: Any, b: Any) -> Any:
    return a if condition else b


def _norm(flat: Any, precision: Precision, number: Any) -> Any:
    total = _sum_of_squares(flat, precision, lambda x: x)
    if number is float:
        return math.sqrt(total[0])
    if _SAFE_SUM[0] < total[0] < _SAFE_SUM[1]:
        return _double_double(total).sqrt()
    largest = _largest(flat, precision)
    if largest == 0 or not np.isfinite(largest):
        return DoubleDouble(float(largest))
    exponent = int(np.frexp(largest)[1])
    total = _sum_of_squares(flat, precision, lambda x: np.ldexp(x, -exponent))
    return _double_double(total).sqrt().scaled(exponent)


def _largest(flat: Any, precision: Precision) -> Any:
    largest = precision(0)
    for piece in pieces(flat):
        values = np.abs(read_piece(flat, piece, precision))
        largest = np.maximum(largest, np.max(values, initial=0))
    return largest


def _sum_of_squares(
    flat: Any, precision: Precision, scale: Callable[[Array], Array]
) -> tuple[Any, Any]:
    """The sum and what rounding took from it.

    Rows of 16 are added by pairs of neighbours, and pairs of pairs, as if zeros followed up to the
    next power of two; then lanes and chunks, with their rounding errors.
    """
    total = (precision(0), precision(0))
    for piece in pieces(flat):
        values = scale(read_piece(flat, piece, precision))
        count = 1 << (-(-values.size // _LANES) - 1).bit_length()
        rows = np.zeros((count, _LANES), precision)
        np.square(values, out=rows.reshape(-1)[: values.size])
        while len(rows) > 1:
            rows = rows[0::2] + rows[1::2]
        high, low = rows[0], np.zeros(_LANES, precision)
        while len(high) > 1:
            high, low = _add((high[0::2], low[0::2]), (high[1::2], low[1::2]))
        total = _add(total, (high[0], low[0]))
    # Where the sum is infinite or NaN, the rounding errors are NaN.
    return fast_two_sum(*total) if np.isfinite(total[0]) else (total[0], precision(0))


def _add(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    total, error = two_sum(a[0], b[0])
    return total, error + (a[1] + b[1])


def _double_double(pair: tuple[Any, Any]) -> DoubleDouble:
    """The sum of two numbers of any precision, the second far smaller."""
    mantissa, exponent = np.frexp(pair[0])
    high = float(mantissa)
    low = float((mantissa - high) + np.ldexp(pair[1], -exponent))
    return DoubleDouble(*fast_two_sum(high, low), int(exponent))


def pieces(flat: Any) -> Iterator[slice]:
    """Chunks: more elements to each in the largest arrays, as in the kernel."""
    numbers = 2 if dtype_of(flat).kind == "c" else 1
    size, chunk = len(flat) * numbers, _SMALLEST_CHUNK
    while size // chunk > _MOST_CHUNKS:
        chunk *= 2
    chunk //= numbers
    return (slice(i, i + chunk) for i in range(0, len(flat), chunk))


def dtype_of(flat: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = flat.base.dtype if isinstance(flat, np.flatiter) else flat.dtype
    return dtype


def read_piece(flat: Any, piece: slice, precision: Precision) -> Array:
    """A piece in this precision; complex numbers as pairs of real ones."""
    x: Array = flat[piece]
    if x.dtype.kind == "u":
        return bfloat16.decode(x).astype(precision, copy=False)
    if x.dtype.kind == "c":
        return x.astype(np.result_type(precision, np.complex64)).view(precision)
    return x.astype(precision, copy=False)


def is_long(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize > (16 if dtype.kind == "c" else 8)
