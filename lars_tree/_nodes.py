"""One node of a tree: how its children are read, and how a node with other children is made.

This is the only place that knows the kinds of nodes; `_tree.py` walks over them. A node is read the
way its user reads it, and reading never writes. A new node is made by the first of a few attempts
that passes the check: it is another object of the same type, and holds what was put in. Exact
dicts, lists, tuples and Containers need no check. `tests/test_nodes.py` keeps this honest.
"""

from __future__ import annotations

import copy
import sys
from collections import ChainMap, OrderedDict, UserString, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from lars_tree import errors

Node = Any
Pairs = list[tuple[Hashable, Any]]
Items = Mapping[Any, Any] | Iterable[tuple[Hashable, Any]]

# A plain dict holds its items in its own memory: the kernel may read them there. Others are read by
# their method `items`, or key by key where a class replaces only the reading of one item.
LEAF, PLAIN_DICT, ITEMS, KEYED, SEQUENCE, NAMED, FIELDS = range(7)

# Classes that live as long as the process. The kernel looks them up here too.
KINDS: dict[type, int] = {
    type(None): LEAF,
    list: SEQUENCE,
    tuple: SEQUENCE,
    dict: PLAIN_DICT,
}
_KINDS_OF_OTHERS: WeakKeyDictionary[type, int] = WeakKeyDictionary()

# Not empty when a class was seen that may read its children in a way of its own.
_OWN_READING: list[bool] = []

# The class method that makes a Container from (key, child) pairs, without converting children.
MAKE = "_lars_tree_make"

_DICTS = (dict, OrderedDict, defaultdict)
_BUILT_IN = (*_DICTS, list, tuple)
_READING = ("__iter__", "__len__", "__getitem__", "keys", "values", "items")


def kind_of(node: Node) -> int:
    """The kind of a node; LEAF for whatever is not a node."""
    cls = type(node)
    kind = KINDS.get(cls)
    if kind is None:
        kind = _KINDS_OF_OTHERS.get(cls)
    if kind is None:
        kind = _classify(cls)
        if kind in (ITEMS, KEYED, SEQUENCE):
            _OWN_READING.append(True)
        (KINDS if is_permanent(cls) else _KINDS_OF_OTHERS)[cls] = kind
    return kind


def may_make_children() -> bool:
    """Whether any node seen so far may make its children anew whenever it is read."""
    return bool(_OWN_READING)


def is_permanent(cls: type) -> bool:
    """Whether a module holds the class, so that a cache may hold it too.

    A class made within a function would otherwise never be freed, nor one that is defined anew
    each time a notebook's cell runs.
    """
    if cls.__module__ == "__main__":
        return False
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found is cls


def _classify(cls: type) -> int:
    if issubclass(cls, dict):
        if _is_own(cls, _READING, dict):
            return PLAIN_DICT
        # The items of dict itself know nothing of a `__getitem__` or `__iter__` of the class.
        by_key = _is_own(cls, ("items",), *_DICTS) and not _is_own(cls, _READING, *_DICTS)
        return KEYED if by_key else ITEMS
    if issubclass(cls, (str, bytes, bytearray, memoryview, range, UserString)):
        return LEAF  # sequences, but of nothing that could be put back
    if hasattr(cls, "__attrs_attrs__"):
        return FIELDS
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return NAMED
    if issubclass(cls, (list, tuple, Sequence)):
        return SEQUENCE
    if issubclass(cls, Mapping):
        return ITEMS if hasattr(cls, "items") else KEYED
    return LEAF


def _is_own(cls: type, names: Iterable[str], *bases: type) -> bool:
    """Whether these methods, as far as the class has them, are those of the bases or Container."""
    for name in names:
        provider = next((base for base in cls.__mro__ if name in vars(base)), bases[0])
        if provider not in bases and MAKE not in vars(provider):
            return False
    return True


def children(node: Node) -> Iterable[tuple[Hashable, Any]]:
    """The (key, child) pairs of a node: keys of a mapping, indices, names of fields."""
    kind = kind_of(node)
    if kind in (PLAIN_DICT, ITEMS):  # through the type: a key named "items" may hide the method
        return type(node).items(node)  # type: ignore[no-any-return]
    if kind == SEQUENCE:
        return enumerate(node)
    if kind == NAMED:
        return zip(type(node)._fields, node, strict=True)
    if kind == FIELDS:
        return [(field.name, getattr(node, field.name)) for field in type(node).__attrs_attrs__]
    return [(key, node[key]) for key in node] if kind == KEYED else ()


class CannotRebuild(Exception):
    """A node of which no other can be made; `keys` leads to it, the innermost key first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.keys: list[Hashable] = []

    def explained(self, argument: str, at: errors.Path = ()) -> errors.LarsTreeError:
        """What to say of it, where the node is somewhere in this argument."""
        path = (*at, *reversed(self.keys))
        text = f"expected a node that can be rebuilt: {self}"
        headline = f"{argument} cannot be rebuilt"
        return errors.error(errors.StructureError, argument, headline, [(path, text)])


def each(node: Node, convert: Callable[[Any, Any], Any], argument: Any = None) -> list[Any]:
    """convert(child, argument) for each child; a CannotRebuild learns the key.

    No further arguments: Python would go through the C stack to pass them on.
    """
    values = []
    for key, child in children(node):
        try:
            values.append(convert(child, argument))
        except CannotRebuild as error:
            error.keys.append(key)
            raise
    return values


def is_trusted(node: Node) -> bool:
    """Whether a node of this very type holds what its constructor is given."""
    cls = type(node)
    return cls is dict or cls is list or cls is tuple or hasattr(cls, MAKE)


def replace_children(node: Node, values: Iterable[Any]) -> Node:
    """A node of the same type and keys with other children, given in the order of `children`.

    Raises:
        CannotRebuild: the class makes no such node.
    """
    cls = type(node)
    if cls is list or cls is tuple:
        return cls(values)
    if is_trusted(node):
        return with_items(node, zip(node, values, strict=True))
    before = list(children(node))
    pairs = [(key, value) for (key, _), value in zip(before, values, strict=True)]
    return _checked(node, before, pairs)


def is_container(node: Node) -> bool:
    """Whether it is a Container."""
    return hasattr(type(node), MAKE)


def container(cls: type, items: Items) -> Node:
    """A Container of children that need no conversion."""
    return getattr(cls, MAKE)(items)


def with_items(node: Node, items: Items) -> Node:
    """A dict or Container, whichever the node is, with other keys."""
    cls = type(node)
    return dict(items) if cls is dict else container(cls, items)


def plain(node: Node, values: Iterable[Any]) -> Node:
    """The same for a node that is only to be read: of another class, it is a list or a dict."""
    if is_trusted(node):
        return replace_children(node, values)
    if kind_of(node) == SEQUENCE:
        return list(values)
    return {key: value for (key, _), value in zip(children(node), values, strict=True)}


Attempt = Callable[[Node, Pairs], Node]


class _Plan(NamedTuple):
    """How to make nodes of a class: the attempts in their order.

    `sure`: the first one cannot fail, as the class reads and writes as the built-in class does.
    """

    attempts: list[Attempt]
    sure: bool


_PLANS: WeakKeyDictionary[type, _Plan] = WeakKeyDictionary()


def _plan(cls: type) -> _Plan:
    if issubclass(cls, (dict, list, tuple)):
        # A class with a `__setitem__` of its own may keep more than the items.
        writes = _is_own(cls, ("__setitem__", "append", "extend"), *_BUILT_IN)
        reads = _is_own(cls, _READING, *_BUILT_IN) and not hasattr(cls, "__copy__")
        attempts: list[Attempt] = [_refilled, _constructed]
        attempts = attempts if writes else attempts[::-1]
        return _Plan(attempts, writes and reads)
    if issubclass(cls, ChainMap):
        return _Plan([], False)  # a view of several mappings, which would be one
    fields = hasattr(cls, "__attrs_attrs__")
    return _Plan([_refilled, _constructed] if fields else [_constructed], False)


def _checked(node: Node, before: Pairs, pairs: Pairs) -> Node:
    """The result of the first attempt that makes what is wanted and leaves the node as it is."""
    cls = type(node)
    plan = _PLANS.get(cls) or _PLANS.setdefault(cls, _plan(cls))
    reason = f"a new {cls.__name__} would not hold what is put in"
    if not plan.attempts:
        reason = f"a {cls.__name__} shows several mappings as one"
    for attempt in plan.attempts:
        made = False
        try:
            new = attempt(node, pairs)
            if plan.sure and not getattr(new, "__dict__", None):
                return new
            made = new is not node and type(new) is cls and _holds(new, pairs)
            made = made and not _remembers(new, before, pairs)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the class may raise anything
            text = " ".join(f"{type(error).__name__}: {error}".split())
            reason = f"{cls.__name__} refuses other children ({errors.clipped(text)})"
        if not _holds(node, before):
            raise CannotRebuild(f"reading the {cls.__name__} again gives other children")
        if made:
            return new
    raise CannotRebuild(reason)


def _constructed(node: Node, pairs: Pairs) -> Node:
    cls: Any = type(node)
    kind = kind_of(node)
    values = [value for _, value in pairs]
    if kind == SEQUENCE:
        return cls(values)
    if kind == NAMED:
        return cls(*values)
    if kind == FIELDS:
        fields = zip(cls.__attrs_attrs__, values, strict=True)
        return cls(**{field.alias: value for field, value in fields if field.init})
    return cls(dict(pairs))


def _refilled(node: Node, pairs: Pairs) -> Node:
    """A shallow copy with other children, which keeps what else a user's class holds.

    The children are put where the built-in class keeps them, which no two objects share: what a
    class does with its items otherwise can neither interfere nor reach the old node.
    """
    cls = type(node)
    if issubclass(cls, tuple):
        return _with_attributes(tuple.__new__(cls, [value for _, value in pairs]), node)
    if not issubclass(cls, (dict, list)) or hasattr(cls, "__copy__"):
        new = copy.copy(node)
        if new is node or type(new) is not cls:
            return new
    else:
        new = _twin(node)
        if new is None:
            return node
    if issubclass(cls, list):
        list.__setitem__(new, slice(None), [value for _, value in pairs])
        return new
    put: Any = object.__setattr__
    if issubclass(cls, dict):
        put = OrderedDict.__setitem__ if issubclass(cls, OrderedDict) else dict.__setitem__
    for key, value in pairs:
        put(new, key, value)
    return new


def _twin(node: Node) -> Node:
    """A copy of a dict or list that calls no method of the class; None if that is not all of it."""
    base: Any = next(base for base in (OrderedDict, dict, list) if isinstance(node, base))
    items = list(enumerate(list.__iter__(node)) if base is list else base.items(node))
    own, read = dict(items), dict(children(node))
    if own.keys() != read.keys() or any(read[key] is not child for key, child in items):
        return None  # the children are elsewhere, where a copy would share them
    new = base.__new__(type(node))
    for key, child in () if base is list else items:  # in the order of the memory
        base.__setitem__(new, key, child)
    return _with_attributes(new, node)


def _with_attributes(new: Node, node: Node) -> Node:
    if getattr(node, "__dict__", None) is node:  # attribute access, in the way of many a class
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
    """Whether reading the node gives these pairs: the very same leaves, in nodes of their types."""
    found = list(children(node))
    if len(found) != len(pairs):
        return False
    for (key, child), (wanted, value) in zip(found, pairs, strict=True):
        if key != wanted or type(child) is not type(value):
            return False
        if child is value:
            continue
        # Some classes copy the nodes that are put into them.
        if kind_of(value) == LEAF or not _holds(child, list(children(value))):
            return False
    return True


_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes)


def _remembers(new: Node, before: Pairs, pairs: Pairs) -> bool:
    """Whether an attribute still is a child of the old node, as where items are attributes too."""
    attributes = getattr(new, "__dict__", None) or {}
    kept = {id(value) for _, value in pairs}
    gone = {id(x) for _, x in before if not isinstance(x, _IMMUTABLE)} - kept
    return any(id(value) in gone for value in attributes.values())
