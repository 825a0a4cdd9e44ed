"""Trees and flat names: the keys of a path joined by '.', and back.

Most trees are found again by splitting the names. Of those that would not be (keys that hold '.'
or are integers, lists, tuples, None, empty nodes), the structure is written down as JSON. Knows
neither arrays nor files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lars_tree import _tree, errors
from lars_tree.errors import Line, Path

RESERVED = "__metadata__"

# The number of keys in the longest path, for what is saved and what is read. Python's limit for
# recursions is 1,000 frames: even `copy.deepcopy`, which takes five for each level, has enough.
DEEPEST = 100


def _most_nodes(leaves: int) -> int:
    """How many nodes are found again by splitting the names of so many leaves.

    A name of dots has a node for each byte, which takes hundreds of bytes of memory. Trees that
    really have that many nodes are saved with their structure, which is longer than they are.
    """
    return 1000 + 4 * leaves


# The structure of a tree: ["dict", [key, child], ...], ["list", child, ...], ["tuple", child, ...],
# null for None, true for a leaf: its name follows from its path.
Structure = Any


def flatten(tree: Any) -> tuple[dict[str, tuple[Path, Any]], str | None]:
    """The (path, leaf) pairs by name, and the structure where the names do not tell it.

    Raises:
        StructureError: a tree that cannot be named: two leaves of one name, a key that is neither
            str nor int, a node that is no dict, list or tuple, something else than a mapping, or
            more than DEEPEST levels.
    """
    encoder = _Encoder()
    if _tree.is_leaf(tree) or not isinstance(tree, Mapping):
        encoder.faults.append(((), f"expected a Container or dict, got {errors.describe(tree)}"))
        raise _fault(encoder.faults)
    try:
        structure = encoder.encode(tree, ())
    except _TooDeepError as error:
        if _tree.cycle(tree):
            raise _tree.explained({"tree": tree}) from None
        raise _fault([(error.path, f"expected at most {DEEPEST} levels")]) from None
    if encoder.faults:
        raise _fault(encoder.faults)
    names = encoder.found
    plain = len(structure) == 1 or (encoder.plain and encoder.nodes <= _most_nodes(len(names)))
    return names, None if plain else json.dumps(structure, separators=(",", ":"))


def _fault(faults: list[Line]) -> errors.LarsTreeError:
    return errors.error(errors.StructureError, "tree", "tree cannot be saved under names", faults)


class _TooDeepError(Exception):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path


class _Encoder:
    """A walk over a tree, which writes its structure and notes what it finds.

    Attributes:
        found: The (path, leaf) pairs by name.
        faults: What cannot be saved.
        plain: Whether splitting the names finds the tree again: it has dicts and leaves alone.
        nodes: How many.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[Path, Any]] = {}
        self.faults: list[Line] = []
        self.plain = True
        self.nodes = 0

    def encode(self, node: Any, path: Path) -> Structure:
        """The structure of a node. A recursion of one frame for each level."""
        if len(path) > DEEPEST:
            raise _TooDeepError(path)
        if node is None:
            self.plain = False
            return None
        if _tree.is_leaf(node):
            self._put(node, path)
            return True
        self.nodes += 1
        pairs = list(_tree.children(node))
        if isinstance(node, Mapping):
            structure: Structure = ["dict"]
            self.plain = self.plain and bool(pairs)
            for key, child in pairs:
                self._check_key(key, path)
                structure.append([key, self.encode(child, (*path, key))])
            return structure
        if type(node) not in (list, tuple):
            text = f"expected a dict, list or tuple, got {errors.describe(node)}"
            self.faults.append((path, text))
        self.plain = False
        structure = [type(node).__name__]
        for i, child in pairs:
            structure.append(self.encode(child, (*path, i)))
        return structure

    def _check_key(self, key: Any, path: Path) -> None:
        if type(key) not in (str, int):
            text = f"expected keys of type str or int, got {key!r} ({type(key).__name__})"
            self.faults.append((path, text))
        if type(key) is not str or "." in key:
            self.plain = False

    def _put(self, leaf: Any, path: Path) -> None:
        name = join(path)
        if name in self.found:
            text = f"its name {name!r} is that of {errors.path_string(self.found[name][0])} too"
            self.faults.append((path, text))
        elif name == RESERVED or "\0" in name or not is_text(name):
            self.faults.append((path, f"{name!r} cannot be a name in a file"))
        self.found.setdefault(name, (path, leaf))


def join(path: Path) -> str:
    """The name of a leaf."""
    return ".".join(map(str, path))


def is_text(name: str) -> bool:
    """Whether it can be written as UTF-8: a lone surrogate cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def unflatten(
    leaves: Mapping[str, Any], text: str | None, make: Callable[[], dict[Any, Any]] = dict
) -> dict[Any, Any]:
    """The tree of these leaves, in lists, tuples and dicts of the kind that `make` makes.

    Raises:
        ValueError: the names cannot be split into one tree, or the structure is not one of them.
    """
    check(leaves, text)
    if text is None:
        return _split(leaves, make)
    left = dict(leaves)
    tree = _decode(parsed(text), (), left, make)
    if not isinstance(tree, dict):
        raise ValueError("the structure is no dict")
    if left:
        raise ValueError(f"the structure lacks {errors.enumerated(map(repr, left))}")
    return tree


def check(names: Iterable[str], text: str | None) -> None:
    """Refuse names that say that the tree has more than DEEPEST levels.

    Raises:
        ValueError: naming one of them.
    """
    if text is None:
        for name in names:
            if name.count(".") >= DEEPEST:
                raise ValueError(f"{name!r} has more than {DEEPEST} levels")


def _split(leaves: Mapping[str, Any], make: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    tree = make()  # whose own methods, where it is a Container, read '/' as a path
    nodes, most = 1, _most_nodes(len(leaves))
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            child = dict.get(node, key)
            if child is None:
                nodes += 1
                child = make()
                dict.__setitem__(node, key, child)
            elif not isinstance(child, dict):
                raise ValueError(f"{name!r} goes through another leaf")
            node = child
        if nodes > most:
            raise ValueError(f"its names have more than {most} nodes for {len(leaves)} leaves")
        if dict.__contains__(node, last):
            raise ValueError(f"{name!r} is a leaf and a node")
        dict.__setitem__(node, last, leaf)
    return tree


def _decode(
    node: Structure, path: Path, left: dict[str, Any], make: Callable[[], dict[Any, Any]]
) -> Any:
    if len(path) > DEEPEST:
        raise ValueError(f"the structure has more than {DEEPEST} levels")
    if node is None:
        return None
    if node is True:
        name = join(path)
        if name not in left:
            raise ValueError(f"the structure has {name!r}, which is not there, or twice")
        return left.pop(name)
    kind, children = _parted(node)
    if kind == "dict":
        tree = make()
        for key, child in map(_pair, children):
            if dict.__contains__(tree, key):
                raise ValueError(f"the structure has the key {key!r} twice")
            dict.__setitem__(tree, key, _decode(child, (*path, key), left, make))
        return tree
    items = []
    for i, child in enumerate(children):
        items.append(_decode(child, (*path, i), left, make))
    return items if kind == "list" else tuple(items)


def _parted(node: Structure) -> tuple[str, Iterable[Any]]:
    if isinstance(node, list) and node and node[0] in ("dict", "list", "tuple"):
        return node[0], node[1:]
    raise ValueError("the structure holds something that is no node")


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int):
        return item[0], item[1]
    raise ValueError("the structure holds a key that is neither a string nor an integer")


class TwiceError(ValueError):
    """An object of JSON has a name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it has the name {name!r} twice")
        self.name = name


def parsed(text: str, convert: Callable[[dict[str, Any]], Any] = lambda x: x) -> Any:
    """JSON, with each of its objects converted.

    Raises:
        ValueError: it is malformed, nested deeper than any structure, or has a name twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise TwiceError(key)
                seen.add(key)
        return convert(found)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        if _is_nested(text, 2 * DEEPEST + 1):
            raise ValueError("it is nested too deeply") from None
        raise  # the caller's own stack is nearly full


def _is_nested(text: str, most: int) -> bool:
    """Whether the brackets of JSON are nested deeper than this."""
    depth = 0
    for match in re.finditer(r'(?s)"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > most:
            return True
    return False
