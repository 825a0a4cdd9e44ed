"""The checks of arrays read each array once, and accept what numpy accepts."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from fractions import Fraction
from inspect import signature

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import _backends, lars_update
from lars_tree._backends.base import Leaf
from lars_tree._core import checks
from lars_tree._core.options import DEFAULTS
from lars_tree._core.values import finite_number
from lars_tree._numerics.formula import Rule


def ones(*shape, dtype=np.float32):
    return np.ones(shape or (2, 3), dtype)


def read_only():
    x = ones()
    x.flags.writeable = False
    return x


def leaf(index=0, w=None, *, out=None, velocity=None, **options):
    w = ones() if w is None else w
    dcdw = options.pop("dcdw", ones())
    rule = Rule(options.pop("lr", 0.1), **options)
    return Leaf(index, w, dcdw, out, rule, _backends.find(w), velocity)


def paths():
    return [("a", i) for i in range(9)]


def test_the_defaults_of_the_signature_are_those_of_the_rule():
    parameters = signature(lars_update).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        *((2, 2.0), (0.5, 0.5), (-0.0, 0.0), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25)),
        *((np.float32(2), 2.0), (np.int8(3), 3.0), (True, None), (np.True_, None)),
        *((-1, None), (-1e-300, None), (np.inf, None), (np.nan, None), (10**400, None)),
        *((1j, None), ("1", None), (None, None), (np.ones(()), None)),
        *((np.timedelta64(1, "s"), None), (Decimal("sNaN"), None)),
    ],
    ids=repr,
)
def test_finite_numbers(x, expected):
    assert repr(finite_number(x)) == repr(expected)


def test_each_array_is_read_once(monkeypatch):
    """The arrays are weights, gradients, results, velocities, and options that leaves share."""
    backend, counts = _backends.find(ones()), Counter()
    for name in ("facts", "fault", "out_fault", "memory", "varying"):
        real = getattr(type(backend), name)

        def counting(self, x, name=name, real=real):
            counts[name, id(x)] += 1
            return real(self, x)

        monkeypatch.setattr(type(backend), name, counting)
    shared, rate = ones(), ones(3)
    leaves = [leaf(i, dcdw=shared, out=ones(), velocity=ones(), lr=rate) for i in range(3)]
    leaves += [leaf(3, w, out=w, velocity=ones()) for w in [ones(2, 6)[:, ::2]]]
    rows = checks.check(leaves, paths, same_shapes=True)
    assert [row.leaf for row in rows] == leaves
    assert counts["facts", id(shared)] == counts["facts", id(rate)] == 1
    assert set(counts.values()) == {1}


def accepts(call, *args):
    try:
        call(*args)
    except ValueError:
        return False
    return True


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(ours=SHAPES, theirs=SHAPES, axis=st.integers(-4, 4))
def test_shapes_and_axes_are_valid_if_numpy_accepts_them(ours, theirs, axis):
    w, x = np.ones(ours), np.ones(theirs)

    def is_valid(**options):
        return accepts(checks.check, [leaf(w=w, **{"dcdw": w, **options})], paths)

    assert is_valid(dcdw=x) == is_valid(decay_lambda=x) == accepts(np.broadcast_to, x, ours)
    assert is_valid(layer_axis=axis) == accepts(np.moveaxis, w, axis, 0)
