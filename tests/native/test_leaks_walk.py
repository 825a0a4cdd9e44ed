"""No walk of the kernel over trees leaks a reference or memory: see test_leaks.py."""

from __future__ import annotations

import pytest
from leaks import check, expecting, raising, returning

from lars_tree import Container, _native
from lars_tree._tree import nodes, structure


class Key:
    """A key that equals keys with the same name, or raises when it is compared."""

    def __init__(self, name, fails=False):
        self.name, self.fails = name, fails

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        if self.fails:
            raise ValueError("on purpose")
        return self.name == other.name


class Other(list):  # not walked natively
    pass


def make_tree(key="b", **others):
    return {"a": [object(), (object(), Other([object()]))], Key(key, **others): {"c": object()}}


def objects(node):
    """A tree and all objects in it."""
    yield node
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, (list, tuple)):
        for x in node:
            yield from objects(x)


def without(tree, key):
    return {k: v for k, v in tree.items() if k is not key}


def walk(*trees, kind_of=structure.kind_of, others=None, exact=False):
    found = []
    if len(trees) == 1:
        others = others or structure._collect_in_python
        _native.kernel.collect(*trees, found, structure.KINDS, kind_of, others)
        return None
    others = others or structure._match_in_python
    return _native.kernel.match(*trees, found, exact, structure.KINDS, kind_of, others)


def changing(tree):
    """A callback for nodes of type `Other` that adds and removes keys of the tree being read."""

    def others(node, *_):
        tree[0.5] = tree.pop(0.5, None)
        tree.pop(1.5, None) if 1.5 in tree else tree.setdefault(1.5)
        return True

    return others


def unknown():  # has a new type, so `kind_of` is called
    return type("New", (), {})()


COLLECTS = {
    "tree": (None, make_tree, {}),
    "leaf": (None, object, {}),
    "the kind raises": (ValueError, unknown, {"kind_of": raising}),
    "the kind is no number": (TypeError, unknown, {"kind_of": lambda node: "leaf"}),
    "another node raises": (ValueError, make_tree, {"others": raising}),
}


@pytest.mark.parametrize("name", COLLECTS)
def test_collect_leaks_nothing(name):
    expected, make, options = COLLECTS[name]
    tree = make()
    call = expecting if expected else returning
    check(call(expected, lambda: walk(tree, **options)), [*objects(tree), *options.values()])


OK, NO = (True, {}), (False, {})
MATCHES = {
    "trees": (*OK, make_tree, make_tree),
    "a value for all": (*OK, lambda: Other([object()]), object),
    "not exact": (False, {"exact": True}, lambda: [object()], object),
    "another key": (*NO, make_tree, lambda: make_tree("other")),
    "a key too few": (*NO, make_tree, lambda: without(make_tree(), "a")),
    "another length": (*NO, lambda: [object()], lambda: [object(), object()]),
    "a node for a leaf": (*NO, object, make_tree),
    "a list for a dict": (*NO, make_tree, lambda: [object()]),
    "keys raise": (ValueError, {}, lambda: make_tree(fails=True), lambda: make_tree(fails=True)),
    "the kind raises": (ValueError, {"kind_of": raising}, unknown, unknown),
    "another node raises": (ValueError, {"others": raising}, make_tree, make_tree),
    "another node gives None": (False, {"others": lambda *_: None}, make_tree, make_tree),
}


@pytest.mark.parametrize("name", MATCHES)
def test_match_leaks_nothing(name):
    expected, options, make, make_prefix = MATCHES[name]
    tree, prefix = make(), make_prefix()
    call = returning if isinstance(expected, bool) else expecting
    given = [*objects(tree), *objects(prefix), *options.values()]
    given = [x for x in given if x is not True]
    check(call(expected, lambda: walk(tree, prefix, **options)), given)


def rebuilt(tree, leaves, kind_of=structure.kind_of, others=structure._fill):
    def rebuild():
        rest = structure.KINDS, kind_of, others, []
        return _native.kernel.rebuild(tree, iter(leaves), *rest)

    return rebuild


def refusing(*_):
    raise nodes.CannotRebuild("refused")


REBUILDS = {
    "tree": (None, make_tree, {}),
    "leaf": (None, object, {}),
    "container": (None, lambda: Container(a=[object(), ()], b={"c": object()}), {}),
    "too few leaves": (StopIteration, make_tree, {"leaves": []}),
    "the kind raises": (ValueError, lambda: [unknown()], {"kind_of": raising}),
    "another node raises": (ValueError, make_tree, {"others": raising}),
    "another node is refused": (
        nodes.CannotRebuild,
        lambda: {"a": [Other()]},
        {"others": refusing},
    ),
}


@pytest.mark.parametrize("name", REBUILDS)
def test_rebuild_leaks_nothing(name):
    expected, make, options = REBUILDS[name]
    tree = make()
    leaves = options.pop("leaves", [object() for _ in range(20)])
    call = rebuilt(tree, leaves, **options)
    check(expecting(expected, call) if expected else call, [*objects(tree), *leaves])


def test_a_tree_that_is_changed_while_it_is_read_leaks_nothing():
    tree = {"a": [Other()], "b": object()}
    call = expecting(RuntimeError, lambda: walk(tree, others=changing(tree)))
    check(call, [tree, *tree.values()])
    call = expecting(RuntimeError, lambda: walk(tree, dict(tree), others=changing(tree)))
    check(call, [tree, tree["a"], tree["b"]])
    call = expecting(RuntimeError, rebuilt(tree, range(9), others=changing(tree)))
    check(call, [tree, tree["a"], tree["b"]])


def test_a_tree_that_contains_itself_leaks_nothing():
    tree = []
    tree.append(tree)
    check(expecting(RecursionError, lambda: walk(tree)), [tree], calls=100)
    check(expecting(RecursionError, lambda: walk(tree, tree)), [tree], calls=100)
