"""flax: TrainState with a linen model, and nnx.Optimizer, with checkpoints of msgpack and orbax."""

from __future__ import annotations

from functools import partial

import jax_runs as runs
import pytest
from conftest import need

from lars_tree import Lars

flax, optax = need("flax"), need("optax")
jax, nnx = need("jax"), need("flax.nnx")
linen, train_state = need("flax.linen"), need("flax.training.train_state")

from lars_tree.optax import lars  # noqa: E402

jnp = jax.numpy
TX = lars(runs.RATE, **runs.OPTIONS)


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (3, 3))(x.reshape(-1, 8, 8, 1))
        x = linen.relu(linen.LayerNorm()(x)).reshape(len(x), -1)
        return linen.Dense(10)(x)


MODEL = Linen()


def new_state():
    params = MODEL.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    return train_state.TrainState.create(apply_fn=MODEL.apply, params=params, tx=TX)


def loss_of(params, x, y):
    return cross_entropy(MODEL.apply({"params": params}, x), y)


@pytest.fixture(scope="module")
def step():
    def step(state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(state.params, x, y)
        return state.apply_gradients(grads=grads), loss

    return jax.jit(step, donate_argnums=0)


@pytest.fixture(scope="module")
def whole(step):
    return runs.run(step, new_state())


def test_a_train_state_takes_the_steps_of_lars(whole):
    state, losses = whole
    runs.assert_trained(losses)
    assert int(state.step) == int(state.opt_state.step) == runs.STEPS
    optimizer, w = Lars(runs.RATE, **runs.OPTIONS), new_state().params

    @jax.jit
    def step(pair, x, y):
        loss, grads = jax.value_and_grad(loss_of)(pair[0], x, y)
        return optimizer.update(pair[0], grads, pair[1]), loss

    (w, other), _ = runs.run(step, (w, optimizer.init(w)))
    runs.assert_close(state.params, w)
    runs.assert_close(state.opt_state.velocity, other.velocity)


def test_a_run_continues_from_msgpack(step, whole):
    state, first = runs.run(step, new_state(), stop=3)
    data = flax.serialization.to_bytes(state)
    state, losses = runs.run(step, flax.serialization.from_bytes(new_state(), data), start=3)
    runs.assert_same(state, whole[0])
    assert first + losses == whole[1]


def test_a_run_continues_from_orbax(step, whole, tmp_path):
    ocp = need("orbax.checkpoint")
    state, _ = runs.run(step, new_state(), stop=3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "run", new_state())
    runs.assert_same(runs.run(step, state, start=3)[0], whole[0])


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x.reshape(-1, 8, 8, 1)))
        return self.head(nnx.relu(x).reshape(len(x), -1))


def new_pair():
    model = Nnx(nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


@pytest.fixture(scope="module")
def nnx_step():
    @partial(nnx.jit, donate_argnums=(0, 1))
    def jitted(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(x), y))(model)
        optimizer.update(model, grads)
        return loss

    def step(pair, x, y):
        return pair, jitted(*pair, x, y)

    return step


@pytest.fixture(scope="module")
def whole_pair(nnx_step):
    pair, losses = runs.run(nnx_step, new_pair())
    return nnx.state(pair), losses


def test_an_nnx_optimizer_takes_the_steps_of_lars(whole_pair):
    state, losses = whole_pair
    runs.assert_trained(losses)
    optimizer, model = Lars(runs.RATE, **runs.OPTIONS), Nnx(nnx.Rngs(0))

    @nnx.jit
    def jitted(model, state, x, y):
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(x), y))(model)
        w = nnx.as_pure(nnx.state(model, nnx.Param))
        w, state = optimizer.update(w, nnx.as_pure(grads), state)
        nnx.update(model, w)
        return state, loss

    first = optimizer.init(nnx.as_pure(nnx.state(model, nnx.Param)))
    runs.run(lambda state, x, y: jitted(model, state, x, y), first)
    runs.assert_close(nnx.filter_state(state, nnx.Param), nnx.state(model, nnx.Param))


def test_an_nnx_run_continues_from_orbax(nnx_step, whole_pair, tmp_path):
    ocp = need("orbax.checkpoint")
    pair, _ = runs.run(nnx_step, new_pair(), stop=3)
    other = new_pair()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.state(pair))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "run", nnx.state(other)))
    runs.assert_same(nnx.state(runs.run(nnx_step, other, start=3)[0]), whole_pair[0])
