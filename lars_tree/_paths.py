"""Keys and paths: how a Container finds, puts and removes what a key or a path names.

The exact key comes first, then the path: a tuple of keys, or a string split at '/', in which digits
may be an index. Works on any tree of dicts, lists and tuples; knows no arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lars_tree import _tree, errors
from lars_tree.errors import LarsTreeError, Path, PathKeyError, path_string

MISSING = object()

_INDEX = re.compile("0|[1-9][0-9]{0,17}")


def split(key: Any) -> Path:
    """The path that a key stands for."""
    if isinstance(key, tuple):
        return key
    return tuple(key.split("/")) if isinstance(key, str) else (key,)


def is_special(name: str) -> bool:
    """Whether it is a name of Python's protocols, such as __setstate__, which is never a key.

    Libraries call what they find under it, and the keys of a file may come from anybody.
    """
    return name.startswith("__") and name.endswith("__")


def find(root: dict[Any, Any], key: Any) -> Any:
    """What is at a key or path; MISSING if nothing is."""
    if dict.__contains__(root, key):
        return dict.__getitem__(root, key)
    path = split(key)
    if path == (key,) or not path:
        return MISSING
    return _descend(root, path)


def _descend(node: Any, path: Path) -> Any:
    for key in path:
        node = _child(node, key)
    return node


def _child(node: Any, key: Any) -> Any:
    if node is MISSING or _tree.is_leaf(node):
        return MISSING
    return dict.get(_items(node), _own_key(node, key), MISSING)


def _items(node: Any) -> dict[Any, Any]:
    return node if _tree.is_plain_dict(node) else dict(_tree.children(node))


def _set(node: dict[Any, Any], key: Any, value: Any) -> None:
    if _tree.is_plain_dict(node):
        dict.__setitem__(node, key, value)  # a Container would read the key as a path
    else:
        node[key] = value


def _own_key(node: Any, key: Any) -> Any:
    """The key itself, or the index that a string stands for."""
    if isinstance(key, str) and _INDEX.fullmatch(key) and not dict.__contains__(_items(node), key):
        return int(key)
    return key


def put(root: dict[Any, Any], key: Any, value: Any, new_node: Callable[[], Any]) -> None:
    """Put a value at a key or path, making the nodes on the way.

    Raises:
        PathKeyError: the path goes through a leaf, or into a list or tuple where nothing is.
    """
    if dict.__contains__(root, key):
        dict.__setitem__(root, key, value)
        return
    path = split(key)
    if not path:
        raise PathKeyError("an empty path names no key")
    # Look before anything is made: a path that cannot be reached leaves no parents behind.
    node: Any = root
    missing = 0
    for depth, step in enumerate(path[:-1]):
        child = _child(node, step)
        if child is MISSING and isinstance(node, dict):
            missing = len(path) - 1 - depth
            break
        if child is MISSING or _tree.is_leaf(child):
            raise _unreachable(path, depth + 1, child)
        node = child
    for step in path[len(path) - 1 - missing : -1]:
        parent, node = node, new_node()
        _set(parent, step, node)
    last = path[-1]
    if isinstance(node, dict):
        there = len(path) > 1 and _child(node, last) is not MISSING
        _set(node, _own_key(node, last) if there else last, value)
    elif isinstance(node, list) and _child(node, last) is not MISSING:
        node[int(str(last))] = value
    else:
        raise _unreachable(path, len(path) - 1, node)


def remove(root: dict[Any, Any], key: Any) -> None:
    """Remove what is at a key or path.

    Raises:
        PathKeyError: nothing is there, or it is in a list or tuple.
    """
    if find(root, key) is MISSING:
        raise missing_error(PathKeyError, root, split(key))
    path = (key,) if dict.__contains__(root, key) else split(key)
    node = _descend(root, path[:-1])
    if not isinstance(node, dict):
        raise _unreachable(path, len(path) - 1, node)
    key = _own_key(node, path[-1])
    if _tree.is_plain_dict(node):
        dict.__delitem__(node, key)
    else:
        del node[key]


def _unreachable(path: Path, depth: int, node: Any) -> LarsTreeError:
    where = path_string(path[:depth])
    what = "is not there" if node is MISSING else f"is {errors.describe(node)}"
    error = PathKeyError(f"cannot change {path_string(path)}: {where} {what}")
    error.paths = (path,)
    return error


def missing_error(kind: type[LarsTreeError], root: Any, path: Path) -> LarsTreeError:
    """The error for a path that is not there: how far it goes, what is there, and near misses."""
    if not path:
        return kind("an empty path names no key")
    node, depth = root, 0
    while depth < len(path) - 1 and (child := _child(node, path[depth])) is not MISSING:
        node, depth = child, depth + 1
    known = [key for key, _ in _tree.children(node)]
    where = f" in {path_string(path[:depth])}" if depth else ""
    there = f"there is {errors.enumerated(known, shown=repr)}" if known else "it is empty"
    what = "that is a leaf" if _tree.is_leaf(node) else there
    hint = errors.did_you_mean(path[depth], known)
    error = kind(f"no {path_string(path[depth : depth + 1])!r}{where}: {what}{hint}")
    error.paths = (path,)
    return error


def flat(root: Any, sep: str, empty: Callable[[], Any]) -> dict[str, Any]:
    """The leaves by name; a node without children counts as a leaf, namely what `empty` makes."""
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
    """Put a value at a path of literal keys where nothing is yet, making the nodes on the way.

    Raises:
        PathKeyError: something is there, or the path goes through a leaf.
    """
    node: Any = root
    for depth, key in enumerate(path[:-1], 1):
        child = dict.get(node, key, MISSING)
        if child is MISSING:
            child = new_node()
            dict.__setitem__(node, key, child)
        if not isinstance(child, type(root)):
            raise _unreachable(path, depth, child)
        node = child
    if dict.__contains__(node, path[-1]):
        raise _unreachable(path, len(path), dict.__getitem__(node, path[-1]))
    dict.__setitem__(node, path[-1], value)
