"""Comparison of two trees: whether they are equal or close, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lars_tree import _backends
from lars_tree._backends.base import Kind, Values, is_bfloat16
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.wrapper import unwrap
from lars_tree._display import show
from lars_tree._tree import nodes, structure
from lars_tree.errors import Line

Test = Callable[[NumpyArray, NumpyArray], bool]

_BOOLS = {"bool", "torch.bool", "array_api_strict.bool"}
_NUMERIC = frozenset("biufc")  # kinds of dtypes whose elements can be compared and subtracted


def equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same keys, and leaves of the same shape and elements."""
    return _matches(a, b, _equal_elements)


def close(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two trees have the same keys, and |x - y| <= atol + rtol |y| for all elements."""

    def test(x: NumpyArray, y: NumpyArray) -> bool:
        numeric = x.dtype.kind in _NUMERIC and y.dtype.kind in _NUMERIC
        return bool(np.allclose(x, y, rtol, atol)) if numeric else _equal_elements(x, y)

    return _matches(a, b, test)


def _equal_elements(x: NumpyArray, y: NumpyArray) -> bool:
    comparable = x.dtype.kind == y.dtype.kind or {x.dtype.kind, y.dtype.kind} <= _NUMERIC
    return comparable and bool(np.array_equal(x, y))


def _matches(a: Any, b: Any, test: Test) -> bool:
    return all(
        what == "order" or (what == "leaves" and _leaf_matches(x, y, test))
        for _, x, y, what in structure.side_by_side(a, b, nodes.may_be_equal)
    )


def _leaf_matches(a: Any, b: Any, test: Test) -> bool:
    a, b = unwrap(a), unwrap(b)
    x, y = _elements(a), _elements(b)
    if x is not None and y is not None:
        return x.shape == y.shape and test(x, y)
    if a is b or _backends.find(a) is not None or _backends.find(b) is not None:
        return a is b
    try:
        return bool(a == b)
    except Exception:  # objects that cannot be compared count as different
        return False


def _elements(x: Any) -> NumpyArray | None:
    """The elements of an array or number as a numpy array; None if x is another object or lazy."""
    if isinstance(x, (int, float, complex)):
        return np.asarray(x)
    backend = _backends.find(x)
    if backend is None or backend.fault(x) or backend.values(x) is Values.TRACED:
        return None
    if backend.facts(x).kind is Kind.OTHER and not _is_comparable(x.dtype):
        return None
    elements = backend.to_numpy(x)
    return elements.astype(np.float64) if is_bfloat16(elements.dtype) else elements


def _is_comparable(dtype: Any) -> bool:
    """Whether elements of a dtype that is not numeric can be compared: bools, strings, dates."""
    return str(dtype) in _BOOLS or getattr(dtype, "kind", None) in set("USMm")


def differences(a: Any, b: Any) -> Iterator[Line]:
    """The paths at which two trees differ, each with a description of both sides."""
    for path, x, y, what in structure.side_by_side(a, b, nodes.may_be_equal):
        if what == "missing":
            yield path, "only there" if x is structure.MISSING else "only here"
        elif what == "nodes":
            here, there = show.leaf(x), show.leaf(y)
            other = " with other static data" if here == there else ""
            yield path, f"{here} here, {there}{other} there"
        elif what == "leaves" and not _leaf_matches(x, y, _equal_elements):
            yield path, _leaf_difference(x, y)


def _leaf_difference(a: Any, b: Any) -> str:
    here, there = show.leaf(a), show.leaf(b)
    x, y = _elements(unwrap(a)), _elements(unwrap(b))
    if here == there and x is not None and y is not None and x.size and x.dtype.kind in _NUMERIC:
        with np.errstate(all="ignore"):
            largest = np.max(np.abs(x.astype(np.result_type(x, np.float64)) - y))
        return f"{here}: elements differ by up to {float(largest):.6g}"
    return f"{here} here, {there} there"
