"""Convert trees to flat names, which are the keys of a path joined by '.', and back.

Most trees are restored by splitting the names. For trees with lists, tuples, None, empty nodes,
integer keys or keys that contain '.', the structure is recorded as JSON. This module does not
depend on arrays or files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

from lars_tree import errors
from lars_tree._tree import nodes
from lars_tree._tree.paths import put_new
from lars_tree._tree.structure import cycle, explained, is_leaf
from lars_tree.errors import Line, Path

RESERVED = "__metadata__"

# The maximum depth of a tree in a file. At this depth, even `copy.deepcopy`, which takes five
# frames per level, stays below Python's recursion limit of 1,000.
DEEPEST = 100


def _most_nodes(leaves: int) -> int:
    """The maximum number of nodes that may be made by splitting the names of this many leaves.

    A hostile name of dots would make one node of hundreds of bytes for each dot. `save` records the
    structure of trees that have more nodes.
    """
    return 1000 + 4 * leaves


# The structure of a tree: ["dict", [key, child], ...], ["list", child, ...], ["tuple", child, ...],
# null for None, and true for a leaf. The name of a leaf is its path, joined.
Structure = Any

Dict = TypeVar("Dict", bound=dict[Any, Any])


def flatten(tree: Any) -> tuple[dict[str, tuple[Path, Any]], str | None]:
    """The (path, leaf) pairs by name, and the structure, or None if the names are sufficient.

    Raises a StructureError for trees that cannot be restored from a file.
    """
    encoder = _Encoder()
    if is_leaf(tree) or not isinstance(tree, Mapping):
        raise _refusal([((), f"expected a Container or dict, got {errors.describe(tree)}")])
    try:
        structure = encoder.encode(tree, ())
    except errors.StructureError:
        if cycle(tree):
            raise explained({"tree": tree}) from None
        raise
    if encoder.faults:
        raise _refusal(encoder.faults)
    found = encoder.found
    if len(structure) == 1 or (encoder.can_split and encoder.nodes <= _most_nodes(len(found))):
        return found, None
    return found, json.dumps(structure, separators=(",", ":"))


def _refusal(faults: list[Line]) -> errors.LarsTreeError:
    return errors.error(errors.StructureError, "tree", "tree cannot be saved under names", faults)


class _Encoder:
    """Walks a tree once and collects what `flatten` needs."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Path, Any]] = {}  # by name
        self.faults: list[Line] = []
        self.can_split = True  # whether splitting the names restores the tree
        self.nodes = 0

    def encode(self, node: Any, path: Path) -> Structure:
        if len(path) > DEEPEST:
            raise _refusal([(path, f"expected at most {DEEPEST} levels")])
        if node is None:
            self.can_split = False
            return None
        if is_leaf(node):
            self._add_leaf(node, path)
            return True
        self.nodes += 1
        is_dict = isinstance(node, Mapping)
        if not is_dict and type(node) not in (list, tuple):
            text = f"expected a dict, list or tuple, got {errors.describe(node)}"
            self.faults.append((path, text))
        pairs = list(nodes.children(node))
        self.can_split = self.can_split and is_dict and bool(pairs)
        structure: Structure = ["dict" if is_dict else type(node).__name__]
        for key, child in pairs:
            if is_dict:
                self._check_key(key, path)
            below = self.encode(child, (*path, key))
            structure.append([key, below] if is_dict else below)
        return structure

    def _check_key(self, key: Any, path: Path) -> None:
        if type(key) not in (str, int):
            text = f"expected keys of type str or int, got {key!r} ({type(key).__name__})"
            self.faults.append((path, text))
        if type(key) is not str or "." in key:
            self.can_split = False

    def _add_leaf(self, leaf: Any, path: Path) -> None:
        name = join(path)
        if name in self.found:
            other = errors.path_string(self.found[name][0])
            self.faults.append((path, f"its name {name!r} is also the name of {other}"))
        elif name == RESERVED or "\0" in name or not is_text(name):
            self.faults.append((path, f"{name!r} cannot be a name in a file"))
        self.found.setdefault(name, (path, leaf))


def join(path: Path) -> str:
    return ".".join(map(str, path))


def is_text(name: str) -> bool:
    """Whether name can be encoded as UTF-8; a lone surrogate cannot."""
    return name.encode(errors="ignore").decode() == name


def unflatten(leaves: Mapping[str, Any], text: str | None, make: Callable[[], Dict]) -> Dict:
    """The tree of the leaves, given by name; `make` makes its dicts.

    `text` is the structure; if it is None, the names are split. Raises a ValueError if the names
    and the structure do not describe a tree.
    """
    check(leaves, text)
    if text is None:
        return _split(leaves, make)
    try:
        structure = parsed(text)
    except ValueError as error:
        raise ValueError(f"the structure cannot be read: {error}") from None
    left = dict(leaves)
    tree = _decode(structure, (), left, make)
    if not isinstance(tree, dict):
        raise ValueError("the structure is not a dict")
    if left:
        raise ValueError(f"the structure lacks {errors.enumerated(map(repr, left))}")
    return cast("Dict", tree)


def check(names: Iterable[str], text: str | None) -> None:
    """Raise a ValueError if a name would be split into more than DEEPEST levels."""
    if text is None:
        for name in names:
            if name.count(".") >= DEEPEST:
                raise ValueError(f"{name!r} has more than {DEEPEST} levels")


def collide(names: Collection[str]) -> bool:
    """Whether a name is the beginning of another, such as 'a' of 'a.b'."""
    known = set(names)
    starts = (name[: match.start()] for name in names for match in re.finditer(r"\.", name))
    return any(start in known for start in starts)


def _split(leaves: Mapping[str, Any], make: Callable[[], Dict]) -> Dict:
    tree = make()
    count, most = 1, _most_nodes(len(leaves))
    for name, leaf in leaves.items():
        try:
            count += put_new(tree, tuple(name.split(".")), leaf)
        except errors.PathKeyError:
            text = (
                f"{name!r} collides with another name: one is the beginning of the other. "
                "Load it with flat=True"
            )
            raise ValueError(text) from None
        if count > most:
            raise ValueError(f"its names have more than {most} nodes for {len(leaves)} leaves")
    return tree


def _decode(node: Structure, path: Path, left: dict[str, Any], make: Callable[[], Dict]) -> Any:
    """The tree of a structure; its leaves are removed from `left`."""
    if len(path) > DEEPEST:
        raise ValueError(f"the structure has more than {DEEPEST} levels")
    match node:
        case None:
            return None
        case True:
            name = join(path)
            if name not in left:
                raise ValueError(f"the structure has {name!r}, which is missing or used twice")
            return left.pop(name)
        case ["dict", *pairs]:
            tree = make()
            for pair in pairs:
                if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
                    raise ValueError("the structure has a key that is neither str nor int")
                key, child = pair
                if dict.__contains__(tree, key):
                    raise ValueError(f"the structure has the key {key!r} twice")
                dict.__setitem__(tree, key, _decode(child, (*path, key), left, make))
            return tree
        case ["list" | "tuple" as kind, *children]:
            items = []
            for i, child in enumerate(children):
                items.append(_decode(child, (*path, i), left, make))
            return items if kind == "list" else tuple(items)
    raise ValueError("the structure has an entry that is not a node")


class TwiceError(ValueError):
    """A JSON object has a name twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it has the name {name!r} twice")
        self.name = name


def parsed(text: str, convert: Callable[[dict[str, Any]], Any] = lambda x: x) -> Any:
    """Parse JSON and apply `convert` to each object.

    Raises a ValueError if the text is malformed or too deep, or if an object repeats a name.
    """

    def converted(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise TwiceError(name)
        return convert(found)

    try:
        return json.loads(text, object_pairs_hook=converted)
    except RecursionError:
        if _is_nested(text, 2 * DEEPEST + 1):
            raise ValueError("it is nested too deeply") from None
        raise  # the caller's own stack is nearly full


def _is_nested(text: str, most: int) -> bool:
    """Whether the brackets in a JSON text are nested more deeply than this."""
    depth = 0
    for match in re.finditer(r'(?s)"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > most:
            return True
    return False
