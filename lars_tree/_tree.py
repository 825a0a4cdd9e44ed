"""Nests of values: walk, match by key, broadcast a prefix, rebuild. Knows no arrays.

What a node is, how it is read and how another one is made says `_nodes.py`. A leaf is whatever is
not a nest; None is a leaf that holds nothing. Depth is bounded by Python's recursion limit alone:
no walk here uses the C stack for it.

Matching runs twice only when it fails: a fast pass that stops at the first difference, then a slow
one that lists them all. The fast walks over plain dicts, lists and tuples have native twins in
`_native/walk.hpp`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lars_tree import _native, _nodes, errors
from lars_tree._nodes import KINDS as _KINDS
from lars_tree._nodes import LEAF as _LEAF
from lars_tree._nodes import PLAIN_DICT as _PLAIN_DICT
from lars_tree._nodes import SEQUENCE as _SEQUENCE
from lars_tree._nodes import kind_of as _kind
from lars_tree.errors import Line, Path

Tree = Any
Leaf = Any
T = TypeVar("T")

NOTHING, MISSING = object(), object()
children = _nodes.children


def is_leaf(node: Tree) -> bool:
    """Whether the node is no nest."""
    return _kind(node) == _LEAF


def is_plain_dict(node: Tree) -> bool:
    """Whether dict's own methods read the node as its class does."""
    return _kind(node) == _PLAIN_DICT


def leaves(tree: Tree) -> list[Leaf]:
    """The leaves, in the order in which the nest holds them."""
    found: list[Leaf] = []
    kernel = _native.in_use()
    try:
        if kernel is None:
            _collect_in_python(tree, found)
        else:
            kernel.collect(tree, found, _KINDS, _kind, _collect_in_python)
    except RuntimeError as error:
        raise _explained_change(error, "w") from None
    return found


def _explained_change(error: RuntimeError, argument: str) -> Exception:
    """The error, in our words where it says that a node was changed while it was read."""
    text = str(error)
    is_change = " during iteration" in text or text == "a tree was changed while it was read"
    return changed(argument) if is_change else error


def _collect_in_python(node: Tree, found: list[Leaf]) -> None:
    if _kind(node) == _LEAF:
        found.append(node)
    else:
        for _, child in children(node):
            _collect_in_python(child, found)


_DEEPEST = 100_000  # levels that a walk goes down whatever the recursion limit: a cycle has no end


def _check_depth(depth: int) -> None:
    if depth > min(sys.getrecursionlimit(), _DEEPEST):
        raise RecursionError


def walk(tree: Tree, path: Path = (), *, empty_nodes: bool = False) -> Iterator[tuple[Path, Leaf]]:
    """(path, leaf) pairs in the order of `leaves`. `empty_nodes` adds nodes without children."""
    if is_leaf(tree):
        yield path, tree
        return
    keys, pending = list(path), [iter(children(tree))]
    while pending:
        for key, child in pending[-1]:
            if is_leaf(child) or (empty_nodes and not list(children(child))):
                yield (*keys, key), child
            else:
                _check_depth(len(pending))
                keys.append(key)
                pending.append(iter(children(child)))
                break
        else:
            pending.pop()
            if pending:
                keys.pop()


def rebuild(tree: T, new_leaves: Iterable[Leaf], argument: str = "tree", at: Path = ()) -> T:
    """A nest like `tree` with other leaves, given in the order of `leaves`.

    `argument` is what the caller calls the tree, and `at` where in the argument it is.

    Raises:
        StructureError: a node cannot be rebuilt; there are more or fewer leaves by now.
    """
    fill = lambda remaining: rebuilding(argument, _fill, tree, remaining, at=at)  # noqa: E731
    new: T = _consuming(new_leaves, fill, argument)
    return new


def _consuming(leaves: Iterable[Leaf], fill: Callable[..., Tree], argument: str = "w") -> Tree:
    """fill(leaves), which takes all of them, unless the tree was changed meanwhile."""
    remaining = iter(leaves)
    try:
        new = fill(remaining)
    except StopIteration:
        raise changed(argument) from None
    if next(remaining, NOTHING) is not NOTHING:
        raise changed(argument)
    return new


def rebuilding(
    argument: str, fill: Callable[..., Any], tree: Tree, *arguments: Any, at: Path = ()
) -> Any:
    """fill(tree, ...), with the path of a node that it cannot rebuild."""
    try:
        return fill(tree, *arguments)
    except _nodes.CannotRebuild as error:
        raise error.explained(argument, at) from None


def changed(argument: str = "w") -> errors.LarsTreeError:
    """What to say of a nest that no longer has the leaves that were found in it."""
    headline = f"{argument} was changed while it was read, as another thread may do"
    text = "expected the same leaves until the end of the call"
    return errors.error(errors.StructureError, argument, headline, [((), text)])


def paths(tree: Tree, count: int) -> list[Path]:
    """The paths of the leaves; a StructureError if these are no longer so many."""
    found = [path for path, _ in walk(tree)]
    if len(found) != count:
        raise changed()
    return found


def _fill(node: Tree, remaining: Iterator[Leaf]) -> Tree:
    # Not a closure: one that calls itself keeps all leaves alive until garbage is collected.
    kind = _kind(node)
    if kind == _LEAF:
        return next(remaining)
    if kind != _PLAIN_DICT or not _nodes.is_trusted(node):
        return _nodes.replace_children(node, _nodes.each(node, _fill, remaining))
    filled = {}
    try:  # the quickest way, for most nodes
        for key, child in dict.items(node):
            filled[key] = _fill(child, remaining)
    except _nodes.CannotRebuild as error:
        error.keys.append(key)
        raise
    return filled if type(node) is dict else _nodes.container(type(node), filled)


def replace_children(node: Tree, values: Iterable[Tree]) -> Tree:
    """A node of the same type and keys with other children, given in the order of `children`.

    Raises:
        StructureError: it cannot be rebuilt.
    """
    return rebuilding("tree", _nodes.replace_children, node, values)


def for_reading(tree: Tree, new_leaves: Iterable[Leaf]) -> Tree:
    """A nest that reads like `tree`, with other leaves; nodes of users' classes are not rebuilt."""
    return _consuming(new_leaves, lambda remaining: _fill_for_reading(tree, remaining))


def _fill_for_reading(node: Tree, remaining: Iterator[Leaf]) -> Tree:
    if _kind(node) == _LEAF:
        return next(remaining)
    return _nodes.plain(node, _nodes.each(node, _fill_for_reading, remaining))


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
    return rebuilding("tree", _pick, tree, kept)


def _pick(node: Tree, kept: Iterator[bool]) -> Tree:
    if is_leaf(node):
        return node if next(kept) else NOTHING
    picked = _nodes.each(node, _pick, kept)
    some = [child is not NOTHING for child in picked]
    if not any(some):
        return NOTHING
    if is_plain_dict(node) and _nodes.is_trusted(node):
        pairs = zip(node, picked, strict=True)
        return _nodes.with_items(node, [pair for pair in pairs if pair[1] is not NOTHING])
    values = [child if keep else None for child, keep in zip(picked, some, strict=True)]
    return _nodes.replace_children(node, values)


def broadcast(
    argument: str,
    tree: Tree,
    prefix: Tree,
    *,
    values: Iterable[Leaf] | None = None,
    exact: bool = False,
    to: str = "w",
    at: Path = (),
) -> list[Leaf]:
    """For each leaf of `tree` the value that `prefix` gives it.

    `prefix` has the nodes of `tree` down to leaves that may come early, unless `exact`: these hold
    for all that lies below them. Keys are matched by name; a list matches a tuple of its length.
    `values` are to be taken for the leaves of the prefix, in their order. `at` is where in the
    argument the prefix is.

    Raises:
        StructureError: naming `argument`, what it goes `to`, and every path where they differ.
    """
    found: list[Leaf] = []
    try:
        given = prefix if values is None else for_reading(prefix, values)
        if _match(tree, given, found, exact):
            return found
        lines = list(differences(tree, prefix, exact, at))
    except RecursionError:
        raise explained({to: tree, argument: prefix}) from None
    except RuntimeError as error:
        raise _explained_change(error, f"{to} or {argument}") from None
    headline = f"{argument} does not match {to}"
    raise errors.error(errors.StructureError, argument, headline, lines)


def _match(tree: Tree, prefix: Tree, found: list[Leaf], exact: bool) -> bool:
    """Whether the prefix is one; adds its value for each leaf."""
    kernel = _native.in_use()
    if kernel is None:
        return _match_in_python(tree, prefix, found, exact)
    return kernel.match(tree, prefix, found, exact, _KINDS, _kind, _match_in_python)


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
    # dict's own methods: those of a Container read 'a/b' as a path.
    others = prefix if prefix_kind == _PLAIN_DICT else dict(children(prefix))
    pairs = list(children(node))
    if len(pairs) != len(others):
        return False
    for key, child in pairs:
        if not dict.__contains__(others, key):
            return False
        if not _match_in_python(child, dict.__getitem__(others, key), found, exact):
            return False
    return True


def side_by_side(
    a: Tree, b: Tree, compare: Callable[[Tree, Tree], tuple[str, bool]], path: Path = ()
) -> Iterator[Line]:
    """What compare(x, y) says of the nodes at each path of two nests.

    It returns a text, or "" if there is nothing to say, and whether to go on into their children.
    For a key of one of them alone, the other is MISSING.
    """
    text, go_on = compare(a, b)
    if text:
        yield path, text
    keys, pending = list(path), [iter(_paired(a, b) if go_on else ())]
    while pending:
        for key, x, y in pending[-1]:
            text, go_on = compare(x, y)
            if text:
                yield (*keys, key), text
            if go_on:
                _check_depth(len(pending))
                keys.append(key)
                pending.append(iter(_paired(x, y)))
                break
        else:
            pending.pop()
            if pending:
                keys.pop()


def _paired(a: Tree, b: Tree) -> list[tuple[Hashable, Tree, Tree]]:
    mine, theirs = dict(children(a)), dict(children(b))
    pairs = [(key, child, theirs.get(key, MISSING)) for key, child in mine.items()]
    return pairs + [(key, MISSING, child) for key, child in theirs.items() if key not in mine]


def differences(tree: Tree, prefix: Tree, exact: bool = False, path: Path = ()) -> Iterator[Line]:
    """Every place where `prefix` is no prefix of `tree`, with what was expected there."""
    lines = 0

    def compare(mine: Tree, theirs: Tree) -> tuple[str, bool]:
        nonlocal lines
        if mine is MISSING or theirs is MISSING:
            return "", False  # that was said of their parents
        text, go_on = _difference(mine, theirs, exact, hints=lines < errors.MOST_LINES)
        lines += bool(text)
        return text, go_on

    return side_by_side(tree, prefix, compare, path)


def _difference(tree: Tree, prefix: Tree, exact: bool, hints: bool) -> tuple[str, bool]:
    kinds = _kind(tree), _kind(prefix)
    if kinds[1] == _LEAF and (kinds[0] == _LEAF or not exact):
        return "", False
    mine, theirs = ([key for key, _ in children(node)] for node in (tree, prefix))
    if _LEAF not in kinds and set(mine) == set(theirs):
        return "", True
    if _LEAF in kinds or _SEQUENCE in kinds:
        return f"expected {errors.describe(tree)}, got {errors.describe(prefix)}", False
    return errors.key_differences(mine, theirs, hints), True


def cycle(tree: Tree) -> tuple[Path, Path] | None:
    """The path of a node that holds itself, and the path at which it does; None without one.

    Iterative, so that it can explain a RecursionError.
    """
    keys: list[Hashable] = []
    depths = {id(tree): 0}  # of the nodes on the way down
    nodes, pending = [tree], [iter(list(children(tree)))]
    while pending:
        if len(pending) > _DEEPEST:
            return None  # some classes make up new nodes whenever they are read, without end
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


@contextmanager
def explaining(arguments: dict[str, Tree]) -> Iterator[None]:
    """Say which of these arguments is too deep, where a RecursionError is raised."""
    try:
        yield
    except RecursionError:
        raise explained(arguments) from None


def explained(arguments: dict[str, Tree]) -> Exception:
    """What to say of a nest that was too deep to walk, found among these arguments."""
    for name, tree in arguments.items():
        found = cycle(tree)
        if found:
            earlier, path = found
            text = f"expected a tree, got the node at {errors.path_string(earlier) or name} again"
            return errors.error(errors.StructureError, name, f"{name} holds itself", [(path, text)])
    return RecursionError("a nest is deeper than the recursion limit: sys.setrecursionlimit")
