"""The counters in the state of Lars; invalid counters are refused before anything is written."""

from __future__ import annotations

import copy
import itertools
import threading
import time

import numpy as np
import pytest
from conftest import need, to_library
from conftest import unit_lars as Lars
from test_optimizer import G, W

from lars_tree import Container, OutError, StateError, lars_update

OPT = Lars(0.1)


def freed(torch):
    x = torch.zeros((), dtype=torch.int64)
    x.untyped_storage().resize_(0)
    return x


def donated():
    x = need("jax.numpy").int32(0)
    x.delete()
    return x


# Functions that make invalid counters, and how the error message describes each counter.
INVALID = {
    "a float": (lambda: np.array(1.0), r"got float64 of shape \(\)"),
    "with an axis": (lambda: np.array([1]), r"got int64 of shape \(1,\)"),
    "8 bits": (lambda: np.array(127, np.int8), r"got int8 of shape \(\)"),
    "16 bits": (lambda: need("torch").tensor(3, dtype=need("torch").int16), "got torch.int16"),
    "a bool": (lambda: np.array(True), "got bool"),
    "a number": (lambda: 3, "got an int"),
    "nothing": (lambda: None, "got None"),
    "freed": (lambda: freed(need("torch")), "got a tensor whose storage was freed"),
    "meta": (lambda: need("torch").zeros((), device="meta").long(), "got a tensor on the meta"),
    "donated": (donated, "got an array that was deleted or donated"),
}


@pytest.mark.parametrize("name", ["step", "skipped"])
@pytest.mark.parametrize("kind", INVALID)
def test_invalid_counters_are_refused(kind, name):
    make, says = INVALID[kind]
    for in_place in (False, True):
        w = W.copy()
        state = OPT.init(w)
        state[name] = make()
        with pytest.raises(StateError, match=f"{name}: expected an integer array.*{says}"):
            OPT.update(w, G, state, out=w if in_place else None)
        assert np.array_equal(w, W)


# JAX has no 64-bit integers unless jax_enable_x64 is set.
COUNTING = [
    *itertools.product(["numpy", "torch", "strict"], ["int32", "int64", "uint32", "uint64"]),
    *itertools.product(["jax"], ["int32", "uint32"]),
]


@pytest.mark.parametrize(("name", "dtype"), COUNTING)
def test_counters_of_32_bits_and_more_count(name, dtype):
    w, g, step, skipped = (
        to_library(name, np.asarray(x)) for x in (W, G, *np.array([3, 1], dtype))
    )
    state = OPT.init(w) | {"step": step, "skipped": skipped}
    if (name, dtype[0]) == ("torch", "u"):  # torch cannot add to unsigned integers
        with pytest.raises(StateError, match=f"got torch.{dtype}"):
            OPT.update(w, g, state)
        return
    _, after = OPT.update(w, g, state)
    assert (int(after["step"]), int(after["skipped"])) == (4, 1)
    assert after["step"].dtype == step.dtype


def parts_of_one_array(w):
    """Weights, velocity and counters side by side in one buffer."""
    memory = np.zeros(6)
    memory[:2] = w
    counters = memory[4:].view(np.int64)
    state = Container(step=counters[:1].reshape(()), skipped=counters[1:].reshape(()))
    state["velocity"] = memory[2:4]
    return memory[:2], state


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_counters_may_lie_beside_weights_in_one_buffer(nonfinite):
    opt = Lars(0.1, nonfinite=nonfinite)
    w, state = parts_of_one_array(W)
    expected = opt.update(W, G, opt.init(W))
    opt.update(w, G, state, out=w)
    assert np.array_equal(w, expected[0])
    assert np.array_equal(state.velocity, expected[1].velocity)
    assert (int(state.step), int(state.skipped)) == (1, 0)


def the_same(state, w):
    state["skipped"] = state["step"]


def a_view(state, w):
    state["skipped"] = state["step"][...]


def of_the_velocity(state, w):
    state["step"] = state["velocity"][:1].view(np.int64).reshape(())


def of_the_weights(state, w):
    state["step"] = w[1:].view(np.int64).reshape(())


def skipped_of_the_weights(state, w):
    state["skipped"] = w[1:].view(np.int32)[1:].reshape(())


SHARING = {
    the_same: "skipped: it shares memory with step",
    a_view: "skipped: it shares memory with step",
    of_the_velocity: "step: it shares memory with a of state",
    of_the_weights: "step: it shares memory with a of out",
    skipped_of_the_weights: "skipped: it shares memory with a of out",
}


CASES = [(share, "skip") for share in SHARING]  # "skip" takes the general path
# The fast path does not write to `skipped`.
CASES += [(share, "propagate") for share in SHARING if share is not skipped_of_the_weights]


@pytest.mark.parametrize(("share", "nonfinite"), CASES)
def test_counters_that_share_memory_are_refused_in_place(share, nonfinite):
    opt = Lars(0.1, nonfinite=nonfinite)
    w = {"a": W.copy()}
    state = opt.init(w)
    inner = {"step": state.step, "skipped": state.skipped, "velocity": state.velocity.a}
    share(inner, w["a"])
    state = Container(inner | {"velocity": {"a": inner["velocity"]}})
    before = copy.deepcopy((w, state))
    with pytest.raises(OutError, match=f"state cannot be written to\n  {SHARING[share]}"):
        opt.update(w, {"a": G}, state, out=w)
    assert (w["a"] == before[0]["a"]).all()
    assert state == before[1]


def test_counters_that_are_views_of_one_tensor_are_refused_in_place():
    torch = need("torch")
    w = torch.tensor(W)
    state = OPT.init(w)
    state["skipped"] = state["step"].view(())
    with pytest.raises(OutError, match="skipped: it shares memory with step"):
        OPT.update(w, torch.tensor(G), state, out=w)
    assert w.tolist() == W.tolist()
    _, after = OPT.update(w, torch.tensor(G), state)  # allowed if new arrays are returned
    assert (int(after.step), int(after.skipped)) == (1, 0)


# ---- Schedules


def test_steps_of_many_threads_follow_each_other():
    steps = []

    def rate(step):
        steps.append(int(step))
        time.sleep(0.002)
        return 0.1 / (1 + int(step))

    w, opt = {"a": np.ones(4)}, Lars(rate, momentum=0.0)
    state = opt.init(w)

    def work():
        for _ in range(3):
            opt.update(w, {"a": np.ones(4)}, state, out=w)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == list(range(12))
    assert int(state["step"]) == 12
    np.testing.assert_allclose(w["a"], np.prod(1 - 0.1 / (1 + np.arange(12))), rtol=1e-14)


def test_a_schedule_may_make_updates():
    other = np.ones(2)

    def rate(step):
        lars_update(other, 1.0, 0.5, out=other)
        return 0.1

    w, opt = np.ones(2), Lars(rate)
    opt.update(w, np.ones(2), opt.init(w), out=w)
    assert w.tolist() == [0.9, 0.9]
    assert other.tolist() == [0.5, 0.5]
