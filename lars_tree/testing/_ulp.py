"""Errors in ulps (units in the last place): the distance of neighbouring numbers of a format.

Arrays here are real and of numpy: complex numbers come as pairs. What is expected may be known in
any float type, or as `decimal.Decimal` in an array of objects; then everything is done in decimals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

from lars_tree.testing._arrays import Array, Format

WIDE = np.longdouble  # where it is no longer than double, errors of float64 are rounded themselves


def errors(actual: Array, expected: Array, scale: Array, form: Format) -> Array:
    """How far off each element is, in ulps of the format at the size of `scale`.

    Infinity counts as the power of two beyond the largest number of the format, and nothing that
    is expected lies farther out. NaN is 0 off from NaN and infinitely far from all else.
    """
    if object in (expected.dtype, scale.dtype):
        rows = np.broadcast_arrays(actual.astype(WIDE), expected, scale)
        one = _decimal_error(form)
        found = [one(*row) for row in zip(*(row.ravel().tolist() for row in rows), strict=True)]
        return np.array(found, np.float64).reshape(actual.shape)
    a, e = _clipped(actual, form), _clipped(expected, form)
    with np.errstate(all="ignore"):
        off = np.where(a == e, WIDE(0), np.abs(a - e)) / _ulp(scale, form)
        off = np.where(np.isnan(a) & np.isnan(e), WIDE(0), off)
        return np.where(np.isnan(off), np.inf, off).astype(np.float64)


def _clipped(x: Array, form: Format) -> Array:
    with np.errstate(all="ignore"):
        end = np.ldexp(WIDE(1), form.largest + 1)
        return np.clip(x.astype(WIDE), -end, end)


def _ulp(scale: Array, form: Format) -> Array:
    exponents = np.frexp(np.abs(scale.astype(WIDE)))[1] - 1
    exponents = np.where(scale == 0, form.smallest, exponents)
    exponents = np.where(np.isfinite(scale), exponents, form.largest)
    exponents = np.clip(exponents, form.smallest, form.largest) - form.bits + 1
    return np.asarray(np.ldexp(WIDE(1), exponents))


def _decimal_error(form: Format) -> Callable[[Any, Any, Any], float]:
    end = Decimal(2) ** (form.largest + 1)

    def number(x: Any) -> Decimal:
        exact = x if isinstance(x, Decimal) else Decimal(float(x))
        return exact if exact.is_nan() else max(-end, min(end, exact))

    def error(actual: Any, expected: Any, scale: Any) -> float:
        a, e = number(actual), number(expected)
        if a.is_nan() or e.is_nan():
            return 0.0 if a.is_nan() and e.is_nan() else np.inf
        return float(abs(a - e) / _decimal_ulp(number(scale), form))

    return error


def _decimal_ulp(scale: Decimal, form: Format) -> Decimal:
    size = float(scale)
    exponent = form.smallest if size == 0 or math.isnan(size) else math.frexp(size)[1] - 1
    exponent = exponent if abs(size) < math.inf else form.largest
    return Decimal(2) ** (min(max(exponent, form.smallest), form.largest) - form.bits + 1)
