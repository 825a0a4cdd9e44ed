"""Containers, and states of Lars, in the files of `flax.serialization`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import need

from lars_tree import Array, Container, Lars

W = {"b": np.arange(3.0), "a": {"c": [np.ones((2, 1), np.float32), None], "1": np.int64(3)}}
G = {"b": np.ones(3), "a": {"c": [np.ones((2, 1), np.float32), None], "1": None}}


@pytest.fixture(scope="module")
def serialization():
    need("flax")
    return need("flax.serialization")


def test_a_container_is_restored_as_a_container(serialization):
    w = Container(W)
    data = serialization.to_bytes(w)
    assert Container(serialization.msgpack_restore(data)) == serialization.to_state_dict(w)
    restored = serialization.from_bytes(w.map(np.zeros_like), data)
    assert restored == w
    assert (type(restored), type(restored.a), restored.paths()) == (Container, Container, w.paths())
    assert (restored.b.dtype, restored.a.c[0].dtype) == (np.float64, np.float32)


def test_a_state_dict_is_that_of_a_dict(serialization):
    w = Container(W)
    state = serialization.to_state_dict(w)
    expected = serialization.to_state_dict(w.to_dict())
    assert Container(state) == expected
    assert type(state) is type(state["a"]) is dict
    assert serialization.from_state_dict(w, expected) == w


def test_a_missing_key_is_an_error_of_flax(serialization):
    state = serialization.to_state_dict(Container(W))
    del state["a"]["c"]
    with pytest.raises(ValueError, match=r"not present in state dict at path .*/a/"):
        serialization.from_state_dict(Container(W), state)


def test_a_subclass_and_an_array_keep_their_types(serialization):
    class Weights(Container):
        pass

    w = Weights(a=Array(np.ones(2)), b={"c": Array(np.zeros(1))})
    restored = serialization.from_bytes(w, serialization.to_bytes(w))
    assert (type(restored), type(restored.b), type(restored.b.c)) == (Weights, Weights, Array)
    assert restored.a.data.tolist() == [1, 1]


def test_a_run_continues_from_a_file_with_the_same_bits(serialization):
    opt = Lars(0.1)
    w, state = Container(W), opt.init(Container(W))
    w, state = opt.update(w, G, state)
    saved = serialization.to_bytes({"w": w, "state": state})
    target = {"w": Container(W), "state": opt.init(Container(W))}
    restored = serialization.from_bytes(target, saved)
    expected = opt.update(w, G, state)
    actual = opt.update(restored["w"], G, restored["state"])
    assert actual == expected
    assert int(actual[1].step) == 2


def test_a_train_state_holds_containers(serialization):
    jax, train_state, optax = need("jax"), need("flax.training.train_state"), need("optax")
    params = Container(kernel=jax.numpy.ones((2, 2)), bias=jax.numpy.zeros(2))
    lars = Lars(0.1)

    class State(train_state.TrainState):
        lars: Container

    def make(params):
        return State.create(
            apply_fn=None, params=params, tx=optax.sgd(0.1, 0.9), lars=lars.init(params)
        )

    state = make(params).apply_gradients(grads=params.map(lambda x: x + 1))
    new, lars_state = jax.jit(lars.update)(state.params, params, state.lars)
    state = state.replace(params=new, lars=lars_state)
    restored = serialization.from_bytes(make(params), serialization.to_bytes(state))
    assert type(restored.params) is type(restored.lars) is Container
    assert restored.params == state.params
    assert restored.lars == state.lars
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(state.opt_state)


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_order_of_imports_does_not_matter(ours_first):
    need("flax")
    lines = ["import lars_tree", "from flax import serialization"]
    code = "\n".join(lines if ours_first else lines[::-1])
    code += """
assert serialization.is_serializable(lars_tree.Container)
assert serialization.is_serializable(lars_tree.Array)
assert serialization.is_serializable(type("Sub", (lars_tree.Container,), {}))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
