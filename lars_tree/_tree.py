"""Nests of values: walk, match by key, broadcast a prefix, rebuild. Knows no arrays.

Dicts (Container is one), lists, tuples, namedtuples and attrs classes are walked by short
recursions of our own, which keep what a user's subclass adds. Further mappings and sequences go
through dm-tree, one node at a time. A leaf is whatever is not a nest; None is a leaf that holds
nothing.

Matching runs twice only when it fails: a fast pass that stops at the first difference, then a slow
one that lists them all. The fast walks over plain dicts, lists and tuples have native twins in
`_native/walk.hpp`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lars_tree import _native, errors
from lars_tree.errors import Line, Path

Tree = Any
Leaf = Any

# A plain dict holds its items in the order of its memory, and has no other way to get at them.
_LEAF, _PLAIN_DICT, _DICT, _SEQUENCE, _NAMED, _FIELDS, _FOREIGN = range(7)
_KINDS: dict[type, int] = {list: _SEQUENCE, tuple: _SEQUENCE, dict: _PLAIN_DICT}

NOTHING = object()

# How to make a dict of exactly this type from a dict or from items; others are copied and refilled.
MAKERS: dict[type, Callable[[Any], Any]] = {dict: dict}


_ACCESS = ("__iter__", "__len__", "keys", "values", "items")


def _kind(node: Tree) -> int:
    cls = type(node)
    kind = _KINDS.get(cls)
    if kind is None:
        kind = _classify(node)
        _KINDS[cls] = kind
    return kind


def _classify(node: Tree) -> int:
    cls = type(node)
    if issubclass(cls, dict):
        plain = all(getattr(cls, name) is getattr(dict, name) for name in _ACCESS)
        return _PLAIN_DICT if plain else _DICT
    if issubclass(cls, (str, bytes, bytearray, memoryview, range)):
        return _LEAF  # sequences, but of nothing that could be put back
    if hasattr(cls, "__attrs_attrs__"):
        return _FIELDS
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _NAMED
    if issubclass(cls, (list, tuple)):
        return _SEQUENCE
    if issubclass(cls, (Mapping, Sequence)):
        import tree

        return _FOREIGN if tree.is_nested(node) else _LEAF
    return _LEAF


def is_leaf(node: Tree) -> bool:
    """Whether the node is no nest."""
    return _kind(node) == _LEAF


def children(node: Tree) -> Iterable[tuple[Hashable, Tree]]:
    """The (key, child) pairs of a node: keys of a mapping, indices, names of fields."""
    kind = _kind(node)
    if kind in (_PLAIN_DICT, _DICT):  # through the type: a key named "items" may hide the method
        return type(node).items(node)  # type: ignore[no-any-return]
    if kind == _SEQUENCE:
        return enumerate(node)
    if kind == _FIELDS:
        return [(field.name, getattr(node, field.name)) for field in type(node).__attrs_attrs__]
    if kind == _NAMED:
        return zip(node._fields, node, strict=True)
    found: list[tuple[Hashable, Tree]] = []
    if kind == _FOREIGN:
        import tree  # dm-tree: only nests of other kinds need it

        def visit(path: Path, child: Tree) -> Any:
            if not path:
                return None  # go on into the node itself
            found.append((path[0], child))
            return child if child is not None else tree.MAP_TO_NONE  # but no deeper

        tree.traverse_with_path(visit, node)
    return found


def replace_children(node: Tree, values: Iterable[Tree]) -> Tree:
    """A node of the same type and keys with other children, given in the order of `children`."""
    cls = type(node)
    if cls is list or cls is tuple:
        return cls(values)
    if cls in MAKERS:
        return MAKERS[cls](zip(node, values, strict=True))
    if isinstance(node, tuple):  # a namedtuple too: its own constructor may want other arguments
        return tuple.__new__(cls, values)
    if isinstance(node, (dict, list)) or hasattr(cls, "__attrs_attrs__"):
        return _refilled(node, values)
    import tree

    remaining = iter(values)

    def visit(path: Path, _: Tree) -> Any:
        if not path:
            return None
        value = next(remaining)
        return value if value is not None else tree.MAP_TO_NONE

    return tree.traverse_with_path(visit, node)


def _refilled(node: Tree, values: Iterable[Tree]) -> Tree:
    """A shallow copy with other children, which keeps what else a user's class holds."""
    new = copy.copy(node)
    if getattr(node, "__dict__", None) is node:  # attribute access, in the way of many a class
        new.__dict__ = new
    if isinstance(node, list):
        new[:] = values
        return new
    put: Any = dict.__setitem__ if isinstance(node, dict) else object.__setattr__
    for (key, _), value in zip(children(node), values, strict=True):
        put(new, key, value)
    return new


def leaves(tree: Tree) -> list[Leaf]:
    """The leaves, in the order in which the nest holds them."""
    found: list[Leaf] = []
    _collect(tree, found)
    return found


def _collect(tree: Tree, found: list[Leaf]) -> None:
    kernel = _native.in_use()
    if kernel is None:
        _collect_in_python(tree, found)
    else:
        kernel.collect(tree, found, _KINDS, _kind, _collect_in_python)


def _collect_in_python(node: Tree, found: list[Leaf]) -> None:
    if _kind(node) == _LEAF:
        found.append(node)
    else:
        for _, child in children(node):
            _collect_in_python(child, found)


def walk(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Leaf]]:
    """(path, leaf) pairs, in the same order as `leaves`."""
    if is_leaf(tree):
        yield path, tree
    else:
        for key, child in children(tree):
            yield from walk(child, (*path, key))


def rebuild(tree: Tree, new_leaves: Iterable[Leaf]) -> Tree:
    """A nest like `tree` with other leaves, given in the order of `leaves`."""
    remaining = iter(new_leaves)
    try:
        new = _fill(tree, remaining)
    except StopIteration:
        raise changed() from None
    if next(remaining, NOTHING) is not NOTHING:
        raise changed()
    return new


def changed(argument: str = "w") -> errors.LarsTreeError:
    """What to say of a nest that no longer has the leaves that were found in it."""
    headline = f"{argument} was changed while it was read, as another thread may do"
    text = "expected the same leaves until the end of the call"
    return errors.error(errors.StructureError, argument, headline, [((), text)])


def paths(tree: Tree, count: int) -> list[Path]:
    """The paths of the leaves, of which there were so many.

    Raises:
        StructureError: now there are more or fewer.
    """
    found = [path for path, _ in walk(tree)]
    if len(found) != count:
        raise changed()
    return found


def _fill(node: Tree, remaining: Iterator[Leaf]) -> Tree:
    # Not a closure: one that calls itself keeps all leaves alive until garbage is collected.
    kind = _kind(node)
    if kind == _LEAF:
        return next(remaining)
    if kind == _PLAIN_DICT and type(node) in MAKERS:  # the quickest way, for most nodes
        filled = {key: _fill(child, remaining) for key, child in dict.items(node)}
        return MAKERS[type(node)](filled)
    return replace_children(node, [_fill(child, remaining) for _, child in children(node)])


def map_leaves(
    fn: Callable[..., Any], tree: Tree, *columns: list[Any], with_path: bool = False
) -> list[Any]:
    """fn(leaf, ...) for each leaf, None for None; what fn raises gets a note with the path."""
    results = []
    for (path, leaf), *values in zip(walk(tree), *columns, strict=True):
        arguments = (path, leaf, *values) if with_path else (leaf, *values)
        try:
            results.append(None if leaf is None else fn(*arguments))
        except Exception as error:
            error.add_note(f"at {errors.path_string(path)}")
            raise
    return results


def pick(tree: Tree, kept: Iterator[bool]) -> Tree:
    """The nest of those leaves for which `kept`, in their order, is true; NOTHING without any.

    Nodes that this empties go too. A list or tuple keeps its length, with None in the gaps.
    """
    if is_leaf(tree):
        return tree if next(kept) else NOTHING
    pairs = [(key, pick(child, kept)) for key, child in children(tree)]
    some = [(key, child) for key, child in pairs if child is not NOTHING]
    if not some:
        return NOTHING
    if type(tree) in MAKERS:
        return MAKERS[type(tree)](some)
    return replace_children(tree, (None if child is NOTHING else child for _, child in pairs))


def broadcast(
    argument: str,
    tree: Tree,
    prefix: Tree,
    *,
    exact: bool = False,
    to: str = "w",
    at: Path = (),
) -> list[Leaf]:
    """For each leaf of `tree` the value that `prefix` gives it.

    `prefix` has the nodes of `tree` down to leaves that may come early, unless `exact`: these hold
    for all that lies below them. Keys are matched by name; a list matches a tuple of its length.
    `at` is where in the argument the prefix is.

    Raises:
        StructureError: naming `argument`, what it goes `to`, and every path where they differ.
    """
    found: list[Leaf] = []
    if not _match(tree, prefix, found, exact):
        raise errors.error(
            errors.StructureError,
            argument,
            f"{argument} does not match {to}",
            differences(tree, prefix, exact, at),
        )
    return found


def _match(tree: Tree, prefix: Tree, found: list[Leaf], exact: bool) -> bool:
    """Whether the prefix is one; adds its value for each leaf."""
    kernel = _native.in_use()
    if kernel is None:
        return _match_in_python(tree, prefix, found, exact)
    matched: bool = kernel.match(tree, prefix, found, exact, _KINDS, _kind, _match_in_python)
    return matched


def _match_in_python(node: Tree, prefix: Tree, found: list[Leaf], exact: bool) -> bool:
    kind, prefix_kind = _kind(node), _kind(prefix)
    if prefix_kind == _LEAF:
        if kind == _LEAF:
            found.append(prefix)
        elif not exact:
            found.extend([prefix] * len(leaves(node)))
        return kind == _LEAF or not exact
    if kind == _LEAF:
        return False
    # dict's own methods, where it is one: those of a Container read 'a/b' as a path.
    others = prefix if isinstance(prefix, dict) else dict(children(prefix))
    pairs = list(children(node))
    if len(pairs) != len(others):
        return False
    for key, child in pairs:
        if not dict.__contains__(others, key):
            return False
        if not _match_in_python(child, dict.__getitem__(others, key), found, exact):
            return False
    return True


def differences(tree: Tree, prefix: Tree, exact: bool = False, path: Path = ()) -> Iterator[Line]:
    """Every place where `prefix` is no prefix of `tree`, with what was expected there."""
    if is_leaf(prefix):
        if exact and not is_leaf(tree):
            yield path, f"expected {errors.describe(tree)}, got {errors.describe(prefix)}"
        return
    if is_leaf(tree):
        yield path, f"expected {errors.describe(tree)}, got {errors.describe(prefix)}"
        return
    mine, theirs = dict(children(tree)), dict(children(prefix))
    if mine.keys() != theirs.keys():
        if _SEQUENCE in (_kind(tree), _kind(prefix)):
            yield path, f"expected {errors.describe(tree)}, got {errors.describe(prefix)}"
            return
        yield path, errors.key_differences(list(mine), list(theirs))
    for key, child in mine.items():
        if key in theirs:
            yield from differences(child, theirs[key], exact, (*path, key))


def cycle(tree: Tree) -> tuple[Path, Path] | None:
    """The path of a node that holds itself, and the path at which it does; None without one.

    Iterative, so that it can explain a RecursionError.
    """
    keys: list[Hashable] = []
    depths = {id(tree): 0}  # of the nodes on the way down
    nodes, pending = [tree], [iter(list(children(tree)))]
    while pending:
        step = next(pending[-1], None)
        if step is None:
            pending.pop()
            del depths[id(nodes.pop())]
            if keys:
                keys.pop()
            continue
        key, child = step
        if id(child) in depths:
            return tuple(keys[: depths[id(child)]]), (*keys, key)
        if not is_leaf(child):
            keys.append(key)
            depths[id(child)] = len(keys)
            nodes.append(child)
            pending.append(iter(list(children(child))))
    return None


def explained(arguments: dict[str, Tree]) -> Exception:
    """What to say of a nest that was too deep to walk, found among these arguments."""
    for name, tree in arguments.items():
        found = cycle(tree)
        if found:
            earlier, path = found
            text = f"expected a tree, got the node at {errors.path_string(earlier) or name} again"
            return errors.error(errors.StructureError, name, f"{name} holds itself", [(path, text)])
    return RecursionError("a nest is deeper than the recursion limit: sys.setrecursionlimit")
