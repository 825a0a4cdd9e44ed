"""How a Container looks: as text, as a tree in a terminal or a notebook, in sums.

Nothing here looks at the elements of an array. `_html.py` writes the tree for a notebook.
"""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from types import NoneType
from typing import Any, NamedTuple

from lars_tree import _backends, _tree, errors
from lars_tree._core.wrapper import Wrapper, unwrap

_MOST_LINES = 40
_MOST_ROWS = 500
_MOST_CHILDREN = 100


class Totals(NamedTuple):
    """What the leaves of a tree come to."""

    leaves: int
    parameters: int
    bytes: int


def totals(leaves: Iterable[Any]) -> Totals:
    """The number of leaves that hold something, of their elements, and of their bytes."""
    return _Sizes(list(leaves)).of(slice(None))


class _Sizes:
    """The sizes of all leaves side by side: runs of one type are measured at once."""

    def __init__(self, leaves: list[Any]) -> None:
        self.present: list[int] = []
        self.parameters: list[int] = []
        self.bytes: list[int] = []
        for cls, run in groupby(leaves, type):
            if issubclass(cls, Wrapper):
                for x in map(unwrap, run):
                    self._add(type(x), [x])
            else:
                self._add(cls, list(run))

    def _add(self, cls: type, xs: list[Any]) -> None:
        backend = _backends.find(xs[0])
        nothing = [0] * len(xs)
        parameters, sizes = backend.sizes(xs) if backend is not None else (nothing, nothing)
        self.present += nothing if cls is NoneType else [1] * len(xs)
        self.parameters += parameters
        self.bytes += sizes

    def of(self, places: slice) -> Totals:
        return Totals(*(sum(x[places]) for x in (self.present, self.parameters, self.bytes)))


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
    return f"{_counted(total)}, {_size(total.bytes)}"


def _counted(total: Totals) -> str:
    leaves = errors.counted(total.leaves, "leaf", "leaves")
    return f"{leaves}, {errors.counted(total.parameters, 'parameter')}"


def _size(count: int) -> str:
    power = min(3, (len(str(count)) - 1) // 3)
    if not power:
        return errors.counted(count, "byte")
    return f"{count / 1000**power:,.4g} {('kB', 'MB', 'GB')[power - 1]}"


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
    """A tree that folds."""
    from lars_tree import _html  # only notebooks need it

    try:
        return _html.page(rows(container, _MOST_ROWS, _MOST_CHILDREN))
    except RecursionError:
        return _html.plain(text(container))


def rich_tree(container: Any) -> Any:
    """A tree for `rich.print`."""
    from rich.text import Text
    from rich.tree import Tree

    def label(row: Row) -> Text:
        # Not a string: rich would read markup in it.
        return Text.assemble((row.name, "bold"), "  ", row.what, "  ", (row.size, "dim"))

    def grow(branch: Tree, row: Row) -> Tree:
        for child in row.children or ():
            grow(branch.add(label(child)), child)
        if row.hidden:
            branch.add(Text(row.more, "dim"))
        return branch

    try:
        root = rows(container, _MOST_LINES, _MOST_LINES)
        return grow(Tree(label(root)), root)
    except RecursionError:
        return Text(text(container))


@dataclass
class Row:
    """A node or a leaf as a tree shows it: its name, what it is, its bytes, and what is below.

    `children` is None for a leaf, and `hidden` counts those that there is no room for. Names and
    words are text of any kind, to be escaped.
    """

    name: str
    what: str
    size: str
    children: list[Row] | None = None
    hidden: int = 0

    @property
    def more(self) -> str:
        """What stands for the children that are not shown."""
        return f"... and {self.hidden:,} more" if self.children else f"{self.hidden:,} not shown"


def rows(container: Any, most: int, most_children: int) -> Row:
    """The rows of a tree: those near the root first, at most `most`, `most_children` to a node."""
    leaves = _tree.leaves(container)
    sizes = _Sizes(leaves)

    def of_node(name: str, start: int, count: int) -> Row:
        summed = sizes.of(slice(start, start + count))
        return Row(name, _counted(summed), _size(summed.bytes))

    def of_leaf(name: str, x: Any, start: int) -> Row:
        is_array = _backends.find(unwrap(x)) is not None
        return Row(name, leaf(x), _size(sizes.bytes[start]) if is_array else "")

    root = of_node(type(container).__name__, 0, len(leaves))
    waiting = deque([(root, container, 0)])
    room = most - 1
    while waiting:
        row, node, start = waiting.popleft()
        children = list(_tree.children(node))
        shown = children[: min(most_children, room)]
        row.children, row.hidden = [], len(children) - len(shown)
        room -= len(shown)
        for key, child in shown:
            name = _clipped(errors.path_string((key,)))
            count = len(_tree.leaves(child))
            is_leaf = _tree.is_leaf(child)
            below = of_leaf(name, child, start) if is_leaf else of_node(name, start, count)
            row.children.append(below)
            if not is_leaf:
                waiting.append((below, child, start))
            start += count
    return root
