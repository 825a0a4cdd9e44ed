"""The state of Lars: saving, unchanged leaves and errors. Also schedules and construction."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import numpy as np
import pytest
from conftest import need, to_library, to_numpy
from conftest import unit_lars as Lars
from test_optimizer import G, W, random_tree, steps

import lars_tree
from lars_tree import (
    Array,
    Container,
    LarsTreeError,
    LeafError,
    NonFiniteError,
    OptionError,
    OutError,
    StateError,
    StructureError,
    lars_update,
)
from lars_tree.schedules import Constant


def test_a_state_is_saved_and_loaded_like_weights():
    opt = Lars(0.1)
    w, state = steps(opt, random_tree(0), [random_tree(1)])
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is Container
    assert again == state
    flat = state.to_flat()
    assert list(flat)[:2] == ["step", "skipped"]
    restored = Container.from_flat(flat)
    expected = opt.update(w, random_tree(2), state)
    for loaded in (again, restored):
        actual = opt.update(w, random_tree(2), loaded)
        assert actual[0] == expected[0]
        assert actual[1] == expected[1]


def test_keys_in_another_order_keep_their_velocities():
    opt, g = Lars(0.1, 0.5), {"b": 2 * G, "a": G}
    w = {"b": W, "a": 3 * W}
    _, state = steps(opt, w, [g])
    turned = {"a": w["a"], "b": w["b"]}
    new, after = opt.update(turned, g, state)
    expected, wanted = opt.update(w, g, state)
    assert list(after.velocity) == ["b", "a"]
    for key in w:
        assert np.array_equal(after.velocity[key], wanted.velocity[key])
        assert np.array_equal(new[key], expected[key])
    assert not np.array_equal(after.velocity.a, after.velocity.b)


def test_a_velocity_may_be_a_numpy_scalar():
    opt, w, g = Lars(0.1, 0.5), np.array(3.0), np.array(1.0)
    _, state = steps(opt, w, [g])
    expected = opt.update(w, g, state)
    state["velocity"] = np.float64(state.velocity)
    actual = opt.update(w, g, state)
    assert float(actual[1].velocity) == float(expected[1].velocity) != 0
    assert float(actual[0]) == float(expected[0])


@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}]
)  # the fast path and the general path
@pytest.mark.parametrize("in_place", [False, True])
def test_a_leaf_without_momentum_or_gradient_needs_no_velocity(library, options, in_place):
    if in_place and not library.mutable:
        pytest.skip("this library's arrays cannot be written")
    w = {k: to_library(library.name, x) for k, x in {"a": W, "b": 2 * W, "c": 3 * W}.items()}
    g = {"a": to_library(library.name, G), "b": to_library(library.name, G), "c": None}
    opt = Lars(0.1, {"a": 0.9, "b": 0.0, "c": 0.9}, **options)
    state = opt.init(w)
    expected, _ = opt.update(w, g, opt.init(w))
    state.velocity |= {"b": None, "c": None}
    lacking = copy.deepcopy(state)
    lacking["velocity"]["a"] = None
    with pytest.raises(LeafError, match="a: expected a velocity, got None"):
        opt.update(w, g, lacking, out=w if in_place else None)
    new, state = opt.update(w, g, state, out=w if in_place else None)
    for key, x in expected.items():
        assert to_numpy(new[key]).tolist() == pytest.approx(to_numpy(x).tolist(), rel=1e-15)
    assert to_numpy(new["c"]).tolist() == (3 * W).tolist()
    assert to_numpy(state.velocity.a).any()
    assert (state.velocity.b, state.velocity.c) == (None, None)
    assert int(state.step) == 1


def test_nothing_is_written_when_a_step_raises():
    w, g = random_tree(0), random_tree(1)
    opt = Lars(0.1, nonfinite="raise")
    _, state = steps(opt, w, [g], out=True)
    before = copy.deepcopy((w, state))
    g.b[2] = np.inf
    with pytest.raises(NonFiniteError, match="b: expected finite"):
        opt.update(w, g, state, out=w)
    assert (w, state) == before


def test_a_skipped_step_changes_only_its_count():
    for out in (False, True):
        w, g = random_tree(0), random_tree(1)
        opt = Lars(0.1, nonfinite="skip")
        w, state = steps(opt, w, [g])
        before = copy.deepcopy((w, state))
        bad = copy.deepcopy(g)
        bad.a.bias[0] = np.nan
        w, state = opt.update(w, bad, state, out=w if out else None)
        assert w == before[0]
        assert state.velocity == before[1].velocity
        assert (int(state.step), int(state.skipped)) == (1, 1)
        w, state = opt.update(w, g, state, out=w if out else None)
        assert (int(state.step), int(state.skipped)) == (2, 1)


def change(state, path, value):
    new = copy.deepcopy(state)
    new[path] = value
    return new


BAD_STATES = {
    "no state": (lambda s: None, StateError, "expected what `init` returns, got None"),
    "no velocity": (
        lambda s: Container(step=s.step, skipped=s.skipped),
        StateError,
        "missing 'velocity'",
    ),
    "another key": (
        lambda s: s | {"velocty": 1},
        StateError,
        "unexpected 'velocty'",
    ),
    "a leaf missing": (
        lambda s: change(s, "velocity", {"a": s.velocity.a}),
        StructureError,
        "velocity: missing 'b'",
    ),
    "a shape": (
        lambda s: change(s, ("velocity", "b"), np.zeros(4)),
        StateError,
        r"b: expected a velocity of float64 \(5,\)",
    ),
    "a dtype": (
        lambda s: change(s, ("velocity", "a", "bias"), np.zeros(3, np.float32)),
        StateError,
        r"a/bias: expected a velocity of float64 \(3,\).* got float32",
    ),
    "None for a leaf": (
        lambda s: change(s, ("velocity", "b"), None),
        LarsTreeError,
        "b: expected a velocity, got None",
    ),
}


@pytest.mark.parametrize("out", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused(name, out):
    make, kind, says = BAD_STATES[name]
    w, g = random_tree(0), random_tree(1)
    opt = Lars(0.1)
    state = make(opt.init(w))
    before = copy.deepcopy((w, state))
    with pytest.raises(kind, match=says):
        opt.update(w, g, state, out=w if out else None)
    assert (w, state) == before


UNWRITABLE = {
    "read-only": lambda w, v: v.setflags(write=False) or v,
    "overlapping itself": lambda w, v: np.lib.stride_tricks.as_strided(v, (5,), (0,)),
    "the weights": lambda w, v: w.b,
    "the gradient of none": lambda w, v: w.b[::-1],
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_velocity_that_cannot_be_written_to_is_refused(name):
    w, g = random_tree(0), random_tree(1)
    opt = Lars(0.1)
    state = opt.init(w)
    state["velocity", "b"] = UNWRITABLE[name](w, np.zeros(5))
    before = copy.deepcopy(w)
    with pytest.raises(OutError, match="state"):
        opt.update(w, g, state, out=w)
    assert w == before
    assert int(state.step) == 0


def test_a_counter_that_cannot_be_written_to_is_refused():
    opt, w = Lars(0.1), W.copy()
    state = opt.init(w)
    state["step"] = np.int64(3)
    with pytest.raises(OutError, match="step: it is a numpy scalar"):
        opt.update(w, G, state, out=w)
    assert np.array_equal(w, W)
    assert int(opt.update(w, G, state)[1].step) == 4


def test_a_schedule_is_called_with_the_number_of_steps_taken():
    asked = []

    def schedule(step):
        asked.append(step)
        return [0.1, 0.0, 0.3][step]

    opt = Lars(schedule, momentum=0.0, nonfinite="skip", adapt=False)
    w, state = W, opt.init(W)
    for g in (G, [np.nan, 1.0] * G, G, G):
        w, state = opt.update(w, g, state)
    assert asked == [0, 1, 1, 2]
    np.testing.assert_allclose(w, W - 0.4 * G, rtol=1e-15)


def test_each_subtree_may_have_a_schedule():
    w, g = random_tree(0), random_tree(1)
    opt = Lars({"a": Constant(0.5), "b": 0.25}, 0.0, adapt=False)
    new, _ = steps(opt, w, [g])
    np.testing.assert_allclose(new.a.bias, w.a.bias - 0.5 * g.a.bias, rtol=1e-14)
    np.testing.assert_allclose(new.b, w.b - 0.25 * g.b, rtol=1e-14)


class Halving(NamedTuple):
    """A schedule that is also a tuple."""

    rate: float

    def __call__(self, step):
        return self.rate / 2**step


class Table(dict):
    """A schedule that is also a dict."""

    def __call__(self, step):
        return self[step]


@pytest.mark.parametrize(
    "schedule", [Halving(0.5), Table({0: 0.5, 1: 0.25})], ids=["tuple", "dict"]
)
@pytest.mark.parametrize("place", ["shared", "in a dict", "in a list"])
def test_a_callable_of_any_type_is_a_schedule(place, schedule):
    wrap = {"shared": lambda x, _: x, "in a dict": lambda *x: dict(zip("ab", x, strict=True))}
    wrap = wrap.get(place, lambda *x: list(x))
    w = {"a": W, "b": W} if place != "in a list" else [W, W]
    opt = Lars(wrap(schedule, 0.5), 0.0, adapt=False)
    new, state = steps(opt, w, [wrap(G, G)] * 2)
    first = new["a"] if isinstance(new, dict) else new[0]
    np.testing.assert_allclose(first, W - 0.75 * G, rtol=1e-15)
    assert int(state.step) == 2


def test_a_callable_attrs_class_is_a_schedule():
    attrs = need("attrs")
    cls = attrs.make_class("Schedule", ["rate"], class_body={"__call__": lambda self, _: self.rate})
    new, _ = steps(Lars(cls(0.5), 0.0, adapt=False), W, [G])
    np.testing.assert_allclose(new, W - 0.5 * G, rtol=1e-15)
    kind = attrs.make_class("Weights", ["a", "b"])
    new, _ = steps(Lars(kind(lambda step: 0.5, 0.25), 0.0, adapt=False), kind(W, W), [kind(G, G)])
    np.testing.assert_allclose([new.a, new.b], [W - 0.5 * G, W - 0.25 * G], rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("w", lambda w: Lars(0.1).init(w)),
        ("lr", lambda lr: Lars(lr)),
        ("lr", lambda lr: Lars(0.1).update(W, G, Lars(0.1).init(W), lr=lr)),
        ("eps", lambda eps: Lars(0.1, eps=eps)),
    ],
)
def test_a_tree_that_contains_itself_is_refused(name, call):
    tree = {"a": {"b": 0.5}}
    tree["a"]["c"] = tree["a"]
    with pytest.raises(StructureError, match=f"{name} contains itself\n  a/c: expected a tree"):
        call(tree)


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: Lars(-0.1), OptionError, "lr: expected a finite number >= 0"),
        (lambda: Lars(0.1, momentum=-1), OptionError, "momentum: expected a finite number >= 0"),
        (lambda: Lars(0.1, momentum=None), OptionError, "momentum: expected"),
        (lambda: Lars(0.1, nesterov=1), OptionError, "nesterov: expected True or False"),
        (lambda: Lars(0.1, decay_lambda=np.nan), OptionError, "weight_decay: expected"),
        (lambda: Lars(0.1, adapt={"a": 3}), OptionError, "a: expected True or False"),
        (lambda: Lars(0.1, epsilon=1e-8), TypeError, "unexpected keyword argument 'epsilon'"),
        (lambda: lars_tree.Lars(0.1, decay_lambda=1e-4), TypeError, "it is 'weight_decay' here"),
        (lambda: lars_update(W, G, 0.1, weight_decay=1e-4), TypeError, "'decay_lambda' here"),
        (
            lambda: Container(a=W).lars_update(W, 1, weight_decay=1),
            TypeError,
            "'decay_lambda' here",
        ),
        (lambda: Array(W).lars_update(W, 1, weight_decay=1), TypeError, "'decay_lambda' here"),
        (lambda: Lars(0.1, trust_coeficient=1), TypeError, "did you mean 'trust_coefficient'"),
    ],
)
def test_invalid_options_are_refused(make, kind, says):
    with pytest.raises(kind, match=says):
        make()


def test_errors_use_the_option_names_of_the_optimizer():
    opt = lars_tree.Lars(0.1, weight_decay={"a": None, "b": 0.1})
    w = {"a": W, "b": W}
    with pytest.raises(OptionError, match=r"^weight_decay has an invalid value"):
        opt.update(w, w, opt.init(w))


def test_an_invalid_scheduled_rate_is_refused_before_writing():
    opt, w = Lars(lambda step: -1.0), W.copy()
    with pytest.raises(OptionError, match=r"lr: expected a finite number >= 0, got -1\.0"):
        opt.update(w, G, opt.init(w), out=w)
    assert np.array_equal(w, W)


def test_repr_shows_options_that_are_not_defaults():
    assert repr(lars_tree.Lars(0.1)) == "Lars(0.1)"
    opt = lars_tree.Lars(Constant(0.1), nesterov=True, weight_decay=1e-4)
    shown = "Lars(Constant(rate=0.1, warmup_steps=0), nesterov=True, weight_decay=0.0001)"
    assert repr(opt) == repr(pickle.loads(pickle.dumps(opt))) == shown
    assert repr(pickle.loads(pickle.dumps(lars_tree.Lars(0.1)))) == "Lars(0.1)"


def test_repr_is_one_line():
    adapt = Container(a={"b": True}, c=[False, np.True_])
    lr = Container(a=0.1, c=np.array([[0.1], [0.2]]))
    shown = "Lars({'a': 0.1, 'c': array([[0.1], [0.2]])}, "
    assert (
        repr(lars_tree.Lars(lr, adapt=adapt))
        == shown + "adapt={'a': {'b': True}, 'c': [False, np.True_]})"
    )
