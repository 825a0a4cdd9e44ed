"""Container: construction, keys and paths, map, selection, comparison, copies."""

from __future__ import annotations

import collections
import copy
import operator
import pickle
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lars_tree import Container, PathAttributeError, PathKeyError, StructureError

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=3)
LEAVES = st.integers(-9, 9) | st.none() | st.lists(st.floats(-9, 9), max_size=2).map(np.array)
NESTED = st.recursive(LEAVES, lambda c: st.dictionaries(NAMES, c, max_size=3), max_leaves=8)
DICTS = st.dictionaries(NAMES, NESTED, max_size=3)
WEIGHTS = DICTS.map(Container)
# The first keys are drawn often, so that a key is often also a path or an index.
KEYS = st.sampled_from(["a", "0", "a/0", "0/a", "a/a", "", "/", 0]) | st.text(max_size=2)
VALUES = st.recursive(
    st.integers(0, 9),
    lambda child: st.dictionaries(KEYS, child, max_size=2) | st.lists(child, max_size=2),
    max_leaves=4,
)
WRITES = [dict.__setitem__, dict.setdefault, dict.pop, dict.__delitem__]


@pytest.fixture
def w():
    return Container(encoder={"kernel": np.ones((3, 4)), "bias": np.zeros(4)}, head=np.ones(4))


# Make


def test_nested_mappings_become_containers_and_sequences_stay():
    point = collections.namedtuple("Point", "x y")
    w = Container({"a": {"b": MappingProxyType({"c": 1})}}, p=point({"d": 2}, [({"e": 3},)]))
    assert type(w.a) is type(w.a.b) is type(w.p.x) is type(w["p/y/0/0"]) is Container
    assert (type(w.p), type(w.p.y), type(w.p.y[0])) == (point, list, tuple)


def test_the_constructor_and_unions_take_the_arguments_of_dict():
    expected = {"a": 1, "b": 2}
    assert dict(Container(expected)) == dict(Container([("a", 1)], b=2)) == expected
    assert dict(Container(a=1) | {"b": 2}) == dict({"a": 1} | Container(b=2)) == expected


def test_writing_does_not_change_the_original_mapping():
    inner = {"b": {"c": 1}}
    w = Container(a=inner, l=[inner])
    w["a", "b", "c"] = w["l", 0, "b"] = 2
    assert inner == {"b": {"c": 1}}
    assert type(inner["b"]) is dict


@given(DICTS)
def test_to_dict_inverts_the_constructor(tree):
    assert Container(Container(tree).to_dict()) == Container(tree)
    assert repr(Container(tree).to_dict()) == repr(tree)


# Read


def test_all_ways_of_reading_agree(w):
    bias = w["encoder"]["bias"]
    assert w.encoder.bias is w["encoder/bias"] is w["encoder", "bias"] is bias
    assert "encoder/bias" in w
    assert ("encoder", "bias") in w


@given(WEIGHTS)
def test_each_leaf_is_read_at_its_path(w):
    for path, leaf in zip(w.paths(), w.leaves(), strict=True):
        assert w[path] is w["/".join(path)] is w.get(path) is leaf
        assert path in w


def test_the_exact_key_takes_precedence_over_the_path():
    w = Container({"a/b": 1, ("c", "d"): 2, "a": {"b": 3}, "c": {"d": 4}})
    assert (w["a/b"], w["c", "d"]) == (1, 2)
    assert (w["a", "b"], w["c/d"]) == (3, 4)


def test_a_dot_never_splits():
    w = Container({"a.b": 1, "a": {"b": 2}})
    assert w["a.b"] == 1
    assert "x.y" not in Container(x={"y": 1})


def test_sequences_are_read_by_index():
    w = Container(a=[1, (2, {"b": 3})])
    assert (w["a/1/0"], w["a", 1, 0], w["a/1/1/b"]) == (2, 2, 3)
    assert "a/2" not in w


@pytest.mark.parametrize("key", ["", "/", "a/", "a//b", (), "a/b/c", 0, None, "9" * 5000 + "/9"])
def test_missing_keys_give_the_default_or_raise(key):
    w = Container(a={"b": 1})
    assert key not in w
    assert w.get(key) is None
    assert w.get(key, 7) == w.pop(key, 7) == 7
    for act in (operator.getitem, operator.delitem):
        with pytest.raises(PathKeyError):
            act(w, key)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (lambda w: w["haed"], "no 'haed': there is 'encoder', 'head' (did you mean 'head'?)"),
        (lambda w: w.haed, "no 'haed': there is 'encoder', 'head' (did you mean 'head'?)"),
        (lambda w: w["encoder/bais"], "no 'bais' in encoder: there is 'kernel', 'bias' (did you"),
        (lambda w: w.encoder.bais, "no 'bais': there is 'kernel', 'bias' (did you mean 'bias'?)"),
        (lambda w: w["encoder/l0/bias"], "no 'l0' in encoder: there is 'kernel', 'bias'"),
        (lambda w: w["head/u"], "no 'u' in head: that is a leaf"),
        (lambda w: Container()["a"], "no 'a': it is empty"),
        (lambda w: Container(dict.fromkeys("abcdefg"))["x"], "'c', 'd', 'e' and 2 more"),
    ],
)
def test_errors_name_the_missing_key_and_the_existing_keys(w, read, text):
    with pytest.raises((KeyError, AttributeError)) as caught:
        read(w)
    assert text in str(caught.value)


# Write and delete


def same_as_dict(w, expected):
    """Whether w has the keys, in the same order, the nodes and the values of a dict."""
    return repr(w.to_dict()) == repr(expected)


@given(st.dictionaries(KEYS, VALUES))
def test_writing_each_item_equals_the_constructor(items):
    """A string key is literal even if it contains '/', as the module names of Haiku do."""
    written, defaulted, updated, united = (Container() for _ in range(4))
    for key, value in items.items():
        written[key] = value
        assert defaulted.setdefault(key, value) is defaulted[key]
        updated.update({key: value})
        united |= {key: value}
    for w in (written, defaulted, updated, united, Container(items)):
        assert same_as_dict(w, items)


@given(st.dictionaries(KEYS, VALUES), st.lists(st.tuples(st.sampled_from(WRITES), KEYS, VALUES)))
def test_writing_and_deleting_string_keys_has_the_effect_and_result_of_a_dict(items, calls):
    w, expected = Container(items), dict(items)
    for write, key, value in calls:
        if write not in {dict.pop, dict.__delitem__}:
            arguments = (key, value)
        elif key in expected:
            arguments = (key,)
        else:
            continue  # a dict would raise, but a Container may find a path
        results = [getattr(x, write.__name__)(*arguments) for x in (w, expected)]
        assert repr(Container(a=results[0]).to_dict()) == repr({"a": results[1]})
    assert same_as_dict(w, expected)
    assert all(w[key] is dict.__getitem__(w, key) for key in expected)


def test_string_keys_are_written_beside_an_existing_path():
    w = Container(a={"b": 1})
    w["a/b"] = 2
    assert w.to_dict() == {"a": {"b": 1}, "a/b": 2}
    assert (w["a/b"], w["a", "b"], w.pop("a/b"), w.pop("a/b")) == (2, 1, 2, 1)
    assert w.to_dict() == {"a": {}}


@given(WEIGHTS, st.lists(NAMES, min_size=1, max_size=3), LEAVES)
def test_a_value_written_at_a_path_is_read_and_deleted_there(w, path, value):
    assume(not any(tuple(path[:i]) in w for i in range(1, len(path) + 1)))
    before = w.paths()
    w[tuple(path)] = value
    assert w[tuple(path)] is w["/".join(path)] is value
    assert w.pop(tuple(path)) is value
    assert tuple(path) not in w
    assert w.paths() == before


def test_paths_create_parents_and_convert_mappings(w):
    w["decoder", "l0", "bias"] = {"scale": 1}
    w.encoder.new = {"a": 2}
    w["encoder", "other"] = [{"b": 3}]
    assert type(w.decoder) is type(w.decoder.l0.bias) is Container
    assert (w["decoder/l0/bias/scale"], w["encoder/new/a"], w["encoder/other/0/b"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (("head", "a"), "cannot change head/a: head is an array of shape (4,)"),
        (("head", "a", "b"), "cannot change head/a/b: head is an array of shape (4,)"),
        (("l", 2), "cannot change l/2: l is a list of 2 items"),
        (("l", 2, "x"), "cannot change l/2/x: l is a list of 2 items"),
        (("t", 0), "cannot change t/0: t is a tuple of 1 item"),
        ((), "an empty path names no key"),
    ],
)
def test_writing_through_a_leaf_is_refused_and_changes_nothing(w, key, text):
    w["l"], w["t"] = [1, 2], (3,)
    before = w.paths()
    with pytest.raises(PathKeyError) as caught:
        w[key] = 1
    assert str(caught.value).startswith(text)
    assert w.paths() == before


def test_items_of_a_list_are_written_but_not_deleted():
    w = Container(a=[1, {"b": 2, 7: 5}])
    w["a", 0] = {"c": 3}
    w["a", 1, "b"] = 4
    w["a", "1", "7"] = w["a", "0", "c"]
    assert w.to_dict() == {"a": [{"c": 3}, {"b": 4, 7: 3}]}
    w["a", "0"] = 6
    w["a", 1] |= {7: 8}
    assert w.to_dict() == {"a": [6, {"b": 4, 7: 8}]}
    with pytest.raises(PathKeyError, match="a is a list"):
        del w["a/0"]
    del w["a/1/b"], w["a/1/7"]
    assert w.to_dict() == {"a": [6, {}]}


def test_keys_that_are_method_names_are_accessed_as_items():
    w = Container({"items": 1, "copy": {"keys": 2}})
    assert (w["items"], w["copy/keys"]) == (1, 2)
    assert next(iter(w.items())) == ("items", 1)
    assert w.to_flat() == {"items": 1, "copy/keys": 2}
    assert w.map(lambda x: x + 1).to_dict() == {"items": 2, "copy": {"keys": 3}}
    for change in (lambda: setattr(w, "items", 3), lambda: delattr(w, "items")):
        with pytest.raises(PathAttributeError, match=r"write w\['items'\]"):
            change()
    del w["items"]
    assert list(w) == ["copy"]


def test_attributes_are_deleted_as_keys(w):
    del w.encoder.bias
    assert w.paths() == [("encoder", "kernel"), ("head",)]
    with pytest.raises(AttributeError, match="no 'bias'"):
        del w.encoder.bias


def test_setdefault_and_pop_take_paths():
    w = Container()
    path = ("a", "b")
    assert w.setdefault(path, {"c": 1}) is w.setdefault(path, 2) is w.a.b
    assert type(w.a.b) is Container
    assert w.pop("a/b/c") == 1
    assert w.to_dict() == {"a": {"b": {}}}


def test_a_tuple_that_is_a_key_is_no_path():
    w = Container({("a", "b"): 1, "a": {"b": 2}})
    w["a", "b"] = 3
    assert w.to_dict() == {("a", "b"): 3, "a": {"b": 2}}
    del w["a", "b"]
    assert w.to_dict() == {"a": {"b": 2}}


# Map, leaves, flat names


def test_map_broadcasts_the_rest_by_prefix():
    w = Container(a={"b": 1, "c": 2}, d=3)
    mapped = w.map(lambda *xs: sum(xs), {"d": 30, "a": 10}, 700)
    assert mapped.to_dict() == {"a": {"b": 711, "c": 712}, "d": 733}
    with pytest.raises(StructureError, match=r"argument 2 does not match.*\n  a: missing 'c'"):
        w.map(print, 1, {"a": {"b": 1}, "d": 1})


def test_map_passes_paths_if_with_path():
    mapped = Container(a={"b": 1}, c=[2]).map(lambda *given: given, 3, with_path=True)
    assert (mapped["a", "b"], mapped["c", 0]) == ((("a", "b"), 1, 3), (("c", 0), 2, 3))


def test_map_keeps_none_and_converts_mappings():
    w = Container(a=None, b=1).map(lambda x: {"n": x})
    assert w.a is None
    assert type(w.b) is Container


def test_an_exception_in_map_gets_a_note_with_the_path():
    with pytest.raises(ZeroDivisionError) as caught:
        Container(a={"b/c": 0}).map(lambda x: 1 / x)
    assert caught.value.__notes__ == ["at a/'b/c'"]


@given(WEIGHTS)
def test_unflatten_is_the_inverse_of_leaves(w):
    assert w.unflatten(w.leaves()) == w
    assert w.unflatten(w.leaves()).paths() == w.paths()
    with pytest.raises(StructureError, match="expected"):
        w.unflatten([*w.leaves(), 1])


def test_the_separator_can_be_chosen():
    assert Container(a={"b/c": 1}).to_flat(".") == {"a.b/c": 1}
    assert Container.from_flat({"a.b/c": 1}, sep=".").to_dict() == {"a": {"b/c": 1}}


@pytest.mark.parametrize(
    ("w", "text"),
    [
        (Container({"a": {"b/c": 1}}), "a key of a/'b/c' holds the separator '/'"),
        (Container({"a": {0: 1, "0": 2}}), "two leaves have the name 'a/0'"),
    ],
)
def test_to_flat_refuses_ambiguous_names(w, text):
    with pytest.raises(StructureError, match=text):
        w.to_flat()


# Select


@given(WEIGHTS, st.integers(0, 3))
def test_filter_and_partition_select_by_path_and_leaf(w, n):
    def pred(path, leaf):
        return len("".join(path)) % 4 <= n

    kept, rest = w.partition(pred)
    assert kept == w.filter(pred)
    assert kept.paths() == [path for path in w.paths() if pred(path, None)]
    assert sorted(kept.paths() + rest.paths()) == sorted(w.paths())
    assert all(kept[path] is w[path] for path in kept.paths())
    assert all(node.leaves() for node in kept.values() if isinstance(node, Container))


@given(WEIGHTS, WEIGHTS)
def test_diff_is_empty_exactly_for_equal_containers(a, b):
    assert a.diff(a.copy()) == {}
    assert (a.diff(b) == {}) == (a == b)


# Compare


@given(DICTS)
def test_a_dict_compares_and_maps_like_a_container(tree):
    w = Container(tree)
    assert (w == tree) is True
    assert (tree == w) is not (w != tree)
    assert w.map(lambda x, y: (x is y) or 1 / 0, tree).paths() == w.paths()


@pytest.mark.parametrize("other", [1, None, np.ones(4), [1], "a", Container(), {"a": 2}, {"b": 1}])
def test_equality_with_other_objects_is_false(other):
    w = Container(a=1)
    assert (w == other) is (other == w) is False
    assert (w != other) is True


# Copy


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_deep_copies_are_containers_that_share_no_leaves(w, twin):
    w["list"], w["tied"] = [{"x": 1}], w.head
    new = twin(w)
    assert new == w
    assert type(new) is type(new.encoder) is type(new["list/0"]) is Container
    assert new.paths() == w.paths()
    assert new.tied is new.head is not w.head


@pytest.mark.parametrize("twin", [copy.copy, Container.copy, lambda w: w | {}, lambda w: {} | w])
def test_shallow_copies_share_only_the_leaves(w, twin):
    new = twin(w)
    assert type(new) is type(new.encoder) is Container
    assert new.head is w.head
    new["z"] = 1
    assert "z" not in w


def test_a_union_prefers_the_right_side_and_converts():
    w = Container(a={"b": 1}, c=2)
    assert (w | {"a": {"d": 3}}).to_dict() == {"a": {"d": 3}, "c": 2}
    assert type((w | {"a": {}}).a) is type(({"a": {}} | Container()).a) is Container
    same = w
    same |= {"e": {"f": 4}}
    assert same is w
    assert w.e.f == 4


def test_from_flat_shares_equal_keys():
    names = ["".join(("layer", "/", part)) for part in ("kernel", "bias")]
    a, b = (Container.from_flat(dict.fromkeys(names, 1)) for _ in range(2))
    assert next(iter(a)) is next(iter(b))
    assert all(x is y for x, y in zip(a["layer"], b["layer"], strict=True))
