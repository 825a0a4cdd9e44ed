"""Which nodes are rebuilt, what a rebuilt node keeps, and why other nodes are refused."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict
from contextlib import suppress

import numpy as np
import pytest
from conftest import unit_lars as Lars
from node_classes import (
    REFUSED,
    CachedLayer,
    First,
    FirstOfPair,
    Mirrored,
    Named,
    NamedList,
    Slotted,
    Sorted,
    Tagged,
)

from lars_tree import Container, StructureError, lars_update, report
from lars_tree._tree import structure

W, G = np.array([3.0, 4.0]), np.array([0.0, 10.0])
NEW = [3.0, 3.5]  # ratio 5 / 10: a step of 0.05 * [0, 10]


# Nodes that cannot be rebuilt


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    ("argument", "act"),
    [
        ("w", lambda w: lars_update(w, G, 0.1)),
        ("w", lambda w: Lars(0.1).init(w)),
        ("w", lambda w: report.trust_ratios(w, G, 0.1)),
        ("self", lambda w: Container._lars_tree_make(w).map(lambda x: 2 * x)),
        ("self", lambda w: Container._lars_tree_make(w).copy()),
        ("self", lambda w: Container._lars_tree_make(w).to_dict()),
    ],
    ids=["update", "init", "ratios", "map", "copy", "to_dict"],
)
def test_a_node_that_cannot_be_rebuilt_is_refused_with_its_path(name, argument, act):
    w = {"ok": W.copy(), "l": [REFUSED[name](W.copy(), W.copy())]}
    with pytest.raises(StructureError, match="l/0: expected a node that can be rebuilt") as caught:
        act(w)
    assert (caught.value.argument, caught.value.paths) == (argument, (("l", 0),))
    assert [x.tolist() for x in structure.leaves(w)] == [W.tolist()] * 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ChainMap", "a ChainMap shows several mappings as one"),
        ("UserDict with another constructor", r"Rated refuses other children \(TypeError: .*\)"),
        ("read anew", "reading the Group again gives other children"),
        ("swapped", "a new Swapped would not hold what is put in"),
        ("drops an item", "a new Dropping would not hold what is put in"),
        ("renames its keys", "a new Renaming would not hold what is put in"),
        ("list that cannot be made", r"SharedList refuses other children \(TypeError: .*\)"),
    ],
)
def test_the_message_says_why_a_node_cannot_be_rebuilt(name, reason):
    with pytest.raises(StructureError, match=f"w: expected a node that can be rebuilt: {reason}$"):
        lars_update(REFUSED[name](W, W), G, 0.1)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_children_at_a_later_reading_is_refused(count):
    """The node has two children until reading `change`, then `count` children."""

    def number(node):
        node.readings += 1
        return 2 if node.readings < change else count

    class Varying(UserDict):
        def items(self):
            return dict.fromkeys("abc"[: number(self)], 0.1).items()

    class VaryingList(list):
        def __iter__(self):
            yield from [W] * number(self)

    def readings(act, cls):
        node = cls()
        node.readings = 0
        with suppress(StructureError):
            act(node)
        return node.readings

    for act, cls in (
        (lambda node: lars_update({"x": node}, {"x": [G, G]}, 0.1), Varying),
        (lambda node: Container._lars_tree_make({"x": node}).map(lambda x: x), Varying),
        (lambda node: lars_update({"a": W, "b": W}, G, node), Varying),
        (lambda node: Lars(node).init({"a": W, "b": W}), Varying),
        (lambda node: Container(x=node), VaryingList),
    ):
        change = 1
        while readings(act, cls) >= change:  # else the number does not change during the call
            change += 1
        assert change > 1


def test_a_state_that_cannot_be_rebuilt_is_refused_with_its_path():
    opt, w = Lars(0.1), {"a": W, "b": W}
    state = opt.init(w)
    dict.__setitem__(state, "velocity", ChainMap({"a": 0 * W}, {"b": 0 * W}))
    with pytest.raises(
        StructureError, match="state cannot be rebuilt\n  velocity: expected a node"
    ):
        opt.update(w, G, state)
    w = {"a": W.copy(), "b": W.copy()}
    opt.update(w, G, state, out=w)  # an update in place only reads the node
    assert w["a"].tolist() == NEW


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError, StructureError), (MemoryError, MemoryError)]
)
def test_an_error_of_a_constructor_is_in_the_message(error, raised):
    class Fails(UserDict):
        def __init__(self, items=(), fail=True):
            if fail:
                raise error("not\nnow" + 99 * ".")
            super().__init__(items)

    with pytest.raises(raised, match=r"Fails refuses.*\(ValueError: not now\.{64}\)$|^not\nnow"):
        lars_update(Fails({"a": W}, fail=False), G, 0.1)


def test_a_constructor_may_not_change_the_old_node():
    class Shares(UserDict):
        shared: dict = {}  # noqa: RUF012

        def __init__(self, items=()):
            self.data = self.shared
            self.data.update(items)

    with pytest.raises(StructureError, match="reading the Shares again gives other"):
        lars_update(Shares({"a": W}), G, 0.1)


# What a rebuilt node keeps


def test_attributes_are_kept():
    ordered = OrderedDict(a=W)
    ordered._metadata = {"version": 1}  # as in a state_dict of torch
    new = lars_update(ordered, G, 0.1)
    assert (new._metadata, list(new)) == ({"version": 1}, ["a"])
    assert lars_update(Tagged("x", [W]), G, 0.1).tag == "x"
    assert lars_update(Named("x", {"a": W}), G, 0.1).name == "x"
    assert lars_update(NamedList("x", [W]), G, 0.1).name == "x"
    slotted = Slotted(a=W)
    slotted.name = "x"
    assert lars_update(slotted, G, 0.1).name == "x"
    mirrored = lars_update(Mirrored({"a": W}), G, 0.1)
    assert mirrored.a is mirrored["a"]


def test_attributes_that_depend_on_the_children_are_made_anew():
    new = lars_update(First({"a": W}), G, 0.1)
    assert new.first is new["a"]
    new = lars_update(FirstOfPair(W, W), G, 0.1)
    assert new.first is new.a


def test_attributes_that_writing_sets_are_made_anew():
    class Putting(dict):
        def __init__(self, items):
            for key, value in items.items():
                self[key] = value

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.seen = id(value)

    class Appending(list):
        def __init__(self, items):
            for x in items:
                self.append(x)

        def append(self, x):
            super().append(x)
            self.seen = id(x)

    class Extending(list):
        def __init__(self, items):
            self.extend(items)

        def extend(self, items):
            super().extend(items)
            self.seen = id(self[-1])

    for w in (Putting({"a": W}), Appending([W]), Extending([W])):
        new = lars_update(w, G, 0.1)
        assert new.seen == id(structure.leaves(new)[0])


def test_an_attribute_may_equal_an_old_number():
    held = Container._lars_tree_make({"w": Named(1, {"a": 1})})
    new = held.map(lambda x: x + 1)["w"]
    assert (new.name, new["a"]) == (1, 2)


def test_a_dict_that_is_read_in_another_order_keeps_its_own():
    new = lars_update(Sorted(b=W, a=G), {"a": 0 * G, "b": G}, 0.1)
    assert list(dict.keys(new)) == ["b", "a"]
    assert [x.tolist() for x in dict.values(new)] == [NEW, G.tolist()]


def test_an_empty_node_may_be_rebuilt_as_itself():
    class Empty(dict):
        def __init__(self, name):
            self.name = name

        def __copy__(self):
            return self

    w = {"x": Empty("x"), "y": W}
    assert lars_update(w, {"x": {}, "y": G}, 0.1)["x"] is w["x"]


def test_a_field_that_the_constructor_does_not_take():
    new = lars_update(CachedLayer(W, W), CachedLayer(G, G), 0.1)
    assert (new.a.tolist(), new.b.tolist(), new.cache) == (NEW, NEW, None)
