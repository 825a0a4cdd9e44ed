"""Flat names of leaves, and error messages about keys that do not match."""

from __future__ import annotations

import difflib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import (
    Container,
    PathAttributeError,
    PathKeyError,
    StructureError,
    errors,
    lars_update,
)
from lars_tree._tree import structure
from lars_tree._tree.paths import put_new

KEYS = st.sampled_from(["a", "b", "a/b", "b/a", "a.b", "0", "", "/"])
TREES = st.dictionaries(
    KEYS,
    st.recursive(st.integers(0, 9), lambda c: st.dictionaries(KEYS, c, max_size=3), max_leaves=6),
    max_size=3,
)


@given(TREES, st.sampled_from("./"), st.randoms(use_true_random=False))
def test_from_flat_inverts_to_flat_in_any_order(tree, sep, random):
    w = Container(tree)
    try:
        flat = w.to_flat(sep)
    except StructureError:
        return  # a key contains the separator
    assert list(Container.from_flat(flat, sep).to_flat(sep)) == list(flat)
    names = list(flat)
    random.shuffle(names)
    assert Container.from_flat({name: flat[name] for name in names}, sep) == w


def test_keys_that_contain_another_separator_are_literal():
    tree = {"a": {"b": 1}, "a/b": 2}
    for w in (Container(tree), Container(dict(reversed(tree.items())))):
        assert Container.from_flat(w.to_flat("."), ".") == w
    assert Container.from_flat({0: 1, "0": 2, ("a", "b"): 3, "a.b": 4}, ".").to_dict() == {
        0: 1,
        "0": 2,
        ("a", "b"): 3,
        "a": {"b": 4},
    }


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a/b", "a/b/c"), "cannot change a/b/c: a/b is an int"),
        (("a/b/c", "a/b"), "cannot change a/b: a/b is a Container with keys 'c'"),
        (("a", "a/b"), "cannot change a/b: a is an int"),
        (("a/b", "a"), "cannot change a: a is a Container with keys 'b'"),
    ],
)
def test_a_name_that_begins_with_another_is_refused_in_any_order(names, text):
    with pytest.raises(PathKeyError, match=f"{text}$"):
        Container.from_flat(dict.fromkeys(names, 1))


@given(TREES)
def test_a_new_path_creates_the_missing_parents(tree):
    new, created = Container(), 0
    nodes = {path[:i] for path in Container(tree).paths() for i in range(1, len(path))}
    for path, leaf in structure.walk(tree):
        created += put_new(new, path, leaf)
    assert list(structure.walk(new)) == list(structure.walk(tree))
    assert created == len(nodes)


def test_a_string_of_digits_is_an_index_only_in_a_path():
    w = Container({0: 1, "a": {0: 2}})
    assert w["a/0"] == 2
    assert "0" not in w
    assert () not in w


# Keys that do not match


@pytest.fixture
def candidates(monkeypatch):
    """A list to which each search for a hint appends its number of candidates."""
    counts = []
    close = difflib.get_close_matches

    def counted(word, possibilities, *args, **kwargs):
        counts.append(len(possibilities))
        return close(word, possibilities, *args, **kwargs)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    return counts


def test_hints_are_searched_only_for_the_keys_that_are_shown(candidates):
    w, g = ({f"{name}.{i}": np.ones(1) for i in range(2000)} for name in ("layer", "layr"))
    with pytest.raises(StructureError) as caught:
        lars_update(w, g, 0.1)
    assert "'layr.0' (did you mean 'layer.0'?)" in str(caught.value)
    assert str(caught.value).endswith("(did you mean 'layer.4'?) and 1995 more")
    assert candidates == [errors.MOST_CANDIDATES] * 5


def test_hints_are_searched_only_for_the_nodes_that_are_shown(candidates):
    w, g = ({i: {name: 1} for i in range(1000)} for name in ("bias", "bais"))
    with pytest.raises(StructureError, match=r"9: missing 'bias'; unexpected 'bais' .did you") as e:
        structure.broadcast("dcdw", w, g)
    assert len(e.value.paths) == 1000
    assert candidates == [1] * errors.MOST_LINES


def test_mismatches_of_many_keys_take_linear_time():
    """A quadratic search would take hours for 100,000 keys."""
    w, g = ({f"{name}{i}": 1 for i in range(100_000)} for name in "ab")
    with pytest.raises(StructureError, match=r"missing 'a0'.* and 99995 more; unexpected 'b0'"):
        structure.broadcast("dcdw", w, g)
    w = Container(w)
    assert w.get("b") is None
    assert not hasattr(w, "b")
    with pytest.raises(PathKeyError, match=r"no 'b': there is 'a0', .* and 99995 more"):
        w["b"]


def test_all_paths_that_strings_can_name_are_completed():
    w = Container(
        {"a": {"b": [np.ones(1), {"c": 1}], 0: 1, "x": 1}, "a/x": 2, ("t",): 3, "deep/er": {}}
    )
    names = w._ipython_key_completions_()
    assert names == ["a", "a/x", "deep/er", "a/b", "a/0", "a/b/0", "a/b/1", "a/b/1/c"]
    assert all(name in w for name in names)
    w["a"]["again"] = w
    assert len(w._ipython_key_completions_()) < 10_000


def test_the_number_and_the_length_of_completions_are_limited():
    w = Container()
    w["a"] = w
    assert w._ipython_key_completions_() == ["/".join("a" * n) for n in range(1, 101)]
    names = [str(i) for i in range(10_001)]
    assert Container.fromkeys(names)._ipython_key_completions_() == names[:-1]
    w = Container.fromkeys(names[:9999], Container(b=1))
    assert w._ipython_key_completions_() == [*names[:9999], "0/b"]


def test_python_may_add_a_hint_if_we_have_none():
    with pytest.raises(PathAttributeError, match=r"there is 'kernel'$") as caught:
        Container(kernel=1).unflaten  # noqa: B018
    assert caught.value.name == "unflaten"


def test_only_names_with_underscores_on_both_sides_are_no_keys():
    names = ["__a", "a__", "_a_", "__a_"]
    w = Container(dict.fromkeys(names, 1))
    assert [getattr(w, name) for name in names] == [1] * 4
    with pytest.raises(PathAttributeError, match="no attribute '__a__'"):
        w.__a__  # noqa: B018


@pytest.mark.parametrize("written", ["w.kernal", "del w.kernal", "w.items = 1"])
def test_a_traceback_shows_the_message_with_one_hint(written):
    """Python adds suggestions to an AttributeError: traceback since 3.12, uncaught since 3.13."""
    with pytest.raises(PathAttributeError) as caught:
        exec(written, {"w": Container(kernel=1)})
    lines = f"""
import traceback
from lars_tree import Container
w = Container(kernel=1)
try:
    {written}
except AttributeError:
    traceback.print_exc()
    raise
"""
    run = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    messages = [line for line in run.stderr.splitlines() if line.startswith("lars_tree.errors.")]
    assert messages == [f"lars_tree.errors.PathAttributeError: {caught.value}"] * 2
    assert caught.value.name is None
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.paths) == (str(caught.value), caught.value.paths)
