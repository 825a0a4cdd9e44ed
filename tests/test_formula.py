"""The formula for whole arrays, by numpy, against `reference.py`: every option at any exponents.

The bound is 4 ulps of the largest of |w|, |u|, |v| and the change of w at each element.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import mpf

from lars_tree._backends.arrays import NamespaceOps
from lars_tree._backends.cpu.norms import norms_of
from lars_tree._numerics import formula
from lars_tree._numerics.double_double import DoubleDouble
from lars_tree._numerics.formula import Rule


class Ops(NamespaceOps):
    """The functions of numpy, which makes numbers of arrays without axes."""

    where = staticmethod(np.where)


OPS = Ops(np)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# The exponents of float32, and of float64 where decay_lambda * grad_scale * w is in its range, too.
RANGES = {True: (-149, 120), False: (-1074, 950)}
RULES = st.fixed_dictionaries(
    {
        "lr_before_momentum": st.sampled_from([0.1, 0.1, 1.0, 0.0]),
        "decay_lambda": st.sampled_from([0.0, 1e-4, 0.1, 3.0]),
        "trust_coefficient": st.sampled_from([1.0, 1e-3]),
        "eps": st.sampled_from([0.0, 1e-8]),
        "adapt": st.sampled_from([True, True, True, False]),
        "trust_clip": st.booleans(),
        "grad_scale": st.sampled_from([1.0, 3.0, 2.0**60, 2.0**-60]),
        "momentum": st.sampled_from([0.9, 0.0, 0.5]),
        "lr_after_momentum": st.sampled_from([1.0, 0.5, 2.0]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "dampening": st.sampled_from([0.0, 0.25]),
    }
).map(lambda options: Rule(**options))
PRESENT = st.sampled_from([1, 1, 1, 0])

each_kind = pytest.mark.parametrize(
    ("in_range", "joint"), list(itertools.product([False, True], repeat=2))
)


@st.composite
def cases(draw, in_range, joint):
    """Weights, gradient, velocity and rule; with `in_range`, the step needs no scaling."""
    rule = draw(RULES)._replace(joint_norm=joint)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ends = RANGES[in_range]
    exponents = st.just(0) | st.sampled_from(ends) | st.integers(*ends)
    w, g, v = (
        np.ldexp(rng.uniform(-2, 2, 4), draw(exponents) + rng.integers(-3, 3, 4)) * draw(present)
        for present in (PRESENT, PRESENT, st.just(1))
    )
    is_exact = math.frexp(rule.grad_scale)[0] == 0.5  # grad_scale * decay_lambda is not rounded
    if joint and is_exact and draw(st.booleans()):  # g and the decay nearly cancel
        part = draw(st.sampled_from([0, 1e-12, 1e-2])) * rng.normal(size=4)
        opposed = (-1 if rule.maximize else 1) * -rule.decay_lambda * rule.grad_scale * w
        g = opposed * (1 + part)
    if in_range:
        w, g, v = (x.astype(np.float32).astype(np.float64) for x in (w, g, v))
    assume(np.isfinite([w, g]).all())
    return w, g, v, rule


def exact(w, g, rule, **options):
    """The step by the reference; with momentum, the product of both rates moves the weights."""
    names = ("decay_lambda", "trust_coefficient", "eps", "adapt", "trust_clip", "joint_norm")
    options = {name: getattr(rule, name) for name in (*names, "grad_scale", "maximize")} | options
    rate = rule.lr_before_momentum * rule.lr_after_momentum
    return reference.lars(w.tolist(), g.tolist(), rate, **options)


def ulps(actual, expected, *sizes):
    """The largest error of an element, in ulps of the largest of its sizes."""
    columns = zip(actual.tolist(), expected, *sizes, strict=True)
    return max(
        float(abs(mpf(x) - y) / reference.ulp(max(map(abs, row)), "float64"))
        for x, y, *row in columns
    )


@each_kind
@given(data=st.data(), moves=st.booleans())
def test_a_step_of_whole_arrays_is_exact(in_range, joint, data, moves):
    w, g, v, rule = data.draw(cases(in_range, joint))
    new, velocity = formula.step(OPS, w, g, rule, v if moves else None, in_range)
    step = exact(w, g, rule)
    factor = (1 - mpf(rule.dampening)) / rule.lr_after_momentum
    step = step._replace(u=[factor * x for x in step.u])
    options = (rule.momentum, rule.nesterov, rule.lr_after_momentum) if moves else (0,)
    expected = reference.move(w.tolist(), v.tolist(), step, *options)
    sizes = w.tolist(), step.u, expected.v_new, expected.change
    assert ulps(new, expected.w_new, *sizes) <= 4
    assert (velocity is None) is not moves
    if moves:
        assert ulps(velocity, expected.v_new, *sizes) <= 4


def is_close(x, expected):
    """Equal up to rounding, unless the expected number is out of the range of float64."""
    return (
        expected > mpf(2) ** 1000 or abs(mpf(float(x)) - expected) <= 2**-50 * expected + 2**-1074
    )


@each_kind
@given(data=st.data())
def test_measured_norms_and_ratios_are_exact(in_range, joint, data):
    """With `trust_clip`, the ratio is the local rate divided by the learning rate."""
    w, g, _, rule = data.draw(cases(in_range, joint))
    found = formula.measure(OPS, w, g, rule, in_range)
    assert {x.shape for x in found} == {(1,)}
    norms = [reference.norm(map(mpf, x.tolist())) for x in (w, g)]
    assume(norms[0] == 0 or norms[0] > 2.0**-1000)  # the decay of smaller weights underflows
    assert is_close(found.w_norm[0], norms[0])
    assert is_close(found.g_norm[0], norms[1] / rule.grad_scale)
    assert is_close(found.ratio[0], exact(w, g, rule).ratio)
    plain = exact(w, g, rule._replace(lr_before_momentum=1.0, trust_clip=False))
    unclipped = plain.ratio
    if rule.trust_clip and rule.adapt and w.any() and any(plain.u if joint else g):
        unclipped /= rule.lr_before_momentum * rule.lr_after_momentum or 1
    assert is_close(found.unclipped[0], unclipped)


@each_kind
@given(data=st.data())
def test_the_layers_of_an_array_are_computed_one_by_one(in_range, joint, data):
    w, g, v, rule = data.draw(cases(in_range, joint))
    layers = [np.stack([x, 2 * x, 0 * x]) for x in (w, g, v)]
    axis = data.draw(st.sampled_from([0, 1, -2]))
    w, g, v = (np.moveaxis(x, 0, axis) for x in layers)
    whole = rule._replace(layer_axis=axis)
    found = [*formula.step(OPS, w, g, whole, v, in_range)]
    found += [np.broadcast_to(x, w.shape) for x in formula.measure(OPS, w, g, whole, in_range)]
    for i, (wi, gi, vi) in enumerate(zip(*layers, strict=True)):
        alone = [*formula.step(OPS, wi, gi, rule, vi, in_range)]
        alone += formula.measure(OPS, wi, gi, rule, in_range)
        for x, expected in zip(found, alone, strict=True):
            expected = np.broadcast_to(expected, wi.shape)
            np.testing.assert_allclose(np.take(x, i, axis), expected, 1e-15, 1e-323)


def test_the_defaults_of_a_rule_are_a_step_without_momentum():
    w, g = np.array([3.0, 4.0]), np.array([0.4, 0.3])
    new, velocity = formula.step(OPS, w, g, Rule(0.1), np.array([5.0, 6.0]), False)
    assert new.round(15).tolist() == [2.6, 3.7]
    assert velocity.round(15).tolist() == [0.4, 0.3]


def test_short_arrays_are_computed_in_double_unless_an_option_is_extreme():
    """Double-double is slower; `norms_of` says which type it used."""
    for name in ("float16", "uint16", "float32", "complex64", "float64", "complex128"):
        x = np.ones(3, name)
        is_short = name not in ("float64", "complex128")
        for options, is_moderate in (
            ({}, True),
            ({"grad_scale": 65536.0, "decay_lambda": 1e-4, "eps": 1e-8, "joint_norm": True}, True),
            ({"eps": 1e-40}, False),
            ({"grad_scale": 1e40}, False),
            ({"lr_after_momentum": 1e40}, True),
            ({"lr_after_momentum": 1e40, "trust_clip": True}, False),
        ):
            number = norms_of(x, x, np.float64, Rule(0.1, **options)).number
            assert number is (float if is_short and is_moderate else DoubleDouble)


def test_weights_of_zero_have_no_decay_that_scales_the_gradient():
    w, g = np.zeros(2), np.array([3e-310, -4e-310])
    rule = Rule(1.0, decay_lambda=1e300, joint_norm=True)
    new, _ = formula.step(OPS, w, g, rule, None, False)
    assert new.tolist() == (-g).tolist()


def test_the_joint_norm_of_zeros_is_zero():
    zeros = np.zeros(3)
    norms = norms_of(zeros, zeros, np.float64, Rule(0.1, decay_lambda=0.1, joint_norm=True))
    assert norms.w == 0
    assert norms.dcdw == 0
