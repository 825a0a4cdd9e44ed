"""How a Container looks: as text, as HTML, in sums."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from itertools import islice
from math import prod
from typing import Any, NamedTuple

from lars_tree import _backends, _tree, errors
from lars_tree.array import unwrap

_MOST_LINES = 40
_MOST_ROWS = 1000


class Totals(NamedTuple):
    """What the leaves of a nest come to."""

    leaves: int
    parameters: int
    bytes: int


def totals(leaves: Iterable[Any]) -> Totals:
    """The number of leaves that hold something, of their elements, and of their bytes."""
    count = parameters = size = 0
    for x in map(unwrap, leaves):
        if x is None:
            continue
        count += 1
        backend = _backends.find(x)
        if backend is not None and not backend.fault(x):
            parameters += prod(x.shape)
            size += getattr(x, "nbytes", 0)
    return Totals(count, parameters, size)


def leaf(x: Any) -> str:
    """One leaf or node in a few words: dtype and shape of an array, never its values."""
    x = unwrap(x)
    backend = _backends.find(x)
    if backend is None:
        return reprlib.repr(x) if _tree.is_leaf(x) else errors.describe(x)
    if backend.fault(x):
        return f"{type(x).__name__} that cannot be used"
    facts = backend.facts(x)
    where = f" on {facts.device}" if backend.name == "torch" and str(facts.device) != "cpu" else ""
    shape = str(tuple(facts.shape))
    return f"{facts.dtype} {shape}{where}"


def summary(leaves: Iterable[Any]) -> str:
    """'3 leaves, 20 parameters, 160 bytes'."""
    total = totals(leaves)
    plural = "leaf" if total.leaves == 1 else "leaves"
    return f"{total.leaves:,} {plural}, {total.parameters:,} parameters, {_size(total.bytes)}"


def _size(count: int) -> str:
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:,.4g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def text(container: Any) -> str:
    """A header, then one line for each leaf, up to a number of lines."""
    try:
        leaves = _tree.leaves(container)
    except RecursionError:
        return f"{type(container).__name__}: holds itself, or deeper than the recursion limit"
    shown = list(islice(_tree.walk(container), _MOST_LINES))
    names = [_clipped(errors.path_string(path)) for path, _ in shown]
    width = max(map(len, names), default=0)
    lines = [f"  {name:<{width}}  {leaf(x)}" for name, (_, x) in zip(names, shown, strict=True)]
    if len(leaves) > len(shown):
        lines.append(f"  ... and {len(leaves) - len(shown):,} more")
    return "\n".join([f"{type(container).__name__}: {summary(leaves)}", *lines])


def _clipped(name: str, most: int = 60) -> str:
    return name if len(name) <= most else f"{name[: most - 23]}...{name[-20:]}"


def html(container: Any) -> str:
    """A tree that folds. Keys are escaped: they may come from anywhere."""
    from html import escape

    try:
        return _html(container)
    except RecursionError:
        return f"<pre>{escape(text(container))}</pre>"


def _html(container: Any) -> str:
    from html import escape

    rows = iter(range(_MOST_ROWS))

    def item(key: Any, node: Any, is_open: bool) -> str:
        if next(rows, None) is None:
            return ""
        name = escape(str(key))
        if _tree.is_leaf(node):
            return f"<div><b>{name}</b> <span>{escape(leaf(node))}</span></div>"
        inside = "".join(item(k, child, False) for k, child in _tree.children(node))
        head = f"<summary><b>{name}</b> <span>{summary(_tree.leaves(node))}</span></summary>"
        return f"<details{' open' if is_open else ''}>{head}{inside}</details>"

    tree = item(type(container).__name__, container, True)
    more = "" if next(rows, None) is not None else f"<div>first {_MOST_ROWS:,} rows</div>"
    style = (
        "<style>.lars-tree{font-family:monospace}.lars-tree span{opacity:.65}"
        ".lars-tree details>*:not(summary){margin-left:1.5em}</style>"
    )
    return f'{style}<div class="lars-tree">{tree}{more}</div>'
