"""The floating-point environment of the caller changes no bit of a result, and is restored.

The tests run with and without the kernel. Libraries that compute with whole arrays are not tested.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars

from lars_tree import _native, lars_update, schedules
from lars_tree._backends.cpu import twin
from lars_tree._core import writes
from lars_tree._numerics import float_environment
from lars_tree.report import trust_ratios
from lars_tree.testing import assert_identical

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the numbers of the modes are those of Linux"
)
X86 = sys.platform == "linux" and os.uname().machine == "x86_64"
MODES = {
    "downward": 0x400 if X86 else 0x800000,
    "upward": 0x800 if X86 else 0x400000,
    "toward zero": 0xC00,
}
if not X86:
    MODES["toward zero"] = 0xC00000
LIBM = ctypes.CDLL(ctypes.util.find_library("m")) if sys.platform == "linux" else None


@contextmanager
def environment(mode):
    """Run the block in a rounding mode, or in flush-to-zero mode. Assert that it keeps the mode."""
    if mode == "flushed":
        torch = need("torch")
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers to zero")
        try:
            yield
            kept = np.float64(5e-324) * 1 == 0
        finally:
            torch.set_flush_denormal(False)
    else:
        assert LIBM.fesetround(MODES[mode]) == 0
        try:
            yield
            kept = LIBM.fegetround() == MODES[mode]
        finally:
            LIBM.fesetround(0)
    assert kept


DTYPES = ["float16", "bfloat16", "float32", "float64", "longdouble", "complex64", ">f4"]
rng = np.random.default_rng(0)


def array(dtype, scale):
    x = rng.normal(size=(3, 8)) * scale
    if dtype == "bfloat16":
        return x.astype(np.float32).astype(need("ml_dtypes").bfloat16)
    return x.astype(dtype)


def steps(dtype):
    """Steps on all paths of `twin`: strided weights, arrays of rates, momentum, trust ratios."""
    tiny = {"float16": 1e-7, "float64": 1e-310, "longdouble": 1e-310}.get(dtype, 1e-39)
    g = array(dtype, 1.0)
    for w in (array(dtype, 1.0), array(dtype, tiny)):
        options = {"decay_lambda": 0.3, "trust_coefficient": 0.7}
        yield lambda w=w, o=options: lars_update(np.repeat(w, 2, 1)[:, ::2], g, 0.1, **o)
        yield lambda w=w, o=options: lars_update(w, g, np.full(8, 0.1), **o)
        yield lambda w=w, o=options: in_place(w, g, o)
        yield lambda w=w: trust_ratios(np.repeat(w, 2, 1)[:, ::2], g, 0.1)


def in_place(w, g, options):
    w = np.repeat(w, 2, 1)[:, ::2]
    opt = Lars(schedules.Polynomial(0.1, total_steps=7, warmup_steps=3), layer_axis=0, **options)
    state = opt.init(w)
    for _ in range(3):
        opt.update(w, g, state, out=w)
    return [w, state["velocity"]]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "flushed"])
def test_the_bits_are_those_of_the_default_environment(mode, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(_native, "kernel", None)
        monkeypatch.setattr(writes, "MAX_HELD", 0)  # updates in place run in a separate thread
    for dtype in DTYPES:
        for step in steps(dtype):
            expected = step()
            with environment(mode):
                actual = step()
            assert_identical(actual, expected)


def test_the_environment_is_back_after_an_error(monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(twin, "_update_layer", fail)
    for mode in MODES:
        with environment(mode), pytest.raises(MemoryError):
            lars_update(np.ones((4, 2))[:, 0], 1.0, 0.1)


def test_schedules_are_called_in_the_default_environment():
    with environment("upward"):
        assert LIBM.fegetround() == MODES["upward"]
        modes = []
        opt = Lars(lambda step: modes.append(LIBM.fegetround()) or 0.1)
        opt.update(np.ones(2), np.ones(2), opt.init(np.ones(2)))
    assert modes == [0]


def test_without_the_c_functions_nothing_is_wrapped(monkeypatch):
    monkeypatch.setattr(float_environment, "_ENVIRONMENT", None)
    assert float_environment.in_default_floats(len) is len
    monkeypatch.setattr(sys, "platform", "win32")
    assert float_environment._environment() is None
