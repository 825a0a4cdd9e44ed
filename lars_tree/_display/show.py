"""The display of a Container as text, as a tree in a terminal, and as rows for `html.py`.

It reads dtypes, shapes and sizes, never the elements of an array.
"""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from math import prod
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from lars_tree import _backends, errors
from lars_tree._backends.wrapper import Wrapper, unwrap
from lars_tree._tree import nodes, structure

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

_MOST_LINES = 40
_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


@dataclass(frozen=True)
class Listed:
    """An array in a file that can be shown but not read, because numpy does not have its dtype."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def size(self) -> int:
        return prod(self.shape)


class Totals(NamedTuple):
    """Sums over leaves; a leaf that is None does not count."""

    leaves: int
    parameters: int
    bytes: int


def totals(leaves: Iterable[Any]) -> Totals:
    return _Sizes(leaves).total(slice(None))


class _Sizes:
    """The sizes of each leaf. Successive leaves of the same type are measured together."""

    def __init__(self, leaves: Iterable[Any]) -> None:
        arrays = list(leaves)
        if any(issubclass(cls, Wrapper) for cls in set(map(type, arrays))):
            arrays = list(map(unwrap, arrays))
        self.present: list[bool] = []
        self.parameters: list[int] = []
        self.bytes: list[int] = []
        for cls, run in groupby(arrays, type):
            xs = list(run)
            self.present += [cls is not NoneType] * len(xs)
            backend = _backends.find(xs[0])
            if cls is Listed:
                parameters, sizes = [x.size for x in xs], [x.nbytes for x in xs]
            else:
                zeros = [0] * len(xs)
                parameters, sizes = (zeros, zeros) if backend is None else backend.sizes(xs)
            self.parameters += parameters
            self.bytes += sizes

    def total(self, part: slice) -> Totals:
        return Totals(*(sum(x[part]) for x in (self.present, self.parameters, self.bytes)))


def leaf(x: Any) -> str:
    """A short description of a leaf or node; for an array, its dtype and shape."""
    x = unwrap(x)
    if isinstance(x, Listed):
        return f"{x.dtype} {x.shape}"
    backend = _backends.find(x)
    if backend is None:
        return reprlib.repr(x) if structure.is_leaf(x) else errors.describe(x)
    if backend.fault(x):
        return f"{type(x).__name__} that cannot be used"
    facts = backend.facts(x)
    where = f" on {facts.device}" if backend.name == "torch" and str(facts.device) != "cpu" else ""
    return f"{facts.dtype} {tuple(facts.shape)}{where}"


def summary(leaves: Iterable[Any]) -> str:
    """The totals as text: '3 leaves, 20 parameters, 160 bytes'."""
    total = totals(leaves)
    return f"{_counted(total)}, {_size(total.bytes)}"


def _counted(total: Totals) -> str:
    leaves = errors.counted(total.leaves, "leaf", "leaves")
    return f"{leaves}, {errors.counted(total.parameters, 'parameter')}"


def _size(count: int) -> str:
    if count < 1000:
        return errors.counted(count, "byte")
    size, unit = count / 1000, 0
    while round(size, 1) >= 1000 and unit < len(_UNITS) - 1:  # 999,999 bytes are 1 MB
        size, unit = size / 1000, unit + 1
    return f"{size:.4g} {_UNITS[unit]}"


def text(container: Any) -> str:
    """A header, and one line for each of the first leaves."""
    try:
        leaves = structure.leaves(container)
    except RecursionError:
        return f"{type(container).__name__}: contains itself, or is deeper than the recursion limit"
    shown = list(islice(structure.walk(container), _MOST_LINES))
    names = [_clipped(errors.path_string(path)) for path, _ in shown]
    width = max(map(len, names), default=0)
    lines = [f"  {name:<{width}}  {leaf(x)}" for name, (_, x) in zip(names, shown, strict=True)]
    if len(leaves) > len(shown):
        lines.append(f"  ... and {len(leaves) - len(shown):,} more")
    return "\n".join([f"{type(container).__name__}: {summary(leaves)}", *lines])


def _clipped(name: str, most: int = 60) -> str:
    return name if len(name) <= most else f"{name[: most - 23]}...{name[-20:]}"


@dataclass
class Row:
    """One row of a tree. `children` is None for a leaf.

    `hidden` is the number of children that are not shown. The text is not escaped.
    """

    name: str
    what: str
    size: str
    children: list[Row] | None = None
    hidden: int = 0

    @property
    def more(self) -> str:
        """The text shown instead of the hidden children."""
        return f"... and {self.hidden:,} more" if self.children else f"{self.hidden:,} not shown"


def rows(container: Any, most: int, most_children: int) -> Row:
    """The row of the root, with at most `most` rows in all and `most_children` below each node.

    Rows near the root take precedence.
    """
    leaves = structure.leaves(container)
    sizes = _Sizes(leaves)

    def row(name: str, node: Any, start: int, count: int) -> Row:
        if structure.is_leaf(node):
            is_array = _backends.find(unwrap(node)) is not None
            return Row(name, leaf(node), _size(sizes.bytes[start]) if is_array else "")
        total = sizes.total(slice(start, start + count))
        return Row(name, _counted(total), _size(total.bytes))

    root = row(type(container).__name__, container, 0, len(leaves))
    queue = deque([(root, container, 0)])
    room = most - 1
    while queue:
        parent, node, start = queue.popleft()
        children = list(nodes.children(node))
        shown = children[: min(most_children, room)]
        parent.children, parent.hidden = [], len(children) - len(shown)
        room -= len(shown)
        for key, child in shown:
            count = len(structure.leaves(child))
            new = row(_clipped(errors.path_string((key,))), child, start, count)
            parent.children.append(new)
            if not structure.is_leaf(child):
                queue.append((new, child, start))
            start += count
    return root


def rich_tree(container: Any) -> Tree | Text:
    """A tree for `rich.print`."""
    from rich.text import Text
    from rich.tree import Tree

    def label(row: Row) -> Text:  # rich would parse a str as markup
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
