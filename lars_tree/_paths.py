"""How a Container finds, writes and removes what a key or a path names.

An exact key takes precedence over a path. A path is a tuple of keys or, except in writing, a string
split at '/'. A key made of digits may be an index. Works on any tree; knows no arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lars_tree import _tree, errors
from lars_tree.errors import LarsTreeError, Path, PathKeyError, path_string

_INDEX = re.compile("0|[1-9][0-9]{0,17}")


def split(key: Any) -> Path:
    """The path that a key stands for."""
    if isinstance(key, tuple):
        return key
    return tuple(key.split("/")) if isinstance(key, str) else (key,)


def is_special(name: str) -> bool:
    """Whether Python reserves the name, as it does __setstate__: never an attribute for a key.

    Libraries call the methods that have such names, and the keys of a file may come from anybody.
    """
    return name.startswith("__") and name.endswith("__")


def find(root: dict[Any, Any], key: Any) -> Any:
    """The value at a key or path; MISSING if there is none."""
    if dict.__contains__(root, key):
        return dict.__getitem__(root, key)
    path = split(key)
    if path == (key,) or not path:
        return _tree.MISSING
    parent, depth = _parent(root, path)
    return _child(parent, path[-1]) if depth == len(path) - 1 else _tree.MISSING


def _parent(root: Any, path: Path) -> tuple[Any, int]:
    """The last node above the end of the path that exists, and how many keys lead to it."""
    node, depth = root, 0
    while depth < len(path) - 1 and (child := _child(node, path[depth])) is not _tree.MISSING:
        node, depth = child, depth + 1
    return node, depth


def _child(node: Any, key: Any) -> Any:
    if _tree.is_leaf(node):
        return _tree.MISSING
    return dict.get(_items(node), _own_key(node, key), _tree.MISSING)


def _items(node: Any) -> dict[Any, Any]:
    return node if _tree.is_plain_dict(node) else dict(_tree.children(node))


def _own_key(node: Any, key: Any) -> Any:
    """The key itself, or the index that a string stands for."""
    if isinstance(key, str) and _INDEX.fullmatch(key) and not dict.__contains__(_items(node), key):
        return int(key)
    return key


def put(root: dict[Any, Any], path: Path, value: Any, new_node: Callable[[], Any]) -> None:
    """Write a value at a path and create the missing parents.

    Raises:
        PathKeyError: the path goes through a leaf, or to an index that a list or tuple cannot set.
    """
    if dict.__contains__(root, path):
        dict.__setitem__(root, path, value)
        return
    if not path:
        raise PathKeyError("an empty path names no key")
    parent, depth = _parent(root, path)
    exists = _child(parent, path[depth]) is not _tree.MISSING
    if not isinstance(parent, dict) and not (isinstance(parent, list) and exists):
        raise _unreachable(path, depth, parent)
    for key in reversed(path[depth + 1 :]):  # bottom-up: only the last write changes the tree
        node = new_node()
        dict.__setitem__(node, key, value)
        value = node
    _set(parent, _own_key(parent, path[depth]) if exists else path[depth], value)


def _set(node: Any, key: Any, value: Any) -> None:
    if _tree.is_plain_dict(node):
        dict.__setitem__(node, key, value)  # a Container would convert the value again
    else:
        node[key] = value


def remove(root: dict[Any, Any], key: Any) -> None:
    """Remove the value at a key or path.

    Raises:
        PathKeyError: there is none, or it is in a list or tuple.
    """
    if find(root, key) is _tree.MISSING:
        raise missing_error(PathKeyError, root, split(key))
    path = (key,) if dict.__contains__(root, key) else split(key)
    parent, depth = _parent(root, path)
    if not isinstance(parent, dict):
        raise _unreachable(path, depth, parent)
    key = _own_key(parent, path[-1])
    if _tree.is_plain_dict(parent):
        dict.__delitem__(parent, key)
    else:
        del parent[key]


def _unreachable(path: Path, depth: int, node: Any) -> LarsTreeError:
    where = path_string(path[:depth])
    error = PathKeyError(f"cannot change {path_string(path)}: {where} is {errors.describe(node)}")
    error.paths = (path,)
    return error


def missing_error(kind: type[LarsTreeError], root: Any, path: Path) -> LarsTreeError:
    """The error for a path that does not exist: its first missing key, and the keys that exist."""
    if not path:
        return kind("an empty path names no key")
    parent, depth = _parent(root, path)
    known = [key for key, _ in _tree.children(parent)]
    where = f" in {path_string(path[:depth])}" if depth else ""
    there = f"there is {errors.enumerated(known, shown=repr)}" if known else "it is empty"
    found = "that is a leaf" if _tree.is_leaf(parent) else there
    hint = errors.did_you_mean(path[depth], known)
    error = kind(f"no {path_string(path[depth : depth + 1])!r}{where}: {found}{hint}")
    error.paths = (path,)
    return error


def flat(root: Any, sep: str, empty: Callable[[], Any]) -> dict[str, Any]:
    """The leaves by name; empty() stands for a node without children."""
    found: dict[str, Any] = {}
    for path, node in _tree.walk(root, empty_nodes=True):
        if any(sep in str(key) for key in path):
            text = f"a key of {path_string(path)} holds the separator {sep!r}"
            raise errors.StructureError(text)
        name = sep.join(map(str, path))
        if name in found:
            raise errors.StructureError(f"two leaves have the name {name!r}")
        found[name] = node if _tree.is_leaf(node) else empty()
    return found


def put_new(root: dict[Any, Any], path: Path, value: Any, new_node: Callable[[], Any]) -> None:
    """Write a value at a new path of literal keys and create the missing parents.

    Raises:
        PathKeyError: the path exists, or goes through a leaf.
    """
    node: Any = root
    for depth, key in enumerate(path[:-1], 1):
        child = dict.get(node, key, _tree.MISSING)
        if child is _tree.MISSING:
            child = new_node()
            dict.__setitem__(node, key, child)
        if not isinstance(child, type(root)):
            raise _unreachable(path, depth, child)
        node = child
    if dict.__contains__(node, path[-1]):
        raise _unreachable(path, len(path), dict.__getitem__(node, path[-1]))
    dict.__setitem__(node, path[-1], value)
