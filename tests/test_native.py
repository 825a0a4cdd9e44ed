"""The native kernel gives the same bits as its twin in numpy.

`without_kernel` runs the twin; `by_kernel` asserts that the kernel updated all leaves.
test_native_plain.py tests which arrays the kernel supports, test_native_torch.py tests tensors, and
test_threads.py tests threads.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CI
from hypothesis import example, given
from hypothesis import strategies as st
from random_arrays import FORMATS, dtype_of, random_array

from lars_tree import _native, lars_update, report
from lars_tree._backends.cpu import twin
from lars_tree._numerics import bfloat16
from lars_tree._numerics.formula import Rule
from lars_tree.testing import assert_identical

if _native.kernel is None and (not CI or os.environ.get("LARS_TREE_NATIVE") == "0"):
    pytest.skip("the native kernel was not built, or is turned off", allow_module_level=True)

# The arrays contain signalling NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

PAIRS = [(a, b) for a in FORMATS for b in FORMATS]
PAIRS += [(a, b) for a in ("complex64", "complex128") for b in ("complex64", "complex128")]
SETS = range(_native.kernel.best_instruction_set() + 1 if _native.kernel else 1)
# Pairs of an instruction set and a number of threads; harness.cpp tests more combinations.
WAYS = [*((instruction_set, 3) for instruction_set in SETS), (SETS[-1], 1), (SETS[-1], 8)]


@contextmanager
def patched(**values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(_native, name, value)
        yield


def without_kernel(*args, **options):
    with patched(kernel=None):
        return lars_update(*args, **options)


@contextmanager
def watched(**values):
    """Yield a list with a bool for each updated plan: whether the kernel supported all leaves."""
    took = []

    class Watched:
        def __init__(self, *args):
            self.plan, self.rest = kernel.Plan(*args), set()

        def __getattr__(self, name):
            return getattr(self.plan, name)

        def prepare(self, *args, indices=None):
            if len(args) == 9:
                *args, indices = args
            rest = self.plan.prepare(*args, indices=indices)
            self.rest = self.rest.difference(indices or ()) | set(rest)
            return rest

        def step(self):
            self.plan.step()
            took.append(not self.rest)

        def apply(self, norms):
            self.plan.apply(norms)
            took.append(not self.rest)

    kernel = _native.kernel
    names = ("Reader", "collect", "match", "rebuild")
    stand_in = SimpleNamespace(Plan=Watched, **{name: getattr(kernel, name) for name in names})
    with patched(kernel=stand_in, **values):
        yield took


def by_kernel(*args, instruction_set=SETS[-1], **options):
    with watched(instruction_set=instruction_set) as took:
        new = lars_update(*args, **options)
    assert took == [True]
    return new


def run(code, **variables):
    """Run the code in a new process, because it may crash, and return the words that it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-500:])
    return result.stdout.split()


LENGTHS = [n + d for n in (16, 128, 16_384, 131_072) for d in (-1, 0, 1)]
SHAPES = st.one_of(
    st.tuples(st.integers(0, 300) | st.sampled_from(LENGTHS)),
    st.just(()),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(*[st.integers(1, 9)] * 3),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "decay_lambda": st.sampled_from([0.0, 1e-4, 0.1, 3.0, 1e-200, 1e200, 1e270]),
        "trust_coefficient": st.sampled_from([1e-3, 1.0, 1e-150, 1e150]),
        "eps": st.sampled_from([0.0, 1e-8, 1e-300]),
        "grad_scale": st.sampled_from([1e-3, 0.1, 3.0, 65536.0, 1e-200]),
        "adapt": st.booleans(),
        "trust_clip": st.booleans(),
        "joint_norm": st.booleans(),
    },
)
SPECIALS = st.sampled_from([(), (), (), (0.0, -0.0), (np.inf,), (np.nan, -np.inf)])


@st.composite
def arrays(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    names, shape, order = draw(st.sampled_from(PAIRS)), draw(SHAPES), draw(st.sampled_from("CF"))
    shape = shape or (1,)
    w, g = (
        random_array(
            rng,
            name,
            shape,
            draw(st.floats(0, 1)),
            draw(st.sampled_from([0, 2, 3000])),
            draw(SPECIALS),
            order,
        )
        for name in names
    )
    return (w, g) if draw(st.booleans()) or w.size != 1 else (w.reshape(()), g.reshape(()))


@given(
    pair=arrays(),
    lr=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e-290, 1e290]),
    options=OPTIONS,
    mode=st.sampled_from(["new", "in place", "out", "out is dcdw"]),
    instruction_set=st.sampled_from(SETS),
)
@example(  # both terms of the step are out of the range of double, but their sum is not
    pair=(np.array([2e38], np.complex64), np.array([-2e307], np.complex128)),
    lr=1.0,
    options={"adapt": False, "decay_lambda": 1e270, "grad_scale": 0.1},
    mode="new",
    instruction_set=0,
)
def test_the_kernel_gives_the_bits_of_its_twin(pair, lr, options, mode, instruction_set):
    w, g = pair
    expected = without_kernel(w, g, lr, **options)
    before = w.copy(), g.copy()
    out = {"new": None, "in place": w, "out": np.empty_like(w), "out is dcdw": g}[mode]
    if out is g and g.dtype != w.dtype:
        out = None
    actual = by_kernel(w, g, lr, out=out, instruction_set=instruction_set, **options)
    assert out is None or actual is out
    assert_identical(actual, expected)
    for x, old in zip((w, g), before, strict=True):
        assert x is out or x.tobytes() == old.tobytes()
    assert out is not None or expected.strides == actual.strides


@pytest.mark.filterwarnings("ignore::lars_tree.report.TrustRatioWarning")
@given(pair=arrays(), options=OPTIONS)
def test_the_kernel_measures_the_bits_of_its_twin(pair, options):
    rows = []
    for kernel in (_native.kernel, None):
        with patched(kernel=kernel):
            (row,) = report.layer_table(*pair, 0.1, **options)
        names = ("w_norm", "g_norm", "ratio", "relative_step", "clipped")
        rows.append({name: np.float64(row[name]) for name in names})
    assert_identical(*rows)


@pytest.mark.parametrize("name", [*FORMATS, "complex64", "complex128"])
def test_the_twin_passes_layers_on_to_the_kernel(name, monkeypatch):
    """An array of uint16 holds the bits of bfloat16."""
    rng = np.random.default_rng(0)
    w, g = (random_array(rng, name, (4, 300)) for _ in range(2))
    new, expected = np.empty_like(w), by_kernel([*w], [*g], 0.1)
    bits = [x.view(np.uint16) if name == "bfloat16" else x for x in (w, g, new)]
    rule = Rule(0.1, layer_axis=0, nonfinite="raise", stop_gradients=False, axis_name=frozenset())
    monkeypatch.setattr(twin, "_update_layer", None)
    twin.update(*bits, rule)
    assert_identical([*new], expected)
    lars_update(w, g, 0.1, layer_axis=0, out=w)
    assert_identical([*w], expected)


def squares(exponent):
    """float64 leaves whose squared elements overflow or underflow although the norms do not."""
    rng = np.random.default_rng(1)
    w = random_array(rng, "float64", (600_001,), exponent, 40)
    return [w], [w[::-1].copy()]


def trees():
    rng = np.random.default_rng(0)
    few = [random_array(rng, name, (37, 5)) for name in (*FORMATS, "complex64", "complex128")]
    yield "few", few, [x[::-1].copy() for x in few]
    for name in FORMATS:
        w = random_array(rng, name, (2_000_003,))
        yield f"large {name}", [w, few[2]], [w[::-1].copy(), few[2]]
    many = [random_array(rng, "float32", (n,)) for n in rng.integers(0, 1900, 2000)]
    yield "many", many, [x[::-1].copy() for x in many]
    yield "overflow", *squares(0.9)
    yield "underflow", *squares(0.1)
    yield "subnormal", *squares(0.0)
    largest = [np.full(300_007, 1.7e308), np.array([1.7e308] * 130)]
    yield "largest", largest, largest  # the norm of the step overflows


def sums():
    """Trees for `joint_norm`; in some of them the gradient and the decay nearly cancel."""
    found = {name: (w, g) for name, w, g in trees()}
    for name in ("few", "large float32", "large float64", "overflow", "subnormal", "largest"):
        w, g = found[name]
        yield name, w, g
        if name not in ("subnormal", "largest"):  # the steps would be 0, or out of range
            yield f"{name}, cancelling", w, [(x * -1e-4).astype(x.dtype) for x in w]


@pytest.mark.parametrize(
    ("w", "g", "joint"),
    [pytest.param(w, g, False, id=name) for name, w, g in trees()]
    + [pytest.param(w, g, True, id=f"joint, {name}") for name, w, g in sums()],
)
def test_instruction_sets_and_threads_give_the_same_bits(w, g, joint):
    options = {"decay_lambda": 1e-4, "trust_coefficient": 0.5, "joint_norm": joint}
    expected = without_kernel(w, g, 3.0, **options)
    for instruction_set, threads in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_native.threads, "_chosen", threads)
            new = by_kernel(w, g, 3.0, instruction_set=instruction_set, **options)
        for actual, one in zip(new, expected, strict=True):
            assert_identical(actual, one)
        assert np.isfinite(new[0]).any()


HALVES = pytest.mark.parametrize("name", ["float16", "bfloat16"])


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("factor", [1, 3, -1])
@HALVES
def test_halves_near_the_midpoints_between_neighbours(name, factor, instruction_set):
    """w - lr * g is a midpoint (j is None), or differs from a midpoint by 2**-j of half an ulp."""
    bits, stored = np.arange(2**16, dtype=np.uint16), FORMATS[name][1]
    w = bits.view(dtype_of(name))
    # The largest power of two up to |w|, but at least the smallest normal number, with the sign
    # of w.
    g = np.maximum(bits & (0x8000 - 2**stored), 2**stored) | (bits & 0x8000)
    g = (g.astype(np.uint16) ^ (0x8000 if factor < 0 else 0)).view(w.dtype)
    # Below a power of two the ulp is half as large.
    tie = np.isfinite(w) & ((bits & (2**stored - 1)) > 1)
    for j in (*range(1, 31), 40, 52, None):
        for sign in (-1, 1):
            off = 0 if j is None else sign * 2.0**-j
            lr = abs(factor) * 2.0 ** -(stored + 1) * (1 + off)
            options = {"adapt": False, "instruction_set": instruction_set}
            actual = by_kernel(w, g, lr, **options)
            assert_identical(actual, without_kernel(w, g, lr, adapt=False))
            if j is None:
                assert (actual.view(np.uint16)[tie] % 2 == 0).all()


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("spread", [0, 3, 300])
@HALVES
def test_halves_over_the_whole_range(name, spread, instruction_set):
    rng = np.random.default_rng(spread)
    for level in (0.01, 0.2, 0.5, 0.8, 0.99):
        w, g = (random_array(rng, name, (40_001,), level, spread) for _ in range(2))
        w[:5] = [0.0, -0.0, *((1e-40, -1e-40, 3e38) if name == "bfloat16" else (6e-8, -6e-8, 6e4))]
        for lr, decay in ((0.1, 0.0), (rng.random(), 1e-4), (1.0, 0.0), (1e-28, 0.1), (30.0, 1e29)):
            options = {"decay_lambda": decay, "adapt": bool(rng.integers(2))}
            actual = by_kernel(w, g, lr, instruction_set=instruction_set, **options)
            assert_identical(actual, without_kernel(w, g, lr, **options))


@pytest.mark.parametrize("instruction_set", SETS)
@HALVES
def test_every_16_bit_number_is_read_and_written_exactly(name, instruction_set):
    w = np.arange(2**16, dtype=np.uint16).view(dtype_of(name))
    nan = {"float16": 0x7E00, "bfloat16": 0x7FC0}[name]
    for lr, g_name in itertools.product((0.0, 0.5), (name, "float32", "float64")):
        g = np.zeros(w.shape, dtype_of(g_name))
        new = by_kernel(w, g, lr, adapt=False, instruction_set=instruction_set)
        assert_identical(new, w)
        assert (new.view(np.uint16)[np.isnan(w)] == nan).all()
    wide = w[np.isfinite(w)].astype(np.float64)
    read = by_kernel(np.copysign(0, wide), -w[np.isfinite(w)], 1.0, adapt=False)
    assert_identical(read, wide)


def near_midpoints(name):
    """Doubles: all numbers of a format (some of float32) and their midpoints, and beside these."""
    total, _ = FORMATS[name]
    most = np.arange(2 ** (total - 1), step=2 ** (total - 16)).astype(f"u{total // 8}")
    values = most.view(dtype_of(name))
    values = values[np.isfinite(values)].astype(np.float64)
    largest = 2 * values[-1] - values[-2]  # the next number, if there were no limit
    middle = (values + np.append(values[1:], largest)) / 2
    x = np.concatenate([values, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)])
    return np.concatenate([x, -x])


def rounded(x, name):
    with np.errstate(over="ignore"):
        return x.astype(name) if name != "bfloat16" else bfloat16.encode(x).view(dtype_of(name))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_doubles_are_rounded_once_to_nearest_even(name, instruction_set):
    rng = np.random.default_rng(5)
    more = [random_array(rng, "float64", (30_000,), 0.5, spread) for spread in (20, 2000)]
    x = np.concatenate([near_midpoints(name), *more, [np.inf, -np.inf]])
    w = rounded(np.copysign(0, x), name)
    actual = by_kernel(w, -x, 1.0, adapt=False, instruction_set=instruction_set)
    assert_identical(actual, rounded(x, name))
