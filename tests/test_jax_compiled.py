"""JAX programs: their size, their memory, and steps in double without scaling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from conftest import need
from conftest import unit_lars as Lars

from lars_tree import Container, lars_update
from lars_tree._numerics import formula

jax = need("jax")

from lars_tree._backends.jax_ops import JaxOps  # noqa: E402

jnp = jax.numpy

OPTIMIZER = Lars(0.1, decay_lambda=1e-4, eps=1e-8)
JOINT = {"joint_norm": True, "decay_lambda": 0.1}


def array(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.fixture(params=[1, 4])
def device_count(request, monkeypatch):
    """Programs for one device and for several devices sum squares in different ways."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "device_count", lambda: request.param)
    yield request.param
    jax.clear_caches()


def update(w, g, lr=0.1, **options):
    return lars_update(w, g, lr, decay_lambda=1e-4, **options)


def move(w, g):
    return OPTIMIZER.update(w, g, OPTIMIZER.init(w))[0]


def scanned(function):
    return lambda w: jax.lax.scan(lambda w, _: (function(w), None), w, None, 2)[0]


TRANSFORMED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": scanned,
    "cond": lambda function: lambda w: jax.lax.cond(w.sum() > 0, function, lambda w: w, w),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_traced_step_can_be_differentiated_twice(name, x64):
    """JAX differentiates a step after tracing it. A cached trace would hide an error."""
    jax.clear_caches()
    w, g = map(jnp.asarray, (array(0, (3, 4)), array(1, (3, 4))))

    def loss(step):
        return lambda w: (step(w) ** 2).sum()

    def step(w):
        return lars_update(w, g, 0.1, decay_lambda=0.01, stop_gradients=False)

    with jax.enable_x64(x64):
        traced = TRANSFORMED[name](step)
        first, second = jax.grad(loss(traced))(w), jax.hessian(loss(traced))(w)
        jax.clear_caches()
        plain = loss(lambda w: step(step(w))) if name == "scan" else loss(step)
        np.testing.assert_allclose(first, jax.grad(plain)(w), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(second, jax.hessian(plain)(w), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [update, move])
def test_each_further_leaf_adds_one_equation(step):
    def equations(count):
        w = {i: jnp.ones((3, i % 2 + 1)) for i in range(count)}
        return jax.make_jaxpr(step)(w, w).jaxpr.eqns

    few, many = equations(10), equations(30)
    zeros = 20 if step is move else 0  # the velocities of `init`
    assert len(many) - len(few) == 20 + zeros
    steps = [x for x in many if x.params.get("name") == "_compute"]
    assert len(steps) == 30
    assert len({id(x.params["jaxpr"]) for x in steps}) == 2  # one for each shape


def test_leaves_with_other_numbers_share_a_trace(monkeypatch):
    traces = []
    step = formula.step
    monkeypatch.setattr(formula, "step", lambda *args: (traces.append(1), step(*args))[1])
    jax.clear_caches()
    w = {i: jnp.ones((3, 5)) for i in range(20)}
    rates = {i: 0.1 + 0.01 * i for i in range(20)}
    new = jax.jit(lambda w, g: update(w, g, rates))(w, w)
    assert len(traces) == 1
    np.testing.assert_allclose(new[10][0, 0], 1 - 0.2, rtol=1e-4)
    jax.clear_caches()


@pytest.mark.parametrize("options", [{}, {"adapt": False}, {"trust_clip": True}], ids=str)
def test_the_arrays_are_never_stored_in_float64(device_count, options):
    w = [jnp.ones((512, 512)) for _ in range(4)]
    compiled = jax.jit(lambda w, g: update(w, g, **options)).lower(w, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w[0].nbytes / 4


def test_a_donated_step_writes_to_the_memory_of_its_arguments():
    w = [jnp.ones((64, 64)) for _ in range(4)]
    state = OPTIMIZER.init(w)
    step = jax.jit(OPTIMIZER.update, donate_argnums=(0, 2))
    memory = step.lower(w, w, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * w[0].nbytes  # weights and velocities


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((), None), ((7,), None), ((3, 300), None), ((2, 3, 4, 5), 2), ((2, 3, 4), 0), ((5,), -1)],
)
def test_the_norms_of_every_shape(device_count, dtype, shape, axis):
    w, g = (jnp.asarray(array(seed, shape), dtype) for seed in (0, 1))
    if dtype == "complex64":
        w, g = w + 1j * g, g - 2j * w
    options = {"layer_axis": axis, "trust_clip": True}
    new = jax.jit(lambda w, g: update(w, g, **options))(w, g)
    expected = update(w, g, **options)
    assert new.dtype == expected.dtype
    kind = complex if dtype == "complex64" else float
    limits = {"float16": 1e-3, "bfloat16": 8e-3}
    rtol = limits.get(dtype, 1e-6)
    np.testing.assert_allclose(np.asarray(new, kind), np.asarray(expected, kind), rtol, rtol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_axis": 1},
        {"trust_clip": True, "trust_coefficient": 0.5},
        JOINT,
        {"momentum": 0.5, "nesterov": True},
        {**JOINT, "momentum": 0.5},
    ],
    ids=str,
)
def test_the_derivatives_are_those_of_a_scaled_step(device_count, options):
    """float64 weights are scaled, float32 weights are not."""
    optimizer = Lars(0.1, stop_gradients=False, **{"decay_lambda": 0.01, "momentum": 0, **options})

    def loss(w, g):
        new = optimizer.update(w, g, optimizer.init(w))[0]
        return (new**3).sum()

    def derivatives(dtype):
        w, g = (jnp.asarray(array(seed, (3, 4), dtype)) for seed in (0, 1))
        forward = jax.jvp(loss, (w, g), (g, w))
        batch = jax.vmap(jax.grad(loss), (0, None))(jnp.stack([w, 2 * w]), g)
        return [*jax.jit(jax.grad(loss, (0, 1)))(w, g), *forward, batch]

    actual = derivatives(np.float32)
    with jax.enable_x64(True):
        expected = derivatives(np.float64)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5)


NUMBERS = ("lr", "decay_lambda", "trust_coefficient", "eps", "grad_scale")
# By the type of the options: the largest exponent at which XLA does not flush numbers to zero, and
# the number of cases to test.
EXTREMES = {"float32": (126, 150), "float64": (960, 150), "number": (960, 20)}


def step_with(numbers, w, g, joint):
    options = dict(zip(NUMBERS, numbers, strict=True))
    return lars_update(w, g, options.pop("lr"), joint_norm=joint, **options)


traced_step = jax.jit(step_with, static_argnums=3)


def weights(exponent, seed):
    return np.ldexp(array(seed, 4), exponent).astype(np.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_options_keep_the_bounds(kind, joint):
    """One option is extreme, and another is its reciprocal, so that the step is often in range."""
    usual = dict.fromkeys(NUMBERS, 1.0) | {"decay_lambda": 0.125, "eps": 0.0}
    exponent, count = EXTREMES[kind]
    sizes = [(-60, 60), (60, -60), (0, 0)]
    cases = list(itertools.product((-exponent, exponent), NUMBERS, NUMBERS, sizes))
    for i in np.linspace(0, len(cases) - 1, count).astype(int):
        exponent, one, other, at = cases[i]
        numbers = usual | {other: 2.0**-exponent, one: 1.5 * 2.0**exponent}
        check(list(numbers.values()), *map(weights, at, (0, 1)), kind, joint)


def check(numbers, w, g, kind, joint):
    with jax.enable_x64(kind == "float64"):
        if kind == "number":
            new = jax.jit(lambda w, g: step_with(numbers, w, g, joint))(w, g)
        else:
            new = traced_step([jnp.asarray(x, kind) for x in numbers], w, g, joint)
    lr, *others = numbers
    options = dict(zip(NUMBERS[1:], others, strict=True))
    step = reference.lars(w.tolist(), g.tolist(), lr, joint_norm=joint, **options)
    error = reference.worst_error(np.asarray(new).tolist(), w.tolist(), step, "float32")
    assert error <= 1 + 1e-6, (numbers, w, g)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_two_are_rounded_down(dtype):
    limits = np.finfo(dtype)
    exponents = np.arange(limits.minexp, limits.maxexp)
    powers = np.ldexp(dtype(1), exponents)
    with jax.enable_x64(True):
        for factor in (1, 1.5, 2 - limits.eps):
            actual = jax.jit(JaxOps().power_of_two)(powers * dtype(factor))
            np.testing.assert_array_equal(actual, powers)
        assert JaxOps().power_of_two(jnp.array([0, np.inf, np.nan], dtype)).tolist() == [1, 1, 1]


def test_a_container_is_compiled_like_a_dict():
    w = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}
    new = jax.jit(update)(Container(w), w)
    assert isinstance(new, Container)
    assert len(jax.make_jaxpr(update)(w, w).jaxpr.eqns) == 2
