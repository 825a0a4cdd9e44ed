"""`lars-tree diff`: where the trees in two files differ, and by how much; read leaf by leaf."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lars_tree import _show, _tree, errors
from lars_tree._commands.output import Output, columns
from lars_tree._files import formats, names
from lars_tree._files.formats import Stored

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20  # elements that are compared at a time


class Change(NamedTuple):
    """How the elements of two arrays of one shape differ.

    Attributes:
        changed: How many differ; NaN is like NaN, and 0 like -0.
        largest: The largest |b - a| / |a| among these; infinite where a is 0, NaN where one is.
    """

    changed: int
    largest: float


def diff(a: str, b: str) -> Output:
    """Compare the trees: keys, shapes, dtypes, elements; not metadata, nor the order of keys.

    The exit status is 1 where they differ.
    """
    with formats.opened(a) as one, formats.opened(b) as other:
        structure = [
            {"path": errors.path_string(path), "difference": text}
            for path, text in _tree.differences(one.tree, other.tree, exact=True)
        ]
        theirs = dict(_tree.walk(other.tree))
        pairs = [(path, x, theirs[path]) for path, x in _tree.walk(one.tree) if path in theirs]
        leaves = [_compared_leaf(path, x, y, one, other) for path, x, y in pairs]
    differing = [leaf for leaf in leaves if leaf["difference"]]
    lines = [(x["path"] or "/", x["difference"]) for x in [*structure, *differing]]
    text = [f"{len(differing)} of {len(leaves)} leaves that both have differ", *columns(lines)]
    record = {"a": a, "b": b, "equal": not lines, "structure": structure, "leaves": leaves}
    return Output("\n".join(text) if lines else "", record, int(bool(lines)))


def _compared_leaf(path: errors.Path, x: Any, y: Any, a: Stored, b: Stored) -> dict[str, Any]:
    """What there is to say of a leaf that is in both."""
    here, there = _show.leaf(x), _show.leaf(y)
    parts = [f"{here} in A, {there} in B"] if here != there else []
    change = None
    if x is not None and y is not None and x.shape == y.shape:
        name = names.join(path)
        change = compared(a.entries[name].fetch(), b.entries[name].fetch())
        if change.changed:
            count = f"{change.changed:,} of {x.size:,} elements"
            parts.append(f"{count} differ, by up to {change.largest:.4g} of |a|")
    return {
        "path": errors.path_string(path),
        "a": here,
        "b": there,
        "changed": change and change.changed,
        "largest_relative_change": change and change.largest,
        "difference": "; ".join(parts),
    }


def compared(a: Array, b: Array) -> Change:
    """How the elements differ, computed in double precision, a block at a time."""
    a, b = a.reshape(-1), b.reshape(-1)
    count, largest = 0, 0.0
    for start in range(0, a.size, _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        if x.dtype != y.dtype:
            x, y = _wide(x), _wide(y)
        differ = (x != y) & ~((x != x) & (y != y))  # noqa: PLR0124 - NaN is what is not itself
        if differ.any():
            count += int(np.count_nonzero(differ))
            x, y = _wide(x[differ]), _wide(y[differ])
            with np.errstate(all="ignore"):
                largest = float(np.maximum(largest, np.max(np.abs(y - x) / np.abs(x))))
    return Change(count, largest)


def _wide(x: Array) -> Array:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
