"""equinox: a filtered, jitted and donated step; a run continues from serialised leaves."""

from __future__ import annotations

import jax_runs as runs
import pytest
from conftest import need

from lars_tree import Lars

eqx, optax = need("equinox"), need("optax")
jax = need("jax")

from lars_tree.optax import lars  # noqa: E402

TX = lars(runs.RATE, **runs.OPTIONS)


def new_model():
    """Its leaves are arrays, activation functions and an integer buffer."""
    keys = jax.random.split(jax.random.key(0))
    layers = [
        eqx.nn.Lambda(lambda x: x.reshape(1, 8, 8)),
        eqx.nn.Conv2d(1, 8, 3, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Lambda(jax.numpy.ravel),
        eqx.nn.Linear(288, 10, key=keys[1]),
    ]
    return eqx.nn.Sequential(layers)


def loss_of(model, x, y):
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def new_pair():
    model = new_model()
    return model, TX.init(eqx.filter(model, eqx.is_inexact_array))


@pytest.fixture(scope="module")
def step():
    @eqx.filter_jit(donate="all")
    def step(pair, x, y):
        model, state = pair
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, x, y)
        updates, state = TX.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return (eqx.apply_updates(model, updates), state), loss

    return step


@pytest.fixture(scope="module")
def whole(step):
    return runs.run(step, new_pair())


def test_the_steps_are_those_of_lars(whole):
    (model, state), losses = whole
    runs.assert_trained(losses)
    optimizer, w = Lars(runs.RATE, **runs.OPTIONS), new_model()
    w, static = eqx.partition(w, eqx.is_inexact_array)

    @jax.jit
    def step(pair, x, y):
        loss, grads = jax.value_and_grad(lambda w: loss_of(eqx.combine(w, static), x, y))(pair[0])
        return optimizer.update(pair[0], grads, pair[1]), loss

    (w, other), _ = runs.run(step, (w, optimizer.init(w)))
    runs.assert_close(model, w)
    assert type(state.velocity) is type(model)
    runs.assert_close(state.velocity, other.velocity)


def test_a_run_continues_from_a_file(step, whole, tmp_path):
    pair, _ = runs.run(step, new_pair(), stop=3)
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", pair)
    pair = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", new_pair())
    runs.assert_same(runs.run(step, pair, start=3)[0], whole[0])


def test_leaves_without_a_gradient_have_no_update():
    model = (eqx.nn.Linear(2, 2, key=jax.random.key(0)), jax.numpy.arange(3), jax.nn.relu)
    grads = eqx.filter_grad(lambda model: model[0](jax.numpy.ones(2)).sum())(model)
    w = eqx.filter(model, eqx.is_array)  # the integers are among the parameters
    updates, _ = TX.update(grads, TX.init(w), w)
    assert updates[1:] == (None, None)
    new = eqx.apply_updates(model, updates)
    assert new[1] is model[1]
    assert new[2] is model[2]
    assert (new[0].weight != model[0].weight).any()
