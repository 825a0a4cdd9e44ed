"""`Lars` updates trees by the rule with momentum, in every library."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
from conftest import need, to_library, to_numpy
from conftest import unit_lars as Lars
from hypothesis import assume, given
from hypothesis import strategies as st
from test_laws import DTYPES, trees, walk

from lars_tree import Array, Container, lars_update
from lars_tree.schedules import Polynomial
from lars_tree.testing import assert_identical, layers, options

W, G = np.array([3.0, 4.0]), np.array([0.4, 0.3])


def steps(opt, w, gradients, out=False):
    """The weights and the state after one step for each gradient."""
    state = opt.init(w)
    for g in gradients:
        w, state = opt.update(w, g, state, out=w if out else None)
    return w, state


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return Container(
        a={"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}, b=rng.normal(size=5)
    )


# ---- The rule


def test_two_steps_by_hand():
    """The ratio is 10, then |w| / |g| = 4.522... / 0.5; u = 0.1 * ratio * g."""
    w, state = steps(Lars(0.1, momentum=0.5), W, [G, G])
    second = 0.1 * np.hypot(2.6, 3.7) / 0.5 * G
    velocity = 0.5 * np.array([0.4, 0.3]) + second
    np.testing.assert_allclose(state.velocity, velocity, rtol=1e-15)
    np.testing.assert_allclose(w, [2.6, 3.7] - velocity, rtol=1e-15)
    assert (int(state.step), int(state.skipped)) == (2, 0)


def test_nesterov_by_hand():
    w, state = steps(Lars(0.1, 0.5, nesterov=True), W, [G])
    np.testing.assert_allclose(state.velocity, [0.4, 0.3], rtol=1e-15)
    np.testing.assert_allclose(w, W - 1.5 * np.array([0.4, 0.3]), rtol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_each_step_against_the_exact_rule(name, nesterov):
    """Each error is at most 1 ulp (4 for float64) of the element's largest of |w|, |u|, |v|."""
    dtype = need("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)
    rng = np.random.default_rng(0)
    opt = Lars(0.1, 0.9, nesterov, decay_lambda=0.01, trust_coefficient=0.1)
    w = rng.normal(size=40).astype(dtype)
    state = opt.init(w)
    v_name = "float64" if name == "float64" else "float32"
    for _ in range(5):
        g = rng.normal(size=40).astype(dtype)
        old_w, old_v = (x.astype(float).tolist() for x in (w, state.velocity))
        w, state = opt.update(w, g, state)
        assert (w.dtype, state.velocity.dtype) == (dtype, np.dtype(v_name))
        step = reference.lars(
            old_w, g.astype(float).tolist(), 0.1, decay_lambda=0.01, trust_coefficient=0.1
        )
        exact = reference.move(old_w, old_v, step, 0.9, nesterov)
        for new, old, values, format_name in [
            (w, old_w, exact.w_new, name),
            (state.velocity, old_v, exact.v_new, v_name),
        ]:
            scale = reference.Step(
                [max(map(abs, row)) for row in zip(step.u, exact.change, old_v, strict=True)],
                values,
                None,
            )
            bound = 4 if format_name == "float64" else 1 + 1e-6
            assert (
                reference.worst_error(new.astype(float).tolist(), old, scale, format_name) <= bound
            )


EXTREMES = [-1060, -900, -500, 0, 500, 900, 1020]


@pytest.mark.parametrize("w_exponent", EXTREMES)
@pytest.mark.parametrize("g_exponent", EXTREMES)
def test_the_whole_range_of_float64(w_exponent, g_exponent):
    rng = np.random.default_rng(1)
    w, g, v = (
        np.ldexp(rng.uniform(1, 2, 6) * rng.choice([-1, 1], 6), e)
        for e in (w_exponent, g_exponent, w_exponent)
    )
    opt = Lars(0.5, 0.75, decay_lambda=0.25)
    state = opt.init(w)
    state["velocity"] = v.copy()
    new, after = opt.update(w, g, state)
    step = reference.lars(w.tolist(), g.tolist(), 0.5, decay_lambda=0.25)
    exact = reference.move(w.tolist(), v.tolist(), step, 0.75)
    scale = [max(abs(a), abs(b)) for a, b in zip(step.u, exact.v_new, strict=True)]
    for actual, old, values in [
        (new, w, exact.w_new),
        (after.velocity, v, exact.v_new),
    ]:
        target = reference.Step(scale, values, None)
        assert reference.worst_error(actual.tolist(), old.tolist(), target, "float64") <= 4


# ---- Laws

# `Lars` requires gradients of the same shapes as the weights.
LAYERS = layers(DTYPES)
TREES = trees(LAYERS)


@given(pair=TREES, options=options(), momentum=st.sampled_from([0, 0.0]))
def test_without_momentum_it_is_lars_update_to_the_bit(pair, options, momentum):
    w, g = pair
    new, state = steps(Lars(0.1, momentum, **options), w, [g])
    expected = lars_update(w, g, 0.1, **options)
    assert_identical(new, expected)
    assert state.keys() == {"step", "skipped"}


@given(pair=TREES, options=options(), nesterov=st.booleans())
def test_the_first_step_moves_by_the_step_of_lars_update(pair, options, nesterov):
    """The velocity after the first step is u, within the rounding errors of w - u."""
    w, g = pair
    _, state = steps(Lars(0.25, 0.5, nesterov, **options), w, [g])
    zero = [(path, x) for path, x in walk(state["velocity"])]
    for (path, v), (_, x), (_, dx) in zip(zero, walk(w), walk(g), strict=True):
        if x is None:
            assert v is None
            continue
        wide = np.result_type(x.dtype.newbyteorder("="), np.longdouble)  # w - u can overflow double
        small = np.broadcast_to(dx, x.shape).astype(wide)
        u = x.astype(wide) - lars_update(x.astype(wide), small, 0.25, **options)
        atol = 1e-6 * (np.abs(x.astype(wide)).max(initial=0) + np.abs(u).max(initial=0))
        with np.errstate(over="ignore"):  # a velocity can overflow its dtype
            u, atol = u.astype(v.dtype), float(atol)
        # u is rounded twice, each time by at most half of the smallest subnormal number.
        atol += float(np.finfo(v.dtype).smallest_subnormal)
        np.testing.assert_allclose(v, u, rtol=1e-6, atol=atol, err_msg=str(path))


@given(pair=TREES, nesterov=st.booleans())
def test_in_place_and_out_of_place_agree(pair, nesterov):
    w, g = pair
    assume(w is not None)  # out=None would not be in place
    opt = Lars(0.1, 0.9, nesterov, decay_lambda=0.01)
    expected, after = steps(opt, w, [g, g, g])
    out = copy.deepcopy(w)
    state = opt.init(out)
    arrays = [x for _, x in walk(state) if x is not None]
    for _ in range(3):
        result = opt.update(out, g, state, out=out)
        assert result[0] is out
        assert result[1] is state
    for actual, wanted in [(out, expected), (state, after)]:
        assert_identical(actual, wanted)
    now = [x for _, x in walk(state) if x is not None]
    assert all(x is y for x, y in zip(arrays, now, strict=True))


@given(leaf=LAYERS, nesterov=st.booleans())
def test_neither_weights_nor_state_nor_gradients_are_modified(leaf, nesterov):
    w, g = leaf
    opt = Lars(0.1, 0.9, nesterov)
    _, state = steps(opt, w, [g])
    before = [x.tobytes() for x in (w, g, state.velocity, state.step)]
    opt.update(w, g, state)
    assert [x.tobytes() for x in (w, g, state.velocity, state.step)] == before


def test_a_leaf_of_a_tree_is_updated_as_on_its_own():
    w, g = random_tree(0), random_tree(1)
    together, _ = steps(Lars(0.1), w, [g, g])
    for path in w.paths():
        alone, _ = steps(Lars(0.1), w[path], [g[path], g[path]])
        assert np.array_equal(together[path], alone)


def test_stacked_layers_are_updated_like_separate_layers():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 3, 4, 5))
    for axis in (0, 1, -1):
        for clip in (False, True):
            opt = Lars(0.1, 0.9, True, layer_axis=axis, trust_clip=clip, decay_lambda=0.1)
            single = Lars(0.1, 0.9, True, trust_clip=clip, decay_lambda=0.1)
            together, _ = steps(opt, w, [g, g])
            rows = zip(np.moveaxis(w, axis, 0), np.moveaxis(g, axis, 0), strict=True)
            each = [steps(single, x.copy(), [dx, dx])[0] for x, dx in rows]
            np.testing.assert_allclose(np.moveaxis(together, axis, 0), each, rtol=1e-14)


def test_trust_clip_limits_the_local_rate():
    """As in LARC, the local rate is min(ratio, lr)."""
    w, g = {"a": 100 * W, "b": 0.001 * W}, {"a": G, "b": G}
    _, state = steps(Lars(0.1, trust_clip=True), w, [g])
    np.testing.assert_allclose(state.velocity.a, 0.1 * G, rtol=1e-15)
    np.testing.assert_allclose(state.velocity.b, 0.005 / 0.5 * G, rtol=1e-14)


def test_options_and_momentum_may_differ_by_leaf():
    w, g = random_tree(0), random_tree(1)
    opt = Lars({"a": 0.1, "b": 0.3}, {"a": 0.5, "b": 0.0}, adapt={"a": True, "b": False})
    new, state = steps(opt, w, [g, g])
    np.testing.assert_allclose(state.velocity.b, 0.3 * g.b, rtol=1e-15)
    np.testing.assert_allclose(new.b, w.b - 0.6 * g.b, rtol=1e-14)
    alone, _ = steps(Lars(0.1, 0.5), w.a, [g.a, g.a])
    assert new.a == alone


def test_leaves_without_gradient_are_not_updated():
    w, g = random_tree(0), random_tree(1)
    for out in (False, True):
        opt = Lars(0.1)
        x, state = steps(opt, copy.deepcopy(w), [g])
        before = copy.deepcopy((x, state))
        x, state = opt.update(x, {"a": None, "b": g.b}, state, out=x if out else None)
        assert x.a == before[0].a
        assert state.velocity.a == before[1].velocity.a
        assert not np.array_equal(x.b, before[0].b)
        assert int(state.step) == 2


# ---- Libraries


def test_every_library_agrees_with_numpy(library):
    rng = np.random.default_rng(0)
    w, gs = rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 4))
    opt = Lars(Polynomial(0.2, 10, 2), nesterov=True, decay_lambda=0.01)
    expected, after = steps(opt, w, gs)
    made = to_library(library.name, w)
    new, state = steps(opt, {"w": made}, [{"w": to_library(library.name, g)} for g in gs])
    assert type(new["w"]) is type(made)
    tolerance = {"rtol": 0, "atol": 0} if library.exact else {"rtol": 1e-12}
    np.testing.assert_allclose(to_numpy(new["w"]), expected, **tolerance)
    np.testing.assert_allclose(to_numpy(state.velocity["w"]), after.velocity, **tolerance)
    assert int(to_numpy(state.step)) == 3


def test_every_library_stacks_and_clips_layers(library):
    """The expected results are from a loop over the layers in numpy."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 3, 4))
    w[1] *= 1e-3  # one ratio is clipped, the other is not
    options = {"trust_clip": True, "decay_lambda": 0.1, "nesterov": True}
    each = [steps(Lars(0.1, **options), x, [dx, dx])[0] for x, dx in zip(w, g, strict=True)]
    made, given = to_library(library.name, w), to_library(library.name, g)
    new, _ = steps(Lars(0.1, layer_axis=0, **options), made, [given, given])
    np.testing.assert_allclose(to_numpy(new), each, rtol=1e-12)


def test_a_compiled_step_stacks_layers():
    jax, jnp = need("jax"), need("jax.numpy")
    w, g = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 4)), "float32") for i in (0, 1))
    opt = Lars(0.1, layer_axis=1, trust_clip=True, nesterov=True)
    new, state = jax.jit(opt.update)(w, g, opt.init(w))
    for i in range(4):
        alone, alone_state = steps(Lars(0.1, trust_clip=True, nesterov=True), w[:, i], [g[:, i]])
        np.testing.assert_allclose(new[:, i], alone, rtol=1e-6)
        np.testing.assert_allclose(state.velocity[:, i], alone_state.velocity, rtol=1e-6)


def test_wrapped_arrays_stay_wrapped():
    new, state = steps(Lars(0.1), {"a": Array(W)}, [{"a": Array(G)}] * 2)
    assert type(new["a"]) is type(state.velocity.a) is Array
    np.testing.assert_allclose(state.velocity.a.data, steps(Lars(0.1), W, [G, G])[1].velocity)


def test_jit_and_scan_agree_with_the_direct_call():
    jax, jnp = need("jax"), need("jax.numpy")
    w, g = (random_tree(seed).map(lambda x: jnp.asarray(x, jnp.float32)) for seed in (0, 1))
    opt = Lars(Polynomial(0.2, 10, 2), nesterov=True, decay_lambda=0.01, nonfinite="skip")
    expected, after = steps(opt, w, [g] * 4)
    update = jax.jit(opt.update)
    x, state = w, opt.init(w)
    for _ in range(4):
        x, state = update(x, g, state)
    scanned, last = jax.lax.scan(
        lambda c, _: (opt.update(c[0], g, c[1]), None), (w, opt.init(w)), None, 4
    )[0]
    assert int(state.step) == int(last.step) == int(after.step) == 4
    for actual in (x, scanned):
        for a, b in zip(actual.leaves(), expected.leaves(), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    for a, b in zip(last.velocity.leaves(), after.velocity.leaves(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [False, True])
def test_a_compiled_step_that_is_skipped_is_counted(bad):
    jax, jnp = need("jax"), need("jax.numpy")
    w = {"a": jnp.asarray(W, jnp.float32), "b": jnp.ones(2)}
    g = {"a": jnp.asarray(G, jnp.float32), "b": jnp.array([1.0, np.nan if bad else 1.0])}
    opt = Lars(0.1, nonfinite="skip")
    new, state = jax.jit(opt.update)(w, g, opt.init(w))
    assert (int(state.step), int(state.skipped)) == ((0, 1) if bad else (1, 0))
    assert (new["a"] == w["a"]).all() == bad
    assert (state.velocity.a == 0).all() == bad


def test_torch_func_maps_and_differentiates_a_step():
    torch = need("torch")
    opt = Lars(0.1, 0.5, stop_gradients=False)
    ws, gs = torch.tensor(np.stack([W, 2 * W])), torch.tensor(np.stack([G, 3 * G]))

    def second(w, g):
        state = opt.init(w)
        for _ in range(2):
            w, state = opt.update(w, g, state)
        return w

    mapped = torch.func.vmap(second)(ws, gs)
    for i in range(2):
        torch.testing.assert_close(mapped[i], second(ws[i], gs[i]), rtol=1e-12, atol=0)
    slope = torch.func.grad(lambda w: second(w, gs[0]).sum())(ws[0])
    for k in range(2):
        e = torch.zeros(2, dtype=torch.float64)
        e[k] = 1e-6
        change = (second(ws[0] + e, gs[0]) - second(ws[0] - e, gs[0])).sum() / 2e-6
        assert float(slope[k]) == pytest.approx(float(change), rel=1e-6)
