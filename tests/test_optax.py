"""`lars_tree.optax.lars`: its steps are those of `Lars`, in every wrapper of optax."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

import lars_tree as lt
from lars_tree import Container, Lars, OptionError, StateError, StructureError

optax = need("optax")
jax = need("jax")
jnp = jax.numpy

from lars_tree.optax import LarsState, lars  # noqa: E402

UNIT = {"trust_coefficient": 1.0, "eps": 0.0}


def tree(seed, dtype="float32"):
    """Weights in [1, 2] with seed 0, otherwise gradients whose steps are smaller than a half."""
    rng = np.random.default_rng(seed)
    shapes = {"encoder": {"kernel": (4, 3), "bias": (3,)}, "head": [(3, 2)]}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = (lambda s: rng.uniform(1, 2, s)) if seed == 0 else (lambda s: rng.normal(0, 0.1, s))
    return jax.tree.map(lambda s: jnp.asarray(draw(s), dtype), shapes, is_leaf=is_shape)


W, G = tree(0), [tree(seed) for seed in range(1, 5)]
KERNELS = {"encoder": {"kernel": True, "bias": False}, "head": True}


def run(tx, w=W, gradients=G, jit=False):
    """The weights after a step for each of the gradients, and the state."""

    def step(w, g, state):
        updates, state = tx.update(g, state, w)
        return optax.apply_updates(w, updates), state

    step, state = (jax.jit(step) if jit else step), tx.init(w)
    for g in gradients:
        w, state = step(w, g, state)
    return w, state


def expected(*arguments, w=W, gradients=G, jit=False, **options):
    """The same for `Lars`."""
    optimizer = Lars(*arguments, **options)
    step, state = (jax.jit(optimizer.update) if jit else optimizer.update), optimizer.init(w)
    for g in gradients:
        w, state = step(w, g, state)
    return w, state


def same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


OPTIONS = [
    {"momentum": 0, "weight_decay": 1e-4},
    {"momentum": 0.5, "weight_decay": 0.1, "adapt": KERNELS},
    {"nesterov": True, "joint_norm": True, "weight_decay": 0.1},
    {"trust_clip": True, "trust_coefficient": 0.02, "grad_scale": 2.0},
    {"layer_axis": {"encoder": {"kernel": 0, "bias": None}, "head": None}, "eps": 0.1},
    {"nonfinite": "skip", "stop_gradients": False},
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_steps_are_those_of_lars(options, jit):
    w, state = run(lars(0.1, **options), jit=jit)
    wanted, other = expected(0.1, **options, jit=jit)
    same(w, wanted)
    assert (int(state.step), int(state.skipped)) == (4, 0)
    if options.get("momentum") == 0:
        assert state.velocity is None
    else:
        same(state.velocity, other.velocity.to_dict())


def test_every_option_of_lars_is_an_option_with_the_same_default():
    from inspect import signature

    from lars_tree.optimizer import _DEFAULTS

    parameters = dict(signature(lars).parameters)
    del parameters["learning_rate"]
    assert {name: x.default for name, x in parameters.items()} == _DEFAULTS
    assert all(x.kind is x.KEYWORD_ONLY for x in parameters.values())


DTYPES = {"float16": 10, "bfloat16": 7, "float32": 23}
numbers = st.builds(math.ldexp, st.floats(-1, 1, width=16), st.integers(-6, 6))
vectors = st.lists(numbers, min_size=8, max_size=8)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(w=vectors, g=vectors, rate=st.floats(0, 8, width=32), nesterov=st.booleans())
def test_updates_are_rounded_once(dtype, jit, w, g, rate, nesterov):
    """The sum is the new weight itself near the old one, else up to an ulp of the update."""
    w, g = (jnp.asarray(x, dtype) for x in (w, g))
    state = LarsState(jnp.int32(0), jnp.int32(0), 0.25 * g.astype(jnp.float32))
    moved = (jax.jit(_transform, static_argnums=0) if jit else _transform)(
        nesterov, w, g, state, rate
    )
    wanted = (jax.jit(_lars, static_argnums=0) if jit else _lars)(nesterov, w, g, state, rate)
    updates, sums = (np.asarray(x, float) for x in moved)
    assert moved[0].dtype == moved[1].dtype == w.dtype
    old, new = np.asarray(w, float), np.asarray(wanted, float)
    near = (old * new > 0) & (abs(old) <= 2 * abs(new)) & (abs(new) <= 2 * abs(old))
    near |= (old == 0) | (old == new)
    np.testing.assert_array_equal(sums[near], new[near])
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    ulps = np.ldexp(1.0, np.frexp(updates)[1] - 1 - DTYPES[dtype])
    assert (abs(sums - new) <= np.maximum(ulps, smallest)).all()


def _transform(nesterov, w, g, state, rate):
    updates, _ = lars(rate, nesterov=nesterov, **UNIT).update(g, state, w)
    return updates, optax.apply_updates(w, updates)


def _lars(nesterov, w, g, state, rate):
    return Lars(rate, nesterov=nesterov, **UNIT).update(w, g, Container(state._asdict()))[0]


def test_double():
    with jax.enable_x64(True):
        w, gradients = tree(0, "float64"), [tree(1, "float64")]
        same(run(lars(0.1), w, gradients)[0], expected(0.1, w=w, gradients=gradients)[0])


def test_schedules_of_both_packages():
    ours = lt.schedules.Polynomial(0.5, total_steps=4, warmup_steps=1)
    theirs = optax.polynomial_schedule(0.5, 0.0, 2, 4)
    for schedule in (ours, theirs, lambda step: 0.1 / (1 + step)):
        same(run(lars(schedule))[0], expected(schedule)[0])
    start = jax.tree.leaves(W)[0]
    moved = run(lars(ours), gradients=G[:1])[0]  # the first rate is 0
    np.testing.assert_array_equal(jax.tree.leaves(moved)[0], start)


# Wrappers of optax


def test_chain_after_clipping():
    large = [optax.tree.scale(100, g) for g in G]
    clipped = [optax.tree.scale(1 / optax.tree.norm(g), g) for g in large]
    tx = optax.chain(optax.clip_by_global_norm(1.0), lars(0.1, momentum=0.5, adapt=False))
    w, _ = run(tx, gradients=large)
    wanted, _ = expected(0.1, momentum=0.5, adapt=False, gradients=clipped)
    for x, y in zip(jax.tree.leaves(w), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_multi_steps_average_gradients():
    means = [jax.tree.map(lambda x, y: (x + y) / 2, *pair) for pair in (G[:2], G[2:])]
    w, state = run(optax.MultiSteps(lars(0.1), every_k_schedule=2))
    wanted, _ = expected(0.1, gradients=means)
    for x, y in zip(jax.tree.leaves(w), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert int(state.inner_opt_state.step) == 2


def test_multi_transform_and_masked_leave_other_leaves_out():
    labels = {"encoder": {"kernel": "a", "bias": "b"}, "head": ["a"]}
    parts = {"a": lars(0.1, weight_decay=0.1), "b": lars(0.5, adapt=False), "c": lars(1.0)}
    w, _ = run(optax.multi_transform(parts, labels))
    rates = {"encoder": {"kernel": 0.1, "bias": 0.5}, "head": 0.1}
    decay = {"encoder": {"kernel": 0.1, "bias": 0.0}, "head": 0.1}
    wanted, _ = expected(rates, weight_decay=decay, adapt=KERNELS)
    same(w, wanted)
    mask = {"encoder": {"kernel": True, "bias": False}, "head": [True]}
    w, state = run(optax.masked(lars(0.1), mask))
    assert isinstance(state.inner_state.velocity["encoder"]["bias"], optax.MaskedNode)
    same(w["head"], expected(0.1)[0]["head"])


def test_inject_hyperparams():
    rate, decay = optax.linear_schedule(0.1, 0.5, 4), optax.constant_schedule(0.01)
    tx = optax.inject_hyperparams(lars)(rate, momentum=0.5, weight_decay=decay, grad_scale=2.0)
    w, state = run(tx)
    names = {"learning_rate", "momentum", "weight_decay", "trust_coefficient", "eps", "grad_scale"}
    assert state.hyperparams.keys() == names
    numbers = {"momentum": 0.5, "weight_decay": np.float32(0.01), "grad_scale": 2.0}
    numbers |= {"trust_coefficient": np.float32(0.001), "eps": np.float32(1e-8)}
    same(w, expected(rate, **numbers)[0])
    state.hyperparams["momentum"] = jnp.float32(0.0)  # the velocity is forgotten, but kept
    updates, state = jax.jit(tx.update)(G[0], state, w)
    fresh, _ = expected(0.5, **numbers | {"momentum": 0.0}, w=w, gradients=G[:1])
    same(optax.apply_updates(w, updates), fresh)
    assert state.inner_state.velocity is not None


def test_inject_hyperparams_with_an_axis_and_functions_of_paths():
    stacked = {"a": jnp.asarray([[3.0, 4.0], [6.0, 8.0]])}
    make = optax.inject_hyperparams(lars, static_args="layer_axis")
    w, _ = run(make(0.1, layer_axis=0), stacked, [stacked])
    wanted, _ = expected(np.float32(0.1), layer_axis=0, w=stacked, gradients=[stacked])
    np.testing.assert_allclose(w["a"], wanted["a"], rtol=1e-6)


def test_apply_if_finite_and_skipped_steps():
    bad = jax.tree.map(lambda x: x * jnp.nan, G[0])
    gradients = [G[0], bad, G[1]]
    wanted, _ = expected(0.1, gradients=[G[0], G[1]])
    w, _ = run(optax.apply_if_finite(lars(0.1), 3), gradients=gradients)
    same(w, wanted)
    w, state = run(lars(0.1, nonfinite="skip"), gradients=gradients)
    same(w, wanted)
    assert (int(state.step), int(state.skipped)) == (2, 1)


def test_scan_and_donation():
    tx, stacked = lars(0.1), jax.tree.map(lambda *xs: jnp.stack(xs), *G)

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    train = jax.jit(lambda w, s: jax.lax.scan(step, (w, s), stacked)[0], donate_argnums=(0, 1))
    w = jax.tree.map(jnp.copy, W)
    same(train(w, tx.init(w))[0], expected(0.1)[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(w))


def test_the_tools_for_states():
    tx = optax.chain(optax.identity(), optax.inject_hyperparams(lars)(0.1))
    _, state = run(tx)
    assert int(optax.tree.get(state, "step")) == 4
    assert jax.tree.structure(optax.tree.get(state, "velocity")) == jax.tree.structure(W)
    assert float(optax.tree.get(state, "learning_rate")) == np.float32(0.1)
    changed = optax.tree.set(state, learning_rate=jnp.float32(0.5))
    assert float(optax.tree.get(changed, "learning_rate")) == 0.5
    names = optax.tree.map_params(lars(0.1), lambda _: "p", lars(0.1).init(W))
    same = jax.tree.map(lambda _: "p", W)
    assert (names.velocity, names.step.dtype) == (same, np.int32)


def test_differentiation_through_a_step():
    def after(rate):
        tx = lars(rate, stop_gradients=False, momentum=0, **UNIT)
        w, g = jnp.asarray([3.0, 4.0]), jnp.asarray([0.4, 0.3])
        return optax.apply_updates(w, tx.update(g, tx.init(w), w)[0]).sum()

    assert float(jax.grad(after)(0.1)) == pytest.approx(-7.0)


def test_strict_promotion_of_dtypes():
    w, g = tree(0, "bfloat16"), tree(1, "bfloat16")
    tx = optax.inject_hyperparams(lars, hyperparam_dtype=jnp.float32)(0.1, nonfinite="skip")
    wanted, _ = expected(np.float32(0.1), w=w, gradients=[g])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        same(run(tx, w, [g], jit=True)[0], wanted)


def test_sharded_weights_inside_shard_map():
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    rows = jax.sharding.NamedSharding(mesh, spec("x"))
    w, g = jax.device_put((jnp.arange(16.0).reshape(8, 2), jnp.ones((8, 2))), rows)
    tx = lars(0.1, axis_name="x", **UNIT)
    states = LarsState(spec(), spec(), spec("x"))
    specs = (spec("x"), states, spec("x"))
    step = jax.shard_map(tx.update, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    updates, _ = jax.jit(step)(g, tx.init(w), w)
    wanted, _ = lars(0.1, **UNIT).update(g, tx.init(w), w)
    np.testing.assert_allclose(updates, wanted, rtol=1e-5)


# Trees and leaves


@pytest.mark.parametrize("make", [Container, dict], ids=["Container", "dict"])
def test_nodes_keep_their_types(make):
    w = make(W)
    updates, state = lars(0.1).update(make(G[0]), lars(0.1).init(w), w)
    assert type(updates) is type(state.velocity) is make
    assert jax.tree.structure(updates) == jax.tree.structure(w)


def test_gradients_of_none_and_of_integers():
    w = {"a": jnp.ones(2), "b": jnp.ones(2), "n": None, "i": jnp.ones(2, int)}
    gradients = {"a": jnp.ones(2), "b": None, "n": None, "i": np.zeros(2, jax.dtypes.float0)}
    state = lars(0.1).init(w)
    updates, state = lars(0.1).update(gradients, state, w)
    assert (updates["b"], updates["n"], state.velocity["i"]) == (None, None, None)
    assert (updates["i"].dtype, updates["i"].tolist()) == (w["i"].dtype, [0, 0])
    assert updates["a"].tolist() == pytest.approx([-1e-4, -1e-4], rel=1e-3)


def test_arrays_of_numpy_are_converted():
    """A checkpoint may be loaded as numpy arrays."""
    w, state = jax.tree.map(np.asarray, (W, lars(0.1).init(W)))
    updates, new = lars(0.1).update(G[0], state, w)
    same(optax.apply_updates(W, updates), run(lars(0.1), gradients=G[:1])[0])
    assert isinstance(new.step, jax.Array)


def test_a_tree_without_arrays():
    state = lars(0.1).init({})
    updates, state = jax.jit(lars(0.1).update)({}, state, {})
    assert (updates, int(state.step), state.step.dtype) == ({}, 1, np.int32)


# Errors


def test_errors():
    tx = lars(0.1)
    state = tx.init(W)
    with pytest.raises(StructureError, match=r"params: expected .* tx.update\(grads, state, par"):
        tx.update(G[0], state)
    with pytest.raises(StateError, match=r"state: expected a LarsState, .* got a TraceState"):
        tx.update(G[0], optax.trace(0.9).init(W), W)
    with pytest.raises(StructureError, match="dcdw does not match w"):
        tx.update({"encoder": G[0]["encoder"]}, state, W)
    with pytest.raises(OptionError, match="nonfinite cannot raise"):
        jax.jit(lars(0.1, nonfinite="raise").update)(G[0], state, W)
    with pytest.raises(OptionError, match="momentum"):
        lars(0.1, momentum=-1)
    with pytest.raises(TypeError, match="positional"):
        lars(0.1, 1e-4)  # weight_decay in `optax.lars`
    with pytest.raises(TypeError, match=r"weight_decay_mask.*did you mean 'weight_decay'"):
        lars(0.1, weight_decay_mask=True)
