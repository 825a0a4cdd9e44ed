"""JAX: transformations, devices, dtypes and skipped steps."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need, to_numpy

from lars_tree import Container, Lars, lars_update, report

jax = need("jax")
jnp = jax.numpy


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"encoder": {"kernel": (4, 3), "bias": (3,)}, "head": (8, 2)}
    return Container(
        encoder={key: rng.normal(size=shape) for key, shape in shapes["encoder"].items()},
        head=rng.normal(size=shapes["head"]),
    ).map(lambda x: jnp.asarray(x.astype(dtype)))


def close(actual, expected, rtol=1e-6):
    for x, y in zip(actual.leaves(), expected.leaves(), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol, 1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jit_gives_the_same_result(dtype):
    w, g = tree(0, getattr(jnp, dtype)), tree(1, getattr(jnp, dtype))
    update = jax.jit(lambda w, g, lr: lars_update(w, g, lr, decay_lambda=0.01))
    close(update(w, g, 0.1), lars_update(w, g, 0.1, decay_lambda=0.01))


def test_a_rate_that_changes_does_not_compile_again():
    traces = []

    @jax.jit
    def update(w, g, lr):
        traces.append(1)
        return w.lars_update(g, lr, decay_lambda=lr)

    for lr in (0.1, 0.2, 0.3):
        close(update(tree(0), tree(1), lr), tree(0).lars_update(tree(1), lr, decay_lambda=lr))
    assert len(traces) == 1


def test_scan_and_vmap():
    w, g = tree(0), tree(1)
    rates = jnp.array([0.1, 0.2, 0.3])
    scanned, _ = jax.lax.scan(lambda w, lr: (w.lars_update(g, lr), None), w, rates)
    expected = w
    for lr in rates:
        expected = expected.lars_update(g, lr)
    close(scanned, expected, 1e-5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), w, g)
    batched = jax.vmap(lambda w: w.lars_update(g, 0.1))(stacked)
    close(jax.tree.map(lambda x: x[0], batched), w.lars_update(g, 0.1))


def test_the_step_is_differentiable_unless_stop_gradients():
    def loss(w, g, lr, decay, stop):
        new = lars_update(w, g, lr, decay_lambda=decay, stop_gradients=stop)
        return (new**2).sum()

    with jax.enable_x64(True):
        args = [jnp.array(x) for x in ([3.0, 4.0], [0.4, 0.3], 0.1, 0.2)]
        for i in range(4):

            def along(x, i=i):
                return loss(*args[:i], x, *args[i + 1 :], False)

            gradient = np.asarray(jax.grad(along)(args[i]))
            for k in range(gradient.size):
                step = np.zeros(gradient.shape)
                step.flat[k] = 1e-6
                slope = (along(args[i] + step) - along(args[i] - step)) / 2e-6
                assert gradient.flat[k] == pytest.approx(float(slope), rel=1e-6)
            stopped = jax.grad(loss, argnums=i)(*args, True)
            assert not np.asarray(stopped).any()


@pytest.mark.parametrize("zero", ["w", "g"])
def test_gradients_are_finite_at_zero(zero):
    w, g = (jnp.zeros(2), jnp.array([0.3, 0.4]))
    if zero == "g":
        w, g = g, w
    gradients = jax.jit(
        jax.grad(lambda w, g, lr: lars_update(w, g, lr, stop_gradients=False).sum(), (0, 1, 2))
    )(w, g, 0.1)
    assert all(np.isfinite(x).all() for x in gradients)
    if zero == "w":
        np.testing.assert_allclose(gradients[1], [-0.1, -0.1], rtol=1e-6)


def test_the_device_is_kept():
    device = jax.devices()[2]
    w = jax.device_put(jnp.ones(3), device)
    assert lars_update(w, w, 0.1).devices() == {device}
    with jax.default_device(device):
        free = jnp.ones(3)
    new = lars_update(free, free, 0.1)
    assert (new.devices(), new.committed) == ({device}, free.committed)


def test_double_stays_double():
    with jax.enable_x64(True):
        w = jnp.array([3.0, 4.0])
        g = jnp.array([0.4, 0.3])
    assert w.dtype == jnp.float64
    new = lars_update(w, g, 0.1)
    assert new.dtype == jnp.float64
    assert to_numpy(new).tolist() == lars_update(np.asarray(w), np.asarray(g), 0.1).tolist()


def test_numbers_do_not_overflow_in_float32_under_jit():
    w, g = jnp.array([3e30, 4e30]), jnp.array([4e-30, 3e-30])
    np.testing.assert_allclose(jax.jit(lars_update)(w, g, 0.1), [2.6e30, 3.7e30], rtol=1e-6)


def test_skip_is_decided_inside_jit():
    update = jax.jit(lambda w, g: lars_update(w, g, 0.1, nonfinite="skip"))
    w = {"a": jnp.ones(2), "b": jnp.ones(2)}
    fine = update(w, w)
    assert fine["a"].tolist() == pytest.approx([0.9, 0.9])
    assert update(w, {"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])})["a"].tolist() == [1, 1]


def test_float0_gradients_leave_integers_as_they_are():
    """`jax.grad(allow_int=True)` gives float0 for integers, as numpy arrays or as tracers."""
    w = {"a": jnp.array([3.0, 4.0]), "i": jnp.array([1, 2])}

    def gradients(w):
        return jax.grad(lambda w: 0.1 * (w["a"] ** 2).sum() + 0.0 * w["i"].sum(), allow_int=True)(w)

    g, opt = gradients(w), Lars(0.1, nonfinite="skip")
    assert g["i"].dtype == jax.dtypes.float0
    expected = lars_update(w["a"], g["a"], 0.1)
    assert lars_update(w, g, 0.1)["a"].tolist() == expected.tolist()
    steps = [opt.update, jax.jit(lambda w, _, state: opt.update(w, gradients(w), state))]
    for step in steps:
        new, state = step(w, g, opt.init(w))
        assert (new["i"].tolist(), new["i"].dtype) == ([1, 2], w["i"].dtype)
        assert state.velocity.i is None
        assert int(state.step) == 1
        assert new["a"].tolist() != w["a"].tolist()
    assert report.trust_ratios(w, g, 0.1)["i"] is None
    w = jax.tree.map(np.array, w)
    assert lars_update(w, {"a": np.asarray(g["a"]), "i": g["i"]}, 0.1, out=w) is w
    assert (w["a"].tolist(), w["i"].tolist()) == (expected.tolist(), [1, 2])
