"""The kinds of nodes: which objects are nodes, and how each class is read.

A class that JAX, torch or optree has registered is read as registered. All others are read by their
own interface: mappings, sequences, namedtuples and attrs classes. The kind of a class is cached,
except for classes that are no nodes now and may be registered later.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, UserString, defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lars_tree import errors
from lars_tree._tree import registered
from lars_tree._tree.registered import Reading

Node = Any

# PLAIN_DICT nodes are read by dict's own methods, and by the kernel. ITEMS nodes are read by their
# method `items`. KEYED nodes are read key by key, because they have no `items` of their own. Kinds
# from REGISTERED on are read as a library has registered them; the difference is its number.
LEAF, PLAIN_DICT, ITEMS, KEYED, SEQUENCE, NAMEDTUPLE, ATTRS, REGISTERED = range(8)

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
BUILT_IN = (*_DICTS, list, tuple)
_OURS = (*BUILT_IN, deque)
READING = ("__iter__", "__len__", "__getitem__", "keys", "values", "items")


def kind_of(node: Node) -> int:
    """The kind of a node; LEAF if it is not a node."""
    cls = type(node)
    kind = KINDS.get(cls)
    if kind is None:
        kind = _KINDS_OF_TEMPORARY.get(cls)
    if kind is None:
        kind, is_final = _new_kind(node)
        if not _COMPUTED and (kind in (ITEMS, KEYED, SEQUENCE) or kind >= REGISTERED):
            _COMPUTED.append(True)
        if is_final:
            (KINDS if is_permanent(cls) else _KINDS_OF_TEMPORARY)[cls] = kind
    return kind


def _new_kind(node: Node) -> tuple[int, bool]:
    """The kind of a node, and whether all nodes of its class have this kind for good."""
    cls = type(node)
    kind = own_kind(cls)
    is_array = errors.is_array_type(cls)
    if kind == NAMEDTUPLE or cls in _OURS or hasattr(cls, MAKE) or is_array:
        return kind, True  # the libraries would read the same, or an array
    library = registered.find(node)
    if library is None:
        # A library may register the class of a leaf later.
        return kind, kind != LEAF or cls.__module__ == "builtins"
    if kind in (LEAF, ATTRS):
        return REGISTERED + library, True
    reading = registered.read(node, library)
    if reading.keys is not None:
        return REGISTERED + library, bool(reading.children)
    # A mapping or sequence that is registered without keys for its children has keys of its own,
    # but only if its children are those of the library.
    names = registered.names(reading.children, own_children(node, kind))
    return (kind if names is None else REGISTERED + library), False


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


def own_kind(cls: type) -> int:
    """The kind of a class if no library has registered it."""
    if issubclass(cls, dict):
        if inherits(cls, READING, dict):
            return PLAIN_DICT
        # dict.items ignores a `__getitem__` or `__iter__` that the class defines.
        by_key = inherits(cls, ("items",), *_DICTS) and not inherits(cls, READING, *_DICTS)
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


def inherits(cls: type, names: Iterable[str], *bases: type) -> bool:
    """Whether `bases` or Container classes define every method in `names` that the class has."""
    for name in names:
        provider = next((base for base in cls.__mro__ if name in vars(base)), bases[0])
        if provider not in bases and MAKE not in vars(provider):
            return False
    return True


def own_children(node: Node, kind: int) -> Iterable[tuple[Hashable, Any]]:
    """The (key, child) pairs of a node of one of our own kinds."""
    if kind in (PLAIN_DICT, ITEMS):  # via the type: a key named "items" may hide the method
        return type(node).items(node)  # type: ignore[no-any-return]
    if kind == SEQUENCE:
        return enumerate(node)
    if kind == NAMEDTUPLE:
        return zip(type(node)._fields, node, strict=True)
    if kind == ATTRS:
        return [(field.name, getattr(node, field.name)) for field in type(node).__attrs_attrs__]
    return [(key, node[key]) for key in node] if kind == KEYED else ()


def read(node: Node, kind: int) -> Reading:
    """A node as a library has registered it."""
    reading = registered.read(node, kind - REGISTERED)
    own = own_kind(type(node)) if reading.keys is None else LEAF
    if own == LEAF:
        return reading
    return reading._replace(keys=registered.names(reading.children, own_children(node, own)))
