"""The Triton kernels of the fused engine; `fused.py` launches them.

The kernels address tensors through tables in device memory (`fused.Table`), so one launch serves
any number of tensors. Each tensor is divided into chunks, each of which is the work of one program.
All arithmetic is in float64: squares of float16, bfloat16 and float32 cannot overflow or vanish in
it, and results are rounded once. Sums have a fixed order, so that repeated runs give the same bits.

The formula itself is not written here: `_compiled` compiles the functions of `formula.py`.
"""

from types import FunctionType
from typing import Any, NamedTuple

import triton
import triton.language as tl

from lars_tree._numerics import formula
from lars_tree._numerics.formula import Norm

CHUNK = tl.constexpr(16384)  # elements for each program; sums depend on it
BLOCK = tl.constexpr(2048)  # elements that a program loads at once
PARTS = tl.constexpr(128)  # partial sums that are added at once

# Columns of the tables; `fused.py` writes the tables by these names.
LAYER_COLUMNS = (
    "w",
    "dcdw",
    "out",
    "velocity",
    "size",
    "inner",
    "stride",
    "first",
    "count",
    "rule",
)
RULE_COLUMNS = (*formula.NUMBERS, *formula.MOMENTUM_NUMBERS)
FLAG_COLUMNS = ("adapt", "trust_clip", "joint_norm", "maximize", "nesterov", "is_guarded")
COEFFICIENTS = 11
_LAYER = tl.constexpr(len(LAYER_COLUMNS))
_RULE = tl.constexpr(len(RULE_COLUMNS) + len(FLAG_COLUMNS))
_COEFFICIENTS = tl.constexpr(COEFFICIENTS)


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
_OPS = tl.constexpr(Ops) if isinstance(_where, triton.JITFunction) else Ops


@triton.jit
def _load(address, offsets, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Elements as float64; bfloat16 is converted by its bits, as the interpreter cannot do it."""
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        x = tl.load(pointer + offsets, mask=mask, other=0)
    else:
        x = tl.load(pointer + offsets)
    if DTYPE == tl.bfloat16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
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
def _is_finite(x, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        return (x & 0x7F80) != 0x7F80
    else:
        return tl.abs(x) < float("inf")


@triton.jit
def _store(
    address, offsets, mask, x, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if MASKED:
        tl.store(pointer + offsets, x, mask=mask)
    else:
        tl.store(pointer + offsets, x)


@triton.jit
def _offsets(start, inner, stride, STRIDED: tl.constexpr):
    """Offsets of BLOCK elements; elements are contiguous only in runs of `inner`, if STRIDED."""
    i = start + tl.arange(0, BLOCK)
    if STRIDED:
        return (i // inner) * stride + i % inner
    else:
        return i


@triton.jit
def _sum_of_squares(
    row,
    start,
    joint,
    sign,
    scale,
    W: tl.constexpr,
    G: tl.constexpr,
    JOINT: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    w_address, dcdw_address = tl.load(row), tl.load(row + 1)
    size, inner, stride = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    w_sum = tl.zeros([BLOCK], tl.float64)
    dcdw_sum = tl.zeros([BLOCK], tl.float64)
    for k in range(CHUNK // BLOCK):
        begin = start + k * BLOCK
        mask = begin + tl.arange(0, BLOCK) < size
        offsets = _offsets(begin, inner, stride, STRIDED)
        w = _load(w_address, offsets, mask, W, ALIGNED, MASKED) * scale
        dcdw = _load(dcdw_address, offsets, mask, G, ALIGNED, MASKED) * scale
        if JOINT:
            dcdw = tl.where(joint != 0, multiply_add(_OPS, sign * dcdw, joint, w), dcdw)
        w_sum += w * w
        dcdw_sum += dcdw * dcdw
    return tl.sum(w_sum), tl.sum(dcdw_sum)


@triton.jit(do_not_specialize=["first"])
def sum_squares(
    chunks,
    layers,
    rules,
    sums,
    first,
    W: tl.constexpr,
    G: tl.constexpr,
    JOINT: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Sum the squares of w and of the (joint) gradient in each chunk, with each scale."""
    chunk = first + tl.program_id(0)
    row = layers + tl.load(chunks + 2 * chunk) * _LAYER
    start = tl.load(chunks + 2 * chunk + 1) * CHUNK
    is_whole = start + CHUNK <= tl.load(row + 4)
    joint, sign = _joint_factors(rules + tl.load(row + 9) * _RULE)
    for k in tl.static_range(SCALES):
        scale = 1.0
        if k == 1:
            scale = 2.0**-600
        if k == 2:
            scale = 2.0**600
        if is_whole:
            w_sum, dcdw_sum = _sum_of_squares(
                row, start, joint, sign, scale, W, G, JOINT, STRIDED, ALIGNED, False
            )
        else:
            w_sum, dcdw_sum = _sum_of_squares(
                row, start, joint, sign, scale, W, G, JOINT, STRIDED, ALIGNED, True
            )
        tl.store(sums + (2 * chunk) * SCALES + k, w_sum)
        tl.store(sums + (2 * chunk + 1) * SCALES + k, dcdw_sum)


@triton.jit
def _joint_factors(rule):
    """The factor of w in the joint gradient, 0 if the layer has none; and the sign of dcdw."""
    decay, grad_scale = tl.load(rule + 1), tl.load(rule + 4)
    is_joint = (tl.load(rule + 8) != 0) & (tl.load(rule + 10) != 0)
    return tl.where(is_joint, decay * grad_scale, 0.0), 1.0 - 2.0 * tl.load(rule + 11)


@triton.jit
def add_sums(layers, sums, norms, SCALES: tl.constexpr):
    """The norms of each layer, from the sums of its chunks."""
    layer = tl.program_id(0)
    row = layers + layer * _LAYER
    first, count = tl.load(row + 7), tl.load(row + 8)
    for column in tl.static_range(2):
        unscaled = _added(sums, first, count, column, 0, SCALES)
        of_large = unscaled
        of_small = unscaled
        if SCALES == 3:
            of_large = _added(sums, first, count, column, 1, SCALES)
            of_small = _added(sums, first, count, column, 2, SCALES)
        norm = norm_of_sums(_OPS, unscaled, of_large, of_small)
        tl.store(norms + 4 * layer + 2 * column, norm.scaled)
        tl.store(norms + 4 * layer + 2 * column + 1, norm.scale)


@triton.jit
def _added(sums, first, count, column, k, SCALES: tl.constexpr):
    total = tl.zeros([PARTS], tl.float64)
    for begin in range(0, count, PARTS):
        i = begin + tl.arange(0, PARTS)
        at = (2 * (first + i) + column) * SCALES + k
        total += tl.load(sums + at, mask=i < count, other=0.0)
    return tl.sum(total)


@triton.jit
def find_coefficients(layers, rules, norms, table, JOINT: tl.constexpr, SCALES: tl.constexpr):
    """The coefficients of the step of each layer, in the order in which `_coefficients` reads."""
    layer = tl.program_id(0)
    numbers = rules + tl.load(layers + layer * _LAYER + 9) * _RULE
    joint, sign = _joint_factors(numbers)
    rule = Rule(
        tl.load(numbers),
        tl.where(joint != 0, 0.0, tl.load(numbers + 1)),
        tl.load(numbers + 2),
        tl.load(numbers + 3),
        tl.load(numbers + 4),
        tl.load(numbers + 5),
        tl.load(numbers + 6),
        tl.load(numbers + 7),
        True,
        tl.load(numbers + 9) != 0,
        (tl.load(numbers + 10) != 0) & (joint == 0),
    )
    norm = norms + 4 * layer
    w_norm = Norm(tl.load(norm), tl.load(norm + 1))
    dcdw_norm = Norm(tl.load(norm + 2), tl.load(norm + 3))
    factor, scale, decay = scaled_coefficients(_OPS, w_norm, dcdw_norm, rule)
    adapts = tl.load(numbers + 8) != 0
    plain_factor, plain_decay = coefficients(1.0, rule)
    factor, decay = tl.where(adapts, factor, plain_factor), tl.where(adapts, decay, plain_decay)
    unscale = tl.where(adapts, 1.0 / dcdw_norm.scale, 1.0)
    scale = tl.where(adapts, scale, 1.0)
    dcdw_scale, w_scale, first, last = 1.0, 1.0, 1.0, 1.0
    if SCALES == 1:  # the product is in the range of float64
        factor = factor * unscale * scale
    else:
        if JOINT:
            joint, dcdw_scale, w_scale = _joint_scales(joint, w_norm.scale, dcdw_norm.scale)
            unscale = unscale / dcdw_scale
        first, middle, last = _factors(unscale, scale)
        factor = factor * middle
    row = table + layer * _COEFFICIENTS
    tl.store(row, w_scale)
    tl.store(row + 1, sign * dcdw_scale)
    tl.store(row + 2, factor)
    tl.store(row + 3, first)
    tl.store(row + 4, decay)
    tl.store(row + 5, joint)
    tl.store(row + 6, rule.momentum)
    tl.store(row + 7, rule.lr_after_momentum)
    tl.store(row + 8, tl.load(numbers + 12))
    tl.store(row + 9, tl.load(numbers + 13))
    tl.store(row + 10, last)


@triton.jit
def _joint_scales(joint, w_scale, joint_gradient_scale):
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
def _factors(a, b):
    """Three factors of the product of two powers of two, which may be out of range.

    A number is multiplied by one after the other. If the first and the last are not 1, both exceed
    2**200 or both are below 2**-200, so a product is out of range only if the last one is.
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


@triton.jit
def _apply(
    row,
    coefficients,
    start,
    keeps,
    W: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    JOINT: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALES: tl.constexpr,
    STORES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Step one chunk. Returns the number of results that are not finite, unless STORES."""
    w_address, dcdw_address, out_address = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    velocity_address = tl.load(row + 3)
    size, inner, stride = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    w_scale, signed_scale = tl.load(coefficients), tl.load(coefficients + 1)
    factor, first, last = (
        tl.load(coefficients + 2),
        tl.load(coefficients + 3),
        tl.load(coefficients + 10),
    )
    decay, joint = tl.load(coefficients + 4), tl.load(coefficients + 5)
    momentum, lr_after = tl.load(coefficients + 6), tl.load(coefficients + 7)
    nesterov = tl.load(coefficients + 8) != 0
    bad = tl.zeros([BLOCK], tl.int32)
    for k in range(CHUNK // BLOCK):
        begin = start + k * BLOCK
        mask = begin + tl.arange(0, BLOCK) < size
        offsets = _offsets(begin, inner, stride, STRIDED)
        w = _load(w_address, offsets, mask, W, ALIGNED, MASKED)
        dcdw = _load(dcdw_address, offsets, mask, G, ALIGNED, MASKED)
        gradient = signed_scale * dcdw
        if JOINT:
            total = multiply_add(_OPS, gradient, joint, w_scale * w)
            gradient = tl.where(joint != 0, total, gradient)
        if SCALES == 3:
            gradient = first * gradient
        u = factor * gradient
        if SCALES == 3:
            u = last * u
        # Without decay, an infinite weight must not become NaN.
        u += tl.where(decay != 0, decay * w, 0.0)
        direction = u
        if V is not None:
            velocity = _load(velocity_address, offsets, mask, V, ALIGNED, MASKED)
            moved = momentum * velocity + u
            direction = lr_after * tl.where(nesterov, u + momentum * moved, moved)
            new_velocity = _rounded(tl.where(keeps, velocity, moved), V)
            if STORES:
                _store(velocity_address, offsets, mask, new_velocity, V, ALIGNED, MASKED)
            else:
                bad += tl.where(_is_finite(new_velocity, V), 0, 1)
        new_w = _rounded(tl.where(keeps, w, w - direction), W)
        if STORES:
            _store(out_address, offsets, mask, new_w, W, ALIGNED, MASKED)
        else:
            bad += tl.where(_is_finite(new_w, W), 0, 1)
    return tl.sum(bad)


@triton.jit(do_not_specialize=["first"])
def apply(
    chunks,
    layers,
    coefficients,
    unless,
    bad,
    first,
    W: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    JOINT: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALES: tl.constexpr,
    STORES: tl.constexpr,
):
    """Write the new weights and velocities, or the old ones if the number at `unless` is not 0.

    Unless STORES, write only, for guarded layers, how many results of each chunk would not be
    finite, to `bad`.
    """
    chunk = first + tl.program_id(0)
    layer = tl.load(chunks + 2 * chunk)
    start = tl.load(chunks + 2 * chunk + 1) * CHUNK
    row, numbers = layers + layer * _LAYER, coefficients + layer * _COEFFICIENTS
    keeps = unless is not None
    if unless is not None:
        keeps = tl.load(unless) != 0
    if start + CHUNK <= tl.load(row + 4):
        count = _apply(
            *(row, numbers, start, keeps, W, G, V, JOINT, STRIDED, ALIGNED, SCALES, STORES, False)
        )
    else:
        count = _apply(
            *(row, numbers, start, keeps, W, G, V, JOINT, STRIDED, ALIGNED, SCALES, STORES, True)
        )
    if not STORES:
        tl.store(bad + chunk, tl.where(tl.load(numbers + 9) != 0, count, 0))
