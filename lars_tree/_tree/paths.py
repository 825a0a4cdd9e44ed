"""How a Container finds, writes and removes values by key or by path.

An exact key takes precedence over a path. A path is a tuple of keys, or a string split at '/'; when
a value is written, a string is a single key. A string of digits may be an index. This module works
on any tree and does not depend on arrays.
"""

from __future__ import annotations

import re
from typing import Any

from lars_tree import errors
from lars_tree._tree import nodes, structure
from lars_tree._tree.structure import MISSING
from lars_tree.errors import LarsTreeError, Path, PathKeyError, StructureError, path_string

_INDEX = re.compile("0|[1-9][0-9]{0,17}")


def split(key: Any) -> Path:
    """The path that a key denotes."""
    if isinstance(key, tuple):
        return key
    return tuple(key.split("/")) if isinstance(key, str) else (key,)


def is_special(name: str) -> bool:
    """Whether Python reserves the name, like __setstate__. Such an attribute is never a key.

    Libraries call methods with reserved names, and the keys of a file may come from an attacker.
    """
    return name.startswith("__") and name.endswith("__")


def find(root: dict[Any, Any], key: Any) -> Any:
    """The value at a key or path; MISSING if there is none."""
    if dict.__contains__(root, key):
        return dict.__getitem__(root, key)
    path = split(key)
    if path == (key,):
        return MISSING
    parent, depth = _parent(root, path)
    return _child(parent, path[-1])[1] if depth == len(path) - 1 else MISSING


def _parent(root: Any, path: Path) -> tuple[Any, int]:
    """The deepest existing node above the last key of the path, and how many keys lead to it."""
    node, depth = root, 0
    while depth < len(path) - 1 and (child := _child(node, path[depth])[1]) is not MISSING:
        node, depth = child, depth + 1
    return node, depth


def _child(node: Any, key: Any) -> tuple[Any, Any]:
    """The key as the node has it, and its child or MISSING.

    A string of digits becomes an integer if the node has that integer as a key, but not the string.
    """
    if structure.is_leaf(node):
        return key, MISSING
    items = node if structure.is_plain_dict(node) else dict(nodes.children(node))
    if isinstance(key, str) and not dict.__contains__(items, key) and _INDEX.fullmatch(key):
        key = int(key) if dict.__contains__(items, int(key)) else key
    return key, dict.get(items, key, MISSING)


_MOST_COMPLETIONS, _DEEPEST_COMPLETIONS = 10_000, 100


def completions(root: dict[Any, Any]) -> list[str]:
    """The strings that name nodes and leaves of a tree, the shortest paths first."""
    found: list[str] = []
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(_DEEPEST_COMPLETIONS):  # a tree may contain itself
        below: list[tuple[str, Any]] = []
        for prefix, node in level:
            for key, child in nodes.children(node):
                name = f"{prefix}{key}"
                if isinstance(key, (str, int)) and find(root, name) is child:
                    found.append(name)
                    below += [] if structure.is_leaf(child) else [(f"{name}/", child)]
        level = below if len(found) < _MOST_COMPLETIONS else []
    return found[:_MOST_COMPLETIONS]


def put(root: dict[Any, Any], path: Path, value: Any) -> None:
    """Write a value at a path and create the missing parents."""
    if dict.__contains__(root, path):
        dict.__setitem__(root, path, value)
        return
    if not path:
        raise _empty_path(PathKeyError)
    parent, depth = _parent(root, path)
    key, child = _child(parent, path[depth])
    can_set = isinstance(parent, dict) or (isinstance(parent, list) and child is not MISSING)
    if not can_set:
        raise _unreachable(path, depth, parent)
    for missing in reversed(path[depth + 1 :]):  # bottom-up: only the last write changes the tree
        node = type(root)()
        dict.__setitem__(node, missing, value)
        value = node
    if structure.is_plain_dict(parent):
        dict.__setitem__(parent, key, value)  # parent[key] may read a tuple as a path
    else:
        parent[key] = value


def merge(root: dict[Any, Any], other: dict[Any, Any]) -> None:
    """Write the items of `other` into `root`; where both have a Container, merge these two."""
    for key, value in dict.items(other):
        mine: Any = dict.get(root, key)
        if nodes.is_container(mine) and nodes.is_container(value):
            merge(mine, value)
        else:
            dict.__setitem__(root, key, value)


def remove(root: dict[Any, Any], key: Any) -> None:
    """Remove the value at a key or path; a PathKeyError if it is missing or in a list or tuple."""
    if dict.__contains__(root, key):
        dict.__delitem__(root, key)
        return
    path = split(key)
    if find(root, key) is MISSING:
        raise missing_error(PathKeyError, root, path)
    parent, depth = _parent(root, path)
    if not isinstance(parent, dict):
        raise _unreachable(path, depth, parent)
    del parent[_child(parent, path[-1])[0]]


def _unreachable(path: Path, depth: int, node: Any) -> LarsTreeError:
    where = path_string(path[:depth])
    text = f"cannot change {path_string(path)}: {where} is {errors.describe(node)}"
    return errors.error(PathKeyError, "key", text, paths=[path])


def _empty_path(kind: type[LarsTreeError]) -> LarsTreeError:
    return errors.error(kind, "key", "an empty path names no key", paths=[()])


def missing_error(kind: type[LarsTreeError], root: Any, path: Path) -> LarsTreeError:
    """The error for a missing path; it names the first missing key and the keys that exist."""
    if not path:
        return _empty_path(kind)
    parent, depth = _parent(root, path)
    known = [key for key, _ in nodes.children(parent)]
    where = f" in {path_string(path[:depth])}" if depth else ""
    there = f"there is {errors.enumerated(known, shown=repr)}" if known else "it is empty"
    found = "that is a leaf" if structure.is_leaf(parent) else there
    hint = errors.did_you_mean(path[depth], known)
    text = f"no {path_string(path[depth : depth + 1])!r}{where}: {found}{hint}"
    exception = errors.error(kind, "key", text, paths=[path])
    if hint and isinstance(exception, AttributeError):
        # If `name` is unset, Python sets it, and since 3.12 a traceback then shows a second hint.
        exception.name = None
    return exception


def flat(root: dict[Any, Any], sep: str) -> dict[str, Any]:
    """The leaves by name; an empty node counts as a leaf and becomes an empty Container."""
    found: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for path, node in structure.walk(root, empty_nodes=True):
        if any(sep in str(key) for key in path):
            text = f"a key of {path_string(path)} holds the separator {sep!r}"
            raise errors.error(StructureError, "sep", text, paths=[path])
        name = sep.join(map(str, path))
        if name in found:
            text = f"two leaves have the name {name!r}"
            raise errors.error(StructureError, "sep", text, paths=[paths[name], path])
        paths[name] = path
        found[name] = node if structure.is_leaf(node) else type(root)()
    return found


def put_new(root: dict[Any, Any], path: Path, value: Any) -> int:
    """Write a value at a new path of literal keys; return how many parents were created."""
    node: Any = root
    *parents, last = path
    created = 0
    for depth, key in enumerate(parents, 1):
        if not dict.__contains__(node, key):
            dict.__setitem__(node, key, type(root)())
            created += 1
        node = dict.__getitem__(node, key)
        if not isinstance(node, type(root)):
            raise _unreachable(path, depth, node)
    if dict.__contains__(node, last):
        raise _unreachable(path, len(path), dict.__getitem__(node, last))
    dict.__setitem__(node, last, value)
    return created
