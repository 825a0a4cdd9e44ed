"""Trees and flat names: the keys of a path joined by '.', and back.

Most trees are found again by splitting the names. Of those that would not be (keys that hold '.'
or are integers, lists, tuples, None, empty nodes), the structure is written down as JSON. Knows
neither arrays nor files.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from lars_tree import _tree, errors
from lars_tree.errors import Line, Path

RESERVED = "__metadata__"

# The structure of a tree: ["dict", [key, child], ...], ["list", child, ...], ["tuple", child, ...],
# null for None, true for a leaf: its name follows from its path.
Structure = Any


def flatten(tree: Any) -> tuple[dict[str, tuple[Path, Any]], str | None]:
    """The (path, leaf) pairs by name, and the structure where the names do not tell it.

    Raises:
        StructureError: a tree that cannot be named: two leaves of one name, a key that is neither
            str nor int, a node that is no dict, list or tuple, or something else than a mapping.
    """
    found: dict[str, tuple[Path, Any]] = {}
    faults: list[Line] = []
    if _tree.is_leaf(tree) or not isinstance(tree, Mapping):
        faults.append(((), f"expected a Container or dict, got {errors.describe(tree)}"))
        raise _fault(faults)
    try:
        structure = _encode(tree, (), found, faults)
    except RecursionError:
        raise _tree.explained({"tree": tree}) from None
    if faults:
        raise _fault(faults)
    plain = len(structure) == 1 or _is_plain(structure)
    return found, None if plain else json.dumps(structure, separators=(",", ":"))


def _fault(faults: list[Line]) -> errors.LarsTreeError:
    return errors.error(errors.StructureError, "tree", "tree cannot be saved under names", faults)


def _encode(
    node: Any, path: Path, found: dict[str, tuple[Path, Any]], faults: list[Line]
) -> Structure:
    if node is None:
        return None
    if _tree.is_leaf(node):
        name = join(path)
        if name in found:
            text = f"its name {name!r} is that of {errors.path_string(found[name][0])} too"
            faults.append((path, text))
        elif name == RESERVED or "\0" in name or not is_text(name):
            faults.append((path, f"{name!r} cannot be a name in a file"))
        found.setdefault(name, (path, node))
        return True
    pairs = list(_tree.children(node))
    if isinstance(node, Mapping):
        for key, _ in pairs:
            if type(key) not in (str, int):
                text = f"expected keys of type str or int, got {key!r} ({type(key).__name__})"
                faults.append((path, text))
        return ["dict", *([key, _encode(x, (*path, key), found, faults)] for key, x in pairs)]
    if type(node) not in (list, tuple):
        text = f"expected a dict, list or tuple, got {errors.describe(node)}"
        faults.append((path, text))
    return [type(node).__name__, *(_encode(x, (*path, i), found, faults) for i, x in pairs)]


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


def _is_plain(node: Structure) -> bool:
    """Whether a node is found again by splitting names: it is a leaf, or a dict of plain nodes."""
    if node is True:
        return True
    return (
        node is not None
        and node[0] == "dict"
        and len(node) > 1
        and all(isinstance(k, str) and "." not in k and _is_plain(x) for k, x in node[1:])
    )


def unflatten(leaves: dict[str, Any], text: str | None) -> dict[Any, Any]:
    """The tree of these leaves, in plain dicts, lists and tuples.

    Raises:
        ValueError: the names cannot be split into one tree, or the structure is not one of them.
    """
    if text is None:
        return _split(leaves)
    left = dict(leaves)
    try:
        tree = _decode(json.loads(text), (), left)
    except RecursionError:
        raise ValueError("the structure is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("the structure is no dict")
    if left:
        raise ValueError(f"the structure lacks {errors.enumerated(map(repr, left))}")
    return tree


def _split(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} goes through another leaf")
        if last in node:
            raise ValueError(f"{name!r} is a leaf and a node")
        node[last] = leaf
    return tree


def _decode(node: Structure, path: tuple[Hashable, ...], left: dict[str, Any]) -> Any:
    if node is None:
        return None
    if node is True:
        name = join(path)
        if name not in left:
            raise ValueError(f"the structure has {name!r}, which is not there, or twice")
        return left.pop(name)
    kind, children = _parted(node)
    if kind == "dict":
        tree = {}
        for key, child in map(_pair, children):
            if key in tree:
                raise ValueError(f"the structure has the key {key!r} twice")
            tree[key] = _decode(child, (*path, key), left)
        return tree
    items = (_decode(child, (*path, i), left) for i, child in enumerate(children))
    return list(items) if kind == "list" else tuple(items)


def _parted(node: Structure) -> tuple[str, Iterable[Any]]:
    if isinstance(node, list) and node and node[0] in ("dict", "list", "tuple"):
        return node[0], node[1:]
    raise ValueError("the structure holds something that is no node")


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int):
        return item[0], item[1]
    raise ValueError("the structure holds a key that is neither a string nor an integer")
