"""Nodes of user classes are read through their public methods; rebuilt nodes are checked."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList
from types import MappingProxyType

import numpy as np
import pytest
from conftest import unit_lars as Lars
from node_classes import (
    ALL,
    REBUILT,
    REFUSED,
    Attributes,
    DotMapLike,
    Elsewhere,
    ElsewhereByKey,
    ElsewhereInAll,
    Group,
)

from lars_tree import Container, StructureError, lars_update, report
from lars_tree._tree import nodes, structure

W, G = np.array([3.0, 4.0]), np.array([0.0, 10.0])
NEW = [3.0, 3.5]  # ratio 5 / 10: a step of 0.05 * [0, 10]


@pytest.fixture(params=REBUILT, ids=str)
def make(request):
    return REBUILT[request.param]


def tree(make, a, b):
    """A tree with the node at three depths."""
    return {"x": make(a, b), "l": [make(a, make(a, b))]}


def keys(node):
    return [key for key, _ in nodes.children(node)]


def nodes_of(tree):
    if not structure.is_leaf(tree):
        yield tree
        for _, child in nodes.children(tree):
            yield from nodes_of(child)


def assert_rebuilt(new, w, values):
    assert [x.tolist() for x in structure.leaves(new)] == values
    pairs = list(zip(nodes_of(new), nodes_of(w), strict=True))
    assert all(a is not b and type(a) is type(b) and keys(a) == keys(b) for a, b in pairs)


@pytest.fixture
def w(make):
    w = tree(make, W.copy(), W.copy())
    yield w
    assert [x.tolist() for x in structure.leaves(w)] == [W.tolist()] * 5


def test_an_update_makes_new_nodes_and_does_not_change_the_old_ones(make, w):
    new = lars_update(w, tree(make, G, G), 0.1)
    assert_rebuilt(new, w, [NEW] * 5)


def test_init_and_trust_ratios_make_new_nodes(make, w):
    state = Lars(0.1, momentum=0.5).init(w)
    assert [x.tolist() for x in structure.leaves(state["velocity"])] == [[0, 0]] * 5
    assert_rebuilt(report.trust_ratios(w, tree(make, G, G), 0.1), w, [0.5] * 5)


def test_two_optimizer_steps_give_the_results_of_plain_nodes(make, w):
    opt, g = Lars(0.1, momentum=0.5), tree(make, G, G)
    plain = {"x": [W, W], "l": [[W, [W, W]]]}
    plain_state, state, new = opt.init(plain), opt.init(w), w
    for _ in range(2):
        new, state = opt.update(new, g, state)
        plain, plain_state = opt.update(plain, 1 * G, plain_state)
    assert_rebuilt(new, w, [x.tolist() for x in structure.leaves(plain)])
    moved = [x.tolist() for x in structure.leaves(state["velocity"])]
    assert moved == [x.tolist() for x in structure.leaves(plain_state["velocity"])]


def test_map_makes_new_nodes(make, w):
    held = Container._lars_tree_make({"w": w})  # does not convert the mappings in w
    assert_rebuilt(held.map(lambda x: x - 1)["w"], w, [(W - 1).tolist()] * 5)
    assert_rebuilt(held.copy()["w"], w, [W.tolist()] * 5)


def test_a_copy_does_not_share_the_store_of_its_children(make):
    node = make(W, G)
    new = Container._lars_tree_make({"w": node}).copy()["w"]
    stores = [
        [x for x in getattr(n, "__dict__", {}).values() if isinstance(x, dict | list)]
        for n in (node, new)
    ]
    assert all(x is not y for x, y in zip(*stores, strict=True))


@pytest.fixture(params=ALL, ids=str)
def any_make(request):
    return ALL[request.param]


def test_reading_is_consistent_and_never_rebuilds_a_node(any_make, monkeypatch):
    """`leaves`, `walk` and `broadcast` agree, and do not rebuild the node."""
    node = any_make(W, G)
    monkeypatch.setattr(nodes, "_checked", None)
    assert [x.tolist() for x in structure.leaves(node)] == [W.tolist(), G.tolist()]
    assert [path for path, _ in structure.walk(node)] == [(key,) for key in keys(node)]
    other = dict(zip(keys(node), (1, 2), strict=True))
    assert (
        structure.broadcast("lr", node, other) == structure.broadcast("lr", other, other) == [1, 2]
    )
    w = dict(zip(keys(node), (W, W), strict=True))
    given = structure.broadcast("dcdw", w, node, exact=True)
    assert [x.tolist() for x in given] == [W.tolist(), G.tolist()]


def test_gradients_options_and_out_are_only_read(any_make, monkeypatch):
    names = keys(any_make(W, G))
    w = dict(zip(names, (W.copy(), W.copy()), strict=True))
    expected = lars_update(w, dict(zip(names, (G, G), strict=True)), 0.1, eps=1.0)
    monkeypatch.setattr(nodes, "_checked", None)
    rates = any_make(np.float64(0.1), np.array(0.1))
    new = lars_update(w, any_make(G, G), rates, eps=any_make(np.ones(()), np.ones(())))
    assert [x.tolist() for x in new.values()] == [x.tolist() for x in expected.values()]
    ratios = report.trust_ratios(w, any_make(G, G), rates)
    assert [x.item() for x in ratios.values()] == [0.5, 0.5]
    report.TrustHistory().record(any_make(W[:1], W[:1]))


def test_an_update_in_place_only_reads_the_node(any_make, monkeypatch):
    node = any_make(W.copy(), W.copy())
    if isinstance(node, Group):
        pytest.skip("each reading gives other arrays")
    monkeypatch.setattr(nodes, "_checked", None)
    assert lars_update(node, any_make(G, G), 0.1, out=node) is node
    assert [x.tolist() for x in structure.leaves(node)] == [NEW, NEW]


def test_schedules_in_a_node_of_any_class(any_make, monkeypatch):
    """Each step calls the schedules and does not rebuild the node."""
    if any_make in (REBUILT["attrs with a converter"], REFUSED["read anew"]):
        pytest.skip("it takes no callables")
    seen = []

    def schedule(step):
        seen.append(int(step))
        return 0.1

    lr = any_make(schedule, schedule)
    monkeypatch.setattr(nodes, "_checked", None)
    opt = Lars(lr, momentum=0)
    w = dict(zip(keys(lr), (W, W), strict=True))
    state = opt.init(w)
    new, state = opt.update(w, dict.fromkeys(w, G), state)
    opt.update(new, dict.fromkeys(w, G), state)
    assert seen == [0, 0, 1, 1]
    assert [x.tolist() for x in new.values()] == [NEW, NEW]
    assert all(x is schedule for x in structure.leaves(lr))


def test_an_npz_file_and_a_chain_of_maps_are_gradients(tmp_path):
    np.savez(tmp_path / "g.npz", a=G, b=G)
    w = {"a": W, "b": W}
    with np.load(tmp_path / "g.npz") as g:
        assert [x.tolist() for x in lars_update(w, g, 0.1).values()] == [NEW, NEW]
        assert [x.tolist() for x in report.trust_ratios(w, g, 0.1).values()] == [0.5, 0.5]
        with pytest.raises(StructureError, match="w: expected a node that can be rebuilt"):
            lars_update(g, 1.0, 0.1)
    g = ChainMap({"a": G}, {"a": W, "b": G})
    assert [x.tolist() for x in lars_update(w, g, 0.1).values()] == [NEW, NEW]


def test_keys_that_cannot_be_sorted():
    w = MappingProxyType({"a": W, 1: W})
    new = lars_update(w, {1: G, "a": G}, 0.1)
    assert (type(new), list(new), new[1].tolist()) == (MappingProxyType, ["a", 1], NEW)


def test_keys_named_like_methods_do_not_hide_the_methods():
    w = Attributes({"items": W, "keys": W, "__iter__": W})
    new = lars_update(w, {"items": G, "keys": G, "__iter__": G}, 0.1)
    assert type(new) is Attributes
    assert [x.tolist() for x in dict.values(new)] == [NEW] * 3
    assert new.items is dict.__getitem__(new, "items")
    assert Container(w).to_flat() == {"items": W, "keys": W, "__iter__": W}


def test_a_container_takes_all_items_of_any_mapping():
    for make in (Elsewhere, ElsewhereInAll, ElsewhereByKey, DotMapLike, UserDict, ChainMap):
        w = Container(make({"a": make({"b": 1})}), c=make({"d": 2}))
        assert w.to_dict() == {"a": {"b": 1}, "c": {"d": 2}}
        assert type(w.a) is type(w.c) is Container
        assert (w | make({"e": 3})).to_dict() == {"a": {"b": 1}, "c": {"d": 2}, "e": 3}


@pytest.mark.parametrize("make", [dict, Elsewhere, ElsewhereInAll, ElsewhereByKey, DotMapLike])
def test_a_path_reads_and_writes_through_the_methods_of_the_node(make):
    w = Container(
        layers=UserList([make({"a": 1, 7: 2})])
    )  # a Container does not convert a UserList
    node = w["layers"][0]
    w["layers", 0, "a"] = 3
    w["layers", "0", "b", "c"] = 4
    assert type(node) is make
    assert (node["a"], node["b"]["c"], w["layers/0/7"]) == (3, 4, 2)
    assert w["layers/0/b/c"] == w["layers", 0, "b", "c"] == 4
    with pytest.raises(KeyError, match="there is 'a', 7, 'b'"):
        w["layers/0/x"]


def test_a_UserString_is_a_leaf():
    from collections import UserString

    assert structure.leaves([UserString("ab")]) == ["ab"]


# Classes are freed


def _used(cls):
    tree = [cls({"a": W})]
    structure.leaves(tree)
    lars_update(tree, cls({"a": G})["a"], 0.1)
    Container(tree=tree)
    return weakref.ref(cls)


@pytest.mark.parametrize("base", [dict, OrderedDict, UserDict])
def test_a_class_made_in_a_call_is_freed(base):
    seen = _used(type("Local", (base,), {}))
    gc.collect()
    assert seen() is None


def test_a_class_of_a_notebook_is_freed_when_its_cell_runs_again(monkeypatch):
    cls = type("Cell", (dict,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Cell", cls, raising=False)
    seen = _used(cls)
    del cls
    monkeypatch.undo()
    gc.collect()
    assert seen() is None


def test_a_leaf_class_made_in_a_call_is_freed():
    def used():
        cls = type("Local", (), {})
        assert structure.leaves([cls(), cls()])
        return weakref.ref(cls)

    seen = used()
    gc.collect()
    assert seen() is None


def test_arrays_that_a_node_makes_anew_at_each_reading_are_refused_as_out():
    w, g = {"a": {"b": np.array([3.0, 4.0])}}, {"a": Group(None, {"b": [0.4, 0.3]})}
    lazy = {"a": Group(None, w["a"])}
    opt = Lars(0.1)
    state = opt.init(w)
    refused = r"out gives other arrays when it is read again\n  a/b: expected the"
    with pytest.raises(StructureError, match=refused):
        opt.update(lazy, g, state, out=lazy)
    with pytest.raises(StructureError, match=refused):
        lars_update(w, g, 0.1, out=lazy)
    odd = {**state, "velocity": {"a": Group(None, state.velocity.a)}}
    with pytest.raises(
        StructureError, match=r"state gives other arrays .*\n  velocity/a/b: expected the"
    ):
        opt.update(w, g, odd, out=w)
    assert (w["a"]["b"].tolist(), int(state.step)) == ([3.0, 4.0], 0)
    opt.update(w, g, state, out=w)  # a `Group` may contain gradients
    assert w["a"]["b"].round(12).tolist() == [2.6, 3.7]
