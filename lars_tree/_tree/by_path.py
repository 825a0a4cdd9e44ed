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
from collections.abc import Callable, Hashable, Iterator, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import Any

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


def only_lacks_keys(tree: Any, given: Any) -> bool:
    """Whether the mappings in `given` are a prefix of the tree except for missing keys."""
    pairs = structure.side_by_side(tree, given, structure.may_match)
    return all(
        other is structure.MISSING
        if what == "missing"
        else what != "nodes" or structure.is_leaf(other)
        for _, _, other, what in pairs
    )


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


class _Level:
    """One mapping, for the leaves below the node at `path`."""

    def __init__(self, given: Any, rows: Sequence[Row], path: Path, sep: str) -> None:
        self.rows, self.path, self.sep = rows, path, sep
        pairs = list(nodes.children(given))
        self.given = {str(key): value for key, value in pairs}
        self.is_ambiguous = len(self.given) < len(pairs)
        self.inner = {key for key, value in self.given.items() if not structure.is_leaf(value)}

    def fill(self, indices: list[int], values: list[Any], lines: list[Line]) -> None:
        """Set the values of the leaves at these indices, or append to `lines` what is wrong."""
        if self.is_ambiguous:
            lines.append((self.path, "expected keys with different names, got two with the same"))
            return
        used = {DEFAULT}
        named = [(i, *self._nearest(i, used)) for i in indices]
        patterns = [
            (key, matcher(key, self.sep))
            for key in sorted(self.given)
            if key not in used and is_pattern(key)
        ]
        known: dict[tuple[str, ...], Any] = {}
        below: dict[tuple[str, int], list[int]] = {}
        for index, name, nearest, depth in named:
            keys = [key for key, match in patterns if match(name)]
            used.update(keys)
            path, leaf = self.rows[index]
            if nearest in self.inner:
                below.setdefault((nearest, depth), []).append(index)
                continue
            if nearest is not None:
                keys = [nearest] if nearest == name else [*keys, nearest]
            keys = keys or ([DEFAULT] if DEFAULT in self.given else [])
            if leaf is None:
                continue
            if tuple(keys) not in known:
                fault = self._fault(path, name, keys)
                if fault:
                    lines.append((path, fault))
                    continue
                known[tuple(keys)] = self.given[keys[0]]
            values[index] = known[tuple(keys)]
        self._refuse_unused(used, indices, lines)
        for (key, depth), those in below.items():
            node = self.rows[those[0]][0][: len(self.path) + depth]
            _Level(self.given[key], self.rows, node, self.sep).fill(those, values, lines)

    def _nearest(self, index: int, used: set[str]) -> tuple[str, str | None, int]:
        """The name of a leaf, and the key and depth of the nearest node; adds keys to `used`.

        The nearest node is the leaf itself, or the lowest node above it, that has a key.
        """
        name, nearest, depth = "", None, 0
        for i, name in enumerate(self._names(index), 1):
            if name in self.given and name != DEFAULT:
                nearest, depth = name, i
                used.add(name)
        return name, nearest, depth

    def _names(self, index: int) -> Iterator[str]:
        """The names of the nodes above a leaf and of the leaf itself, below the path of this."""
        name = None
        for key in self.rows[index][0][len(self.path) :]:
            name = f"{key!s}" if name is None else f"{name}{self.sep}{key!s}"
            yield name

    def _fault(self, path: Path, name: str, keys: list[str]) -> str | None:
        """Why these matching keys give no value to a leaf; None if they do."""
        found = [self.given[key] for key in keys]
        if not keys and path == self.path:
            return f"expected one value, got keys {errors.enumerated(self.given, shown=repr)}"
        if not keys:
            where = f" of {errors.path_string(self.path)}" if self.path else ""
            return f"no key matches it: add the key '*' for all other leaves{where}"
        for key in keys:
            if key in self.inner:
                return f"expected one value for {key!r}, got {errors.describe(self.given[key])}"
        if all(_equal(found[0], value) for value in found):
            return None
        shown = ", ".join(f"{key!r}: {_shown(self.given[key])}" for key in sorted(keys))
        return f"expected one value, got {shown}: add a key for {name!r} itself"

    def _refuse_unused(self, used: set[str], indices: list[int], lines: list[Line]) -> None:
        unused = [key for key in self.given if key not in used]
        if not unused:
            return
        names = list(dict.fromkeys(name for i in indices for name in self._names(i)))
        for key in unused:
            hint = errors.did_you_mean(key, names)
            lines.append(((*self.path, key), f"this key matches no leaf{hint}"))


@lru_cache(maxsize=256)
def matcher(pattern: str, sep: str) -> Callable[[str], Any]:
    """A function that says whether the pattern matches the path of a leaf or of a node above it."""
    patterns = [pattern]
    rest = pattern.lstrip("*")
    if rest != pattern and rest.startswith(sep):
        patterns.append(rest.removeprefix(sep))
    alternatives = [translate(x) for p in patterns for x in (p, f"{p}{sep}*")]
    return re.compile("|".join(alternatives)).match


def _equal(x: Any, y: Any) -> bool:
    """Whether two values are the same. Arrays are compared by identity, as they may be traced."""
    if x is y:
        return True
    simple = (int, float, str, frozenset)
    if isinstance(x, bool) or isinstance(y, bool) or not isinstance(x, simple):
        return False
    return isinstance(y, simple) and x == y


def _shown(value: Any) -> str:
    is_short = isinstance(value, (bool, int, float, str, type(None)))
    return repr(value) if is_short else errors.describe(value)
