"""JAX with strict settings: no promotion of dtypes or ranks, and NaN in any result is an error."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from conftest import need

from lars_tree import Lars, lars_update, report, schedules

jax = need("jax")
jnp = jax.numpy

OPTIONS = [
    {"nonfinite": "skip"},
    {"layer_axis": 0, "lr": jnp.full(3, 0.1, jnp.bfloat16), "trust_clip": True},
    {"joint_norm": True, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0, "lr": np.full(3, 0.1), "stop_gradients": False},
    {"grad_scale": jnp.asarray(2), "weight_decay": jnp.float16(0.1), "momentum": jnp.float32(0.5)},
    {"lr": {"a": jnp.bfloat16(0.1), "b": 0.2}, "eps": jnp.float32(1e-3), "adapt": False},
    {"lr": schedules.Polynomial(0.1, 10, 2), "trust_coefficient": jnp.bfloat16(0.1)},
    {"lr": schedules.Cosine(0.1, 10, 2), "trust_clip": True},
]


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def strict(request):
    jax.clear_caches()
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(request.param))
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        stack.enter_context(jax.debug_nans(True))
        yield


def tree(seed, dtype):
    """A weight matrix and another one that is zero, as after an initialisation to zeros."""
    x = np.random.default_rng(seed).normal(size=(2, 3))
    return {"a": jnp.asarray(x, dtype), "b": jnp.zeros((2, 3), dtype)}


def close(actual, expected, dtype):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        rtol = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(x, complex), np.asarray(y, complex), rtol, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_compiled_steps_are_those_without_jit(strict, options, dtype):
    options = {"lr": 0.1, **options}
    optimizer = Lars(options.pop("lr"), **options)
    w, g = tree(0, dtype), tree(1, dtype)

    def steps(w, g):
        carry = (w, optimizer.init(w))
        return jax.lax.scan(lambda c, _: (optimizer.update(c[0], g, c[1]), None), carry, None, 2)[0]

    expected, state = optimizer.update(w, g, optimizer.init(w))
    expected, state = optimizer.update(expected, g, state)
    actual, counted = jax.jit(steps)(w, g)
    close(actual, expected, dtype)
    assert (int(counted.step), int(counted.skipped)) == (int(state.step), int(state.skipped))
    assert counted.step.dtype == state.step.dtype == np.int32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_reports(strict, dtype):
    w, g = tree(0, dtype), tree(1, dtype)
    ratios = report.trust_ratios(w, g, 0.1, layer_axis=0)
    expected = report.trust_ratios(
        *(jax.tree.map(np.asarray, x) for x in (w, g)), 0.1, layer_axis=0
    )
    close(ratios, expected, "float32")
    close(jax.jit(lambda w, g: report.trust_ratios(w, g, 0.1))(w, g)["b"], [1.0], "float32")


def test_derivatives_and_vmap(strict):
    w, g = tree(0, "float32"), tree(1, "float32")

    def total(w):
        new = lars_update(w, g, 0.1, decay_lambda=0.1, stop_gradients=False)
        return sum(x.sum() for x in jax.tree.leaves(new))

    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), w)
    one, many = jax.grad(total)(w), jax.vmap(jax.grad(total))(stacked)
    close(jax.tree.map(lambda x: x[1], many), one, "float32")


def test_a_skipped_step_is_counted(strict):
    w, bad = tree(0, "float32"), {"a": jnp.full((2, 3), jnp.inf), "b": jnp.zeros((2, 3))}
    optimizer = Lars(0.1, nonfinite="skip")
    with jax.debug_nans(False):
        new, state = jax.jit(optimizer.update)(w, bad, optimizer.init(w))
    assert (int(state.step), int(state.skipped)) == (0, 1)
    np.testing.assert_array_equal(new["a"], w["a"])
