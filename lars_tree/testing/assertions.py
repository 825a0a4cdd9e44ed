"""Assertions on two trees: identical bits, or equal within some units in the last place (ulps).

A failure lists every path that differs, like the errors of the package, and the worst element of
each array: its index, both values, and their distance in ulps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.wrapper import unwrap
from lars_tree._display import show
from lars_tree._tree import nodes, structure
from lars_tree.errors import Line
from lars_tree.testing import _arrays


def assert_identical(actual: Any, expected: Any, *, check_type: bool = True) -> None:
    """Assert that two trees are the same: node types, key order, dtypes, shapes, devices and bits.

    Any NaN equals any other NaN, because no library guarantees the sign and payload. -0.0 differs
    from 0.0. The memory layout of arrays does not matter.

    >>> from lars_tree.testing import assert_identical
    >>> assert_identical({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.5])})
    Traceback (most recent call last):
        ...
    AssertionError: actual is not identical to expected
      a: 1 of 2 elements differs: at [1] 2.0, expected 2.5, 1.13e+15 ulp off

    Args:
        actual: A tree of arrays of any library, numbers and other leaves, or one leaf.
        expected: The tree or leaf to compare with.
        check_type: Whether leaves must have the same type (`numpy.ndarray`, `torch.Tensor`,
            `Array`). If False, arrays of two libraries can be identical: dtypes are compared by
            name.

    Raises:
        AssertionError: Names every path that differs.
    """
    __tracebackhide__ = True
    with structure.explaining({"actual": actual, "expected": expected}):
        _raise("actual is not identical to expected", differences(actual, expected, check_type))


def _raise(headline: str, lines: Iterator[Line]) -> None:
    __tracebackhide__ = True
    found = list(lines)
    if found:
        raise AssertionError(errors.message("actual", headline, found))


def differences(
    actual: Any, expected: Any, check_type: bool, values: bool = True, order: bool = True
) -> Iterator[Line]:
    """The paths at which two trees differ, and how.

    Without `values`, elements are not compared; without `order`, keys may have any order.
    """
    same_type = lambda x, y: type(x) is type(y)  # noqa: E731
    for path, wanted, found, what in structure.side_by_side(expected, actual, same_type):
        text = ""
        if what == "leaves":
            text = _leaf_difference(found, wanted, check_type, values)
        elif what == "order" and not order:
            continue
        elif what == "order":
            keys = [[key for key, _ in nodes.children(node)] for node in (wanted, found)]
            orders = [errors.enumerated(each, shown=repr) for each in keys]
            text = f"expected the keys in the order {orders[0]}, got {orders[1]}"
        elif what != "missing":  # missing keys are listed at their parents
            text = structure.mismatch(wanted, found, what)
        if text:
            yield path, text


def _leaf_difference(actual: Any, expected: Any, check_type: bool, values: bool) -> str:
    if check_type and type(actual) is not type(expected):
        return f"expected {_type_name(expected)}, got {_type_name(actual)}"
    backends = [_backends.find(unwrap(x)) for x in (actual, expected)]
    if None in backends:
        same = backends == [None, None] and _same_object(actual, expected)
        return "" if same else f"expected {show.leaf(expected)}, got {show.leaf(actual)}"
    facts = [b.facts(unwrap(x)) for b, x in zip(backends, (actual, expected), strict=True) if b]
    if not check_type:
        facts = [x._replace(dtype=_dtype_name(x.dtype), device=None) for x in facts]
    if facts[0] != facts[1]:
        shown = [show.leaf(x) for x in (expected, actual)]
        if shown[0] == shown[1]:
            shown = [f"{show.leaf(x)} on {unwrap(x).device}" for x in (expected, actual)]
        return f"expected {shown[0]}, got {shown[1]}"
    return _element_difference(actual, expected) if values else ""


def _type_name(x: Any) -> str:
    cls = type(x)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.").removeprefix("array_api_strict.")


def _same_object(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    both_nan = isinstance(a, float) and math.isnan(a) and math.isnan(b)
    return a is b or both_nan or bool(a == b)


def _element_difference(actual: Any, expected: Any) -> str:
    a, e = (_arrays.to_numpy(x) for x in (actual, expected))
    if a.dtype.kind not in "fc":
        different = np.argwhere(np.asarray(a != e))
        return _element_text(a, a, e, different[0], len(different)) if len(different) else ""
    x, y = _real_parts(a), _real_parts(e)
    same = ((x == y) & (np.signbit(x) == np.signbit(y))) | (np.isnan(x) & np.isnan(y))
    if same.all():
        return ""
    distance = np.where(same, -1, _distance(x, y, y, _format(actual)))
    return _element_text(a, x, y, _index_of_largest(distance), int((~same).sum()), distance)


def _format(x: Any) -> _arrays.Format:
    return _arrays.format_of(_arrays.name_of(getattr(unwrap(x), "dtype", float)))


def _real_parts(x: NumpyArray) -> NumpyArray:
    """Complex elements as pairs of real ones, along a new last axis."""
    return np.stack([x.real, x.imag], -1) if x.dtype.kind == "c" else x


def _index_of_largest(x: NumpyArray) -> tuple[Any, ...]:
    return np.unravel_index(np.argmax(x), x.shape)


def _element_text(
    array: NumpyArray,
    actual: NumpyArray,
    expected: NumpyArray,
    at: Any,
    count: int,
    distance: NumpyArray | None = None,
    verbs: tuple[str, str] = ("differs", "differ"),
) -> str:
    """A text with the number of elements that differ, and the values at the index `at`."""
    index = tuple(int(i) for i in at)
    part = ("real part ", "imag part ")[index[-1]] if actual.ndim > array.ndim else ""
    shown = ", ".join(map(str, index[: array.ndim]))
    where = f"at [{shown}] " if shown else ""
    values = f"{part}{_number(actual[index])}, expected {_number(expected[index])}"
    elements = errors.counted(array.size, "element")
    ulps = "" if distance is None else f", {distance[index]:.3g} ulp off"
    return f"{count:,} of {elements} {verbs[count != 1]}: {where}{values}{ulps}"


def _number(x: Any) -> str:
    if not isinstance(x, Decimal):
        return str(x)
    as_float = float(x)
    return str(as_float) if as_float and math.isfinite(as_float) else f"{x:.3g}"


def assert_close_ulp(
    actual: Any, expected: Any, ulp: float = 1, scale: Any = None, *, dtype: Any = None
) -> None:
    """Assert that every element is within some ulps (units in the last place) of the expected one.

    An ulp is the distance between neighbouring numbers, in the format of `actual`, at the size of
    the expected element. Keys (in any order) and shapes must be the same. Node types and dtypes may
    differ, so that expected values can be more precise. Infinity counts as the number 1 ulp above
    the largest finite number, because some exact results overflow.

    >>> from lars_tree.testing import assert_close_ulp
    >>> w, third = np.float32([0.3333333, 0.33333]), np.float64([1 / 3, 1 / 3])
    >>> assert_close_ulp({"a": w}, {"a": third}, ulp=2)
    Traceback (most recent call last):
        ...
    AssertionError: actual is not within 2 ulp of expected
      a: 1 of 2 elements is too far off: at [1] 0.33333, expected 0.3333333333333333, 112 ulp off

    Args:
        actual: A tree of floating-point or complex arrays of any library, or one array.
        expected: A tree with the same keys: arrays, or arrays of `decimal.Decimal` objects.
        ulp: The largest distance that is accepted, in ulps.
        scale: The size at which an ulp is measured, by default that of the expected element: a
            prefix of `expected` with numbers or arrays that broadcast. For w - u use the larger of
            |w| and |u|, because digits that cancel are lost.
        dtype: The format whose ulps are counted, by default that of `actual`.

    Raises:
        AssertionError: Names every path that differs, and the worst element of each array.
    """
    __tracebackhide__ = True
    with structure.explaining({"actual": actual, "expected": expected}):
        mismatch = list(structure.differences(expected, actual, exact=True))
    if mismatch:
        raise AssertionError(errors.message("actual", "actual does not match expected", mismatch))
    actuals = structure.broadcast("actual", expected, actual, exact=True)
    scales = structure.broadcast("scale", expected, scale, to="expected")
    rows = zip(structure.walk(expected), actuals, scales, strict=True)
    lines = ((path, _excess(a, e, ulp, size, dtype)) for (path, e), a, size in rows)
    _raise(f"actual is not within {ulp:g} ulp of expected", ((p, t) for p, t in lines if t))


def _excess(actual: Any, expected: Any, ulp: float, scale: Any, dtype: Any) -> str:
    """A text about the elements that are too far off; empty if there are none."""
    different = f"expected {show.leaf(expected)}, got {show.leaf(actual)}"
    if actual is None or expected is None:
        return "" if actual is expected else different
    a, e = (_arrays.to_numpy(x) for x in (actual, expected))
    if a.shape != e.shape:
        return different
    if a.dtype.kind not in "fc":
        return f"{show.leaf(actual)} has no ulp"
    x, y = _real_parts(a), _real_parts(e)
    sizes = y if scale is None else np.broadcast_to(_arrays.to_numpy(scale), a.shape)
    if scale is not None and x.ndim > a.ndim:
        sizes = sizes[..., None]
    form = _format(actual) if dtype is None else _arrays.format_of(_arrays.name_of(dtype))
    distance = _distance(x, y, sizes, form)
    count = int(np.count_nonzero(~(distance <= ulp)))
    if not count:
        return ""
    verbs = "is too far off", "are too far off"
    return _element_text(a, x, y, _index_of_largest(distance), count, distance, verbs)


_WIDE = np.longdouble  # if this type is only double, distances of float64 are rounded


def _distance(
    actual: NumpyArray, expected: NumpyArray, scale: NumpyArray, form: _arrays.Format
) -> NumpyArray:
    """The distance of each real element, in ulps of the format at the size of `scale`.

    Magnitudes above 2**(form.largest + 1), including infinity, count as that number. NaN has
    distance 0 from NaN, and infinite distance from everything else. If `expected` or `scale`
    contains Decimals, distances are computed in Decimals.
    """
    exponents = _ulp_exponents(scale.astype(_WIDE), form)
    if object in (expected.dtype, scale.dtype):
        distance = np.frompyfunc(partial(_decimal_distance, form), 3, 1)
        return np.asarray(distance(actual, expected, exponents), np.float64)
    with np.errstate(all="ignore"):
        end = np.ldexp(_WIDE(1), form.largest + 1)
        a, e = (np.clip(x.astype(_WIDE), -end, end) for x in (actual, expected))
        off = np.where(a == e, _WIDE(0), np.abs(a - e)) / np.ldexp(_WIDE(1), exponents)
        off = np.where(np.isnan(a) & np.isnan(e), _WIDE(0), off)
        return np.where(np.isnan(off), np.inf, off).astype(np.float64)


def _ulp_exponents(scale: NumpyArray, form: _arrays.Format) -> NumpyArray:
    exponents = np.frexp(np.abs(scale))[1] - 1
    exponents = np.where(scale == 0, form.smallest, exponents)
    exponents = np.where(np.isfinite(scale), exponents, form.largest)
    return np.asarray(np.clip(exponents, form.smallest, form.largest) - form.bits + 1)


def _decimal_distance(form: _arrays.Format, actual: Any, expected: Any, exponent: int) -> float:
    numbers = [x if isinstance(x, Decimal) else Decimal(float(x)) for x in (actual, expected)]
    nans = [x.is_nan() for x in numbers]
    if any(nans):
        return 0.0 if all(nans) else math.inf
    end = Decimal(2) ** (form.largest + 1)
    a, e = (max(-end, min(end, x)) for x in numbers)
    return float(abs(a - e) / Decimal(2) ** exponent)
