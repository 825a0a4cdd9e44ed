"""Two nests side by side: equal, close, or where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lars_tree import _backends, _show, _tree
from lars_tree._backends.base import Kind, Values, is_bfloat16
from lars_tree._core.wrapper import unwrap
from lars_tree.errors import Line

Array = np.ndarray[Any, Any]
Test = Callable[[Array, Array], bool]

_TRUTH = {"bool", "torch.bool", "array_api_strict.bool"}
_NUMERIC = frozenset("biufc")  # kinds of dtypes whose elements compare and subtract


def equal(a: Any, b: Any) -> bool:
    """Whether two nests have the same keys, and leaves of the same shape and elements."""
    return _matches(a, b, _equal_elements)


def close(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two nests have the same keys, and |x - y| <= atol + rtol |y| for all elements."""

    def test(x: Array, y: Array) -> bool:
        numeric = x.dtype.kind in _NUMERIC and y.dtype.kind in _NUMERIC
        return bool(np.allclose(x, y, rtol, atol)) if numeric else _equal_elements(x, y)

    return _matches(a, b, test)


def _equal_elements(x: Array, y: Array) -> bool:
    comparable = x.dtype.kind == y.dtype.kind or {x.dtype.kind, y.dtype.kind} <= _NUMERIC
    return comparable and bool(np.array_equal(x, y))


def _matches(a: Any, b: Any, test: Test) -> bool:
    def compare(x: Any, y: Any) -> tuple[str, bool]:
        if x is _tree.MISSING or y is _tree.MISSING:
            return "another key", False
        if _tree.is_leaf(x) and _tree.is_leaf(y):
            return ("" if _leaf_matches(x, y, test) else "another leaf"), False
        return ("", True) if _same_node(x, y) else ("another node", False)

    return next(_tree.side_by_side(a, b, compare), None) is None


def _same_node(a: Any, b: Any) -> bool:
    """Whether a and b are nodes that may be equal: dicts of any type, else of one type."""
    if _tree.is_leaf(a) or _tree.is_leaf(b):
        return False
    return type(a) is type(b) or (isinstance(a, dict) and isinstance(b, dict))


def _leaf_matches(a: Any, b: Any, test: Test) -> bool:
    a, b = unwrap(a), unwrap(b)
    x, y = _elements(a), _elements(b)
    if x is not None and y is not None:
        return x.shape == y.shape and test(x, y)
    if a is b or _backends.find(a) is not None or _backends.find(b) is not None:
        return a is b
    try:
        return bool(a == b)
    except Exception:  # an object that cannot say whether it is equal is not
        return False


def _elements(x: Any) -> Array | None:
    """The elements as numpy knows them; None of what is no array or cannot be looked at."""
    if isinstance(x, (int, float, complex)):
        return np.asarray(x)
    backend = _backends.find(x)
    if backend is None or backend.fault(x) or backend.values(x) is Values.TRACED:
        return None
    if backend.facts(x).kind is Kind.OTHER and not _is_plain(x):
        return None
    numbers = backend.to_numpy(x)
    return numbers.astype(np.float64) if is_bfloat16(numbers.dtype) else numbers


def _is_plain(x: Any) -> bool:
    """Whether x has truth values, strings or dates: no numbers, but as easy to compare."""
    return str(x.dtype) in _TRUTH or getattr(x.dtype, "kind", None) in set("USMm")


def differences(a: Any, b: Any) -> Iterator[Line]:
    """Where two nests differ, and how."""
    return _tree.side_by_side(a, b, _difference)


def _difference(a: Any, b: Any) -> tuple[str, bool]:
    if a is _tree.MISSING or b is _tree.MISSING:
        return ("only there" if a is _tree.MISSING else "only here"), False
    if _tree.is_leaf(a) and _tree.is_leaf(b):
        return ("" if _leaf_matches(a, b, _equal_elements) else _leaf_difference(a, b)), False
    if not _same_node(a, b):
        return f"{_show.leaf(a)} here, {_show.leaf(b)} there", False
    return "", True


def _leaf_difference(a: Any, b: Any) -> str:
    here, there = _show.leaf(a), _show.leaf(b)
    x, y = _elements(unwrap(a)), _elements(unwrap(b))
    if here == there and x is not None and y is not None and x.size and x.dtype.kind in _NUMERIC:
        with np.errstate(all="ignore"):
            largest = np.max(np.abs(x.astype(np.result_type(x, np.float64)) - y))
        return f"{here}: elements differ by up to {float(largest):.6g}"
    return f"{here} here, {there} there"
