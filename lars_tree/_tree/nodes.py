"""One node of a tree: how its children are read, and how it is rebuilt with other children.

`_tree/kinds.py` decides how the nodes of a class are read, and `_tree/structure.py` walks over
nodes. A node is read through the same methods that its user would call, or as a library has
registered it, and is never changed. To rebuild a node, at most two attempts are made; a result is
accepted only if it is a new object of the same type that has the new children. The check is omitted
for dict, list, tuple and Container themselves.
"""

from __future__ import annotations

import copy
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from lars_tree import errors
from lars_tree._tree import kinds, registered
from lars_tree._tree.kinds import (
    ATTRS,
    BUILT_IN,
    LEAF,
    MAKE,
    NAMEDTUPLE,
    READING,
    REGISTERED,
    SEQUENCE,
    inherits,
    kind_of,
)

Node = Any
Pairs = list[tuple[Hashable, Any]]
Items = Mapping[Any, Any] | Iterable[tuple[Hashable, Any]]


def children(node: Node) -> Iterable[tuple[Hashable, Any]]:
    """The (key, child) pairs of a node; a key is a mapping's key, an index or a field name."""
    kind = kind_of(node)
    return kinds.own_children(node, kind) if kind < REGISTERED else kinds.read(node, kind).pairs()


def items(mapping: Node) -> Iterable[tuple[Hashable, Any]]:
    """The items of a mapping, even if a library has registered other children."""
    kind = kind_of(mapping)
    own_kind = kind if kind < REGISTERED else kinds.own_kind(type(mapping))
    return kinds.own_children(mapping, own_kind)


def has_other_children(mapping: Node) -> bool:
    """Whether a library has registered other children of a mapping than its items.

    Some items may be static data, for example, or the children may be rows of stacked arrays.
    """
    if kind_of(mapping) < REGISTERED:
        return False
    return dict(items(mapping)).keys() != dict(children(mapping)).keys()


class CannotRebuild(Exception):
    """A node cannot be rebuilt. `keys` is its path, the innermost key first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.keys: list[Hashable] = []

    def explained(self, argument: str, at: errors.Path = ()) -> errors.LarsTreeError:
        """The StructureError; `at` is the path of the tree within the argument."""
        path = (*at, *reversed(self.keys))
        text = f"expected a node that can be rebuilt: {self}"
        headline = f"{argument} cannot be rebuilt"
        return errors.error(errors.StructureError, argument, headline, [(path, text)])


def map_children(node: Node, convert: Callable[[Any, Any], Any], argument: Any = None) -> list[Any]:
    """convert(child, argument) for each child; the key of the child is added to a CannotRebuild."""
    return map_pairs(children(node), convert, argument)


def map_pairs(
    pairs: Iterable[tuple[Hashable, Any]], convert: Callable[[Any, Any], Any], argument: Any
) -> list[Any]:
    """Like `map_children`, for (key, child) pairs.

    Only one argument is passed, because *arguments would use too much C stack in deep trees.
    """
    values = []
    for key, child in pairs:
        try:
            values.append(convert(child, argument))
        except CannotRebuild as error:
            error.keys.append(key)
            raise
    return values


def is_trusted(node: Node) -> bool:
    """Whether the node is rebuilt without a check: a dict, list, tuple or Container."""
    cls = type(node)
    return cls is dict or cls is list or cls is tuple or hasattr(cls, MAKE)


def replace_children(node: Node, values: Iterable[Any]) -> Node:
    """A node of the same type and keys with new children, in the order of `children`."""
    cls = type(node)
    if cls is list or cls is tuple:
        return cls(values)
    before, values = list(children(node)), list(values)
    if len(before) != len(values):
        raise _read_anew(node)
    pairs = [(key, value) for (key, _), value in zip(before, values, strict=True)]
    return with_items(node, pairs) if is_trusted(node) else _checked(node, before, pairs)


def _read_anew(node: Node) -> CannotRebuild:
    return CannotRebuild(f"reading the {type(node).__name__} again gives other children")


def is_container(node: Node) -> bool:
    return hasattr(type(node), MAKE)


def container(cls: type, items: Items) -> Node:
    """A Container of children that do not need conversion."""
    return getattr(cls, MAKE)(items)


def with_items(node: Node, items: Items) -> Node:
    """A dict or Container of the same type as the node, with new items."""
    cls = type(node)
    return dict(items) if cls is dict else container(cls, items)


def for_reading(node: Node, pairs: Pairs) -> Node:
    """A node of new (key, child) pairs that is only read: it may be a list or dict instead."""
    if kind_of(node) == SEQUENCE:
        values = [value for _, value in pairs]
        return tuple(values) if type(node) is tuple else values
    return with_items(node, pairs) if is_container(node) else dict(pairs)


Attempt = Callable[[Node, Pairs], Node]


class _Plan(NamedTuple):
    """How to rebuild nodes of a class: the attempts in their order.

    `sure`: the first attempt needs no check, because the class reads and writes like its base.
    """

    attempts: list[Attempt]
    sure: bool = False


_PLANS: WeakKeyDictionary[type, _Plan] = WeakKeyDictionary()


def _plan(node: Node) -> _Plan:
    if kind_of(node) >= REGISTERED:
        return _Plan([_unflattened])
    cls = type(node)
    return _PLANS.get(cls) or _PLANS.setdefault(cls, _own_plan(cls))


def _own_plan(cls: type) -> _Plan:
    if issubclass(cls, (dict, list, tuple)):
        # A class that overrides `__setitem__` may store more than the items.
        writes = inherits(cls, ("__setitem__", "append", "extend"), *BUILT_IN)
        reads = inherits(cls, READING, *BUILT_IN) and not hasattr(cls, "__copy__")
        attempts: list[Attempt] = [_refilled, _constructed]
        return _Plan(attempts if writes else attempts[::-1], writes and reads)
    if issubclass(cls, ChainMap):
        return _Plan([])  # a view of several mappings
    has_fields = hasattr(cls, "__attrs_attrs__")
    return _Plan([_refilled, _constructed] if has_fields else [_constructed])


def _checked(node: Node, before: Pairs, pairs: Pairs) -> Node:
    """The first correct result of an attempt that leaves the old node unchanged."""
    cls = type(node)
    plan = _plan(node)
    reason = f"a new {cls.__name__} would not hold what is put in"
    if not plan.attempts:
        reason = f"a {cls.__name__} shows several mappings as one"
    for attempt in plan.attempts:
        correct = False
        try:
            new = attempt(node, pairs)
            if plan.sure and not getattr(new, "__dict__", None):
                return new
            correct = (new is not node or not pairs) and type(new) is cls and _holds(new, pairs)
            # A library restores the attributes of a registered node that are not children.
            as_registered = attempt is _unflattened
            correct = correct and (as_registered or not _keeps_old_child(new, before, pairs))
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the class may raise anything
            text = " ".join(f"{type(error).__name__}: {error}".split())
            reason = f"{cls.__name__} refuses other children ({errors.shortened(text, 80)})"
        if not _holds(node, before):
            raise _read_anew(node)
        if correct:
            return new
    raise CannotRebuild(reason)


def _unflattened(node: Node, pairs: Pairs) -> Node:
    reading = kinds.read(node, kind_of(node))
    return reading.make([value for _, value in pairs])


def _constructed(node: Node, pairs: Pairs) -> Node:
    cls: Any = type(node)
    kind = kind_of(node)
    values = [value for _, value in pairs]
    if kind == SEQUENCE:
        return cls(values)
    if kind == NAMEDTUPLE:
        return cls(*values)
    if kind == ATTRS:
        fields = zip(cls.__attrs_attrs__, values, strict=True)
        return cls(**{field.alias: value for field, value in fields if field.init})
    return cls(dict(pairs))


def _refilled(node: Node, pairs: Pairs) -> Node:
    """A shallow copy with new children and the same attributes.

    The children are written by methods of the built-in base: a method of the user's class might
    write to something that the copy shares with the node.
    """
    cls = type(node)
    if issubclass(cls, tuple):
        return _with_attributes(tuple.__new__(cls, [value for _, value in pairs]), node)
    by_class = not issubclass(cls, (dict, list)) or hasattr(cls, "__copy__")
    new = copy.copy(node) if by_class else _shallow_copy(node)
    if new is node or type(new) is not cls:
        return new  # refused by `_checked`, unless the node is empty
    if issubclass(cls, list):
        list.__setitem__(new, slice(None), [value for _, value in pairs])
        return new
    put: Any = object.__setattr__
    if issubclass(cls, dict):
        put = OrderedDict.__setitem__ if issubclass(cls, OrderedDict) else dict.__setitem__
    for key, value in pairs:
        put(new, key, value)
    return new


def _shallow_copy(node: Node) -> Node:
    """Copy a dict or list without calling methods of its class.

    None if the class keeps the children outside the dict or list: the copy would share that store.
    """
    base: Any = next(base for base in (OrderedDict, dict, list) if isinstance(node, base))
    items = list(enumerate(list.__iter__(node)) if base is list else base.items(node))
    own, read = dict(items), dict(children(node))
    if own.keys() != read.keys() or any(read[key] is not child for key, child in items):
        return None
    new = base.__new__(type(node))
    for key, child in () if base is list else items:  # in the order of the dict itself
        base.__setitem__(new, key, child)
    return _with_attributes(new, node)


def _with_attributes(new: Node, node: Node) -> Node:
    if getattr(node, "__dict__", None) is node:  # a common way to read keys as attributes
        object.__setattr__(new, "__dict__", new)
        return new
    state = object.__getstate__(node)
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        new.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(new, name, value)
    return new


def _holds(node: Node, pairs: Pairs) -> bool:
    """Whether the node has these children: the same leaf objects, in nodes of the same types."""
    found = list(children(node))
    if len(found) != len(pairs):
        return False
    for (key, child), (wanted, value) in zip(found, pairs, strict=True):
        if key != wanted or type(child) is not type(value):
            return False
        if child is value:
            continue
        # Some classes convert or copy nodes that are put into them.
        if kind_of(value) == LEAF or not _holds(child, list(children(value))):
            return False
    return True


_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes)


def _keeps_old_child(new: Node, before: Pairs, pairs: Pairs) -> bool:
    """Whether an attribute still refers to an old child: some classes store their items twice."""
    attributes = getattr(new, "__dict__", None) or {}
    kept = {id(value) for _, value in pairs}
    gone = {id(x) for _, x in before if not isinstance(x, _IMMUTABLE)} - kept
    return any(id(value) in gone for value in attributes.values())


def may_be_equal(a: Node, b: Node) -> bool:
    """Whether two nodes may be equal: dicts of any class, or the same class and static data."""
    kind = kind_of(a)
    if type(a) is type(b) and kind >= REGISTERED:
        return registered.equal(*(kinds.read(x, kind).static for x in (a, b)))
    return type(a) is type(b) or (isinstance(a, dict) and isinstance(b, dict))
