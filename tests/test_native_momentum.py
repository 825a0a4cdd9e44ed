"""With momentum, the native kernel gives the same bits as its twin in numpy.

test_native_momentum_plain.py tests which arrays the kernel supports; test_native_momentum_torch.py
tests tensors.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from native_steps import numpy_reader, options_of, stepped
from test_native import (
    OPTIONS,
    PAIRS,
    SETS,
    SPECIALS,
    WAYS,
    arrays,
    dtype_of,
    near_midpoints,
    patched,
    random_array,
    rounded,
    watched,
)

from lars_tree import _native
from lars_tree._core.advance import advance
from lars_tree._numerics.formula import Rule
from lars_tree._tree import structure
from lars_tree.testing import assert_identical

# The arrays contain signalling NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SHORT = {"float16": "float32", "bfloat16": "float32"}


def step(w, g, out, velocity, lr=0.1, **options):
    """The new weights, velocity and number of steps."""
    state = {"velocity": velocity, "step": np.zeros((), np.int64)}
    new, state = advance(w, g, out, options_of(lr=lr, **options), state)
    return new, state["velocity"], state["step"]


def by_twin(*args, **options):
    with patched(kernel=None):
        return step(*args, **options)


def by_kernel(*args, instruction_set=SETS[-1], threads=1, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native.threads, "_chosen", threads)
        with watched(instruction_set=instruction_set) as took:
            new = step(*args, **options)
    assert took == [True]
    return new


def velocity_for(w, rng, *numbers):
    name = SHORT.get(w.dtype.name, w.dtype.name)
    v = np.empty_like(w, name)
    v[...] = random_array(rng, name, w.shape or (1,), *numbers).reshape(w.shape)
    return v


def assert_same_step(actual, expected):
    """Assert equal bits in the weights and velocities of two trees, and one counted step."""
    for x, y in zip(actual[:2], expected[:2], strict=True):
        for leaf, twin in zip(structure.leaves(x), structure.leaves(y), strict=True):
            assert_identical(leaf, twin)
    assert actual[2] == expected[2] == 1
    assert actual[2].dtype == np.int64


@st.composite
def cases(draw):
    w, g = draw(arrays())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0, 2, 3000]))
    return w, g, velocity_for(w, rng, draw(st.floats(0, 1)), spread, draw(SPECIALS))


MOTIONS = st.fixed_dictionaries(
    {"momentum": st.sampled_from([0.9, 0.0, 0.5, 1.0, 3.0, 1e-300, 1e300])},
    optional={
        "lr_after_momentum": st.sampled_from([0.0, 0.1, 0.5, 3.0, 1e-300, 1e290]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
    },
)


@given(
    case=cases(),
    lr=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e-290, 1e290]),
    options=OPTIONS,
    motion=MOTIONS,
    mode=st.sampled_from(["new", "in place", "out", "out is dcdw"]),
    instruction_set=st.sampled_from(SETS),
)
@example(  # momentum * velocity is out of the range of double, but the new velocity is not
    case=(np.array([1.0]), np.array([-1.5e308]), np.array([1.7e308])),
    lr=1.0,
    options={"adapt": False},
    motion={"momentum": 1.9},
    mode="in place",
    instruction_set=0,
)
@example(  # both terms of the step overflow double, but float32 results are not recomputed
    case=(np.array([2e38], np.float32), np.array([-2e17]), np.array([1.0], np.float32)),
    lr=1e290,
    options={"adapt": False, "decay_lambda": 1e-20, "grad_scale": 0.1},
    motion={"momentum": 0.5},
    mode="new",
    instruction_set=0,
)
@example(  # the product of the rates is out of the range of double
    case=(np.array([2.0], np.float32), np.array([1.0], np.float32), np.array([0.0], np.float32)),
    lr=2.0**90,
    options={"trust_clip": True},
    motion={"momentum": 0.5, "lr_after_momentum": 2.0**1000},
    mode="new",
    instruction_set=0,
)
def test_the_kernel_gives_the_bits_of_its_twin(case, lr, options, motion, mode, instruction_set):
    w, g, v = case
    options = {"lr": lr, **options, **motion}
    expected = by_twin(w, g, None, v, **options)
    before = [x.tobytes() for x in (w, g, v)]
    out = {"new": None, "in place": w, "out": np.empty_like(w), "out is dcdw": g}[mode]
    if out is g and g.dtype != w.dtype:
        out = None
    actual = by_kernel(w, g, out, v, instruction_set=instruction_set, **options)
    assert_same_step(actual, expected)
    assert (actual[0] is out, actual[1] is v) == (out is not None, out is not None)
    for x, old in zip((w, g, v), before, strict=True):
        assert x is out or (x is v and out is not None) or x.tobytes() == old
    assert actual[1].strides == v.strides


SIZES = [n + d for n in (16, 128, 256, 16_384, 131_072) for d in (-1, 0, 1)]
MOTION = {"momentum": 0.9, "lr_after_momentum": 0.7}
RULES = {
    "no decay": {},
    "nesterov": {"nesterov": True},
    "nesterov, decay": {"nesterov": True, "decay_lambda": 0.1, "maximize": True},
    "no ratio": {"adapt": False, "decay_lambda": 1e-3, "maximize": True},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_instruction_sets_and_threads_give_the_same_bits(names, rule):
    """Small layers are updated by one thread, larger layers by all threads."""
    options = MOTION | RULES[rule]
    rng = np.random.default_rng(0)
    w, g = ([random_array(rng, name, (n,)) for n in (*SIZES, 0, 1, 400_001)] for name in names)
    v = [velocity_for(x, rng) for x in w]
    expected = by_twin(w, g, None, v, **options)
    for instruction_set, threads in WAYS:
        one = {"instruction_set": instruction_set, "threads": threads, **options}
        assert_same_step(by_kernel(w, g, None, v, **one), expected)
        new, moving = [x.copy() for x in w], [x.copy() for x in v]
        assert_same_step(by_kernel(new, g, new, moving, **one), expected)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_both_results_are_rounded_once_to_nearest_even(name, instruction_set):
    x = np.concatenate([near_midpoints(name), [np.inf, -np.inf]])
    w = rounded(np.copysign(0, x), name)
    v = np.full(x.shape, -0.0, np.float32)  # -0 + x is x, also if x is a zero
    options = {"adapt": False, "momentum": 0.5, "instruction_set": instruction_set}
    new, moved, _ = by_kernel(w, -x, None, v, 1.0, **options)
    assert_identical(new, rounded(x, name))
    assert_identical(moved, rounded(-x, "float32"))


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_several_steps_over_the_range_of_exponents(names, level):
    rng = np.random.default_rng(0)
    w, g = (random_array(rng, name, (700,), level, 3) for name in names)
    v = velocity_for(w, rng, 1 - level, 3)
    twin = w.copy(), v.copy()
    for lr, nesterov in ((0.1, False), (0.3, True), (5.0, True), (0.1, False)):
        options = {"lr": lr, "nesterov": nesterov, "decay_lambda": 1e-3, "momentum": 0.9}
        expected = by_twin(twin[0], g, None, twin[1], **options)
        assert_same_step(by_kernel(w, g, w, v, **options), expected)
        twin = expected[:2]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_values_by_the_formula(names, nesterov):
    """The numbers have few bits, so nothing is rounded."""
    numbers = {"w": [3, -4, 0.5], "g": [1, 2, -0.5], "v": [0.5, -1, 2]}
    w, g = (np.array(numbers[x]).astype(dtype_of(n)) for x, n in zip("wg", names, strict=True))
    v = np.array(numbers["v"]).astype(SHORT.get(names[0], names[0]))
    for decay, sign in itertools.product((0.0, 0.5), (1, -1)):
        us = [0.5 * (sign * b + decay * a) for a, b in zip(numbers["w"], numbers["g"], strict=True)]
        vs = [0.5 * c + u for c, u in zip(numbers["v"], us, strict=True)]
        direction = [u + 0.5 * c if nesterov else c for u, c in zip(us, vs, strict=True)]
        ws = [a - 0.5 * x for a, x in zip(numbers["w"], direction, strict=True)]
        options = {"adapt": False, "decay_lambda": decay, "maximize": sign < 0}
        new, moved, _ = by_kernel(
            w, g, None, v, 0.5, momentum=0.5, lr_after_momentum=0.5, nesterov=nesterov, **options
        )
        assert new.astype(complex).tolist() == ws
        assert moved.astype(complex).tolist() == vs
        assert (new.dtype, moved.dtype) == (w.dtype, v.dtype)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_maximize_negates_the_gradient(names):
    rng = np.random.default_rng(0)
    w, g = (random_array(rng, name, (300,)) for name in names)
    v = velocity_for(w, rng)
    for options in ({}, {"decay_lambda": 0.1, "trust_clip": True}, {"grad_scale": 1e-200}):
        options = {"momentum": 0.9, **options}
        up = by_kernel(w, g, None, v, maximize=True, **options)
        assert_same_step(up, by_kernel(w, -g, None, v, **options))
        rules = [Rule(0.1, maximize=maximize, **options) for maximize in (True, False)]
        up, down = (
            stepped(numpy_reader(), [w], [x], None, [r])[0]
            for x, r in zip((g, -g), rules, strict=True)
        )
        assert_identical(up[0], down[0])


BIG = 2.0**1023

# (w, dcdw, velocity, options, new w, new velocity); the arrays are in units of BIG
OVERFLOWS = {
    "the old velocity": (1, -1.25, 1.5, {"lr": 2.0, "momentum": 2.0}, 0.5, 0.5),
    "how far it moves": (1.5, 0, 1.5, {"momentum": 1.0, "lr_after_momentum": 2.0}, -1.5, 1.5),
    "nesterov's sum": (1.5, 1.25, -0.5, {"momentum": 1.0, "nesterov": True}, -0.5, 0.75),
    "the decay": (1.5, -1.5, 0, {"momentum": 0.5, "decay_lambda": 2.0}, 0, 1.5),
    "the velocity": (-1.5, 1.5, 1.5, {"momentum": 1.0}, -np.inf, np.inf),
    "the velocity alone": (1.5, 1.5, 1.5, {"momentum": 1.0, "lr_after_momentum": 0.5}, 0, np.inf),
    "the weights": (-1.5, 0, 1, {"momentum": 1.0}, -np.inf, 1),
}


@pytest.mark.parametrize("name", ["float64", "complex128"])
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("case", OVERFLOWS)
def test_intermediate_overflow_does_not_make_results_infinite(case, instruction_set, name):
    """One element is large, in a full block of 128 elements or in the remainder."""
    *big, given_options, new_w, new_v = OVERFLOWS[case]
    options = {"lr": 1.0, "adapt": False, **given_options}
    rng = np.random.default_rng(0)
    for size, at in ((1, 0), (127, 3), (128, 127), (300, 130), (300, 299)):
        w, g, v = (random_array(rng, name, (size,)) for _ in range(3))
        w[at], g[at], v[at] = (x * BIG for x in big)
        expected = by_twin(w, g, None, v, **options)
        actual = by_kernel(w, g, w, v, instruction_set=instruction_set, **options)
        assert_same_step(actual, expected)
        assert (w[at].real, v[at].real) == (new_w * BIG, new_v * BIG)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("g_name", ["float64", "float32"])
def test_coefficients_out_of_the_range_of_double(g_name, instruction_set):
    """|w| / |dcdw| is 2**2000 or 2**1140, so the gradient is scaled before it is multiplied."""
    g = np.full(256, 2.0**-1000 if g_name == "float64" else 2.0**-140, g_name)
    for nesterov, new_w in ((False, 2.0**998), (True, 2.0**997)):
        w, v = np.full(256, 2.0**1000), np.full(256, 2.0**999)
        options = {"momentum": 0.5, "nesterov": nesterov, "instruction_set": instruction_set}
        by_kernel(w, g, w, v, 0.5, **options)  # the step is 2**999
        assert (set(v), set(w)) == ({1.5 * 2.0**999}, {new_w})


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_nan_and_infinity_do_not_spread_to_other_elements(names, decay):
    rng = np.random.default_rng(0)
    w, g = (random_array(rng, name, (300,)) for name in names)
    v = velocity_for(w, rng)
    g[5], w[150], v[0], v[299] = np.nan, np.inf, np.nan, -np.inf
    options = {"adapt": False, "decay_lambda": decay, "momentum": 0.9}
    for instruction_set in SETS:
        actual = by_kernel(w, g, None, v, instruction_set=instruction_set, **options)
        assert_same_step(actual, by_twin(w, g, None, v, **options))
        lost = [np.flatnonzero(~np.isfinite(x)).tolist() for x in actual[:2]]
        assert lost == [[0, 5, 150, 299], [0, 5, 150, 299] if decay else [0, 5, 299]]
        assert actual[0][299].real == np.inf
