"""The floating-point environment of the caller is restored, and is the default one for schedules.

`tests/reliability/bits.py` shows that it changes no bit of a result.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import unit_lars as Lars
from float_modes import LIBM, MODES, mode

from lars_tree import lars_update
from lars_tree._backends.cpu import twin
from lars_tree._numerics import float_environment

pytestmark = pytest.mark.skipif(not MODES, reason="the modes of this system are not known")


def test_the_environment_is_back_after_an_error(monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(twin, "_update_layer", fail)
    for name in MODES:
        with mode(name), pytest.raises(MemoryError):
            lars_update(np.ones((4, 2))[:, 0], 1.0, 0.1)


def test_schedules_are_called_in_the_default_environment():
    with mode("upward"):
        assert LIBM.fegetround() == MODES["upward"][0]
        modes = []
        opt = Lars(lambda step: modes.append(LIBM.fegetround()) or 0.1)
        opt.update(np.ones(2), np.ones(2), opt.init(np.ones(2)))
    assert modes == [0]


def test_without_the_c_functions_nothing_is_wrapped(monkeypatch):
    monkeypatch.setattr(float_environment, "_ENVIRONMENT", None)
    assert float_environment.in_default_floats(len) is len
    monkeypatch.setattr(sys, "platform", "win32")
    assert float_environment._environment() is None
