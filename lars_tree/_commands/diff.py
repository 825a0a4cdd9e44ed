"""`lars-tree diff`: which leaves of two files differ, and by how much."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._commands.output import Output, columns
from lars_tree._display import show
from lars_tree._files import formats, names
from lars_tree._files.formats import Stored
from lars_tree._tree.structure import mismatch, side_by_side

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20  # the number of elements compared at a time


class Change(NamedTuple):
    """How the elements of two arrays of one shape differ.

    Attributes:
        changed: How many elements differ; NaN equals NaN, and 0 equals -0.
        largest: The largest |b - a| / |a| of these elements: infinite if some a is 0, NaN if some
            a or b is NaN.
    """

    changed: int
    largest: float


def diff(a: str, b: str) -> Output:
    """Compare keys, shapes, dtypes and elements, but neither metadata nor the order of keys.

    The exit status is 1 if the trees differ.
    """
    structure: list[dict[str, str]] = []
    leaves: list[dict[str, Any]] = []
    with formats.opened(a) as one, formats.opened(b) as other:
        for path, x, y, what in side_by_side(one.tree, other.tree):
            if what == "leaves":
                leaves.append(_leaf_record(path, x, y, one, other))
            elif what in ("nodes", "keys"):
                text = mismatch(x, y, what)
                structure.append({"path": errors.path_string(path), "difference": text})
    differing = [leaf for leaf in leaves if leaf["difference"]]
    lines = [(x["path"] or "/", x["difference"]) for x in [*structure, *differing]]
    printed = [f"{len(differing)} of {len(leaves)} leaves that both have differ", *columns(lines)]
    record = {"a": a, "b": b, "equal": not lines, "structure": structure, "leaves": leaves}
    return Output("\n".join(printed) if lines else "", record, int(bool(lines)))


def _leaf_record(path: errors.Path, x: Any, y: Any, a: Stored, b: Stored) -> dict[str, Any]:
    shown = {"a": show.leaf(x), "b": show.leaf(y)}
    parts = [f"{shown['a']} in A, {shown['b']} in B"] if shown["a"] != shown["b"] else []
    change = None
    if x is not None and y is not None and x.shape == y.shape:
        name = names.join(path)
        change = compared(a.entries[name].fetch(), b.entries[name].fetch())
        if change.changed:
            count = f"{change.changed:,} of {x.size:,} elements"
            parts.append(f"{count} differ, by up to {change.largest:.4g} of |a|")
    return {
        "path": errors.path_string(path),
        **shown,
        "changed": change and change.changed,
        "largest_relative_change": change and change.largest,
        "difference": "; ".join(parts),
    }


def compared(a: Array, b: Array) -> Change:
    """The difference between two arrays, computed in double precision, a block at a time."""
    a, b = a.reshape(-1), b.reshape(-1)
    count, largest = 0, 0.0
    for start in range(0, a.size, _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        if x.dtype != y.dtype:
            x, y = _wide(x), _wide(y)
        differ = (x != y) & ~((x != x) & (y != y))  # noqa: PLR0124 - NaN != NaN
        if differ.any():
            count += int(np.count_nonzero(differ))
            x, y = _wide(x[differ]), _wide(y[differ])
            with np.errstate(all="ignore"):
                largest = float(np.maximum(largest, np.max(np.abs(y - x) / np.abs(x))))
    return Change(count, largest)


def _wide(x: Array) -> Array:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
