"""The LARS formula for one array; this is its only implementation in Python.

    ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps),   g = dcdw / grad_scale
    u     = lr * ratio * (g + decay_lambda * w)
    w_new = w - u

With `joint_norm` the denominator is |g + decay_lambda * w| + eps. The step then equals a step
without decay for the gradient g + decay_lambda * w: see `joint`.

u is a linear combination of dcdw and w. Its two coefficients depend on dcdw and w only through
their norms. `trust_ratio` and `coefficients` compute the coefficients for any type of number
(float, double-double or array), and `apply_step` applies them. `step` calls all three functions,
for libraries that compute with whole arrays.

With momentum, u is added to a velocity v, which updates the weights (`increment`,
`apply_momentum`):

    u     = (1 - dampening) * lr_before_momentum * ratio * (g + decay_lambda * w)
    v_new = momentum * v + u
    w_new = w - lr_after_momentum * v_new
            w - lr_after_momentum * (u + momentum * v_new)      with nesterov

This module knows neither trees nor array libraries. `_native/kernel.hpp` implements the rule again
for CPU memory. `tests/test_numbers.py` and `tests/test_formula.py` compare both implementations
with `tests/reference.py`, an independent implementation in mpmath.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from lars_tree._numerics.double_double import two_sum


class Rule(NamedTuple):
    """The options of the rule for one leaf, with the defaults of `lars_update`.

    The learning rate is the product of two factors, which differ with momentum.
    `lr_before_momentum` scales what is added to the velocity, as in the paper, where a new rate
    acts on later gradients only. `lr_after_momentum` scales the velocity when it is subtracted from
    the weights, as in torch, where a new rate acts on the whole velocity. Without a velocity the
    step uses the first factor only; `trust_clip` always uses the product.

    `maximize` negates the gradient, but not the decay. The name () in `axis_name` means that each
    device has whole layers along all other mesh axes. The kernel reads the fields by name.
    """

    lr_before_momentum: Any
    decay_lambda: Any = 0.0
    stop_gradients: bool = True
    trust_coefficient: Any = 1.0
    eps: Any = 0.0
    adapt: bool = True
    trust_clip: bool = False
    joint_norm: bool = False
    grad_scale: Any = 1.0
    nonfinite: str = "propagate"
    layer_axis: int | None = None
    axis_name: frozenset[Any] | None = None
    momentum: Any = 0.0
    lr_after_momentum: Any = 1.0
    nesterov: bool = False
    maximize: bool = False
    dampening: Any = 0.0


# The fields of `Rule` that are numbers: those of a step without momentum, and all.
NUMBERS = ("lr_before_momentum", "decay_lambda", "trust_coefficient", "eps", "grad_scale")
ALL_NUMBERS = (*NUMBERS, "momentum", "lr_after_momentum", "dampening")


Where = Callable[[Any, Any, Any], Any]  # elementwise choice


def trust_ratio(
    w_norm: Any, dcdw_norm: Any, rule: Rule, where: Where, one: Any = 1, clip: bool = True
) -> Any:
    """The ratio of the formula; the norms may be None if `adapt` is False.

    With `joint_norm`, dcdw_norm is the norm of the joint gradient. `one` is a ratio of 1 in the
    units of the norms, for callers that scale the norms. `trust_clip` divides the ratio by the
    learning rate and, if `clip`, limits the quotient to 1.
    """
    if not rule.adapt:
        return one
    # The ratio is 1 if the weights are zero, so that they can train, and if the gradient is zero,
    # so that decay still applies. The denominator is then set to 1, so that a division by 0 does
    # not make the derivative of the ratio NaN.
    undefined = (w_norm == 0) | (dcdw_norm == 0)
    denominator = dcdw_norm / rule.grad_scale
    if not rule.joint_norm:
        denominator = denominator + rule.decay_lambda * w_norm
    denominator = denominator + rule.eps
    ratio = rule.trust_coefficient * w_norm / where(undefined, 1, denominator)
    if rule.trust_clip:  # LARC: min(ratio, rate) is the rate times the result
        rate = rule.lr_before_momentum * rule.lr_after_momentum * one
        relative = ratio / where(rate == 0, one, rate) * one
        ratio = where(ratio > rate, one, relative) if clip else relative
    return where(undefined, one, ratio)


def coefficients(ratio: Any, rule: Rule) -> tuple[Any, Any]:
    """The coefficients of dcdw and of w in u."""
    rate = rule.lr_before_momentum * ratio * (1 - rule.dampening)
    return rate / rule.grad_scale, rate * rule.decay_lambda


def is_joint(rule: Rule) -> bool:
    """Whether the denominator uses the norm of g + decay_lambda * w instead of the norm of g."""
    return rule.joint_norm and rule.adapt and not is_zero(rule.decay_lambda)


def apply_step(w: Any, dcdw: Any, gradient_coefficient: Any, decay_coefficient: Any) -> Any:
    """The weights after a step without momentum.

    A decay_coefficient of None means no decay; with 0, an infinite weight would become NaN.
    """
    decayed = w if decay_coefficient is None else (1 - decay_coefficient) * w
    return decayed - gradient_coefficient * dcdw


def increment(w: Any, dcdw: Any, gradient_coefficient: Any, decay_coefficient: Any) -> Any:
    """The u of the formula; a decay_coefficient of None means no decay."""
    u = gradient_coefficient * dcdw
    return u if decay_coefficient is None else u + decay_coefficient * w


def apply_momentum(w: Any, velocity: Any, u: Any, rule: Rule) -> tuple[Any, Any]:
    """The weights and the velocity after a step with momentum."""
    velocity = rule.momentum * velocity + u
    direction = u + rule.momentum * velocity if rule.nesterov else velocity
    return w - rule.lr_after_momentum * direction, velocity


def is_zero(number: Any) -> bool:
    """Whether an option is the number 0; False for arrays."""
    return isinstance(number, (int, float)) and number == 0


class Ops(Protocol):
    """The operations of an array library that `step` needs."""

    def norms(self, w: Any, dcdw: Any, layer_axis: int | None) -> tuple[Norm, Norm]:
        """The 2-norms of w and dcdw; all axes except layer_axis are reduced to length 1."""

    def unscaled_norms(self, w: Any, dcdw: Any, layer_axis: int | None) -> tuple[Any, Any]:
        """Like `norms`, for arrays whose squares are in range; with defined derivatives at 0."""

    def largest(self, x: Any, layer_axis: int | None) -> Any:
        """The largest magnitude over the axes of `norms`, constant under differentiation."""

    def power_of_two(self, x: Any) -> Any:
        """A power of two near x (1 unless x > 0), constant under differentiation."""

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Elementwise choice; a and b may be numbers."""

    def upper_half(self, x: Any) -> Any:
        """Round x to half of its bits; the difference from x has the other half."""

    def finite_or(self, x: Any, other: Any) -> Any:
        """Elementwise, x where it is finite, otherwise `other`."""

    def like(self, number: Any, x: Any) -> Any:
        """Convert a number to an array of the type of x; return an array unchanged."""

    def maximum(self, a: Any, b: Any) -> Any:
        """The elementwise maximum of two arrays, or of an array and a number."""

    def sqrt(self, x: Any) -> Any:
        """The elementwise square root."""


class Norm(NamedTuple):
    """A norm as `scaled * scale`.

    The scale is a power of two, and constant under differentiation. The scaled norm is far from the
    limits of its type, and its derivative is defined as 0 at 0.
    """

    scaled: Any
    scale: Any


# Squares of float64 numbers may overflow or underflow, so they are summed once with each of these
# scales; the sums show which scale to use (Blue 1978, doi:10.1145/355769.355771).
SCALES = (1.0, 2.0**-600, 2.0**600)
_SMALLEST_SAFE_SUM, _LARGEST_SAFE_SUM = 2.0**-900, 2.0**1000


def norm_of_sums(ops: Ops, unscaled: Any, of_large: Any, of_small: Any) -> Norm:
    """The norm of numbers, given the sums of their squares, scaled by each of `SCALES`."""
    is_safe = (unscaled > _SMALLEST_SAFE_SUM) & (unscaled < _LARGEST_SAFE_SUM)
    is_large = of_large > _SMALLEST_SAFE_SUM
    total = ops.where(is_safe, unscaled, ops.where(is_large, of_large, of_small))
    root = ops.sqrt(total)
    # The scale must be finite even if the norm is not, and so must be its inverse, which is not the
    # case for subnormal numbers. A norm of 0 has the scale 1.
    power = ops.power_of_two(ops.where(root < 2.0**400, root, 2.0**400))
    power = ops.maximum(power, 2.0**-422)
    scale = ops.where(is_safe, power, ops.where(is_large, power * 2.0**600, power * 2.0**-600))
    return Norm(root / power, ops.where(total == 0, 1.0, scale))


# Computed in double, a step of arrays and options of at most the range of float32 never leaves the
# range of double, in any order of operations. Options that are numbers are in range between these
# bounds.
MODERATE = (2.0**-100, 2.0**100)


def is_moderate(number: float) -> bool:
    return number == 0 or MODERATE[0] < number < MODERATE[1]


def step(ops: Ops, w: Any, dcdw: Any, rule: Rule, velocity: Any, in_range: bool) -> tuple[Any, Any]:
    """The weights and the velocity (None if there is none) after a step, in the precision of w.

    The step is valid over the whole range of exponents: arrays are scaled by powers of two, so that
    their largest elements are near 1 and no norm overflows or vanishes. The rule allows this: if w
    is divided by a, dcdw and eps by b, and decay_lambda is multiplied by a / b, then the gradient
    term of u is divided by a, like w, and the decay coefficient does not change.

    With `in_range`, nothing is scaled. All arguments are then in double, but arrays were converted
    from shorter types, and numbers are moderate: see `MODERATE`.
    """
    dcdw, rule = joint(ops, w, dcdw, rule, in_range)
    decays = not is_zero(rule.decay_lambda)
    if rule.adapt and in_range:
        unscaled = ops.unscaled_norms(w, dcdw, rule.layer_axis)
        ratio = trust_ratio(*unscaled, rule, ops.where, ops.like(1, unscaled[0]))
        gradient_coefficient, decay_coefficient = coefficients(ratio, rule)
    elif rule.adapt:
        norms = ops.norms(w, dcdw, rule.layer_axis)
        dcdw = dcdw / norms[1].scale
        coefficient, gradient_coefficient, decay_coefficient = scaled_coefficients(
            ops, *norms, rule
        )
        # Multiply by the scale last, because an intermediate subnormal result would lose digits.
        dcdw = coefficient * dcdw
    else:
        gradient_coefficient, decay_coefficient = coefficients(1, rule)
    if rule.maximize:
        gradient_coefficient = -gradient_coefficient
    terms = w, dcdw, gradient_coefficient, decay_coefficient if decays else None
    if velocity is None:
        return apply_step(*terms), None
    return apply_momentum(w, velocity, increment(*terms), rule)


def scaled_coefficients(
    ops: Ops, w_norm: Norm, dcdw_norm: Norm, rule: Rule
) -> tuple[Any, Any, Any]:
    """The coefficients of dcdw / dcdw_norm.scale and of w in u, which adapts.

    The coefficient of dcdw is given as two factors, whose product may be out of range.
    """
    scaled, _, one = _scaled(ops, w_norm, dcdw_norm, rule)
    ratio = trust_ratio(w_norm.scaled, dcdw_norm.scaled, scaled, ops.where, one)
    # A ratio of 1 must not be scaled, as it does not depend on the norms.
    is_one = ratio == one
    gradient_if_one, decay_if_one = coefficients(1, rule)
    gradient_coefficient, decay_coefficient = coefficients(ratio, scaled)
    return (
        ops.where(is_one, gradient_if_one, gradient_coefficient),
        ops.where(is_one, dcdw_norm.scale, w_norm.scale),
        ops.where(is_one, decay_if_one, decay_coefficient),
    )


def joint(ops: Ops, w: Any, dcdw: Any, rule: Rule, in_range: bool = False) -> tuple[Any, Rule]:
    """For `joint_norm`, the joint gradient dcdw + decay * w, and the rule without decay.

    The denominator is then the norm of this gradient. The sum is scaled to be near 1, so that
    nothing overflows, and the loss scale is divided by the same factor; with `in_range`, see
    `step`, nothing is scaled.
    """
    if not is_joint(rule):
        return dcdw, rule
    decay = rule.decay_lambda * rule.grad_scale
    if in_range:
        signed = -dcdw if rule.maximize else dcdw
        total = multiply_add(ops, signed, ops.like(decay, w), w, short=True)
        return total, without_decay(rule)
    w_largest, dcdw_largest = (ops.largest(x, rule.layer_axis) for x in (w, dcdw))
    w_scale = ops.power_of_two(w_largest)
    decay = ops.where(w_largest > 0, ops.like(decay, w_largest), 0)  # not infinity * 0
    largest = ops.maximum(decay * w_scale, dcdw_largest)
    scale = ops.power_of_two(ops.maximum(largest, 2.0**-100))  # its inverse must not overflow
    signed = -scale if rule.maximize else scale
    factor = scaled_product(ops, decay, w_scale, scale)
    total = multiply_add(ops, dcdw / signed, factor, w / w_scale)
    return total, without_decay(rule)._replace(grad_scale=rule.grad_scale / scale)


def scaled_product(ops: Ops, a: Any, b: Any, scale: Any) -> Any:
    """Compute a * b / scale, where a * b is at most near the scale but may be subnormal."""
    divisor = ops.where((b < 1) & (scale < 1), scale, 1)
    return a * (b / divisor) / (scale / divisor)


def multiply_add(ops: Ops, a: Any, b: Any, x: Any, short: bool = False) -> Any:
    """Compute a + b * x, almost as exactly as with a single rounding, even if the two terms cancel.

    The factors are split into halves, whose products are exact, and the rounding errors of the sums
    are added to the sum (Dekker 1971, doi:10.1007/BF01397083). If x is `short`, it has at most half
    of the bits of its type, and is not split.
    """
    b_high = ops.upper_half(b)
    b_low = b - b_high
    if short:
        total, rest = two_sum(a, b_high * x)
        return ops.finite_or(total + (rest + b_low * x), total)
    x_high = ops.upper_half(x)
    x_low = x - x_high
    total, rest = two_sum(a, b_high * x_high)
    near, near_rest = two_sum(total, b_high * x_low + b_low * x_high)  # this sum is exact, too
    exact = near + (near_rest + (rest + b_low * x_low))
    return ops.finite_or(exact, total)


def without_decay(rule: Rule) -> Rule:
    """The rule for the joint gradient, which already includes decay and the sign."""
    return rule._replace(decay_lambda=0.0, maximize=False, joint_norm=False)


def _scaled(ops: Ops, w_norm: Norm, dcdw_norm: Norm, rule: Rule) -> tuple[Rule, Any, Any]:
    """The rule for scaled norms, the scale of its denominator, and a ratio of 1 at this scale."""
    # If the scale divided by the loss scale is out of range, the undivided scale is good enough.
    unscaled = dcdw_norm.scale / rule.grad_scale
    in_range = (unscaled > 0) & (unscaled < float("inf"))
    scale = ops.where(in_range, unscaled, dcdw_norm.scale)
    scale = ops.maximum(scale, rule.decay_lambda * w_norm.scale)
    scale = ops.power_of_two(ops.maximum(scale, rule.eps))
    scaled = _with_denominator(
        rule,
        rule.decay_lambda * w_norm.scale / scale,
        ops.like(rule.eps, scale) / scale,
        rule.grad_scale * (scale / dcdw_norm.scale),
    )
    # A scaled ratio is never near these bounds, so it cannot equal `one` even if `one` is bounded.
    one = ops.maximum(scale / ops.maximum(w_norm.scale, scale * 2.0**-100), 2.0**-100)
    return scaled, scale, one


def _with_denominator(rule: Rule, decay_lambda: Any, eps: Any, grad_scale: Any) -> Rule:
    return rule._replace(decay_lambda=decay_lambda, eps=eps, grad_scale=grad_scale)


def mesh_axes(rule: Rule) -> frozenset[Any]:
    """The mesh axes over which norms are summed."""
    return (rule.axis_name or frozenset()) - {()}


class Measured(NamedTuple):
    """The norms and ratios of a layer, with the loss scale divided out.

    `unclipped` is the ratio before `trust_clip` limits it to 1.
    """

    w_norm: Any
    g_norm: Any
    ratio: Any
    unclipped: Any


def measure(ops: Ops, w: Any, dcdw: Any, rule: Rule, in_range: bool = False) -> Measured:
    """The norms and trust ratios of `step`, in the shape that `Ops.norms` gives the norms."""
    if in_range:
        return _measure_in_range(ops, w, dcdw, rule)
    w_norm, dcdw_norm = ops.norms(w, dcdw, rule.layer_axis)
    g_norm = dcdw_norm.scaled * (dcdw_norm.scale / rule.grad_scale)
    if is_joint(rule):
        dcdw, rule = joint(ops, w, dcdw, rule)
        w_norm, dcdw_norm = ops.norms(w, dcdw, rule.layer_axis)
    scaled, scale, one = _scaled(ops, w_norm, dcdw_norm, rule)

    def ratio(clip: bool) -> Any:
        norms = w_norm.scaled, dcdw_norm.scaled
        found = trust_ratio(*norms, scaled, ops.where, one, clip=clip)
        return ops.where(found == one, 1, found * (w_norm.scale / scale))

    return Measured(w_norm.scaled * w_norm.scale, g_norm, ratio(clip=True), ratio(clip=False))


def _measure_in_range(ops: Ops, w: Any, dcdw: Any, rule: Rule) -> Measured:
    w_norm, dcdw_norm = ops.unscaled_norms(w, dcdw, rule.layer_axis)
    g_norm = dcdw_norm / rule.grad_scale
    if is_joint(rule):
        dcdw, rule = joint(ops, w, dcdw, rule, in_range=True)
        _, dcdw_norm = ops.unscaled_norms(w, dcdw, rule.layer_axis)
    one = ops.where(w_norm == 0, ops.like(1, w_norm), 1)  # in the shape of the norms
    norms = w_norm, dcdw_norm
    ratios = (trust_ratio(*norms, rule, ops.where, one, clip=clip) for clip in (True, False))
    return Measured(w_norm, g_norm, *ratios)
