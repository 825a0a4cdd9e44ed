"""`execute` gives each leaf to an engine that supports it, and updates all leaves or none."""

from __future__ import annotations

import threading
from itertools import count

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

import lars_tree
from lars_tree import Array, Container, Lars, lars_update

SHAPE = (4, 6)
SEEDS = count()


def dense(dtype=np.float32):
    return np.random.default_rng(next(SEEDS)).standard_normal(SHAPE).astype(dtype)


def strided(x):
    wide = np.zeros((SHAPE[0], 2 * SHAPE[1]), x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def complex_numbers(x):
    return (x + 1j * x[::-1]).astype(np.complex64)


# For each kind of leaf: weights, gradient, and options.
KINDS = {
    "dense": lambda: (dense(), dense(), {}),
    "Array": lambda: (Array(dense()), Array(dense()), {}),
    "strided": lambda: (strided(dense()), dense(), {}),
    "Fortran": lambda: (np.asfortranarray(dense()), dense(), {}),
    "strided gradient": lambda: (dense(), strided(dense()), {}),
    "number": lambda: (dense(), 0.5, {}),
    "row": lambda: (dense(), dense()[0], {}),
    "no gradient": lambda: (dense(), None, {}),
    "integers": lambda: (np.arange(24).reshape(SHAPE), None, {}),
    "complex": lambda: (complex_numbers(dense()), complex_numbers(dense()), {}),
    "long double": lambda: (dense(np.longdouble), dense(), {}),
    "another byte order": lambda: (dense(">f8"), dense(), {}),
    "layers": lambda: (dense(), dense(), {"layer_axis": 1}),
    "rates": lambda: (dense(), dense(), {"lr": np.linspace(0.1, 0.2, 6)}),
    "words": lambda: ("five", None, {}),
    "empty": lambda: (np.ones((0, 3)), np.ones((0, 3)), {}),
}
DEFAULTS = {"lr": 0.1, "layer_axis": None}


def tree_of(kinds):
    """Weights, gradients and options of a tree with one leaf for each item of `kinds`."""
    leaves = {f"{i} {kind}": KINDS[kind]() for i, kind in enumerate(kinds)}
    w, g, options = ({name: leaf[i] for name, leaf in leaves.items()} for i in range(3))
    by_leaf = {
        option: {name: given.get(option, default) for name, given in options.items()}
        for option, default in DEFAULTS.items()
    }
    return Container(w), Container(g), by_leaf


def bits(x):
    return np.asarray(x).tolist(), np.asarray(x).dtype, type(x)


def update(w, g, options, **shared):
    options = dict(options)
    return lars_update(w, g, options.pop("lr"), **options, **shared)


kinds = st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=8)
shared = st.sampled_from([{}, {"decay_lambda": 0.3, "joint_norm": True}, {"nonfinite": "raise"}])


@given(kinds=kinds, shared=shared)
def test_each_leaf_is_updated_as_if_it_were_alone(kinds, shared):
    """The bits are the same, whether the update is in place or returns new arrays."""
    w, g, options = tree_of(["dense", *kinds])  # a tree without any array is refused
    expected = {
        name: update(x, g[name], {k: x[name] for k, x in options.items()}, **shared)
        for name, x in w.items()
        if not isinstance(x, str)
    }
    expected |= {name: x for name, x in w.items() if isinstance(x, str)}
    new = update(w, g, options, **shared)
    assert {name: bits(x) for name, x in new.items()} == {k: bits(x) for k, x in expected.items()}
    arrays = dict(w)
    assert update(w, g, options, out=w, **shared) is w
    assert all(w[name] is x for name, x in arrays.items())
    assert {name: bits(x) for name, x in w.items()} == {k: bits(x) for k, x in expected.items()}


@given(kinds=kinds, nesterov=st.booleans())
def test_each_leaf_with_momentum_is_updated_as_if_it_were_alone(kinds, nesterov):
    w, g, options = tree_of(kind for kind in kinds if kind not in ("number", "row", "words"))
    opt = Lars(options["lr"], layer_axis=options["layer_axis"], nesterov=nesterov)
    state = opt.init(w)
    for name in w:
        one = Lars(options["lr"][name], layer_axis=options["layer_axis"][name], nesterov=nesterov)
        mine = one.init(w[name])
        x, mine = one.update(w[name], g[name], mine)
        x, _ = one.update(x, g[name], mine)
        options[name] = x
    new, state = opt.update(w, g, state)
    new, state = opt.update(new, g, state)
    assert {name: bits(x) for name, x in new.items()} == {name: bits(options[name]) for name in w}


def test_one_update_may_hold_arrays_of_several_libraries():
    torch = need("torch")
    x, g = dense(), dense()
    mixed = {"a": x.copy(), "b": torch.tensor(x), "c": x.copy(), "d": torch.tensor(x).t()}
    gs = {"a": g, "b": torch.tensor(g), "c": strided(g), "d": torch.tensor(g).t()}
    expected = lars_update(x, g, 0.1)
    for new in (lars_update(mixed, gs, 0.1), lars_update(mixed, gs, 0.1, out=mixed)):
        assert [type(y) for y in new.values()] == [type(y) for y in gs.values()]
        assert all(np.array_equal(new[k], expected) for k in "abc")
        assert np.array_equal(new["d"], expected.T)


@pytest.mark.parametrize("odd", ["dense", "strided"])
def test_a_fault_of_one_leaf_leaves_all_leaves_unchanged(odd):
    """The error names all invalid leaves, whichever engine would update them."""
    w, g, options = tree_of(["dense", odd, "dense", odd, "dense"])
    names = list(w)
    before = {name: bits(x) for name, x in w.items()}
    for name in names[1::2]:
        g[name] = np.ones((2, 2))
    with pytest.raises(lars_tree.ShapeError) as caught:
        update(w, g, options, out=w)
    assert caught.value.paths == tuple((name,) for name in names[1::2])
    assert {name: bits(x) for name, x in w.items()} == before


def test_memory_is_compared_across_engines():
    """In the first tree, only the last leaf is strided and takes the general path."""
    base = np.ones((4, 4))
    w, ones = {"a": np.ones(4), "b": base[1], "c": base[:, 1]}, np.ones(4)
    with pytest.raises(lars_tree.OutError, match="two leaves of out share memory") as caught:
        lars_update(w, {"a": ones, "b": ones, "c": ones}, 0.1, out=w)
    assert caught.value.paths == (("c",),)
    w = {"a": base[1], "b": base[:, 1], "c": base[::2, 1]}
    with pytest.raises(lars_tree.OutError, match="two leaves of out share memory") as caught:
        lars_update(w, {"a": ones, "b": ones, "c": ones[:2]}, 0.1, out=w)
    assert sorted(caught.value.paths) == [("b",), ("c",)]  # c shares memory only with b
    assert np.array_equal(base, np.ones((4, 4)))
    # The gradient of a is in the memory of b, and must be read before b is written.
    w = {"a": np.arange(4.0), "b": strided(dense(np.float64))[0]}
    g = {"a": w["b"][:4], "b": np.ones(6)}
    expected = lars_update(w, g, 0.1)
    lars_update(w, g, 0.1, out=w)
    assert all(np.array_equal(w[k], expected[k]) for k in w)


@pytest.mark.parametrize("bad", ["dense", "strided", "complex"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_one_leaf_that_is_not_finite_stops_all_engines(bad, nonfinite):
    w, g, options = tree_of(["dense", "strided", "complex", "dense"])
    name = next(name for name in w if bad in name)
    g[name] = g[name] * np.float32(np.inf)
    before = {k: bits(x) for k, x in w.items()}
    if nonfinite == "raise":
        with pytest.raises(lars_tree.NonFiniteError) as caught:
            update(w, g, options, nonfinite=nonfinite, out=w)
        assert caught.value.paths == ((name,),)
    else:
        new = update(w, g, options, nonfinite=nonfinite)
        assert {k: bits(x) for k, x in new.items()} == before
        update(w, g, options, nonfinite=nonfinite, out=w)
    assert {k: bits(x) for k, x in w.items()} == before


def test_only_updates_of_the_same_memory_wait_for_each_other():
    inside, leave = threading.Event(), threading.Event()

    def rate(step):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert leave.wait(60)
        return 0.1

    w, other = {"a": np.ones(3)}, {"a": np.ones(3)}
    opt = Lars(rate)
    state, others = opt.init(w), opt.init(other)
    thread = threading.Thread(target=opt.update, args=(w, w, state, w))
    thread.start()
    assert inside.wait(60)
    opt.update(other, other, others, out=other)  # does not wait, because it writes other weights
    done = threading.Event()
    late = threading.Thread(target=lambda: (lars_update(w, 1.0, 0.0, out=w), done.set()))
    late.start()
    assert done.wait(60)  # only the state is locked while a schedule is called
    leave.set()
    thread.join()
    late.join()
    assert int(state["step"]) == int(others["step"]) == 1
