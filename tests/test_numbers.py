"""Errors against `reference.py` are bounded over the whole range of each format.

The bound of each element is 4 ulps of max(|w|, |u|) for float64, and 1 ulp for other formats; u is
the step. `tests/reliability/exponents.py` has grids of all pairs of exponents.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import reference
from conftest import need, to_numpy
from conftest import unit_lars as Lars
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import lars_update

# Results near the midpoint of two numbers may be rounded either way, so the bounds exceed 1 ulp.
BOUNDS = {"float16": 1 + 1e-6, "bfloat16": 1 + 1e-6, "float32": 1 + 1e-6, "float64": 4}
DECAYS = [0.0, 1e-4, 0.1, 3.0]


def dtype_of(name):
    return need("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def random_array(rng, name, exponent, size):
    """Random elements with about this exponent, clipped to the range of the format."""
    bits, smallest, largest = reference.FORMATS[name]
    exponents = exponent + rng.integers(-2, 3, size)
    mantissas = rng.uniform(1, 2, size) * rng.choice([-1, 1], size)
    limit = np.ldexp(2.0 - 2.0 ** (1 - bits), largest)
    values = np.ldexp(mantissas, np.clip(exponents, smallest - bits, largest))
    return np.clip(values, -limit, limit).astype(dtype_of(name))


def error(w, g, lr, name, update=lars_update, **options):
    new = to_numpy(update(w, g, lr, **options))
    assert new.dtype == dtype_of(name)
    flat = [x.astype(np.float64).ravel(order="K").tolist() for x in (new, w, g)]
    step = reference.lars(flat[1], flat[2], lr, **options)
    return reference.worst_error(flat[0], flat[1], step, name)


def exponents(name, count):
    bits, smallest, largest = reference.FORMATS[name]
    return [int(e) for e in np.linspace(smallest - bits + 1, largest, count)]


@pytest.mark.parametrize("name", reference.FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {"trust_coefficient": 1e-3},
        {"eps": 1e-8},
        {"eps": 1e-300, "decay_lambda": 1e-200},
        {"adapt": False, "decay_lambda": 0.01},
        {"trust_clip": True},
        {"grad_scale": 65536.0, "decay_lambda": 1e-4, "eps": 1e-6},
        {"trust_clip": True, "grad_scale": 1e-3, "trust_coefficient": 10.0},
        {"joint_norm": True, "decay_lambda": 1e-4, "trust_clip": True, "eps": 1e-8},
        {"joint_norm": True, "decay_lambda": 3.0, "grad_scale": 0.1},
        {"joint_norm": True, "decay_lambda": 1e-200},
    ],
    ids=str,
)
def test_the_error_is_bounded_for_every_option(name, options):
    rng = np.random.default_rng(2)
    for w_exponent, g_exponent in itertools.product(exponents(name, 7), repeat=2):
        w = random_array(rng, name, w_exponent, 5)
        g = random_array(rng, name, g_exponent, 5)
        assert error(w, g, 0.1, name, **options) <= BOUNDS[name]


@pytest.mark.parametrize("decay", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_norm_of_a_sum_is_exact_where_the_sum_cancels(name, decay):
    """The sum g + decay * w is small; a norm computed from dot products would lose its digits."""
    rng = np.random.default_rng(9)
    for exponent, part in itertools.product(exponents(name, 7)[1:-1], [0, 1e-12, 1e-6, 1e-2]):
        w = random_array(rng, name, exponent, 5)
        g = (-decay * w.astype(float) * (1 + part * rng.normal(size=5))).astype(w.dtype)
        if not np.isfinite(g.astype(float)).all():
            continue
        options = {"joint_norm": True, "decay_lambda": decay}
        assert error(w, g, 0.1, name, **options) <= BOUNDS[name]


def test_simple_values_of_the_options_of_the_denominator():
    w, g = np.array([3.0, 4.0]), np.array([0.4, 0.3])
    joint = lars_update(w, g, 0.1, decay_lambda=0.1, joint_norm=True)
    assert joint.round(3).tolist() == [2.646, 3.646]
    larc = {"trust_coefficient": 0.02, "trust_clip": True}
    assert np.allclose(lars_update(w / 10, g, 0.1, **larc), w / 10 - 0.02 * g, rtol=1e-15)
    assert np.allclose(lars_update(w, g, 0.1, **larc), w - 0.1 * g, rtol=1e-15)
    assert lars_update(w, g, 0.0, **larc).tolist() == [3.0, 4.0]
    assert np.allclose(lars_update(0 * w, g, 0.1, **larc), -0.1 * g, rtol=1e-15)
    decays = {"decay_lambda": 0.01, "trust_coefficient": 1e-3}
    assert np.allclose(lars_update(w, 0 * g, 0.1, **decays), [2.997, 3.996], rtol=1e-15)


@pytest.mark.parametrize("name", reference.FORMATS)
@pytest.mark.parametrize("size", [1, 63, 128, 129, 1000, 16_384, 16_385, 50_001])
def test_long_sums_are_exact(name, size):
    """The worst case is a constant array: the rounding errors of all squares have the same sign."""
    rng = np.random.default_rng(size)
    for values in (np.full(size, 1.7), rng.uniform(1, 2, size)):
        w, g = values.astype(dtype_of(name)), (values[::-1] * 0.3).astype(dtype_of(name))
        flat = w[:3].astype(float).tolist(), g[:3].astype(float).tolist()
        new = lars_update(w, g, 1.0)[:3].astype(float).tolist()
        norms = [reference.norm(x.astype(float).tolist()) for x in (w, g)]
        u = [norms[0] / norms[1] * x for x in flat[1]]
        step = reference.Step(u, [x - y for x, y in zip(flat[0], u, strict=True)], None)
        assert reference.worst_error(new, flat[0], step, name) <= BOUNDS[name]


finite = {
    name: st.floats(width=width, allow_nan=False, allow_infinity=False)
    for name, width in (("float16", 16), ("float32", 32), ("float64", 64))
}
rates = st.sampled_from([0.0, 1e-5, 0.1, 0.5, 1.0])


@pytest.mark.parametrize("name", finite)
@given(data=st.data(), lr=rates, decay=st.sampled_from(DECAYS))
def test_the_error_is_bounded_for_any_numbers(name, data, lr, decay):
    size = data.draw(st.integers(1, 6))
    w, g = (
        np.array(data.draw(st.lists(finite[name], min_size=size, max_size=size)), name)
        for _ in range(2)
    )
    assert error(w, g, lr, name, decay_lambda=decay) <= BOUNDS[name]


@given(size=st.integers(1, 5), data=st.data(), decay=st.sampled_from(DECAYS))
def test_a_rate_for_each_element(size, data, decay):
    numbers = st.lists(finite["float32"], min_size=size, max_size=size)
    w, g = (np.array(data.draw(numbers), np.float32) for _ in range(2))
    lr = np.array(data.draw(st.lists(rates | st.just(3.0), min_size=size, max_size=size)))
    options = {"decay_lambda": decay, "joint_norm": data.draw(st.booleans())}
    options["trust_clip"] = data.draw(st.booleans())
    new = lars_update(w, g, lr, **options)
    step = reference.lars(w.tolist(), g.tolist(), lr, **options)
    assert reference.worst_error(new.tolist(), w.tolist(), step, "float32") <= BOUNDS["float32"]


def test_a_ratio_beyond_double_bounds_a_rate_for_each_element():
    w, g = np.array([3e-155, 4e-155]), np.array([4e298, 3e298])
    rates = np.array([0.1, 0.1])
    for options in ({}, {"joint_norm": True, "decay_lambda": 1e-9}):
        expected = lars_update(w, g, 0.1, trust_clip=True, **options)
        actual = lars_update(w, g, rates, trust_clip=True, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-15)
        np.testing.assert_allclose(actual, [-1e-155, 1e-155], rtol=1e-15)
    w, g = np.array([3e-138, 4e-138]), np.array([4e137, 3e137])
    actual = lars_update(w, g, np.array([1e-276, 0.1]), trust_clip=True)  # the ratio is 1e-275
    np.testing.assert_allclose(actual, [2.6e-138, 1e-138], rtol=1e-15)


def test_rates_of_layers_with_a_norm_of_0_are_not_clipped():
    x, zeros, rates = np.array([0.6, 0.8]), np.zeros(2), np.array([3.0, 0.5])
    options = {"trust_clip": True, "decay_lambda": 0.25}
    steps = {"zero weights": (zeros, x, rates * x), "no gradient": (x, zeros, 0.25 * rates * x)}
    steps["norms of 1"] = x, x, np.minimum(rates, 0.8) * 1.25 * x
    for name, (w, g, u) in steps.items():
        new = lars_update(w, g, rates, **options)
        np.testing.assert_allclose(new, w - u, rtol=0, atol=2e-16, err_msg=name)


@pytest.mark.parametrize("library_name", ["torch", "jit", "dask", "strict"])
def test_whole_arrays_are_exact_where_a_sum_cancels(library_name):
    from conftest import to_library

    rng = np.random.default_rng(10)
    options = {"joint_norm": True, "decay_lambda": 0.1}
    exponents = [0] if library_name == "jit" else [0, -1030, -1066]  # XLA flushes small numbers
    for part, exponent in itertools.product((1, 1e-1, 1e-3, 1e-6, 1e-12, 0), exponents):
        w = np.ldexp(rng.normal(size=5), exponent)
        g = -0.1 * w * (1 - part * rng.uniform(0.5, 1.5, 5))
        if library_name == "jit":
            with need("jax").enable_x64(True):
                new = to_numpy(
                    need("jax").jit(lambda w, g: lars_update(w, g, 1.0, **options))(w, g)
                )
        else:
            ours = [to_library(library_name, x) for x in (w, g)]
            given = options
            if library_name == "torch":
                ours[0].requires_grad_()
                given = {**options, "stop_gradients": False}
            new = to_numpy(lars_update(*ours, 1.0, **given))
        step = reference.lars(w.tolist(), g.tolist(), 1.0, **options)
        assert reference.worst_error(new.tolist(), w.tolist(), step, "float64") <= 4


@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_complex_numbers_are_pairs_of_real_ones(name):
    rng = np.random.default_rng(4)
    real = "float32" if name == "complex64" else "float64"
    w, g = ((rng.normal(size=6) + 1j * rng.normal(size=6)).astype(name) for _ in range(2))
    expected = lars_update(w.view(real), g.view(real), 0.1, decay_lambda=0.01)
    assert lars_update(w, g, 0.1, decay_lambda=0.01).view(real).tolist() == expected.tolist()
    step = reference.lars(w.tolist(), g.tolist(), 0.1, decay_lambda=0.01)
    new = lars_update(w, g, 0.1, decay_lambda=0.01).tolist()
    assert max(abs(a - complex(b)) for a, b in zip(new, step.w_new, strict=True)) < 1e-6


def test_long_double_keeps_its_digits_and_its_range():
    two = np.longdouble(2)
    w = np.array([3, 4], np.longdouble) * two**1100  # out of the range of double
    g = np.array([4, 3], np.longdouble) * two**-1100
    if not np.isfinite(w).all():
        pytest.skip("long double is double here")
    new = lars_update(w, g, 0.5)
    assert new.dtype == np.longdouble
    assert (new / two**1100).tolist() == [1.0, 2.5]
    third = np.array([1, 2, 2], np.longdouble) / 3  # the norm is 1 to the last digit
    fresh = lars_update(third, third, 0.25)
    assert np.max(np.abs(fresh - third * 3 / 4)) <= 4 * np.finfo(np.longdouble).eps


def of_long_double(x):
    """The exact elements: each is the sum of two doubles."""
    high = x.astype(float)
    return [reference.mpf(a) + float(b) for a, b in zip(high, x - high, strict=True)]


@pytest.mark.parametrize("decay", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("joint", [False, True])
def test_long_double_is_as_exact_as_its_digits(decay, joint):
    eps = np.finfo(np.longdouble).eps
    if eps == np.finfo(float).eps:
        pytest.skip("long double is double here")
    rng = np.random.default_rng(11)
    for part in (1, 1e-15):
        w, g = rng.uniform(1, 2, (2, 5)) + rng.integers(0, 2**11, (2, 5)) * eps
        if joint and part < 1:  # g and the decay nearly cancel
            g = -decay * w * (1 - part * g)
        options = {"decay_lambda": decay, "joint_norm": joint}
        new = lars_update(w, g, 0.1, **options)
        flat = [of_long_double(x) for x in (new, w, g)]
        step = reference.lars(flat[1], flat[2], 0.1, **options)
        for x, wi, ui, exact in zip(flat[0], flat[1], step.u, step.w_new, strict=True):
            assert abs(x - exact) <= 4 * float(eps) * max(abs(wi), abs(ui))


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_the_result_is_rounded_once(name, bits):
    """1 + 2**-bits - 2**-45 is just below a midpoint, so rounding twice would round up."""
    w = np.array([1.0], dtype_of(name))
    g = np.array([1.0], dtype_of(name))
    lr = -(2.0**-bits - 2.0**-45)
    new = lars_update(w, -g, -lr)  # 1 + 2**-bits - 2**-45
    assert new.astype(float).tolist() == [1.0]


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
def test_bfloat16_is_rounded_to_nearest_even_like_the_reference():
    from lars_tree._numerics import bfloat16

    bfloat = need("ml_dtypes").bfloat16
    every = np.arange(2**16, dtype=np.uint16)
    values = bfloat16.decode(every)
    finite = values[np.isfinite(values)]
    assert np.array_equal(values, every.view(bfloat).astype(np.float64), equal_nan=True)
    assert np.array_equal(bfloat16.encode(finite), every[np.isfinite(values)])
    ordered = np.unique(finite)
    middle = (ordered[1:] + ordered[:-1]) / 2
    for nudge, expected in ((-1, ordered[:-1]), (1, ordered[1:])):
        nudged = np.nextafter(middle, nudge * np.inf)
        assert np.array_equal(bfloat16.decode(bfloat16.encode(nudged)), expected)
    assert (bfloat16.encode(middle) % 2 == 0).all()
    extremes = bfloat16.decode(bfloat16.encode(np.array([np.inf, -np.inf, np.nan, 1e39, -1e300])))
    assert np.array_equal(extremes, [np.inf, -np.inf, np.nan, np.inf, -np.inf], equal_nan=True)


@pytest.mark.parametrize(
    ("decay", "joint"), [(0.0, False), (1e-4, False), (0.1, False), (0.1, True)]
)
@pytest.mark.parametrize("name", reference.FORMATS)
def test_jit_keeps_the_bounds_for_normal_numbers(name, decay, joint):
    """XLA flushes subnormal numbers to zero on the CPU."""
    jax = need("jax")
    rng = np.random.default_rng(5)
    bits, smallest, largest = reference.FORMATS[name]
    with jax.enable_x64(True):
        options = {"decay_lambda": decay, "joint_norm": joint}
        update = jax.jit(lambda w, g, lr: lars_update(w, g, lr, **options))
        grid = [int(e) for e in np.linspace(smallest + bits + 3, largest - 4, 6)]
        for w_exponent, g_exponent in itertools.product(grid, repeat=2):
            w, g = (random_array(rng, name, e, 5) for e in (w_exponent, g_exponent))
            new = to_numpy(update(w, g, 0.1))
            flat = [x.astype(float).tolist() for x in (new, w, g)]
            step = reference.lars(flat[1], flat[2], 0.1, **options)
            assert reference.worst_error(flat[0], flat[1], step, name) <= BOUNDS[name]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("library_name", ["torch", "dask", "strict"])
@pytest.mark.parametrize(("decay", "joint"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_array_operations_keep_the_bounds(library_name, name, decay, joint):
    """Updates with autograd, Dask and the array API standard use `formula.step`."""
    from conftest import to_library

    rng = np.random.default_rng(6)
    for w_exponent, g_exponent in itertools.product(exponents(name, 6), repeat=2):
        w, g = (random_array(rng, name, e, 5) for e in (w_exponent, g_exponent))
        ours = [to_library(library_name, x) for x in (w, g)]
        options = {"decay_lambda": decay, "joint_norm": joint}
        given = options
        if library_name == "torch":
            ours[0].requires_grad_()
            given = {**options, "stop_gradients": False}
        new = to_numpy(lars_update(*ours, 0.1, **given))
        step = reference.lars(w.tolist(), g.tolist(), 0.1, **options)
        assert reference.worst_error(new.tolist(), w.tolist(), step, name) <= BOUNDS[name]


@cache
def compiled(**options):
    opt = Lars(1.0, trust_coefficient=0.1, **options)
    return need("jax").jit(lambda w, g: opt.update(w, g, opt.init(w))[1].velocity)


def stepped_from_rest(way, w, g, options):
    """The velocity after one step from velocity 0: the change of the weights before rounding."""
    from conftest import to_library

    if way in ("foreach", "fused"):  # as on accelerators
        torch = need("torch")
        optimizer = need("lars_tree.torch").Lars
        names = {"decay_lambda": "weight_decay"}
        given = {names.get(name, name): x for name, x in options.items() if name != "grad_scale"}
        w = torch.nn.Parameter(torch.tensor(w))
        w.grad = torch.tensor(g)
        stepping = optimizer([w], 1.0, trust_coefficient=0.1, eps=0.0, **{way: True}, **given)
        assert stepping.engine == way
        stepping.grad_scale = torch.tensor(options.get("grad_scale", 1.0), dtype=torch.float64)
        stepping.step()
        return to_numpy(stepping.state[w]["momentum_buffer"])
    opt = Lars(1.0, trust_coefficient=0.1, stop_gradients=way != "torch", **options)
    if way != "jit":
        w, g = (to_library(way, x) for x in (w, g))
        w = w.requires_grad_() if way == "torch" else w
        return to_numpy(opt.update(w, g, opt.init(w))[1].velocity)
    jax = need("jax")
    with jax.enable_x64(True):
        w, g = map(jax.numpy.asarray, (w, g))
        return to_numpy(compiled(**options)(w, g))


@pytest.fixture(params=["numpy", "foreach", "fused", "torch", "strict", "jit"])
def way(request):
    """The engines, and libraries whose arrays are updated by whole-array operations."""
    if request.param == "fused":
        if need("torch").cuda.is_available():
            pytest.skip("Triton interprets no kernels if it runs them on a GPU")
        request.getfixturevalue("small_chunks")
    return request.param


@pytest.mark.filterwarnings("ignore:(overflow|underflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(("decay", "joint"), [(0.0, False), (0.1, False), (0.1, True)])
def test_a_velocity_has_its_digits_where_the_weights_hide_them(way, decay, joint):
    """The steps are far smaller or larger than the weights, which may be 0."""
    rng = np.random.default_rng(7)
    grid = [-960, 0, 1000]
    for w_exponent, g_exponent, clip in itertools.product([None, *grid], grid, [False, True]):
        w, g = np.abs([random_array(rng, "float64", e or 0, 5) for e in (w_exponent, g_exponent)])
        w *= w_exponent is not None
        options = {"decay_lambda": decay, "trust_clip": clip, "joint_norm": joint}
        step = reference.lars(w.tolist(), g.tolist(), 1.0, trust_coefficient=0.1, **options)
        expected = [float(x) for x in step.u]
        actual = stepped_from_rest(way, w, g, options)
        case = f"{w_exponent}, {g_exponent}, {clip}"
        np.testing.assert_allclose(actual, expected, rtol=2e-15, atol=1e-300, err_msg=case)


@pytest.mark.filterwarnings("ignore:(overflow|underflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(("g_exponent", "grad_scale"), [(-1010, 2.0**80), (1010, 2.0**-80)])
def test_the_loss_scale_may_take_a_gradient_out_of_range(way, g_exponent, grad_scale):
    """The unscaled gradient is out of range, but the step is not."""
    rng = np.random.default_rng(8)
    for w_exponent, decay, clip in itertools.product([0, 900], [0.0, 1e-4], [False, True]):
        w, g = (random_array(rng, "float64", e, 5) for e in (w_exponent, g_exponent))
        options = {"decay_lambda": decay, "trust_clip": clip, "grad_scale": grad_scale}
        step = reference.lars(w.tolist(), g.tolist(), 1.0, trust_coefficient=0.1, **options)
        expected = [float(x) for x in step.u]
        actual = stepped_from_rest(way, w, g, options)
        case = f"{w_exponent}, {decay}, {clip}"
        np.testing.assert_allclose(actual, expected, rtol=2e-15, atol=1e-300, err_msg=case)
