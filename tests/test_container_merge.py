"""Container.merge: a deep union of two trees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Container, StructureError

KEYS = st.sampled_from(["a", "b", "a/b", 0])
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2),
        lambda child: st.dictionaries(KEYS, child, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def merged_dicts(a, b):
    both = {
        key: merged_dicts(a[key], b[key]) for key in a if dict is type(a[key]) is type(b.get(key))
    }
    return {**a, **b, **both}


@given(TREES, TREES)
def test_a_merge_is_a_union_of_each_pair_of_dicts(a, b):
    merged = Container(a).merge(b)
    assert type(merged) is Container
    assert repr(merged.to_dict()) == repr(merged_dicts(a, b))  # also the order of the keys
    assert merged == Container(a).merge(Container(b))


def test_a_merge_is_deep_and_replaces_all_but_mappings():
    w = Container(a={"b": 1, "c": [2, 3]}, d=4)
    other = {"a": {"c": [5], "e": {"f": 6}}, "d": {"g": 7}}
    assert w.merge(other).to_dict() == {
        "a": {"b": 1, "c": [5], "e": {"f": 6}},
        "d": {"g": 7},
    }
    assert w.merge({"a": 8}).to_dict() == {"a": 8, "d": 4}
    assert (w | other).to_dict() == {**w.to_dict(), **other}
    assert w.to_dict() == {"a": {"b": 1, "c": [2, 3]}, "d": 4}


def test_a_merge_shares_no_node_with_either_side():
    w, other = Container(a={"b": {"c": 1}}), Container(d={"e": {"f": 2}}, a={"g": {}})
    merged = w.merge(other)
    merged.a.b.x = merged.d.e.x = merged.a.g.x = 3
    assert (w, other) == ({"a": {"b": {"c": 1}}}, {"d": {"e": {"f": 2}}, "a": {"g": {}}})


def test_a_merge_with_another_object_or_a_cycle_is_refused():
    w = Container(a=1)
    with pytest.raises(StructureError, match="other: expected a mapping, got a list of 1 item"):
        w.merge([1])
    cyclic = {"a": {}}
    cyclic["a"]["b"] = cyclic
    with pytest.raises(StructureError, match="other contains itself"):
        w.merge(cyclic)
