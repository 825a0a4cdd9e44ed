"""Assertions on two trees: the same to the last bit, or within so many units in the last place.

A failure lists every path that differs, in the dialect of `lars_tree.errors`, and of each array the
worst element: its index, both values, and how far apart they are in ulps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np

from lars_tree import _backends, _show, _tree, errors
from lars_tree._core.wrapper import unwrap
from lars_tree.errors import Line
from lars_tree.testing import _arrays, _ulp
from lars_tree.testing._arrays import Array


def assert_identical(actual: Any, expected: Any, *, check_type: bool = True) -> None:
    """Assert that two trees are the same: node types, key order, dtypes, shapes, devices and bits.

    NaN is NaN, whatever its sign and payload: no library promises them. -0.0 is not 0.0. How arrays
    lie in memory does not matter.

    >>> from lars_tree.testing import assert_identical
    >>> assert_identical({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.5])})
    Traceback (most recent call last):
        ...
    AssertionError: actual is not identical to expected
      a: 1 of 2 elements differs: at [1] 2.0, expected 2.5, 1.13e+15 ulp off

    Args:
        actual: A tree of arrays of any library, numbers and other leaves, or one of them.
        expected: The same.
        check_type: Whether leaves must be of one type (`numpy.ndarray`, `torch.Tensor`, `Array`).
            False also compares arrays of two libraries, dtypes by their names.

    Raises:
        AssertionError: naming every path that differs.
    """
    with _tree.explaining({"actual": actual, "expected": expected}):
        _raise("actual is not identical to expected", differences(actual, expected, check_type))


def _raise(headline: str, lines: Iterator[Line]) -> None:
    found = list(lines)
    if found:
        raise AssertionError(errors.message("actual", headline, found))


def differences(
    actual: Any, expected: Any, check_type: bool, values: bool = True
) -> Iterator[Line]:
    """Where two trees differ, and how; `values` False looks at all but the elements of arrays."""

    def compare(wanted: Any, found: Any) -> tuple[str, bool]:
        if wanted is _tree.MISSING or found is _tree.MISSING:
            return "", False  # that was said of their parents
        if _tree.is_leaf(found) and _tree.is_leaf(wanted):
            return _leaf_difference(found, wanted, check_type, values), False
        return _node_difference(found, wanted)

    return _tree.side_by_side(expected, actual, compare)


def _node_difference(actual: Any, expected: Any) -> tuple[str, bool]:
    mine, theirs = ([key for key, _ in _tree.children(node)] for node in (actual, expected))
    same_type = type(actual) is type(expected)
    if same_type and mine == theirs:
        return "", True
    if not same_type or (isinstance(expected, (list, tuple)) and len(mine) != len(theirs)):
        text = f"expected {errors.describe(expected)}, got {errors.describe(actual)}"
        return text, same_type
    if set(mine) != set(theirs):
        return errors.key_differences(theirs, mine), True
    orders = [errors.enumerated(keys, shown=repr) for keys in (theirs, mine)]
    return f"expected the keys in the order {orders[0]}, got {orders[1]}", True


def _leaf_difference(actual: Any, expected: Any, check_type: bool, values: bool) -> str:
    if check_type and type(actual) is not type(expected):
        return f"expected {_type_name(expected)}, got {_type_name(actual)}"
    backends = [_backends.find(unwrap(x)) for x in (actual, expected)]
    if None in backends:
        same = backends == [None, None] and _same_object(actual, expected)
        return "" if same else f"expected {_show.leaf(expected)}, got {_show.leaf(actual)}"
    facts = [b.facts(unwrap(x)) for b, x in zip(backends, (actual, expected), strict=True) if b]
    if not check_type:
        facts = [x._replace(dtype=_dtype_name(x.dtype), device=None) for x in facts]
    if facts[0] != facts[1]:
        shown = [_show.leaf(x) for x in (expected, actual)]
        if shown[0] == shown[1]:
            shown = [f"{_show.leaf(x)} on {unwrap(x).device}" for x in (expected, actual)]
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
    nan = isinstance(a, float) and math.isnan(a) and math.isnan(b)
    return a is b or nan or bool(a == b)


def _element_difference(actual: Any, expected: Any) -> str:
    a, e = (_arrays.to_numpy(x) for x in (actual, expected))
    if a.dtype.kind not in "fc":
        at = np.argwhere(np.asarray(a != e))
        return _text(a, a, e, at[:1], len(at), "") if len(at) else ""
    x, y = _parts(a), _parts(e)
    same = ((x == y) & (np.signbit(x) == np.signbit(y))) | (np.isnan(x) & np.isnan(y))
    if same.all():
        return ""
    off = _ulp.errors(x, y, y, _arrays.format_of(_format_name(actual)))
    worst = np.unravel_index(np.argmax(np.where(same, -1, off)), off.shape)
    return _text(a, x, y, [worst], (~same).sum(), f", {off[worst]:.3g} ulp off")


def _format_name(x: Any) -> str:
    return _arrays.name_of(getattr(unwrap(x), "dtype", float))


def _parts(x: Array) -> Array:
    """Complex numbers as pairs of real ones, along a further axis."""
    return np.stack([x.real, x.imag], -1) if x.dtype.kind == "c" else x


def _text(whole: Array, a: Array, e: Array, at: Any, count: int, off: str, how: str = "") -> str:
    index = tuple(int(i) for i in at[0])
    part = ""
    if a.ndim > whole.ndim:
        part = ("real", "imag")[index[-1]] + " part "
    shown = ", ".join(map(str, index[: whole.ndim]))
    where = f"at [{shown}] " if shown else ""
    verb = how or ("differs" if count == 1 else "differ")
    values = f"{part}{_number(a[index])}, expected {_number(e[index])}"
    elements = errors.counted(whole.size, "element")
    return f"{count:,} of {elements} {verb}: {where}{values}{off}"


def _number(x: Any) -> str:
    if not isinstance(x, Decimal):
        return str(x)
    near = float(x)
    return str(near) if near and math.isfinite(near) else f"{x:.3g}"


def assert_close_ulp(
    actual: Any, expected: Any, ulp: float = 1, scale: Any = None, *, dtype: Any = None
) -> None:
    """Assert that every element is within so many ulps (units in the last place) of the expected.

    An ulp is the distance of neighbouring numbers, in the format of `actual`, at the size of the
    expected element. Keys must be the same, in any order, and shapes; node types and dtypes need
    not: what is expected may be known more exactly. A result that had to overflow is 1 ulp from the
    largest number, not infinitely far.

    >>> from lars_tree.testing import assert_close_ulp
    >>> w, third = np.float32([0.3333333, 0.33333]), np.float64([1 / 3, 1 / 3])
    >>> assert_close_ulp({"a": w}, {"a": third}, ulp=2)
    Traceback (most recent call last):
        ...
    AssertionError: actual is not within 2 ulp of expected
      a: 1 of 2 elements is too far off: at [1] 0.33333, expected 0.3333333333333333, 112 ulp off

    Args:
        actual: A tree of floating-point or complex arrays of any library, or one.
        expected: A tree of the same keys: arrays, or arrays of `decimal.Decimal` objects.
        ulp: The most that an element may be off, in ulps.
        scale: At what size an ulp is measured instead: a prefix of `expected`, of numbers or
            arrays that broadcast. For w - u, the larger of |w| and |u|: what cancels may not be
            asked back.
        dtype: The format that an ulp is of, if not that of `actual`.

    Raises:
        AssertionError: naming every path that differs, and of each array the worst element.
    """
    with _tree.explaining({"actual": actual, "expected": expected}):
        mismatch = list(_tree.differences(expected, actual, exact=True))
    if mismatch:
        raise AssertionError(errors.message("actual", "actual does not match expected", mismatch))
    actuals = _tree.broadcast("actual", expected, actual, exact=True)
    scales = _tree.broadcast("scale", expected, scale, to="expected")
    rows = zip(_tree.walk(expected), actuals, scales, strict=True)
    lines = ((path, _distance(a, e, ulp, size, dtype)) for (path, e), a, size in rows)
    _raise(f"actual is not within {ulp:g} ulp of expected", ((p, t) for p, t in lines if t))


def _distance(actual: Any, expected: Any, ulp: float, scale: Any, dtype: Any) -> str:
    if actual is None or expected is None:
        return "" if actual is expected else _expected(expected, actual)
    a, e = (_arrays.to_numpy(x) for x in (actual, expected))
    if a.shape != e.shape or a.dtype.kind not in "fc":
        return (
            _expected(expected, actual)
            if a.shape != e.shape
            else f"{_show.leaf(actual)} has no ulp"
        )
    x, y = _parts(a), _parts(e) if e.dtype != object else e
    sizes = y if scale is None else np.broadcast_to(_arrays.to_numpy(scale), a.shape)
    if scale is not None and x.ndim > a.ndim:
        sizes = sizes[..., None]
    form = _arrays.format_of(_format_name(actual) if dtype is None else _arrays.name_of(dtype))
    off = _ulp.errors(x, y, sizes, form)
    far = ~(off <= ulp)
    if not far.any():
        return ""
    worst = np.unravel_index(np.argmax(off), off.shape)
    count = int(far.sum())
    how = "is too far off" if count == 1 else "are too far off"
    return _text(a, x, y, [worst], count, f", {off[worst]:.3g} ulp off", how)


def _expected(expected: Any, actual: Any) -> str:
    return f"expected {_show.leaf(expected)}, got {_show.leaf(actual)}"
