"""Double-double numbers: twice the precision of double, with a separate exponent.

The ratio of two norms of float64 arrays may be out of the range of double although the step is in
range, and a ratio rounded to double would increase the error of the result.
`_native/double_double.hpp` does the same operations in the same order, so both give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

SPLITTER = 2.0**27 + 1  # splits the 53 bits of a double into halves


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The rounded sum of numbers or arrays, and its exact error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fast_two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Like `two_sum`, for |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


def two_product(a: Any, b: Any, splitter: float = SPLITTER) -> tuple[Any, Any]:
    """The rounded product of numbers or arrays, and its exact error (Dekker, Veltkamp)."""
    product = a * b
    a_big, b_big = splitter * a, splitter * b
    a_high, b_high = a_big - (a_big - a), b_big - (b_big - b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


class DoubleDouble:
    """(high + low) * 2**exponent, with 1 <= high < 2 and high == high + low rounded to double.

    If high is 0, infinite or NaN, low and exponent are 0. No number is negative.
    """

    __slots__ = ("exponent", "high", "low")

    def __init__(self, high: float, low: float = 0.0, exponent: int = 0) -> None:
        if high == 0 or not math.isfinite(high):
            self.high, self.low, self.exponent = high, 0.0, 0
            return
        shift = math.frexp(high)[1] - 1
        self.high = math.ldexp(high, -shift)
        self.low = math.ldexp(low, -shift)
        self.exponent = exponent + shift

    @property
    def _is_finite_nonzero(self) -> bool:
        return self.high != 0 and math.isfinite(self.high)

    def __mul__(self, other: DoubleDouble | float) -> DoubleDouble:
        other = other if isinstance(other, DoubleDouble) else DoubleDouble(float(other))
        if not (self._is_finite_nonzero and other._is_finite_nonzero):
            return DoubleDouble(self.high * other.high)
        product, error = two_product(self.high, other.high)
        error += self.high * other.low + self.low * other.high
        return DoubleDouble(*fast_two_sum(product, error), self.exponent + other.exponent)

    def __truediv__(self, other: DoubleDouble | int) -> DoubleDouble:
        other = other if isinstance(other, DoubleDouble) else DoubleDouble(float(other))
        if not (self._is_finite_nonzero and other._is_finite_nonzero):
            return DoubleDouble(_ieee_divide(self.high, other.high))
        quotient = self.high / other.high
        product, error = two_product(quotient, other.high)
        rest = ((self.high - product) - error) + self.low - quotient * other.low
        pair = fast_two_sum(quotient, rest / other.high)
        return DoubleDouble(*pair, self.exponent - other.exponent)

    def __add__(self, other: DoubleDouble) -> DoubleDouble:
        if other.high == 0:
            return self
        if self.high == 0:
            return other
        if not (self._is_finite_nonzero and other._is_finite_nonzero):
            return DoubleDouble(self.high + other.high)
        a, b = (self, other) if self.exponent >= other.exponent else (other, self)
        if a.exponent - b.exponent > 200:
            return a
        scale = math.ldexp(1.0, b.exponent - a.exponent)
        high, error = two_sum(a.high, b.high * scale)
        error += a.low + b.low * scale
        return DoubleDouble(*fast_two_sum(high, error), a.exponent)

    def sqrt(self) -> DoubleDouble:
        if not self._is_finite_nonzero:
            return DoubleDouble(math.sqrt(self.high))
        odd = self.exponent % 2
        high, low = (2 * self.high, 2 * self.low) if odd else (self.high, self.low)
        root = math.sqrt(high)
        square, error = two_product(root, root)
        rest = ((high - square) - error) + low
        return DoubleDouble(*fast_two_sum(root, rest / (2 * root)), (self.exponent - odd) // 2)

    def scaled(self, exponent: int) -> DoubleDouble:
        """The number times 2**exponent."""
        return DoubleDouble(self.high, self.low, self.exponent + exponent)

    def __gt__(self, other: DoubleDouble) -> bool:
        if not (self._is_finite_nonzero and other._is_finite_nonzero):
            return self.high > other.high
        return (self.exponent, self.high, self.low) > (other.exponent, other.high, other.low)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DoubleDouble):
            return (self.high, self.low, self.exponent) == (other.high, other.low, other.exponent)
        return other == 0 and self.high == 0

    __hash__ = None  # type: ignore[assignment]

    def __float__(self) -> float:
        """The nearest double, which may be 0 or infinite."""
        try:
            return math.ldexp(self.high, max(-3000, self.exponent))
        except OverflowError:
            return math.inf

    def split(self) -> tuple[DoubleDouble, int]:
        """The number as m * 2**e. Near 1, e is 0; far from 1, 1 <= m < 2.

        To multiply by the number, scale by 2**e and then multiply by m, so that there is only one
        rounding and the result overflows only if the product does.
        """
        if not self._is_finite_nonzero or -960 < self.exponent < 960:
            return self, 0
        return DoubleDouble(self.high, self.low), max(-5000, min(5000, self.exponent))


def _ieee_divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.inf
    return a / b
