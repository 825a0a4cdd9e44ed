"""`lars-tree diff`: which leaves of two files differ, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._commands.output import Output, columns, progress
from lars_tree._display import show
from lars_tree._files import formats, names
from lars_tree._files.formats import Stored
from lars_tree._tree.paths import put_new
from lars_tree._tree.structure import mismatch, side_by_side, walk

_BLOCK = 1 << 20  # the number of elements compared at a time


class Change(NamedTuple):
    """How the elements of two arrays of one shape differ, without those that are NaN.

    Attributes:
        changed: How many elements differ; 0 equals -0.
        size: |b - a|, the norm of the difference.
        norm: |a|.
        nan: How many elements are NaN in a only, and in b only.
    """

    changed: int
    size: float
    norm: float
    nan: tuple[int, int]

    @property
    def relative(self) -> float:
        """|b - a| / |a|: infinite if only |a| is 0, NaN if both norms are infinite."""
        with np.errstate(all="ignore"):
            return float(np.float64(self.size) / self.norm) if self.size else 0.0

    def text(self, size: int) -> str:
        """The differences in words; `size` is the number of elements. Empty if there are none."""
        parts = []
        if self.changed:
            if 0 < self.norm < math.inf and self.size < math.inf:
                amount = f"|b - a| / |a| = {self.relative:.4g}"
            else:
                amount = f"|b - a| = {self.size:.4g}, |a| = {self.norm:.4g}"
            parts.append(f"{self.changed:,} of {size:,} elements differ, {amount}")
        parts += [f"{n:,} NaN in {x} only" for n, x in zip(self.nan, "AB", strict=True) if n]
        return "; ".join(parts)


def diff(a: str, b: str) -> Output:
    """Compare names, shapes, dtypes and elements, but neither metadata nor the order of names.

    The exit status is 1 if the trees differ.
    """
    structure: list[dict[str, str]] = []
    common: list[tuple[errors.Path, Any, Any]] = []
    with formats.opened(a) as one, formats.opened(b) as other:
        for path, x, y, what in side_by_side(*_comparable(one.tree, other.tree)):
            if what == "leaves":
                common.append((path, x, y))
            elif what in ("nodes", "keys"):
                text = mismatch(x, y, what)
                structure.append({"path": errors.path_string(path), "difference": text})
        size = sum(0 if x is None else x.nbytes for _, x, _ in common)
        leaves: list[dict[str, Any]] = []
        with progress(size, "diff") as advance:
            for path, x, y in common:
                leaves.append(_leaf_record(path, x, y, one, other))
                advance(0 if x is None else x.nbytes)
    differing = [leaf for leaf in leaves if leaf["difference"]]
    lines = [(x["path"] or "/", x["difference"]) for x in [*structure, *differing]]
    header = f"{len(differing):,} of {len(leaves):,} leaves that both have differ"
    if structure and not leaves:
        header = f"{a} and {b} have no leaf in common"
    printed = "\n".join([header, *columns(lines)]) if lines else ""
    record = {"a": a, "b": b, "equal": not lines, "structure": structure, "leaves": leaves}
    return Output(printed, record, int(bool(lines)))


def _comparable(a: Any, b: Any) -> tuple[Any, Any]:
    """Two trees with the same rule for names: all names are split at '.', or none if they collide.

    A flat state_dict has the same names as a tree, but another structure.
    """
    try:
        return _split(a), _split(b)
    except errors.PathKeyError:
        return _flat(a), _flat(b)


def _flat(tree: Any) -> dict[str, Any]:
    return {names.join(path): x for path, x in _leaves(tree)}


def _split(tree: Any) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for path, x in _leaves(tree):
        put_new(new, tuple(names.join(path).split(".")), x)
    return new


def _leaves(tree: Any) -> Iterator[tuple[errors.Path, Any]]:
    return ((path, x) for path, x in walk(tree, empty_nodes=True) if path)


def _leaf_record(path: errors.Path, x: Any, y: Any, a: Stored, b: Stored) -> dict[str, Any]:
    shown = {"a": show.leaf(x), "b": show.leaf(y)}
    parts = [f"{shown['a']} in A, {shown['b']} in B"] if shown["a"] != shown["b"] else []
    change = None
    if x is not None and y is not None and x.shape == y.shape:
        name = names.join(path)
        change = compared(a.entries[name].fetch(), b.entries[name].fetch())
        parts += filter(None, [change.text(x.size)])
    return {
        "path": errors.path_string(path),
        **shown,
        "changed": change and change.changed,
        "relative_change": change and change.relative,
        "change_norm": change and change.size,
        "a_norm": change and change.norm,
        "nan_in_a_only": change and change.nan[0],
        "nan_in_b_only": change and change.nan[1],
        "difference": "; ".join(parts),
    }


def compared(a: NumpyArray, b: NumpyArray) -> Change:
    """The difference between two arrays, computed in double precision, a block at a time."""
    a, b = a.reshape(-1), b.reshape(-1)
    count, size, norm, nan_a, nan_b = 0, 0.0, 0.0, 0, 0
    for start in range(0, a.size, _BLOCK):
        x, y = a[start : start + _BLOCK], b[start : start + _BLOCK]
        if x.dtype != y.dtype:
            x, y = _wide(x), _wide(y)
        is_nan, is_nan_too = x != x, y != y  # noqa: PLR0124
        differ = x != y
        if is_nan.any() or is_nan_too.any():
            nan_a += int(np.count_nonzero(is_nan & ~is_nan_too))
            nan_b += int(np.count_nonzero(is_nan_too & ~is_nan))
            differ &= ~(is_nan | is_nan_too)
            x = np.where(is_nan, 0, x)
        norm = math.hypot(norm, _norm(_wide(x)))
        if differ.any():
            count += int(np.count_nonzero(differ))
            with np.errstate(all="ignore"):
                size = math.hypot(size, _norm(_wide(y[differ]) - _wide(x[differ])))
    return Change(count, size, norm, (nan_a, nan_b))


def _norm(x: NumpyArray) -> float:
    """The 2-norm, without overflow of squares; infinite if an element is not finite."""
    magnitudes = np.abs(x)
    largest = float(magnitudes.max(initial=0))
    if largest == 0:
        return 0.0
    if not largest < math.inf:
        return math.inf
    return largest * math.sqrt(float(np.sum(np.square(magnitudes / largest))))


def _wide(x: NumpyArray) -> NumpyArray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
