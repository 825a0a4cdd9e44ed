"""Trees of values: walk, match by key, broadcast a prefix, rebuild. Does not depend on arrays.

`_tree/nodes.py` reads and rebuilds one node. Every object that is not a node, including None, is a
leaf. Only Python's recursion limit bounds the depth: no walk recurses on the C stack.

Matching first runs a fast pass that stops at the first difference. Only if that fails does a slow
pass list all differences. `_native/walk.hpp` implements the fast walks for dicts, lists and tuples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from lars_tree import _native, errors
from lars_tree._tree import nodes
from lars_tree._tree.kinds import KINDS, LEAF, PLAIN_DICT, SEQUENCE, kind_of
from lars_tree._tree.nodes import children
from lars_tree.errors import Line, Path

Tree = Any
Leaf = Any
T = TypeVar("T")
What = Literal["", "leaves", "nodes", "keys", "order", "missing"]
Pair = tuple[Path, Tree, Tree, What]
Correspond = Callable[[Tree, Tree], bool]

NOTHING, MISSING = object(), object()


def is_leaf(node: Tree) -> bool:
    return kind_of(node) == LEAF


def is_plain_dict(node: Tree) -> bool:
    """Whether dict's own methods read the node as the methods of its class do."""
    return kind_of(node) == PLAIN_DICT


def leaves(tree: Tree) -> list[Leaf]:
    found: list[Leaf] = []
    kernel = _native.in_use()
    try:
        if kernel is None:
            _collect_in_python(tree, found)
        else:
            kernel.collect(tree, found, KINDS, kind_of, _collect_in_python)
    except RuntimeError as error:
        raise translated(error, "w") from None
    return found


def translated(error: RuntimeError, argument: str) -> Exception:
    """A StructureError if Python or the kernel reports that a node changed while it was read."""
    text = str(error)
    is_change = " during iteration" in text or text == "a tree was changed while it was read"
    return changed(argument) if is_change else error


def _collect_in_python(node: Tree, found: list[Leaf]) -> None:
    if kind_of(node) == LEAF:
        found.append(node)
    else:
        for _, child in children(node):
            _collect_in_python(child, found)


_DEEPEST = 100_000  # levels, even if the recursion limit is higher, to end walks over cycles


def _check_depth(depth: int) -> None:
    if depth > min(sys.getrecursionlimit(), _DEEPEST):
        raise RecursionError


def walk(tree: Tree, path: Path = (), *, empty_nodes: bool = False) -> Iterator[tuple[Path, Leaf]]:
    """(path, leaf) pairs in the order of `leaves`; with `empty_nodes` also (path, empty node)."""
    try:
        yield from _walk(tree, path, empty_nodes)
    except RuntimeError as error:
        raise translated(error, "w") from None


def _walk(tree: Tree, path: Path, empty_nodes: bool) -> Iterator[tuple[Path, Leaf]]:
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
    """A tree with the nodes of `tree` and new leaves, in the order of `leaves`.

    Errors name the tree as `argument`; `at` is its path within that argument.
    """
    fill = _fill if _native.in_use() is None else _fill_natively
    return _rebuild(fill, tree, new_leaves, argument, at)


def for_reading(tree: Tree, new_leaves: Iterable[Leaf], argument: str) -> Tree:
    """`rebuild` for reading only: nodes of other types become dicts or lists."""
    return _rebuild(_fill_for_reading, tree, new_leaves, argument)


def _rebuild(
    fill: Callable[..., Tree], tree: T, leaves: Iterable[Leaf], argument: str, at: Path = ()
) -> T:
    remaining = iter(leaves)
    try:
        new: T = rebuilding(argument, fill, tree, remaining, at=at)
    except StopIteration:
        raise changed(argument) from None
    except RuntimeError as error:
        raise translated(error, argument) from None
    if next(remaining, NOTHING) is not NOTHING:
        raise changed(argument)
    return new


def rebuilding(
    argument: str, fill: Callable[..., Any], tree: Tree, *arguments: Any, at: Path = ()
) -> Any:
    """fill(tree, ...); a StructureError if a node cannot be rebuilt."""
    try:
        return fill(tree, *arguments)
    except nodes.CannotRebuild as error:
        raise error.explained(argument, at) from None


def changed(argument: str = "w") -> errors.LarsTreeError:
    """The error for a tree whose leaves changed during a call."""
    headline = f"{argument} was changed while it was read, as another thread may do"
    text = "expected the same leaves until the end of the call"
    return errors.error(errors.StructureError, argument, headline, [((), text)])


def paths(tree: Tree, count: int) -> list[Path]:
    """The paths of the leaves; a StructureError if their number is not `count`."""
    found = [path for path, _ in walk(tree)]
    if len(found) != count:
        raise changed()
    return found


def _fill_natively(node: Tree, remaining: Iterator[Leaf]) -> Tree:
    others = KINDS, kind_of, _fill, list[Hashable]()
    try:
        return _native.kernel.rebuild(node, remaining, *others)  # type: ignore[union-attr]
    except nodes.CannotRebuild as error:
        error.keys += others[-1]
        raise


def _fill(node: Tree, remaining: Iterator[Leaf]) -> Tree:
    # Not a closure: a recursive closure is a reference cycle, which keeps all leaves alive.
    kind = kind_of(node)
    if kind == LEAF:
        return next(remaining)
    if kind != PLAIN_DICT or not nodes.is_trusted(node):
        return nodes.replace_children(node, nodes.map_children(node, _fill, remaining))
    filled = {}
    try:  # the fast path, for most nodes
        for key, child in dict.items(node):
            filled[key] = _fill(child, remaining)
    except nodes.CannotRebuild as error:
        error.keys.append(key)
        raise
    return filled if type(node) is dict else nodes.container(type(node), filled)


def _fill_for_reading(node: Tree, remaining: Iterator[Leaf]) -> Tree:
    if kind_of(node) == LEAF:
        return next(remaining)
    pairs = [(key, _fill_for_reading(child, remaining)) for key, child in children(node)]
    return nodes.for_reading(node, pairs)


def map_leaves(
    fn: Callable[..., Any], tree: Tree, *columns: list[Any], with_path: bool = False
) -> list[Any]:
    """Call fn(leaf, ...) for each leaf except None; add the path to an exception as a note."""
    results = []
    pairs = list(walk(tree))  # first, because `fn` may change the tree
    for (path, leaf), *values in zip(pairs, *columns, strict=True):
        arguments = (path, leaf, *values) if with_path else (leaf, *values)
        try:
            results.append(None if leaf is None else fn(*arguments))
        except Exception as error:
            error.add_note(f"at {errors.path_string(path)}")
            raise
    return results


def pick(tree: T, kept: Iterable[bool]) -> T:
    """Keep only the leaves of a Container for which `kept` is true.

    Nodes left without leaves are removed. Lists and tuples keep their lengths: None fills the gaps.
    """
    picked = _rebuild(_pick, tree, kept, "self")
    return nodes.with_items(tree, ()) if picked is NOTHING else picked


def _pick(node: Tree, kept: Iterator[bool]) -> Tree:
    """NOTHING if no leaf is kept."""
    if is_leaf(node):
        return node if next(kept) else NOTHING
    picked = nodes.map_children(node, _pick, kept)
    if all(child is NOTHING for child in picked):
        return NOTHING
    if is_plain_dict(node) and nodes.is_trusted(node):
        pairs = zip(node, picked, strict=True)
        return nodes.with_items(node, [pair for pair in pairs if pair[1] is not NOTHING])
    return nodes.replace_children(node, [None if x is NOTHING else x for x in picked])


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
    """For each leaf of `tree`, its value in `prefix`, which must have the same structure.

    Unless `exact`, a leaf of the prefix may match a node: its value applies to all leaves below.
    Keys are matched by name; a list matches a tuple of the same length. `values` replace the leaves
    of the prefix, in order. `argument` and `to` are the names of the prefix and of the tree in
    error messages; `at` is the path of the prefix within the argument.
    """
    found: list[Leaf] = []
    try:
        given = prefix if values is None else for_reading(prefix, values, argument)
        if match(tree, given, found, exact):
            return found
        lines = list(differences(tree, prefix, exact, at))
    except RecursionError:
        raise explained({to: tree, argument: prefix}) from None
    except RuntimeError as error:
        raise translated(error, f"{to} or {argument}") from None
    headline = f"{argument} does not match {to}"
    raise errors.error(errors.StructureError, argument, headline, lines)


def match(tree: Tree, prefix: Tree, found: list[Leaf], exact: bool) -> bool:
    """Whether `prefix` is a prefix of the tree. Appends the value for each leaf to `found`."""
    kernel = _native.in_use()
    if kernel is None:
        return _match_in_python(tree, prefix, found, exact)
    return kernel.match(tree, prefix, found, exact, KINDS, kind_of, _match_in_python)


def _match_in_python(node: Tree, prefix: Tree, found: list[Leaf], exact: bool) -> bool:
    kind, prefix_kind = kind_of(node), kind_of(prefix)
    if prefix_kind == LEAF:
        if kind == LEAF:
            found.append(prefix)
        elif not exact:
            found.extend([prefix] * len(leaves(node)))
        return kind == LEAF or not exact
    # Use dict's own methods, because the methods of a Container read 'a/b' as a path.
    parts = prefix if prefix_kind == PLAIN_DICT else dict(children(prefix))
    pairs = list(children(node))
    if kind == LEAF or len(pairs) != len(parts):
        return False
    for key, child in pairs:
        part = dict.get(parts, key, MISSING)
        if part is MISSING or not _match_in_python(child, part, found, exact):
            return False
    return True


def side_by_side(
    left: Tree, right: Tree, correspond: Correspond = lambda *_: True, path: Path = ()
) -> Iterator[Pair]:
    """Walk two trees together; yield each pair of leaves, and each pair that differs in structure.

    The pairs are (path, left, right, what), where `what` is one of

    * "leaves": two leaves, equal or not;
    * "nodes": a leaf and a node, or two nodes that do not `correspond`; neither is entered;
    * "keys", "order": nodes with different keys, or with the same keys in another order;
    * "missing": a child of one node only; the other side is MISSING.
    """
    keys: list[Hashable] = list(path)
    pending: list[Iterator[tuple[Path, Tree, Tree]]] = [iter([((), left, right)])]
    while pending:
        for key, x, y in pending[-1]:
            what, pairs = _compare(x, y, correspond)
            if what:
                yield (*keys, *key), x, y, what
            if pairs:
                _check_depth(len(pending) - 1)
                keys.extend(key)
                pending.append(iter(pairs))
                break
        else:
            pending.pop()
            if len(pending) > 1:
                keys.pop()


def _compare(
    left: Tree, right: Tree, correspond: Correspond
) -> tuple[What, list[tuple[Path, Tree, Tree]]]:
    """How two nodes differ, and the pairs of children to compare next, each with its (key,)."""
    if left is MISSING or right is MISSING:
        return "missing", []
    if is_leaf(left) or is_leaf(right):
        return "leaves" if is_leaf(left) and is_leaf(right) else "nodes", []
    if not correspond(left, right):
        return "nodes", []
    a, b = dict(children(left)), dict(children(right))
    what: What = "keys" if a.keys() != b.keys() else "" if list(a) == list(b) else "order"
    return what, [((key,), a.get(key, MISSING), b.get(key, MISSING)) for key in a | b]


def differences(tree: Tree, prefix: Tree, exact: bool = False, path: Path = ()) -> Iterator[Line]:
    """The paths at which `prefix` is not a prefix of `tree`, each with an explanation."""
    count = 0
    for where, node, other, what in side_by_side(tree, prefix, may_match, path):
        if what == "keys" or (what == "nodes" and (exact or not is_leaf(other))):
            yield where, mismatch(node, other, what, hints=count < errors.MOST_LINES)
            count += 1


def may_match(tree: Tree, prefix: Tree) -> bool:
    """Whether to compare two nodes key by key: a list or tuple only if the keys are the same."""
    if SEQUENCE not in (kind_of(tree), kind_of(prefix)):
        return True
    return dict(children(tree)).keys() == dict(children(prefix)).keys()


def mismatch(expected: Tree, found: Tree, what: What, hints: bool = True) -> str:
    """The message for a pair of `side_by_side` that differs in its nodes or keys."""
    if what == "keys" and SEQUENCE not in (kind_of(expected), kind_of(found)):
        keys, found_keys = ([key for key, _ in children(node)] for node in (expected, found))
        return errors.key_differences(keys, found_keys, hints)
    return f"expected {errors.describe(expected)}, got {errors.describe(found)}"


def cycle(tree: Tree) -> tuple[Path, Path] | None:
    """The path of a node that contains itself, and of its next occurrence; None without a cycle.

    The search is iterative, so that it can explain a RecursionError.
    """
    depths = {id(tree): 0}  # of the nodes from the root to the current one
    pending: list[tuple[Hashable, Tree, Iterator[Any]]] = [(None, tree, iter([*children(tree)]))]
    while pending:
        if len(pending) > _DEEPEST:
            return None  # some classes make new nodes each time they are read
        for key, child in pending[-1][-1]:
            if id(child) in depths:
                keys = [parent for parent, *_ in pending[1:]]
                return tuple(keys[: depths[id(child)]]), (*keys, key)
            if not is_leaf(child):
                depths[id(child)] = len(pending)
                pending.append((key, child, iter([*children(child)])))
                break
        else:
            del depths[id(pending.pop()[1])]
    return None


@contextmanager
def explaining(arguments: dict[str, Tree]) -> Iterator[None]:
    """Replace a RecursionError by an error that names the argument that contains itself."""
    try:
        yield
    except RecursionError:
        raise explained(arguments) from None


def explained(arguments: dict[str, Tree]) -> Exception:
    """The error for a RecursionError in these trees: a StructureError if a tree contains itself."""
    for name, tree in arguments.items():
        if found := cycle(tree):
            earlier, path = found
            text = f"expected a tree, got the node at {errors.path_string(earlier) or name} again"
            headline = f"{name} contains itself"
            return errors.error(errors.StructureError, name, headline, [(path, text)])
    return RecursionError("a tree is deeper than the recursion limit: sys.setrecursionlimit")
