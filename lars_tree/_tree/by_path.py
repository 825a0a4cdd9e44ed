"""Values by path: mappings whose keys are paths or patterns, such as {"*/bias": False, "*": True}.

A key is the path of a leaf; or the path of a node, for all leaves below it; or a pattern of
`fnmatch` for such paths. In a pattern, `*` matches "/" too, and a leading "*/" may match nothing,
so "*/bias" includes a bias at the root. The key "*" is for the leaves that no other key matches.

The result does not depend on the order of the keys, because JAX sorts the keys of dicts. The key of
a leaf itself decides. So does a mapping that is given for a node: it has the keys for all leaves
below that node. Otherwise the key of the nearest node and all matching patterns must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from lars_tree import errors
from lars_tree._tree import nodes, structure
from lars_tree.errors import Line, Path

DEFAULT = "*"

Row = tuple[Path, Any]  # the path of a leaf, and the leaf


def is_pattern(key: Hashable) -> bool:
    """Whether the key has a character with a meaning in patterns."""
    return isinstance(key, str) and any(character in key for character in "*?[")


def has_patterns(tree: Any) -> bool:
    """Whether a key at any depth of a tree of values is a pattern."""
    paths = (path for path, _ in structure.walk(tree, empty_nodes=True))
    return any(is_pattern(key) for path in paths for key in path)


def resolve(
    argument: str, given: Any, rows: Sequence[Row], *, sep: str = "/", to: str = "w"
) -> list[Any]:
    """The value for each (path, leaf) of `rows` in a mapping with patterns.

    >>> rows = [(("dense", "kernel"), 1.0), (("dense", "bias"), 2.0), (("bias",), 3.0)]
    >>> resolve("adapt", {"*/bias": False, "*": True}, rows)
    [True, False, False]

    Args:
        argument: The name of the mapping for messages.
        given: The mapping.
        rows: The leaves with their paths. A leaf that is None needs no value, and gets None if no
            key matches it.
        sep: The separator of keys in the paths of the mapping: "." for the names of parameters
            of torch, with rows [(tuple(name.split(".")), p) for name, p in named_parameters].
        to: The name of the tree of these leaves for messages.

    Raises:
        StructureError: A leaf has no value, or different values; or a key matches no leaf.
    """
    values: list[Any] = [None] * len(rows)
    lines: list[Line] = []
    _Level(given, rows, (), sep).fill(list(range(len(rows))), values, lines)
    if lines:

        def shown(path: Path) -> str:
            return errors.path_string(path) if sep == "/" else sep.join(map(str, path))

        headline = f"{argument} does not match {to}"
        raise errors.error(errors.StructureError, argument, headline, lines, shown)
    return values


class _Literal(NamedTuple):
    """The key of a leaf or of the nearest node above it, and the number of its path's keys."""

    key: str
    depth: int


class _Level:
    """One mapping, for the leaves below the node at `path`."""

    def __init__(self, given: Any, rows: Sequence[Row], path: Path, sep: str) -> None:
        self.rows, self.path, self.sep = rows, path, sep
        pairs = list(nodes.children(given))
        self.given = {str(key): value for key, value in pairs}
        self.is_ambiguous = len(self.given) < len(pairs)

    def fill(self, indices: list[int], values: list[Any], lines: list[Line]) -> None:
        """Set the values of the leaves at these indices, or append to `lines` what is wrong."""
        if self.is_ambiguous:
            lines.append((self.path, "expected keys with different names, got two with the same"))
            return
        names = {i: self._names(self.rows[i][0]) for i in indices}
        literals = {i: self._literals(names[i]) for i in indices}
        found = {literal.key for of_leaf in literals.values() for literal in of_leaf}
        patterns: dict[str, Callable[[str], Any]] = {
            key: _matcher(key, self.sep)
            for key in self.given
            if key not in found and key != DEFAULT and is_pattern(key)
        }
        inner: dict[_Literal, list[int]] = {}
        for i in indices:
            name = names[i][-1] if names[i] else ""
            matching = [key for key, match in patterns.items() if match(name)]
            found.update(matching)
            nearest = literals[i][-1] if literals[i] else None
            if nearest is not None and _is_node(self.given[nearest.key]):
                inner.setdefault(nearest, []).append(i)
                continue
            if nearest is not None and nearest.depth == len(names[i]):
                matching = [nearest.key]
            elif nearest is not None:
                matching.append(nearest.key)
            self._choose(i, name, matching, values, lines)
        self._refuse_unused(found, names, lines)
        for literal, below in inner.items():
            path = self.rows[below[0]][0][: len(self.path) + literal.depth]
            _Level(self.given[literal.key], self.rows, path, self.sep).fill(below, values, lines)

    def _names(self, path: Path) -> list[str]:
        """The paths, below this level, of all nodes above a leaf and of the leaf itself."""
        keys = map(str, path[len(self.path) :])
        return list(accumulate(keys, lambda parent, key: f"{parent}{self.sep}{key}"))

    def _literals(self, names: list[str]) -> list[_Literal]:
        return [
            _Literal(name, depth)
            for depth, name in enumerate(names, 1)
            if name in self.given and name != DEFAULT
        ]

    def _choose(
        self, i: int, name: str, matching: list[str], values: list[Any], lines: list[Line]
    ) -> None:
        path, leaf = self.rows[i]
        if leaf is None:
            return
        if not matching and DEFAULT in self.given:
            matching = [DEFAULT]
        if not matching:
            lines.append((path, self._uncovered(path)))
        elif any(_is_node(self.given[key]) for key in matching):
            key = next(key for key in matching if _is_node(self.given[key]))
            text = f"expected one value for {key!r}, got {errors.describe(self.given[key])}"
            lines.append((path, text))
        elif not all(_equal(self.given[matching[0]], self.given[key]) for key in matching):
            found = ", ".join(f"{key!r}: {_shown(self.given[key])}" for key in sorted(matching))
            text = f"expected one value, got {found}: add a key for {name!r} itself"
            lines.append((path, text))
        else:
            values[i] = self.given[matching[0]]

    def _uncovered(self, path: Path) -> str:
        if path == self.path:
            return f"expected one value, got keys {errors.enumerated(self.given, shown=repr)}"
        where = f" of {errors.path_string(self.path)}" if self.path else ""
        return f"no key matches it: add the key '*' for all other leaves{where}"

    def _refuse_unused(
        self, found: set[str], names: Mapping[int, list[str]], lines: list[Line]
    ) -> None:
        known: list[str] | None = None
        for key in self.given:
            if key not in found and key != DEFAULT:
                if known is None:
                    known = list(dict.fromkeys(name for row in names.values() for name in row))
                hint = errors.did_you_mean(key, known)
                lines.append(((*self.path, key), f"this key matches no leaf{hint}"))


@lru_cache(maxsize=256)
def _matcher(pattern: str, sep: str) -> Callable[[str], Any]:
    """A function that says whether the pattern matches the path of a leaf or of a node above it."""
    patterns = [pattern]
    rest = pattern.lstrip("*")
    if rest != pattern and rest.startswith(sep):
        patterns.append(rest.removeprefix(sep))
    alternatives = [translate(x) for p in patterns for x in (p, f"{p}{sep}*")]
    return re.compile("|".join(alternatives)).match


def _is_node(value: Any) -> bool:
    return not structure.is_leaf(value)


def _equal(x: Any, y: Any) -> bool:
    """Whether two values are the same. Arrays are compared by identity, as they may be traced."""
    if x is y:
        return True
    simple = (bool, int, float, str, frozenset)
    return isinstance(x, simple) and isinstance(y, simple) and x == y


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return text or errors.describe(value)
