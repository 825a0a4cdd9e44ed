"""Nodes registered with JAX, torch or optree, compared with the `tree_map` of the library."""

from __future__ import annotations

import functools
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from conftest import need, unit_lars
from hypothesis import given, settings
from hypothesis import strategies as st
from registered_classes import REGISTERED, Fields, jax_class, jax_dataclass, tree_map

from lars_tree import (
    Container,
    LeafError,
    OutError,
    StructureError,
    lars_update,
    report,
)
from lars_tree._tree import kinds, nodes, structure

W, G = np.array([3.0, 4.0]), np.array([0.0, 10.0])
NEW = [3.0, 3.5]  # ratio 5 / 10: a step of 0.05 * [0, 10]

FEW = settings(max_examples=settings.default.max_examples // 4)  # for each class


@pytest.fixture(params=REGISTERED, scope="module")
def name(request):
    need(request.param.partition(" ")[0])
    return request.param


@pytest.fixture
def make(name):
    return REGISTERED[name][0]()


@pytest.fixture
def paths(name):
    return REGISTERED[name][1]


def values(tree):
    return [None if x is None else x.tolist() for x in structure.leaves(tree)]


def static(node):
    return kinds.read(node, kinds.kind_of(node)).static


# Trees of a class, next to nodes of other classes


ARRAYS = st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(lambda x: np.array(x, float))


@functools.cache
def trees(name):
    make = REGISTERED[name][0]()

    def parents(child):
        lists = st.lists(child, max_size=2)
        dicts = st.dictionaries(st.sampled_from("abc"), child, max_size=2)
        # JAX and optree sort the keys of a dict, and the oracle must see the same order.
        sorted_dicts = dicts.map(lambda items: {key: items[key] for key in sorted(items)})
        tags = st.sampled_from([len, str]) if "partial" in name else st.sampled_from("xy")
        return st.one_of(st.builds(make, child, child, tags), lists, lists.map(tuple), sorted_dicts)

    return st.recursive(ARRAYS | st.none(), parents, max_leaves=8)


def drawn(data, name):
    """Weights of a drawn structure, and gradients of the same structure."""
    w = data.draw(trees(name), label="w")
    gradients = st.none() | ARRAYS
    return w, tree_map(name)(lambda x: None if x is None else data.draw(gradients), w)


def step(w, g):
    return w if g is None else lars_update(w, g, 0.1)


@FEW
@given(data=st.data())
def test_a_step_of_a_tree_is_the_step_of_each_leaf(name, data):
    w, g = drawn(data, name)
    map_leaves = tree_map(name)
    expected = map_leaves(step, w, g)
    before = values(w)
    actual = lars_update(w, g, 0.1)
    assert values(w) == before
    assert values(actual) == values(expected)
    # Maps over both trees, which raises if they differ in a class or in static data.
    map_leaves(lambda x, y: None, actual, expected)
    ratios = report.trust_ratios(w, g, 0.1)
    map_leaves(lambda x, y: None, ratios, expected)
    rates = map_leaves(lambda x: 0.1, w)
    assert values(lars_update(w, g, rates)) == values(expected)


@FEW
@given(data=st.data())
def test_steps_of_an_optimizer_are_the_steps_of_the_same_leaves_in_a_list(name, data):
    w, g = drawn(data, name)
    opt = unit_lars(0.1, momentum=0.5)
    leaves, gradients = structure.leaves(w), structure.leaves(g)
    expected, list_state = leaves, opt.init(leaves)
    new, state = w, opt.init(w)
    for _ in range(2):
        new, state = opt.update(new, g, state)
        expected, list_state = opt.update(expected, gradients, list_state)
    assert values(new) == values(expected)
    assert values(state.velocity) == values(list_state.velocity)
    tree_map(name)(lambda *_: None, w, new)


@FEW
@given(data=st.data())
def test_an_update_in_place_gives_the_same_and_keeps_all_nodes(name, data):
    w, g = drawn(data, name)
    expected = values(lars_update(w, g, 0.1))
    assert lars_update(w, g, 0.1, out=w) is w
    assert values(w) == expected


@FEW
@given(data=st.data())
def test_a_map_keeps_classes_and_static_data(name, data):
    w, _ = drawn(data, name)
    held = Container._lars_tree_make({"w": w})  # does not convert mappings
    mapped = held.map(lambda x: x + 1)["w"]
    back = tree_map(name)(lambda x: None if x is None else x - 1, mapped)
    tree_map(name)(np.testing.assert_array_equal, w, back)
    assert held == held.copy()
    assert held.unflatten(held.leaves()) == held


# One node


def test_the_keys_are_those_of_the_library(make, paths):
    w = {"x": make(W, G), "l": [make(G, W)]}
    found = [("x", *path) for path in paths] + [("l", 0, *path) for path in paths]
    assert [path for path, _ in structure.walk(w)] == found
    assert len(set(found)) == 4
    assert repr(Container._lars_tree_make(w)).count("float64 (2,)") == 4


def test_the_class_and_static_data_are_kept(make):
    w = {"x": make(W, W)}
    new = lars_update(w, {"x": make(G, None)}, 0.1)
    assert type(new["x"]) is type(w["x"])
    assert new["x"] is not w["x"]
    assert static(new["x"]) == static(w["x"])
    assert sorted(values(new)) == [NEW, W.tolist()]
    assert values(w) == [W.tolist()] * 2


def test_dicts_with_the_same_keys_and_prefixes_match(make, paths):
    w = make(W, W)
    g = {}
    for path, x in zip(paths, (G, 2 * G), strict=True):
        *parents, last = path
        node = g
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = x
    assert values(lars_update(w, g, 0.1)) == [NEW, NEW]
    assert values(lars_update({"x": w}, {"x": G}, {"x": 0.1})) == [NEW, NEW]
    plain = lars_update(g, w, 0.0)
    assert type(plain) is dict
    with pytest.raises(StructureError, match="expected a") as caught:
        lars_update({"x": w}, {"x": [{**g, "c": G}]}, 0.1)
    assert caught.value.paths == (("x",),)
    missing = dict(list(g.items())[:1])
    with pytest.raises(StructureError, match=f"x: missing {list(g)[1]!r}"):
        lars_update({"x": w}, {"x": missing}, 0.1)


def test_reading_never_rebuilds_a_node(make, monkeypatch):
    w = make(W.copy(), W.copy())
    monkeypatch.setattr(nodes, "_checked", None)
    g = make(G, G)
    monkeypatch.setattr(kinds.registered.Reading, "make", None)
    lars_update(w, g, make(np.float64(0.1), np.float64(0.1)), out=w)
    assert values(w) == [NEW, NEW]


def test_an_error_names_the_path(make, paths):
    with pytest.raises(LeafError, match="expected an array, got a str") as caught:
        lars_update({"x": make("a", W)}, G, 0.1)
    first = {tuple(path) for path in paths}
    assert {path[1:] for path in caught.value.paths} < first
    assert caught.value.argument == "w"


def test_other_static_data_makes_containers_unequal(name, make):
    tag = str if "partial" in name else "other"
    a, b = (Container._lars_tree_make({"x": make(W, G, *more)}) for more in ((), (tag,)))
    assert a == a.copy()
    assert a != b
    assert a.diff(b)["x"].endswith("with other static data there")


def test_static_data_may_be_a_child_too():
    cls = jax_class()
    new = lars_update(cls(W, G, W), G, 0.1)
    assert (new.a.tolist(), new.tag is W) == (NEW, True)


def test_a_registered_dict_equals_a_dict_of_the_same_children():
    node = REGISTERED["jax dict"][0]()(W, G)
    assert Container._lars_tree_make({"x": node}) == {"x": {"a": W, "b": G}}
    assert Container._lars_tree_make({"x": node}) != {"x": {"a": W, "b": W}}


def test_arrays_in_static_data_are_not_compared():
    make = jax_dataclass()
    a, b = (Container(x=make(W, G, tag=W.copy())) for _ in range(2))
    assert a != b
    assert values(lars_update(a, {"x": make(G, G)}, 0.1)) == [NEW, [0, 9]]


# Positions


def test_positions_match_only_if_the_static_data_is_equal():
    """The static data often says which child has which name."""
    make = jax_class()
    w, other = {"x": make(W, W, "a, b")}, {"x": make(G, G, "b, a")}
    for arguments in ((w, other, 0.1), (w, G, {"x": make(0.1, 0.1, "b, a")})):
        with pytest.raises(StructureError, match=r"missing 0 of .*a, b.* unexpected 0 of .*b, a"):
            lars_update(*arguments)
    assert values(lars_update(w, {"x": [G, G]}, 0.1)) == [NEW, NEW]
    assert values(lars_update(w, {"x": make(G, G, "a, b")}, 0.1)) == [NEW, NEW]


@pytest.mark.parametrize("name", ["jax class", "torch class", "optree class"])
def test_positions_match_if_the_static_data_is_the_same_array(name):
    w = REGISTERED[name][0]()(W, W, (W, "names"))
    g = tree_map(name)(lambda x: G, w)
    assert values(lars_update(w, g, 0.1)) == [NEW, NEW]


def test_positions_are_integers():
    path = Container(x=jax_class()(W, G)).paths()[1]
    assert path == ("x", 1)
    assert (str(path[1]), f"{path[1]}", hash(path[1]), path[1] != 1) == ("1", "1", 1, False)
    copied = pickle.loads(pickle.dumps(path))
    assert (copied, type(copied[1])) == (path, int)


def test_keys_that_are_not_unique_are_replaced_by_positions():
    tree_util = need("jax").tree_util

    class Key:
        name: list[str] = []  # noqa: RUF012

    def flatten(key):
        return lambda node: (((key, node.a), (key, node.b)), node.tag)

    for key in (tree_util.GetAttrKey("a"), Key()):
        cls = type("Twice", (Fields,), {})
        tree_util.register_pytree_with_keys(cls, flatten(key), cls.tree_unflatten)
        w = cls(W, W)
        assert [path for path, _ in structure.walk(w)] == [(0,), (1,)]
        new = lars_update(w, cls(G, None), 0.1)
        assert (new.a.tolist(), new.b.tolist()) == (NEW, W.tolist())


# What cannot be rebuilt


@pytest.mark.parametrize("slots", [False, True])
def test_a_class_that_changes_what_is_put_in_is_refused_with_its_path(slots):
    @need("jax").tree_util.register_dataclass
    @dataclass(slots=slots)
    class Copies:
        a: Any

        def __post_init__(self):
            self.a = np.array(self.a, copy=True)

    w = {"x": [Copies(W)]}
    with pytest.raises(StructureError, match=r"x/0: .* a new Copies would not hold") as caught:
        lars_update(w, G, 0.1)
    assert (caught.value.argument, caught.value.paths) == ("w", (("x", 0),))
    lars_update(w, G, 0.1, out=w)
    assert values(w) == [NEW]


def test_a_class_that_refuses_other_children_is_refused_with_its_path():
    @need("jax").tree_util.register_dataclass
    @dataclass
    class Checked:
        a: Any
        b: Any = field(default=None)

        def __post_init__(self):
            if self.a.shape != (2,):
                raise ValueError("a must have two elements")

    w = {"x": Checked(W)}
    assert values(lars_update(w, {"x": Checked(G)}, 0.1)) == [NEW, None]
    with pytest.raises(StructureError, match=r"x: .*Checked refuses.*two elements") as caught:
        report.trust_ratios(w, {"x": {"a": G, "b": None}}, 0.1)
    assert caught.value.paths == (("x",),)


def test_children_that_are_computed_at_each_reading_cannot_be_written():
    cls = type("Computed", (Fields,), {"tree_flatten": lambda self: ((1 * self.a,), None)})
    need("jax").tree_util.register_pytree_node_class(cls)
    w = {"x": cls(W.copy(), None)}
    with pytest.raises(StructureError, match=r"out gives other arrays(.|\n)*x/0"):
        lars_update(w, G, 0.1, out=w)
    with pytest.raises(StructureError, match="w cannot be rebuilt\n  x: "):
        lars_update(w, G, 0.1)
    assert values(lars_update({"x": [W]}, {"x": cls(G, None)}, 0.1)) == [NEW]


def test_a_cycle_and_a_deep_tree_are_refused():
    make = jax_class()
    w = make(W, None)
    w.b = [w]
    with pytest.raises(StructureError, match="w contains itself\n  1/0: ") as caught:
        lars_update(w, G, 0.1)
    assert caught.value.paths == ((1, 0),)
    deep = W
    for _ in range(20_000):
        deep = make(deep, None)
    with pytest.raises(RecursionError):
        lars_update(deep, G, 0.1)


def test_two_children_that_are_the_same_array_are_updated_one_by_one():
    for make in (REGISTERED[name][0]() for name in ("jax attrs", "jax mapping", "jax dataclass")):
        w = make(W, W)
        new = lars_update(w, {"a": G, "b": None}, 0.1)
        read = dict(nodes.children(new))
        assert (read["a"].tolist(), read["b"].tolist()) == (NEW, W.tolist())
        with pytest.raises(OutError, match="share memory"):
            lars_update(w, G, 0.1, out=w)


# Under jit


def test_a_jitted_step_returns_nodes_of_the_same_class():
    jax = need("jax")
    for name in [name for name in REGISTERED if name.startswith("jax")]:
        make = REGISTERED[name][0]()
        w, g = (make(*map(jax.numpy.asarray, pair)) for pair in ((W, W), (G, G)))
        opt = unit_lars(0.1, momentum=0.5)
        new, state = jax.jit(opt.update)(w, g, opt.init(w))
        assert jax.tree.structure(new) == jax.tree.structure(w)
        np.testing.assert_allclose([np.asarray(x) for x in structure.leaves(new)], [NEW, NEW])
        assert jax.tree.leaves(state.velocity)[0].tolist() == [0, 0.5]
