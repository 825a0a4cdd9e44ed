"""How each class is read, which kinds are cached, and which nodes may make their children anew."""

from __future__ import annotations

import ast
from collections import (
    ChainMap,
    Counter,
    OrderedDict,
    UserDict,
    UserList,
    UserString,
    defaultdict,
    deque,
    namedtuple,
)
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace

import pytest
from conftest import need
from node_classes import DotMapLike, Elsewhere, ElsewhereByKey, Frozen, FrozenLayer, Group, Tagged
from registered_classes import REGISTERED

from lars_tree import Container
from lars_tree._tree import kinds, nodes, structure
from lars_tree._tree.kinds import ATTRS, ITEMS, KEYED, LEAF, NAMEDTUPLE, PLAIN_DICT, SEQUENCE


class Items(Mapping):
    """Reads its items in a way of its own."""

    def __init__(self, items):
        self.store = dict(items)

    def __getitem__(self, key):
        raise AssertionError

    __iter__ = __len__ = __getitem__

    def items(self):
        return self.store.items()


@Mapping.register
class Keyed:
    """A Mapping by registration only, without a method `items`."""

    def __init__(self, items):
        self.store = dict(items)

    def __getitem__(self, key):
        return self.store[key]

    def __iter__(self):
        return iter(self.store)


class Outer:
    class Inner(dict):
        pass


class OwnItems(Container):
    def items(self):
        return super().items()


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        (PLAIN_DICT, [dict, defaultdict, Counter, Container, Frozen, Outer.Inner]),
        (ITEMS, [OrderedDict, UserDict, ChainMap, MappingProxyType, Group, Items]),
        (ITEMS, [Elsewhere, DotMapLike, OwnItems]),
        (KEYED, [ElsewhereByKey, Keyed]),
        (SEQUENCE, [list, tuple, deque, UserList, Tagged, Sequence]),
        (NAMEDTUPLE, [namedtuple("Pair", "a b")]),
        (ATTRS, [FrozenLayer]),
        (LEAF, [str, bytes, bytearray, memoryview, range, UserString, type(None), set]),
        (LEAF, [ast.Name, SimpleNamespace, int, type]),  # ast.Name has `_fields`, but is no tuple
    ],
)
def test_the_kind_of_each_class(kind, classes):
    assert {cls: kinds.own_kind(cls) for cls in classes} == dict.fromkeys(classes, kind)


def own(base, name):
    """A class that defines the method anew."""
    return type("Own", (base,), {name: lambda self, *args: getattr(base, name)(self, *args)})


@pytest.mark.parametrize("name", ["__iter__", "__len__", "__getitem__", "keys", "values", "items"])
def test_a_dict_with_a_reading_method_of_its_own_is_read_by_it(name):
    kind = ITEMS if name == "items" else KEYED
    for base in (dict, OrderedDict, Container):
        assert kinds.own_kind(own(base, name)) == kind
        assert kinds.own_kind(own(base, "pop")) == kinds.own_kind(base)


def test_mappings_are_read_by_their_items_or_key_by_key():
    for make in (Items, Keyed):
        assert list(nodes.children(make({"a": 1, "b": 2}))) == [("a", 1), ("b", 2)]


# Caches


def test_the_kinds_of_module_level_classes_are_known_to_the_kernel():
    structure.leaves([Container(), Frozen(), Outer.Inner(), 1, "a", 2.5])
    assert {Container, Frozen, Outer.Inner, int, str, float} <= structure.KINDS.keys()


def test_the_libraries_are_asked_once_for_each_class(monkeypatch):
    names = [name for name in REGISTERED if name.startswith("jax") and "mapping" not in name]
    need("jax")
    made = [REGISTERED[name][0]()(1, 2) for name in names]
    made += [type("Local", (base,), {})() for base in (dict, UserDict, UserList, Container)]
    structure.leaves(made)
    monkeypatch.setattr(kinds.registered, "find", None)
    structure.leaves([*made, *made])


def test_nodes_that_may_make_their_children_at_each_reading(monkeypatch):
    """In place updates check these nodes; they do not check trees of all other nodes."""
    make = REGISTERED["jax class"][0]()
    need("jax")

    def found(*nodes):
        with monkeypatch.context() as patch:
            patch.setattr(kinds, "_COMPUTED", [])
            structure.leaves(list(nodes))
            return kinds.may_make_children()

    new = [type("New", (base,), {}) for base in (dict, namedtuple("Pair", "a b"), Container)]
    assert not found({}, [], (), Container(), None, new[0](), new[1](1, 2), new[2](), 1, "a")
    for cls in (own(dict, "items"), own(dict, "keys"), type("New", (UserList,), {})):
        assert found(cls())
    cls = type("New", (type(make(1, 2)),), {})
    need("jax").tree_util.register_pytree_node_class(cls)
    assert found(cls(1, 2))
