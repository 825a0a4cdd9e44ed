"""One node of a tree: how its children are read, and how it is rebuilt with other children.

Only this module knows the kinds of nodes; `_tree/structure.py` walks over them. A node is read
through the same methods that its user would call, and is never changed. To rebuild a node, at most
two attempts are made; a result is accepted only if it is a new object of the same type that has the
new children. The check is omitted for dict, list, tuple and Container themselves.
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

# PLAIN_DICT nodes are read by dict's own methods, and by the kernel. ITEMS nodes are read by their
# method `items`. KEYED nodes are read key by key, because they have no `items` of their own.
LEAF, PLAIN_DICT, ITEMS, KEYED, SEQUENCE, NAMEDTUPLE, ATTRS = range(7)

# The kinds of classes that are never freed. The kernel reads this dict too.
KINDS: dict[type, int] = {
    type(None): LEAF,
    list: SEQUENCE,
    tuple: SEQUENCE,
    dict: PLAIN_DICT,
}
_KINDS_OF_TEMPORARY: WeakKeyDictionary[type, int] = WeakKeyDictionary()

# Not empty after the first node whose class may compute its children each time it is read.
_COMPUTED: list[bool] = []

# The class method that makes a Container of (key, child) pairs without converting the children.
MAKE = "_lars_tree_make"

_DICTS = (dict, OrderedDict, defaultdict)
_BUILT_IN = (*_DICTS, list, tuple)
_READING = ("__iter__", "__len__", "__getitem__", "keys", "values", "items")


def kind_of(node: Node) -> int:
    """The kind of a node; LEAF if it is not a node."""
    cls = type(node)
    kind = KINDS.get(cls)
    if kind is None:
        kind = _KINDS_OF_TEMPORARY.get(cls)
    if kind is None:
        kind = _classify(cls)
        if kind in (ITEMS, KEYED, SEQUENCE):
            _COMPUTED.append(True)
        (KINDS if is_permanent(cls) else _KINDS_OF_TEMPORARY)[cls] = kind
    return kind


def may_make_children() -> bool:
    """Whether any node seen so far may make new children whenever it is read."""
    return bool(_COMPUTED)


def is_permanent(cls: type) -> bool:
    """Whether the class is found in its module, so that a cache may keep it alive.

    Other classes, such as those that a function or a notebook cell makes, must not be kept alive.
    """
    if cls.__module__ == "__main__":
        return False
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found is cls


def _classify(cls: type) -> int:
    if issubclass(cls, dict):
        if _inherits(cls, _READING, dict):
            return PLAIN_DICT
        # dict.items ignores a `__getitem__` or `__iter__` that the class defines.
        by_key = _inherits(cls, ("items",), *_DICTS) and not _inherits(cls, _READING, *_DICTS)
        return KEYED if by_key else ITEMS
    if issubclass(cls, (str, bytes, bytearray, memoryview, range, UserString)):
        return LEAF  # sequences, but not of children
    if hasattr(cls, "__attrs_attrs__"):
        return ATTRS
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return NAMEDTUPLE
    if issubclass(cls, (list, tuple, Sequence)):
        return SEQUENCE
    if issubclass(cls, Mapping):
        return ITEMS if hasattr(cls, "items") else KEYED
    return LEAF


def _inherits(cls: type, names: Iterable[str], *bases: type) -> bool:
    """Whether `bases` or Container classes define every method in `names` that the class has."""
    for name in names:
        provider = next((base for base in cls.__mro__ if name in vars(base)), bases[0])
        if provider not in bases and MAKE not in vars(provider):
            return False
    return True


def children(node: Node) -> Iterable[tuple[Hashable, Any]]:
    """The (key, child) pairs of a node; a key is a mapping's key, an index or a field name."""
    kind = kind_of(node)
    if kind in (PLAIN_DICT, ITEMS):  # via the type: a key named "items" may hide the method
        return type(node).items(node)  # type: ignore[no-any-return]
    if kind == SEQUENCE:
        return enumerate(node)
    if kind == NAMEDTUPLE:
        return zip(type(node)._fields, node, strict=True)
    if kind == ATTRS:
        return [(field.name, getattr(node, field.name)) for field in type(node).__attrs_attrs__]
    return [(key, node[key]) for key in node] if kind == KEYED else ()


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
    """convert(child, argument) for each child; the key of the child is added to a CannotRebuild.

    Only one argument is passed, because *arguments would use too much C stack in deep trees.
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
    """Whether the node is rebuilt without a check: a dict, list, tuple or Container."""
    cls = type(node)
    return cls is dict or cls is list or cls is tuple or hasattr(cls, MAKE)


def replace_children(node: Node, values: Iterable[Any]) -> Node:
    """A node of the same type and keys with new children, in the order of `children`."""
    cls = type(node)
    if cls is list or cls is tuple:
        return cls(values)
    if is_trusted(node):
        return with_items(node, zip(node, values, strict=True))
    before = list(children(node))
    pairs = [(key, value) for (key, _), value in zip(before, values, strict=True)]
    return _checked(node, before, pairs)


def is_container(node: Node) -> bool:
    return hasattr(type(node), MAKE)


def container(cls: type, items: Items) -> Node:
    """A Container of children that do not need conversion."""
    return getattr(cls, MAKE)(items)


def with_items(node: Node, items: Items) -> Node:
    """A dict or Container of the same type as the node, with new items."""
    cls = type(node)
    return dict(items) if cls is dict else container(cls, items)


def replace_for_reading(node: Node, values: Iterable[Any]) -> Node:
    """Like `replace_children`, but the result is only read: it may be a list or dict instead."""
    if is_trusted(node):
        return replace_children(node, values)
    if kind_of(node) == SEQUENCE:
        return list(values)
    return {key: value for (key, _), value in zip(children(node), values, strict=True)}


Attempt = Callable[[Node, Pairs], Node]


class _Plan(NamedTuple):
    """How to rebuild nodes of a class: the attempts in their order.

    `sure`: the first attempt needs no check, because the class reads and writes like its base.
    """

    attempts: list[Attempt]
    sure: bool


_PLANS: WeakKeyDictionary[type, _Plan] = WeakKeyDictionary()


def _plan(cls: type) -> _Plan:
    if issubclass(cls, (dict, list, tuple)):
        # A class that overrides `__setitem__` may store more than the items.
        writes = _inherits(cls, ("__setitem__", "append", "extend"), *_BUILT_IN)
        reads = _inherits(cls, _READING, *_BUILT_IN) and not hasattr(cls, "__copy__")
        attempts: list[Attempt] = [_refilled, _constructed]
        return _Plan(attempts if writes else attempts[::-1], writes and reads)
    if issubclass(cls, ChainMap):
        return _Plan([], False)  # a view of several mappings
    has_fields = hasattr(cls, "__attrs_attrs__")
    return _Plan([_refilled, _constructed] if has_fields else [_constructed], False)


def _checked(node: Node, before: Pairs, pairs: Pairs) -> Node:
    """The first correct result of an attempt that leaves the old node unchanged."""
    cls = type(node)
    plan = _PLANS.get(cls) or _PLANS.setdefault(cls, _plan(cls))
    reason = f"a new {cls.__name__} would not hold what is put in"
    if not plan.attempts:
        reason = f"a {cls.__name__} shows several mappings as one"
    for attempt in plan.attempts:
        correct = False
        try:
            new = attempt(node, pairs)
            if plan.sure and not getattr(new, "__dict__", None):
                return new
            correct = new is not node and type(new) is cls and _holds(new, pairs)
            correct = correct and not _keeps_old_child(new, before, pairs)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # the class may raise anything
            text = " ".join(f"{type(error).__name__}: {error}".split())
            reason = f"{cls.__name__} refuses other children ({errors.shortened(text, 80)})"
        if not _holds(node, before):
            raise CannotRebuild(f"reading the {cls.__name__} again gives other children")
        if correct:
            return new
    raise CannotRebuild(reason)


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
    if not issubclass(cls, (dict, list)) or hasattr(cls, "__copy__"):
        new = copy.copy(node)
        if new is node or type(new) is not cls:
            return new
    else:
        new = _shallow_copy(node)
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
