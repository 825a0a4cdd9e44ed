"""Two nests side by side: equal, close, or where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lars_tree import _backends, _show, _tree
from lars_tree._backends.base import Values
from lars_tree.array import unwrap
from lars_tree.errors import Line, Path

Test = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], bool]


def equal(a: Any, b: Any) -> bool:
    """Whether two nests have the same keys, and leaves of the same shape and elements."""
    return _matches(a, b, lambda x, y: bool(np.array_equal(x, y)))


def close(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two nests have the same keys, and |x - y| <= atol + rtol |y| for all elements."""
    return _matches(a, b, lambda x, y: bool(np.allclose(x, y, rtol, atol)))


def _matches(a: Any, b: Any, test: Test) -> bool:
    if _tree.is_leaf(a) or _tree.is_leaf(b):
        return _tree.is_leaf(a) and _tree.is_leaf(b) and _leaf_matches(a, b, test)
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):
        return False
    mine, theirs = dict(_tree.children(a)), dict(_tree.children(b))
    return mine.keys() == theirs.keys() and all(_matches(mine[k], theirs[k], test) for k in mine)


def _leaf_matches(a: Any, b: Any, test: Test) -> bool:
    a, b = unwrap(a), unwrap(b)
    x, y = _elements(a), _elements(b)
    if x is None or y is None:
        return a is b or (not (_is_array(a) or _is_array(b)) and bool(a == b))
    return x.shape == y.shape and test(x, y)


def _is_array(x: Any) -> bool:
    return _backends.find(x) is not None


def _elements(x: Any) -> np.ndarray[Any, Any] | None:
    """The elements as numpy knows them; None of what is no array or cannot be looked at."""
    if isinstance(x, (int, float, complex)):
        return np.asarray(x)
    backend = _backends.find(x)
    if backend is None or backend.fault(x) or backend.values(x) is Values.LATER:
        return None
    numbers = backend.to_numpy(x)
    return numbers.astype(np.float64) if numbers.dtype.name == "bfloat16" else numbers


def differences(a: Any, b: Any, path: Path = ()) -> Iterator[Line]:
    """Where two nests differ, and how."""
    if _tree.is_leaf(a) or _tree.is_leaf(b):
        if _tree.is_leaf(a) and _tree.is_leaf(b):
            if not _leaf_matches(a, b, lambda x, y: bool(np.array_equal(x, y))):
                yield path, _leaf_difference(a, b)
        else:
            yield path, f"{_show.leaf(a)} here, {_show.leaf(b)} there"
        return
    mine, theirs = dict(_tree.children(a)), dict(_tree.children(b))
    for key, child in mine.items():
        if key in theirs:
            yield from differences(child, theirs[key], (*path, key))
        else:
            yield (*path, key), "only here"
    for key in theirs:
        if key not in mine:
            yield (*path, key), "only there"


def _leaf_difference(a: Any, b: Any) -> str:
    here, there = _show.leaf(a), _show.leaf(b)
    x, y = _elements(unwrap(a)), _elements(unwrap(b))
    if here != there or x is None or y is None or not x.size:
        return f"{here} here, {there} there"
    with np.errstate(all="ignore"):
        largest = np.max(np.abs(x.astype(np.result_type(x, np.float64)) - y))
    return f"{here}: elements differ by up to {float(largest):.6g}"
