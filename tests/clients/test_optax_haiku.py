"""haiku: a jitted and donated step of a transformed function; a run continues from msgpack."""

from __future__ import annotations

import jax_runs as runs
import pytest
from conftest import need

from lars_tree import Lars

hk, optax = need("haiku"), need("optax")
jax = need("jax")

from lars_tree.optax import lars  # noqa: E402

jnp = jax.numpy
TX = lars(runs.RATE, **runs.OPTIONS)


@hk.without_apply_rng
@hk.transform
def model(x):
    x = hk.Conv2D(8, 3)(x.reshape(-1, 8, 8, 1))
    x = jax.nn.relu(hk.LayerNorm(-1, True, True)(x))
    return hk.Linear(10)(hk.Flatten()(x))


def loss_of(w, x, y):
    logits = model.apply(w, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def new_pair():
    w = model.init(jax.random.key(0), jnp.ones((1, 64)))
    return w, TX.init(w)


@pytest.fixture(scope="module")
def step():
    def step(pair, x, y):
        loss, grads = jax.value_and_grad(loss_of)(pair[0], x, y)
        updates, state = TX.update(grads, pair[1], pair[0])
        return (optax.apply_updates(pair[0], updates), state), loss

    return jax.jit(step, donate_argnums=0)


@pytest.fixture(scope="module")
def whole(step):
    return runs.run(step, new_pair())


def test_the_steps_are_those_of_lars(whole):
    (w, state), losses = whole
    runs.assert_trained(losses)
    optimizer, (other, _) = Lars(runs.RATE, **runs.OPTIONS), new_pair()

    @jax.jit
    def step(pair, x, y):
        loss, grads = jax.value_and_grad(loss_of)(pair[0], x, y)
        return optimizer.update(pair[0], grads, pair[1]), loss

    (other, counted), _ = runs.run(step, (other, optimizer.init(other)))
    runs.assert_close(w, other)
    assert int(state.step) == int(counted.step) == runs.STEPS


def test_a_run_continues_from_msgpack(step, whole):
    serialization = need("flax.serialization")
    pair, _ = runs.run(step, new_pair(), stop=3)
    data = serialization.to_bytes(pair)
    pair = serialization.from_bytes(new_pair(), data)
    runs.assert_same(runs.run(step, pair, start=3)[0], whole[0])
