"""The fused engine against `reference.py`, and against the native engine.

Triton interprets the kernels if there is no GPU. Chunks are small where the test says so.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from conftest import interpreting, need, need_triton
from test_numbers import BOUNDS, exponents, random_array

torch = need("torch")
need_triton()

from lars_tree._backends.torch.fused import Fused, row_of  # noqa: E402
from lars_tree._backends.torch.layers import Layer  # noqa: E402
from lars_tree._numerics.formula import Rule  # noqa: E402

with interpreting():  # Triton reads the variable when a kernel is defined
    from lars_tree._backends.torch import kernels  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.usefixtures("small_chunks")


def to_torch(x, name):
    """A copy on the device; torch cannot convert bfloat16 arrays of numpy."""
    return torch.tensor(np.asarray(x, np.float64)).to(DEVICE, getattr(torch, name))


def floats(x):
    return x.double().flatten().tolist()


def write(layers, unless=None):
    engine = engine_of(layers)
    engine.write(engine.norms(), unless)


def engine_of(layers):
    return Fused(layers, list(map(row_of, layers)))


def errors(cases, name, g_name=None):
    """The errors, in ulps, of steps from weights and gradients with rates and options."""
    layers = []
    for w, g, lr, options in cases:
        w, g = to_torch(w, name), to_torch(g, g_name or name)
        layers.append(Layer(w, g, torch.empty_like(w), None, Rule(lr, **options)))
    write(layers)
    found = []
    for layer, (_, _, lr, options) in zip(layers, cases, strict=True):
        w = floats(layer.w)
        step = reference.lars(w, floats(layer.dcdw), lr, **options)
        found.append(reference.worst_error(floats(layer.out), w, step, name))
    return found


def grid(rng, name, count, options, size=3, g_name=None):
    """Cases over the range of exponents of a format."""
    every = itertools.product(exponents(name, count), exponents(g_name or name, count))
    return [
        (random_array(rng, name, e, size), random_array(rng, g_name or name, f, size), lr, options)
        for (e, f), lr in zip(every, itertools.cycle([1e-3, 0.1, 1.0]))
    ]


# ---- Errors


@pytest.mark.parametrize("name", reference.FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trust_coefficient": 1e-3, "decay_lambda": 1e-4},
        {"decay_lambda": 3.0, "maximize": True},
        {"eps": 1e-8},
        {"eps": 1e-300, "decay_lambda": 1e-200},
        {"adapt": False, "decay_lambda": 0.01, "maximize": True},
        {"trust_clip": True},
        {"grad_scale": 65536.0, "decay_lambda": 1e-4, "eps": 1e-6},
        {"trust_clip": True, "grad_scale": 1e-3, "trust_coefficient": 10.0},
        {"joint_norm": True, "decay_lambda": 1e-4, "trust_clip": True, "eps": 1e-8},
        {"joint_norm": True, "decay_lambda": 3.0, "grad_scale": 0.1, "maximize": True},
        {"joint_norm": True, "decay_lambda": 1e-200},
    ],
    ids=str,
)
def test_the_error_is_bounded_for_every_option_and_exponent(name, options):
    cases = grid(np.random.default_rng(1), name, 5, options)
    found = errors(cases, name)
    assert len(found) == 25
    assert max(found) <= BOUNDS[name]


def test_layers_of_all_formats_and_options_do_not_affect_each_other():
    """One engine; JOINT and SCALES are the same for all layers, and rules differ."""
    rng = np.random.default_rng(2)
    options = [{}, {"joint_norm": True, "decay_lambda": 0.1}, {"adapt": False}]
    layers = []
    for name, each, exponent in itertools.product(reference.FORMATS, options, (-10, 10)):
        w, g = (to_torch(random_array(rng, name, e, 5), name) for e in (exponent, -exponent))
        layers.append((name, each, Layer(w, g, torch.empty_like(w), None, Rule(0.1, **each))))
    write([layer for *_, layer in layers])
    for name, each, layer in layers:
        w = floats(layer.w)
        step = reference.lars(w, floats(layer.dcdw), 0.1, **each)
        assert reference.worst_error(floats(layer.out), w, step, name) <= BOUNDS[name]


@pytest.mark.parametrize("decay", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_norm_of_a_sum_is_exact_where_the_sum_cancels(name, decay):
    """The sum g + decay * w is small; a norm computed from dot products would lose its digits."""
    rng = np.random.default_rng(9)
    options = {"joint_norm": True, "decay_lambda": decay}
    cases = []
    for exponent, part in itertools.product(exponents(name, 7)[1:-1], [0, 1e-12, 1e-6, 1e-2]):
        w = random_array(rng, name, exponent, 5)
        g = (-decay * w.astype(float) * (1 + part * rng.normal(size=5))).astype(w.dtype)
        if np.isfinite(g.astype(float)).all():
            cases.append((w, g, 0.1, options))
    assert max(errors(cases, name)) <= BOUNDS[name]
    assert len(cases) > 14


@pytest.mark.parametrize(
    ("name", "g_name"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float64"),
        ("float64", "float16"),
        ("float32", "float64"),
    ],
)
def test_a_gradient_may_have_another_format(name, g_name):
    rng = np.random.default_rng(3)
    for options in ({"decay_lambda": 0.01}, {"joint_norm": True, "decay_lambda": 0.01}):
        cases = grid(rng, name, 4, options, g_name=g_name)
        assert max(errors(cases, name, g_name)) <= BOUNDS[name]


@pytest.mark.parametrize("name", reference.FORMATS)
def test_elements_of_all_sizes_in_one_array(name):
    """A joint gradient is scaled, so its smallest elements would be lost in the whole range."""
    rng = np.random.default_rng(3)
    decay = {"decay_lambda": 0.01}
    cases = []
    for options in ({}, decay, {"joint_norm": True, **decay}) * 3:
        every = np.array(exponents(name, 19))
        if "joint_norm" in options:
            every = np.clip(every, -700, 700)
        w, g = (
            np.concatenate([random_array(rng, name, e, 1) for e in rng.permutation(every)])
            for _ in range(2)
        )
        cases.append((w, g, 0.1, options))
    assert max(errors(cases, name)) <= BOUNDS[name]


@pytest.mark.parametrize("name", reference.FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True, "maximize": True},
        {"dampening": 0.25, "decay_lambda": 0.1},
        {"dampening": 0.5, "adapt": False, "decay_lambda": 0.1},
        {"nesterov": True, "joint_norm": True, "decay_lambda": 0.5},
        {"trust_clip": True, "dampening": 0.5},
    ],
    ids=str,
)
def test_the_error_with_momentum_is_bounded(name, options):
    """The rate 0.1 is the product of 0.4, which scales u, and 0.25, which scales the velocity."""
    rng = np.random.default_rng(4)
    kept = name if name in ("float32", "float64") else "float32"
    moving = {"momentum": 0.9, "lr_after_momentum": 0.25}
    layers = []
    for w_exponent, g_exponent, v_exponent in itertools.product((-9, 0, 9), (-8, 4), (-12, 3)):
        w, g = (to_torch(random_array(rng, name, e, 3), name) for e in (w_exponent, g_exponent))
        v = to_torch(random_array(rng, kept, v_exponent, 3), kept)
        layers.append(Layer(w, g, torch.empty_like(w), v, Rule(0.4, **moving, **options)))
    before = [floats(layer.velocity) for layer in layers]
    write(layers)
    plain = {k: x for k, x in options.items() if k not in ("nesterov", "dampening")}
    for layer, v in zip(layers, before, strict=True):
        w = floats(layer.w)
        step = reference.lars(w, floats(layer.dcdw), 0.1, **plain)
        undampened = (1 - options.get("dampening", 0)) / 0.25
        step = step._replace(u=[undampened * x for x in step.u])
        moved = reference.move(w, v, step, 0.9, "nesterov" in options, 0.25)
        change = reference.Step(moved.change, moved.w_new, None)
        assert reference.worst_error(floats(layer.out), w, change, name) <= BOUNDS[name]
        change = reference.Step(step.u, moved.v_new, None)
        assert reference.worst_error(floats(layer.velocity), v, change, kept) <= BOUNDS[kept]


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_ratio_is_1_where_a_norm_is_0(values):
    w, g = ([x, -2 * x, 3 * x] for x in values)
    for options in ({}, {"trust_clip": True}, {"joint_norm": True}):
        cases = [(w, g, 0.25, {"decay_lambda": 0.5, **options})]
        for name in reference.FORMATS:
            assert errors(cases, name) == [0]


def test_numbers_that_are_not_finite_follow_ieee_arithmetic():
    """Only the layers that contain them are affected; without decay, no weight becomes NaN."""
    inf, nan = float("inf"), float("nan")
    w = [[1.0, 2.0], [inf, 2.0], [1.0, 2.0], [nan, 1.0]]
    g = [[3.0, 4.0], [3.0, 4.0], [inf, 4.0], [3.0, 4.0]]
    for name in reference.FORMATS:
        layers = []
        for x, y, adapts in zip(w, g, (True, False, False, False), strict=True):
            x, y = to_torch(x, name), to_torch(y, name)
            layers.append(Layer(x, y, torch.empty_like(x), None, Rule(0.5, adapt=adapts)))
        write(layers)
        step = reference.lars(w[0], g[0], 0.5)
        assert reference.worst_error(floats(layers[0].out), w[0], step, name) <= BOUNDS[name]
        assert floats(layers[1].out) == [inf, 0.0]
        assert floats(layers[2].out) == [-inf, 0.0]
        assert np.array_equal(floats(layers[3].out), [nan, -1.0], equal_nan=True)
