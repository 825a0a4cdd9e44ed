"""The option `nonfinite`: NaN and infinity propagate, raise an error, or skip the step."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need, to_library, to_numpy

from lars_tree import Container, NonFiniteError, OptionError, lars_update

# Dask computes later, outside the np.errstate of the package.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BAD = [np.nan, -np.inf]


def trees(name, bad, where="dcdw"):
    """Weights and gradients; the last leaf of one of these trees has a bad element."""
    w = Container({key: np.array([3.0, 4.0]) for key in "abc"})
    g = Container({key: np.array([0.4, 0.3]) for key in "abc"})
    (g if where == "dcdw" else w).c[1] = bad
    return [tree.map(lambda x: to_library(name, x)) for tree in (w, g)]


def numbers(tree):
    return {path: to_numpy(x).tolist() for path, x in zip(tree.paths(), tree.leaves(), strict=True)}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["dcdw", "w"])
def test_by_default_only_the_bad_leaf_is_bad(library, bad, where):
    w, g = trees(library.name, bad, where)
    new = numbers(w.lars_update(g, 0.1))
    assert new[("a",)] == new[("b",)] == pytest.approx([2.6, 3.7])
    assert not np.isfinite(new[("c",)]).all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["dcdw", "w"])
def test_skip_writes_no_leaf_at_all(library, bad, where):
    w, g = trees(library.name, bad, where)
    before = numbers(w)
    new = w.lars_update(g, 0.1, nonfinite="skip")
    np.testing.assert_equal(numbers(new), before)
    if library.mutable:
        w.lars_update(g, 0.1, nonfinite="skip", out=w)
        np.testing.assert_equal(numbers(w), before)
        out = w.map(lambda x: to_library(library.name, np.zeros(2)))
        assert w.lars_update(g, 0.1, nonfinite="skip", out=out) is out
        np.testing.assert_equal(numbers(out), before)


@pytest.mark.parametrize("bad", BAD)
def test_raise_names_the_leaf_and_writes_nothing(library, bad):
    if library.name == "dask":
        pytest.skip("lazy arrays are refused: see test_errors.py")
    w, g = trees(library.name, bad)
    before = numbers(w)
    with pytest.raises(NonFiniteError, match=r"\n  c: ") as caught:
        w.lars_update(g, 0.1, nonfinite="raise", out=w if library.mutable else None)
    assert caught.value.paths == (("c",),)
    assert numbers(w) == before


def test_good_steps_are_taken(library):
    w, g = trees(library.name, 0.3)
    expected = numbers(w.lars_update(g, 0.1))
    assert expected[("c",)] == pytest.approx([2.6, 3.7])
    for choice in ("skip", "raise")[: 1 if library.name == "dask" else 2]:
        assert numbers(w.lars_update(g, 0.1, nonfinite=choice)) == expected


def test_one_bad_leaf_stops_the_leaves_of_all_libraries():
    torch, jnp = need("torch"), need("jax.numpy")
    w = Container(n=np.ones(2), t=torch.ones(2), j=jnp.ones(2))
    g = {"n": np.ones(2), "t": torch.ones(2), "j": jnp.array([1.0, np.nan])}
    assert numbers(w.lars_update(g, 0.1, nonfinite="skip")) == numbers(w)


def test_each_leaf_may_have_its_own_nonfinite():
    w, g = trees("numpy", np.nan)
    watched = {"a": "raise", "b": "skip", "c": "propagate"}
    new = numbers(w.lars_update(g, 0.1, nonfinite=watched))
    assert new[("a",)] == new[("b",)] == pytest.approx([2.6, 3.7])
    assert np.isnan(new[("c",)]).all()
    skipped = numbers(w.lars_update(g, 0.1, nonfinite=watched | {"c": "skip"}))
    assert skipped == numbers(w)


def test_a_step_that_overflows_half_precision_counts_too():
    w = np.array([6e4, 1.0], np.float16)
    g = np.array([-1.0, 0.0], np.float16)
    assert not np.isfinite(lars_update(w, g, 1.0)).all()
    assert lars_update(w, g, 1.0, nonfinite="skip").tolist() == w.tolist()


def test_skip_refuses_lazy_arrays_together_with_concrete_ones():
    w = {"now": np.ones(2), "later": need("dask.array").ones(2)}
    with pytest.raises(OptionError, match="now: expected arrays of one library"):
        lars_update(w, w, 0.1, nonfinite="skip")
