"""The Triton kernels of the fused engine; `fused.py` launches them.

The kernels address tensors through tables in device memory (`fused._Table`), so one launch serves
any number of tensors. Each tensor is divided into chunks, each of which is the work of one program.
All arithmetic is in float64, and results are rounded once. For addresses of the same alignment, the
order of sums is fixed, so that repeated runs give the same bits.

The formula itself is not written here: see `kernel_math.py`.
"""

import triton
import triton.language as tl

from lars_tree._backends.torch.kernel_math import (
    OPS,
    Rule,
    coefficients,
    factors,
    is_finite,
    joint_scales,
    multiply_add,
    norm_of_sums,
    rounded,
    scaled_coefficients,
)
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Norm

# Of nine combinations, these were the fastest on an H200: 3 % to 15 % faster than 16,384 with 2,048
# elements and 8 warps for bfloat16, and equal within 1 % for float32.
CHUNK = tl.constexpr(8192)  # elements for each program; sums depend on it
BLOCK = tl.constexpr(512)  # elements that a program loads at once
WARPS = 4  # of a program that reads a chunk
PARTS = tl.constexpr(128)  # partial sums that are added at once

# The columns of the three tables. `fused.py` makes the tables of layers and of rules.
LAYER_COLUMNS = 10
W_AT, DCDW_AT, OUT_AT, VELOCITY_AT, SIZE, INNER, STRIDE, FIRST_CHUNK, CHUNKS, RULE = map(
    tl.constexpr, range(LAYER_COLUMNS)
)
RULE_NUMBERS = formula.ALL_NUMBERS
RULE_FLAGS = ("adapt", "trust_clip", "joint_norm", "maximize", "nesterov")  # and `is_guarded`
RULE_COLUMNS = len(RULE_NUMBERS) + len(RULE_FLAGS) + 1
LR, DECAY, TRUST_COEFFICIENT, EPS, GRAD_SCALE, MOMENTUM, LR_AFTER, DAMPENING = map(
    tl.constexpr, range(len(RULE_NUMBERS))
)
ADAPT, TRUST_CLIP, JOINT_NORM, MAXIMIZE, NESTEROV, IS_GUARDED = map(
    tl.constexpr, range(len(RULE_NUMBERS), RULE_COLUMNS)
)
# u = last * (factor * (first * gradient)) + decay * w, where the gradient, if it is joint, is
# dcdw_scale * dcdw + joint * (w_scale * w). The last columns are those of the rule.
STEP_COLUMNS = 11
STEP_W_SCALE, STEP_DCDW_SCALE, STEP_FIRST, STEP_FACTOR, STEP_LAST, STEP_DECAY, STEP_JOINT = map(
    tl.constexpr, range(7)
)
STEP_MOMENTUM, STEP_LR_AFTER, STEP_NESTEROV, STEP_IS_GUARDED = map(
    tl.constexpr, range(7, STEP_COLUMNS)
)
LAYER_ROW, RULE_ROW, STEP_ROW = map(tl.constexpr, (LAYER_COLUMNS, RULE_COLUMNS, STEP_COLUMNS))


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
    w_address, dcdw_address = tl.load(row + W_AT), tl.load(row + DCDW_AT)
    size, inner, stride = tl.load(row + SIZE), tl.load(row + INNER), tl.load(row + STRIDE)
    w_sum = tl.zeros([BLOCK], tl.float64)
    dcdw_sum = tl.zeros([BLOCK], tl.float64)
    for k in range(CHUNK // BLOCK):
        begin = start + k * BLOCK
        mask = begin + tl.arange(0, BLOCK) < size
        offsets = _offsets(begin, inner, stride, STRIDED)
        w = _load(w_address, offsets, mask, W, ALIGNED, MASKED) * scale
        dcdw = _load(dcdw_address, offsets, mask, G, ALIGNED, MASKED) * scale
        if JOINT:
            dcdw = tl.where(joint != 0, multiply_add(OPS, sign * dcdw, joint, w), dcdw)
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
    row = layers + tl.load(chunks + 2 * chunk) * LAYER_ROW
    start = tl.load(chunks + 2 * chunk + 1) * CHUNK
    is_whole = start + CHUNK <= tl.load(row + SIZE)
    joint, sign = _joint_factors(rules + tl.load(row + RULE) * RULE_ROW)
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
    decay, grad_scale = tl.load(rule + DECAY), tl.load(rule + GRAD_SCALE)
    is_joint = (tl.load(rule + ADAPT) != 0) & (tl.load(rule + JOINT_NORM) != 0)
    return tl.where(is_joint, decay * grad_scale, 0.0), 1.0 - 2.0 * tl.load(rule + MAXIMIZE)


@triton.jit
def add_sums(layers, sums, norms, SCALES: tl.constexpr):
    """The norms of each layer, from the sums of its chunks."""
    layer = tl.program_id(0)
    row = layers + layer * LAYER_ROW
    first, count = tl.load(row + FIRST_CHUNK), tl.load(row + CHUNKS)
    for column in tl.static_range(2):
        unscaled = _added(sums, first, count, column, 0, SCALES)
        of_large = unscaled
        of_small = unscaled
        if SCALES == 3:
            of_large = _added(sums, first, count, column, 1, SCALES)
            of_small = _added(sums, first, count, column, 2, SCALES)
        norm = norm_of_sums(OPS, unscaled, of_large, of_small)
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
    """The numbers of the step of each layer: its rule and coefficients."""
    layer = tl.program_id(0)
    numbers = rules + tl.load(layers + layer * LAYER_ROW + RULE) * RULE_ROW
    joint, sign = _joint_factors(numbers)
    rule = Rule(
        tl.load(numbers + LR),
        tl.where(joint != 0, 0.0, tl.load(numbers + DECAY)),
        tl.load(numbers + TRUST_COEFFICIENT),
        tl.load(numbers + EPS),
        tl.load(numbers + GRAD_SCALE),
        tl.load(numbers + MOMENTUM),
        tl.load(numbers + LR_AFTER),
        tl.load(numbers + DAMPENING),
        True,
        tl.load(numbers + TRUST_CLIP) != 0,
        (tl.load(numbers + JOINT_NORM) != 0) & (joint == 0),
    )
    norm = norms + 4 * layer
    w_norm = Norm(tl.load(norm), tl.load(norm + 1))
    dcdw_norm = Norm(tl.load(norm + 2), tl.load(norm + 3))
    factor, scale, decay = scaled_coefficients(OPS, w_norm, dcdw_norm, rule)
    adapts = tl.load(numbers + ADAPT) != 0
    plain_factor, plain_decay = coefficients(1.0, rule)
    factor, decay = tl.where(adapts, factor, plain_factor), tl.where(adapts, decay, plain_decay)
    unscale = tl.where(adapts, 1.0 / dcdw_norm.scale, 1.0)
    scale = tl.where(adapts, scale, 1.0)
    dcdw_scale, w_scale, first, last = 1.0, 1.0, 1.0, 1.0
    if SCALES == 1:  # the product is in the range of float64
        factor = factor * unscale * scale
    else:
        if JOINT:
            joint, dcdw_scale, w_scale = joint_scales(joint, w_norm.scale, dcdw_norm.scale)
            unscale = unscale / dcdw_scale
        first, middle, last = factors(unscale, scale)
        factor = factor * middle
    row = table + layer * STEP_ROW
    tl.store(row + STEP_W_SCALE, w_scale)
    tl.store(row + STEP_DCDW_SCALE, sign * dcdw_scale)
    tl.store(row + STEP_FACTOR, factor)
    tl.store(row + STEP_FIRST, first)
    tl.store(row + STEP_DECAY, decay)
    tl.store(row + STEP_JOINT, joint)
    tl.store(row + STEP_MOMENTUM, rule.momentum)
    tl.store(row + STEP_LR_AFTER, rule.lr_after_momentum)
    tl.store(row + STEP_NESTEROV, tl.load(numbers + NESTEROV))
    tl.store(row + STEP_IS_GUARDED, tl.load(numbers + IS_GUARDED))
    tl.store(row + STEP_LAST, last)


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
    w_address, dcdw_address, out_address = (
        tl.load(row + W_AT),
        tl.load(row + DCDW_AT),
        tl.load(row + OUT_AT),
    )
    velocity_address = tl.load(row + VELOCITY_AT)
    size, inner, stride = tl.load(row + SIZE), tl.load(row + INNER), tl.load(row + STRIDE)
    w_scale, dcdw_scale = (
        tl.load(coefficients + STEP_W_SCALE),
        tl.load(coefficients + STEP_DCDW_SCALE),
    )
    first, last = tl.load(coefficients + STEP_FIRST), tl.load(coefficients + STEP_LAST)
    factor = tl.load(coefficients + STEP_FACTOR)
    decay, joint = tl.load(coefficients + STEP_DECAY), tl.load(coefficients + STEP_JOINT)
    momentum, lr_after = (
        tl.load(coefficients + STEP_MOMENTUM),
        tl.load(coefficients + STEP_LR_AFTER),
    )
    nesterov = tl.load(coefficients + STEP_NESTEROV) != 0
    bad = tl.zeros([BLOCK], tl.int32)
    for k in range(CHUNK // BLOCK):
        begin = start + k * BLOCK
        mask = begin + tl.arange(0, BLOCK) < size
        offsets = _offsets(begin, inner, stride, STRIDED)
        w = _load(w_address, offsets, mask, W, ALIGNED, MASKED)
        dcdw = _load(dcdw_address, offsets, mask, G, ALIGNED, MASKED)
        gradient = dcdw_scale * dcdw
        if JOINT:
            total = multiply_add(OPS, gradient, joint, w_scale * w)
            gradient = tl.where(joint != 0, total, gradient)
        if SCALES == 3:
            gradient = first * gradient
        u = factor * gradient
        if SCALES == 3:
            u = last * u
        # As in `formula.py`; without decay, an infinite weight must not become NaN.
        if V is None:
            new_w = tl.where(decay != 0, (1.0 - decay) * w, w) - u
        else:
            u += tl.where(decay != 0, decay * w, 0.0)
            velocity = _load(velocity_address, offsets, mask, V, ALIGNED, MASKED)
            moved = momentum * velocity + u
            direction = lr_after * tl.where(nesterov, u + momentum * moved, moved)
            new_velocity = rounded(tl.where(keeps, velocity, moved), V)
            if STORES:
                _store(velocity_address, offsets, mask, new_velocity, V, ALIGNED, MASKED)
            else:
                bad += tl.where(is_finite(new_velocity, V), 0, 1)
            new_w = w - direction
        new_w = rounded(tl.where(keeps, w, new_w), W)
        if STORES:
            _store(out_address, offsets, mask, new_w, W, ALIGNED, MASKED)
        else:
            bad += tl.where(is_finite(new_w, W), 0, 1)
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
    row, numbers = layers + layer * LAYER_ROW, coefficients + layer * STEP_ROW
    keeps = unless is not None
    if unless is not None:
        keeps = tl.load(unless) != 0
    if start + CHUNK <= tl.load(row + SIZE):
        count = _apply(
            *(row, numbers, start, keeps, W, G, V, JOINT, STRIDED, ALIGNED, SCALES, STORES, False)
        )
    else:
        count = _apply(
            *(row, numbers, start, keeps, W, G, V, JOINT, STRIDED, ALIGNED, SCALES, STORES, True)
        )
    if not STORES:
        tl.store(bad + chunk, tl.where(tl.load(numbers + STEP_IS_GUARDED) != 0, count, 0))
