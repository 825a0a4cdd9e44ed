"""The arithmetic of the Triton kernels: the formula, compiled from `formula.py`, and rounding.

All numbers are float64: squares of float16, bfloat16 and float32 numbers cannot overflow or vanish
in it. Two functions extend this to float64 tensors, whose products may be out of range.
"""

from types import FunctionType
from typing import Any, NamedTuple

import triton
import triton.language as tl

from lars_tree._numerics import formula


class Rule(NamedTuple):
    """The fields of `formula.Rule` that a kernel needs; numbers are 0-d float64 tensors."""

    lr_before_momentum: Any
    decay_lambda: Any
    trust_coefficient: Any
    eps: Any
    grad_scale: Any
    momentum: Any
    lr_after_momentum: Any
    dampening: Any
    adapt: Any
    trust_clip: Any
    joint_norm: Any


@triton.jit
def _where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def _sqrt(x):
    return tl.sqrt(x)


@triton.jit
def _maximum(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _power_of_two(x):
    exponent = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    power = tl.where(exponent == 0, 2.0**-1022, exponent.to(tl.float64, bitcast=True))
    return tl.where((x > 0) & (x < float("inf")), power, 1.0)


@triton.jit
def _like(number, x):
    return number


@triton.jit
def _upper_half(x):
    spread = x * (2.0**27 + 1)
    return spread - (spread - x)


@triton.jit
def _finite_or(x, other):
    return tl.where(tl.abs(x) < float("inf"), x, other)


@triton.jit
def _with_denominator(rule, decay_lambda, eps, grad_scale):
    return Rule(
        rule.lr_before_momentum,
        decay_lambda,
        rule.trust_coefficient,
        eps,
        grad_scale,
        rule.momentum,
        rule.lr_after_momentum,
        rule.dampening,
        rule.adapt,
        rule.trust_clip,
        rule.joint_norm,
    )


def _compiled(*names: str) -> dict[str, Any]:
    """Compile functions of `formula.py`, which may call each other, for the device.

    Triton evaluates their annotations, which are therefore replaced.
    """
    annotations = dict.fromkeys(("Any", "Where", "Ops", "bool"), tl.constexpr(None))
    names_of_numbers = (name for name, x in vars(formula).items() if isinstance(x, float))
    numbers = {name: tl.constexpr(getattr(formula, name)) for name in names_of_numbers}
    replaced = {"tl": tl, "_with_denominator": _with_denominator}
    scope = {**vars(formula), **annotations, **numbers, **replaced}
    for name in names:
        function = getattr(formula, name)
        new = FunctionType(function.__code__, scope, name, function.__defaults__)
        new.__module__, new.__qualname__ = function.__module__, function.__qualname__
        scope[name] = triton.jit(new)
    return scope


_formula = _compiled(
    *("trust_ratio", "coefficients", "_scaled", "scaled_coefficients"),
    *("two_sum", "multiply_add", "norm_of_sums"),
)
coefficients = _formula["coefficients"]
scaled_coefficients = _formula["scaled_coefficients"]
multiply_add = _formula["multiply_add"]
norm_of_sums = _formula["norm_of_sums"]


class Ops:
    """`formula.Ops` for float64."""

    where = _where
    maximum = _maximum
    power_of_two = _power_of_two
    like = _like
    upper_half = _upper_half
    finite_or = _finite_or
    sqrt = _sqrt


# The compiler accepts classes only as constants; the interpreter runs plain Python.
OPS = tl.constexpr(Ops) if isinstance(_where, triton.JITFunction) else Ops


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round float64 once; bfloat16 is returned as its bits."""
    if DTYPE == tl.bfloat16:
        near = x.to(tl.float32)
        bits = near.to(tl.int32, bitcast=True)
        # Round to odd first: then rounding a second time gives the result of rounding once
        # (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).
        back = near.to(tl.float64)
        is_even = (bits & 1) == 0
        odd = bits + tl.where(tl.abs(back) > tl.abs(x), -1, 1)
        bits = tl.where((back != x) & is_even, odd, bits)
        bits = tl.where(x == x, bits, 0)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16)
    else:
        return x.to(DTYPE)


@triton.jit
def is_finite(x, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (x & 0x7F80) != 0x7F80
    else:
        return tl.abs(x) < float("inf")


@triton.jit
def joint_scales(joint, w_scale, joint_gradient_scale):
    """The factor of w in a scaled joint gradient, and the scales of dcdw and of w in it.

    Its terms are at most near 2**543: they cannot overflow, and far smaller ones keep their digits.
    """
    decay = joint * tl.where(w_scale < 2.0**900, w_scale, 2.0**900)
    other = tl.where(joint_gradient_scale < 2.0**900, joint_gradient_scale, 2.0**900)
    largest = _power_of_two(_maximum(_maximum(decay, other), 2.0**-520))
    dcdw_scale = 2.0**420 / largest
    w_scale = 2.0**420 / _maximum(w_scale, 2.0**-520)
    is_joint = joint != 0
    return (
        joint * (dcdw_scale / w_scale),
        tl.where(is_joint, dcdw_scale, 1.0),
        tl.where(is_joint, w_scale, 1.0),
    )


@triton.jit
def factors(a, b):
    """Three factors of the product of two powers of two, which may be out of range.

    A number is multiplied by the three factors in order. If the first and the last are not 1, both
    exceed 2**200 or both are below 2**-200. An intermediate product can then be out of range only
    if the final product is.
    """
    product = a * b
    is_large, is_small = product >= 2.0**900, product <= 2.0**-900
    edge = tl.where(is_large, 2.0**200, 2.0**-200)
    a_is_inside = tl.where(is_large, a < edge, a > edge)
    b_is_inside = tl.where(is_large, b < edge, b > edge)
    first = tl.where(a_is_inside, edge, a) * tl.where(b_is_inside, b / edge, 1.0)
    last = tl.where(b_is_inside, edge, b) * tl.where(a_is_inside, a / edge, 1.0)
    is_safe = ~(is_large | is_small)
    return (
        tl.where(is_safe, 1.0, first),
        tl.where(is_safe, product, 1.0),
        tl.where(is_safe, 1.0, last),
    )
