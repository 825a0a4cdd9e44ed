"""Walking, rebuilding and matching trees, compared with dm-tree, and the messages of mismatches."""

from __future__ import annotations

import collections
from types import MappingProxyType

import numpy as np
import pytest
import tree as dm_tree
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Container, StructureError
from lars_tree._tree import nodes, structure
from lars_tree.testing import prefixes_of

Point = collections.namedtuple("Point", "x y")


@pytest.fixture(scope="module")
def layer():
    return need("attrs").make_class("Layer", ["kernel", "bias"])


def _parents(child):
    some = st.lists(child, max_size=3)
    named = st.dictionaries(st.text("abc", max_size=2), child, max_size=3)
    return st.one_of(
        some,
        some.map(tuple),
        st.builds(Point, child, child),
        named,
        named.map(collections.OrderedDict),
        named.map(lambda d: collections.defaultdict(list, d)),
        named.map(MappingProxyType),
        named.map(Container),
    )


LEAVES = st.integers(0, 9) | st.none() | st.text(max_size=2)
TREES = st.recursive(LEAVES, _parents, max_leaves=12)
DICTS = st.recursive(
    st.just(0), lambda child: st.dictionaries(st.sampled_from("abc"), child, max_size=2)
)


def assert_same(actual, expected):
    """Assert the same leaves at the same paths, in the same order, in nodes of the same types."""
    dm_tree.assert_same_structure(actual, expected)
    assert dm_tree.flatten_with_path(actual) == dm_tree.flatten_with_path(expected)
    assert list(structure.walk(actual)) == list(structure.walk(expected))


# Walk and rebuild


@given(TREES)
def test_the_walk_finds_the_leaves_of_dm_tree(tree):
    expected = dm_tree.flatten_with_path(tree)
    actual = list(structure.walk(tree))
    assert len(actual) == len(expected)
    assert dict(actual) == dict(expected)


@given(TREES)
def test_leaves_come_in_the_order_of_the_walk(tree):
    assert structure.leaves(tree) == [leaf for _, leaf in structure.walk(tree)]


@given(TREES)
def test_rebuild_maps_as_dm_tree_does(tree):
    expected = dm_tree.map_structure(lambda x: f"{x}!", tree)
    actual = structure.rebuild(tree, [f"{x}!" for x in structure.leaves(tree)])
    assert_same(actual, expected)


@given(TREES, st.lists(st.integers(), max_size=4))
def test_another_number_of_leaves_is_refused(tree, leaves):
    count = len(structure.leaves(tree))
    for wrong in ([*structure.leaves(tree), 0], leaves[:-1] if len(leaves) == count else leaves):
        if len(wrong) != count:
            with pytest.raises(StructureError, match="tree was changed while") as caught:
                structure.rebuild(tree, wrong)
            assert (caught.value.argument, caught.value.paths) == ("tree", ((),))


@given(TREES)
def test_every_node_is_a_leaf_or_has_children(tree):
    assert structure.is_leaf(tree) == (not dm_tree.is_nested(tree))
    if not structure.is_leaf(tree):
        children = [child for _, child in nodes.children(tree)]
        assert_same(nodes.replace_children(tree, children), tree)


@given(st.data())
def test_attrs_are_nodes_as_in_dm_tree(layer, data):
    tree = {"l": layer(data.draw(TREES), layer(data.draw(TREES), [None]))}
    assert dict(structure.walk(tree)) == dict(dm_tree.flatten_with_path(tree))
    expected = dm_tree.map_structure(lambda x: f"{x}!", tree)
    assert_same(structure.rebuild(tree, [f"{x}!" for x in structure.leaves(tree)]), expected)


def test_keys_keep_their_own_order():
    tree = {"b": 1, "a": collections.OrderedDict(z=2, y=3)}
    assert list(structure.walk(tree)) == [(("b",), 1), (("a", "z"), 2), (("a", "y"), 3)]
    assert list(structure.rebuild(tree, [1, 2, 3])["a"]) == ["z", "y"]


def test_keys_may_be_of_several_types():
    tree = {1: "a", "1": "b", None: "c", (1, 2): {2.5: "d"}}
    assert [path for path, _ in structure.walk(tree)] == [(1,), ("1",), (None,), ((1, 2), 2.5)]
    assert structure.rebuild(tree, structure.leaves(tree)) == tree


def test_none_is_a_leaf_and_an_empty_node_has_none():
    tree = {"a": None, "b": {}, "c": [], "d": ((), Point(None, [{}]))}
    assert list(structure.walk(tree)) == [(("a",), None), (("d", 1, "x"), None)]
    assert_same(structure.rebuild(tree, [None, None]), tree)


def test_a_defaultdict_keeps_its_factory():
    rebuilt = structure.rebuild(collections.defaultdict(list, a=1), [2])
    assert rebuilt["a"] == 2
    assert rebuilt["missing"] == []


def test_a_dict_subclass_keeps_its_type_without_its_constructor_being_called():
    class Named(dict):
        def __init__(self, name):
            self.name = name

    tree = Named("encoder")
    tree["a"] = 1
    rebuilt = structure.rebuild(tree, [2])
    assert (type(rebuilt), rebuilt.name, rebuilt["a"]) == (Named, "encoder", 2)
    assert tree["a"] == 1


@pytest.mark.parametrize("leaf", ["text", b"bytes", 3, None, {1, 2}, np.ones(2)], ids=repr)
def test_leaves_of_each_kind(leaf):
    assert structure.is_leaf(leaf)
    assert list(structure.walk(leaf)) == [((), leaf)]


def test_keys_named_like_methods_do_not_hide_the_methods():
    tree = Container({"items": 1, "keys": {"values": 2}})
    assert structure.leaves(tree) == [1, 2]
    assert structure.broadcast("lr", tree, {"items": 3, "keys": 4}) == [3, 4]


# Match and broadcast


@given(TREES, st.data())
def test_a_prefix_broadcasts_as_dm_tree_does(tree, data):
    """Each leaf of the prefix is repeated for all leaves of the tree at or below its path."""
    prefix = data.draw(prefixes_of(tree, st.integers(1, 99)))
    expected = dm_tree.map_structure_up_to(
        prefix, lambda value, part: dm_tree.map_structure(lambda _: value, part), prefix, tree
    )
    actual = structure.rebuild(tree, structure.broadcast("lr", tree, prefix))
    dm_tree.assert_same_structure(actual, expected)
    assert dm_tree.flatten_with_path(actual) == dm_tree.flatten_with_path(expected)
    assert [path for path, _ in structure.walk(actual)] == [
        path for path, _ in structure.walk(tree)
    ]


@given(DICTS, DICTS)
def test_dm_tree_agrees_on_exact_matches(a, b):
    try:
        dm_tree.assert_same_structure(a, b)
    except (TypeError, ValueError):
        with pytest.raises(StructureError):
            structure.broadcast("dcdw", a, b, exact=True)
    else:
        assert structure.broadcast("dcdw", a, b, exact=True) == structure.leaves(b)


@given(DICTS, DICTS)
def test_differences_are_listed_exactly_where_broadcasting_fails(a, b):
    lines = list(structure.differences(a, b))
    if lines:
        with pytest.raises(StructureError) as caught:
            structure.broadcast("lr", a, b)
        assert caught.value.paths == tuple(path for path, _ in lines)
    else:
        assert len(structure.broadcast("lr", a, b)) == len(structure.leaves(a))


def test_keys_match_by_name_and_not_by_order():
    assert structure.broadcast("dcdw", {"a": 1, "b": 2}, {"b": 20, "a": 10}, exact=True) == [10, 20]
    assert structure.broadcast("dcdw", Point(1, 2), {"y": 20, "x": 10}, exact=True) == [10, 20]


def test_a_list_matches_a_tuple_of_its_length():
    assert structure.broadcast("dcdw", [1, [2, 3]], (4, (5, 6)), exact=True) == [4, 5, 6]


def test_a_key_with_a_slash_is_not_read_as_a_path():
    with pytest.raises(StructureError, match="missing 'a/b'; unexpected 'a'"):
        structure.broadcast("dcdw", Container({"a/b": 1}), Container(a={"b": 2}))


@pytest.mark.parametrize(
    ("w", "other", "line"),
    [
        (
            {"bias": 1},
            {"bais": 1},
            "dcdw: missing 'bias'; unexpected 'bais' (did you mean 'bias'",
        ),
        ({"a": {"b": 1}}, {"a": {}}, "a: missing 'b'"),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, "a: unexpected 'c'"),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, "a: expected a list of 2 items, got a list of 3 items"),
        ({"a": 1}, {"a": {"u": 1, "v": 2}}, "a: expected an int, got a dict with keys 'u', 'v'"),
        ({"a": 1}, {"a": {}}, "a: expected an int, got an empty dict"),
        ({"a": {"b": {}}}, {"a": {"b": 1}}, "a/b: expected an empty dict, got an int"),
        ({"a": [{"b": 1}]}, {"a": [None]}, "a/0: expected a dict with keys 'b', got None"),
        (Point(1, {"k": 1}), Point(1, {}), "y: missing 'k'"),
        ({"a/b": {"": 1}}, {"a/b": {"": [1]}}, "'a/b'/'': expected an int, got a list of"),
        (
            {"w": np.ones((3, 4))},
            {"w": Container(u=1)},
            "w: expected an array of shape (3, 4), got",
        ),
    ],
)
def test_the_message_of_a_mismatch(w, other, line):
    with pytest.raises(StructureError) as caught:
        structure.broadcast("dcdw", w, other, exact=True)
    assert str(caught.value).startswith(f"dcdw does not match w\n  {line}")
    assert caught.value.argument == "dcdw"


def test_a_mismatch_lists_every_path():
    w = {"a": {"bias": 1, "kernel": 2}, "h": 3, "same": 4}
    other = {"a": {"bias": 1, "kernel": [2]}, "h": {"u": 3}, "same": 4}
    with pytest.raises(StructureError) as caught:
        structure.broadcast("dcdw", w, other)
    assert caught.value.paths == (("a", "kernel"), ("h",))


# Cycles and depth


def _cyclic(make):
    node = {"x": 1}
    node["me"] = make(node)
    return {"root": node}


@pytest.mark.parametrize(
    ("make", "path"),
    [(lambda n: n, ()), (lambda n: [n], (0,)), (lambda n: Point(0, {"z": n}), ("y", "z"))],
    ids=["itself", "in a list", "in a namedtuple"],
)
def test_a_cycle_is_found_where_it_closes(make, path):
    tree = _cyclic(make)
    assert structure.cycle(tree) == (("root",), ("root", "me", *path))
    assert structure.cycle(tree["root"]) == ((), ("me", *path))
    for node, start in ((tree, "root"), (tree["root"], "w")):
        (line,) = str(structure.explained({"lr": 1, "w": node})).splitlines()[1:]
        assert line.endswith(f": expected a tree, got the node at {start} again")


def test_a_node_at_two_paths_is_not_a_cycle():
    shared = {"x": 1}
    assert structure.cycle({"a": shared, "b": [shared, shared]}) is None


def test_a_tree_of_any_depth_is_searched_for_cycles():
    tree = {}
    for _ in range(3000):
        tree = {"deeper": tree}
    assert structure.cycle(tree) is None


# Pick


@given(DICTS, st.data())
def test_pick_keeps_the_chosen_leaves(tree, data):
    tree = {"x": tree}
    kept = [data.draw(st.booleans()) for _ in structure.leaves(tree)]
    expected = [pair for pair, keep in zip(structure.walk(tree), kept, strict=True) if keep]
    assert list(structure.walk(structure.pick(tree, kept))) == expected


def test_pick_keeps_the_length_of_a_sequence():
    assert structure.pick({"a": [1, 2], "b": (3,)}, [False, True, False]) == {"a": [None, 2]}


# Two trees side by side


def test_side_by_side_yields_leaves_and_differences_in_the_order_of_the_left_tree():
    left = {"a": 1, "b": {"x": 1, "y": 2}, "c": [1], "d": {"p": 1, "q": 2}, "e": {}, "f": 3}
    right = {"d": {"q": 2, "p": 1}, "c": (1,), "b": {"x": 5, "z": 6}, "a": 4, "e": 0, "g": 7}

    def correspond(x, y):
        return type(x) is type(y)

    assert list(structure.side_by_side(left, right, correspond)) == [
        ((), left, right, "keys"),
        (("a",), 1, 4, "leaves"),
        (("b",), left["b"], right["b"], "keys"),
        (("b", "x"), 1, 5, "leaves"),
        (("b", "y"), 2, structure.MISSING, "missing"),
        (("b", "z"), structure.MISSING, 6, "missing"),
        (("c",), [1], (1,), "nodes"),
        (("d",), left["d"], right["d"], "order"),
        (("d", "p"), 1, 1, "leaves"),
        (("d", "q"), 2, 2, "leaves"),
        (("e",), {}, 0, "nodes"),
        (("f",), 3, structure.MISSING, "missing"),
        (("g",), structure.MISSING, 7, "missing"),
    ]
    assert list(structure.side_by_side(1, 2, path=("at",))) == [(("at",), 1, 2, "leaves")]


@given(TREES, TREES)
def test_side_by_side_pairs_the_common_leaves(a, b):
    leaves = {path: (x, y) for path, x, y, what in structure.side_by_side(a, b) if what == "leaves"}
    left, right = dict(structure.walk(a)), dict(structure.walk(b))
    assert leaves == {path: (x, right[path]) for path, x in left.items() if path in right}


@pytest.mark.parametrize(("a", "b"), [([1], (1,)), ({}, []), ({0: 1}, [1])])
def test_diff_distinguishes_nodes_like_equality(a, b):
    a, b = Container(x=a), Container(x=b)
    assert (a.diff(b) == {}) == (a == b)


def test_diff_says_what_differs():
    a = Container(s={"x": np.zeros(2), "y": 1}, t=np.ones(2), u=3, v={"z": 1}, n=None)
    b = Container(s={"x": np.array([0, 0.5]), "w": 1}, t=np.ones(3), u=3, v=2, n=0)
    assert a.diff(b) == {
        "s/x": "float64 (2,): elements differ by up to 0.5",
        "s/y": "only here",
        "s/w": "only there",
        "t": "float64 (2,) here, float64 (3,) there",
        "v": "a Container with keys 'z' here, 2 there",
        "n": "None here, 0 there",
    }


def test_a_container_that_holds_itself_has_a_repr():
    w = Container(a=1)
    dict.__setitem__(w, "self", w)
    assert "contains itself" in repr(w)
    assert "contains itself" in w._repr_html_()
