"""The LARS formula for one array: its only statement in Python.

    ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps),   g = dcdw / grad_scale
    u     = lr * ratio * (g + decay_lambda * w)
    w_new = w - u

With `joint_norm` the denominator is |g + decay_lambda * w| + eps. The step is then the same as
without decay along the gradient g + decay_lambda * w: see `joint`.

u is linear in dcdw and w, with two coefficients that depend on the norms only. `trust_ratio` and
`coefficients` compute them for any kind of number (float, double-double or array), and `apply_step`
applies them. `step` does all of it, for libraries that compute with whole arrays.

With momentum, u is added to a velocity v, which moves the weights (`increment`, `apply_momentum`):

    u     = (1 - dampening) * lr_before_momentum * ratio * (g + decay_lambda * w)
    v_new = momentum * v + u
    w_new = w - lr_after_momentum * v_new
            w - lr_after_momentum * (u + momentum * v_new)      with nesterov

This module knows neither trees nor array libraries. `_native/kernel.hpp` states the rule again for
CPU memory, and `tests/reference.py` independently in mpmath, to which `tests/test_numbers.py`
compares both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from lars_tree._numerics.double_double import two_sum


class Rule(NamedTuple):
    """The options of the rule for one leaf, with the defaults of `lars_update`.

    The learning rate is the product of two factors, which differ with momentum.
    `lr_before_momentum` scales what is added to the velocity, as in the paper, where a new rate
    acts on later gradients only. `lr_after_momentum` scales the velocity when it moves the weights,
    as in torch, where a new rate acts on the whole velocity. Without a velocity the step uses the
    first factor only; `trust_clip` always uses the product.

    `maximize` negates the gradient, but not the decay. The name () in `axis_name` states that
    along all other mesh axes each device has whole layers. The kernel reads the fields by name.
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


NUMBERS = ("lr_before_momentum", "decay_lambda", "trust_coefficient", "eps", "grad_scale")
MOMENTUM_NUMBERS = ("momentum", "lr_after_momentum", "dampening")


Where = Callable[[Any, Any, Any], Any]  # elementwise choice


def trust_ratio(
    w_norm: Any, dcdw_norm: Any, rule: Rule, where: Where, one: Any = 1, clip: bool = True
) -> Any:
    """The ratio of the formula; the norms may be None where adapt is False.

    dcdw_norm is that of the joint gradient with `joint_norm`, and `one` is a ratio of 1 in the
    units of the norms, for callers that scale them. `trust_clip` divides the ratio by the learning
    rate and, if `clip`, limits it to 1.
    """
    if not rule.adapt:
        return one
    # The ratio is 1 for weights of zero, which must train, and for a gradient of zero, which leaves
    # the unscaled decay. Dividing by 1 there keeps NaN out of the derivative of the other branch.
    undefined = (w_norm == 0) | (dcdw_norm == 0)
    denominator = dcdw_norm / rule.grad_scale
    if not rule.joint_norm:
        denominator = denominator + rule.decay_lambda * w_norm
    denominator = denominator + rule.eps
    ratio = rule.trust_coefficient * w_norm / where(undefined, 1, denominator)
    if rule.trust_clip:  # LARC: the local rate is min(ratio, rate), which is rate times the result
        rate = rule.lr_before_momentum * rule.lr_after_momentum * one
        relative = ratio / where(rate == 0, one, rate) * one
        ratio = where(ratio > rate, one, relative) if clip else relative
    return where(undefined, one, ratio)


def coefficients(ratio: Any, rule: Rule) -> tuple[Any, Any]:
    """The gradient and the decay coefficient: u is the first times dcdw plus the second times w."""
    rate = rule.lr_before_momentum * ratio * (1 - rule.dampening)
    return rate / rule.grad_scale, rate * rule.decay_lambda


def is_joint(rule: Rule) -> bool:
    """Whether the denominator needs the norm of g + decay_lambda * w, and it is not that of g."""
    return rule.joint_norm and rule.adapt and not is_zero(rule.decay_lambda)


def apply_step(w: Any, dcdw: Any, gradient_coefficient: Any, decay_coefficient: Any) -> Any:
    """The weights after a step without momentum.

    A decay_coefficient of None means no decay: 0 * inf would make NaN of an infinite weight.
    """
    decayed = w if decay_coefficient is None else (1 - decay_coefficient) * w
    return decayed - gradient_coefficient * dcdw


def increment(w: Any, dcdw: Any, gradient_coefficient: Any, decay_coefficient: Any) -> Any:
    """U: what is subtracted from the weights, or added to the velocity; None as in `apply_step`."""
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
        """2-norms of both over all axes but layer_axis; the other axes have length 1."""

    def largest(self, x: Any, layer_axis: int | None) -> Any:
        """The largest magnitude over the same axes, a constant to differentiation."""

    def power_of_two(self, x: Any) -> Any:
        """A power of two within a factor of two of x > 0, else 1; a constant to differentiation."""

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Elementwise choice; a and b may be numbers."""

    def upper_half(self, x: Any) -> Any:
        """X rounded to half as many bits; the rest has the others."""

    def finite_or(self, x: Any, other: Any) -> Any:
        """Elementwise, x where it is finite."""

    def like(self, number: Any, x: Any) -> Any:
        """A number as an array of the type of x, an array as it is."""

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger of two arrays or of an array and a number."""


class Norm(NamedTuple):
    """A norm as `scaled * scale`.

    The scale is a power of two, and constant to differentiation; the scaled norm is far from the
    limits of its type, and its derivative is 0 at 0.
    """

    scaled: Any
    scale: Any


def step(ops: Ops, w: Any, dcdw: Any, rule: Rule, velocity: Any = None) -> tuple[Any, Any]:
    """The weights and the velocity (None if there is none) after a step, in the precision of w.

    Valid over the whole range of exponents. The rule is homogeneous: if w is scaled, or dcdw,
    decay_lambda and eps together, then the part of u along dcdw scales like w, and the part along w
    does not change. So norms are scaled to be near 1, where no square overflows or vanishes.
    Scaling by powers of two changes no bit.
    """
    dcdw, rule = joint(ops, w, dcdw, rule)
    decays = not is_zero(rule.decay_lambda)
    if rule.adapt:
        w_norm, dcdw_norm = ops.norms(w, dcdw, rule.layer_axis)
        scaled, _, one = _scaled(ops, w_norm, dcdw_norm, rule)
        dcdw = dcdw / dcdw_norm.scale
        ratio = trust_ratio(w_norm.scaled, dcdw_norm.scaled, scaled, ops.where, one)
        # A ratio of 1 does not depend on the norms, nor on their scales.
        is_one = ratio == one
        pairs = zip(coefficients(1, rule), coefficients(ratio, scaled), strict=True)
        gradient_coefficient, decay_coefficient = (ops.where(is_one, *pair) for pair in pairs)
        # The scale comes last: a subnormal number times anything has few digits left.
        dcdw = gradient_coefficient * dcdw
        gradient_coefficient = ops.where(is_one, dcdw_norm.scale, w_norm.scale)
    else:
        gradient_coefficient, decay_coefficient = coefficients(1, rule)
    if rule.maximize:
        gradient_coefficient = -gradient_coefficient
    terms = w, dcdw, gradient_coefficient, decay_coefficient if decays else None
    if velocity is None:
        return apply_step(*terms), None
    return apply_momentum(w, velocity, increment(*terms), rule)


def joint(ops: Ops, w: Any, dcdw: Any, rule: Rule) -> tuple[Any, Rule]:
    """For `joint_norm`, the joint gradient dcdw + decay * w, and the rule without decay.

    The denominator is then the norm of this gradient. The sum is scaled to be near 1, so that
    nothing overflows; the loss scale absorbs the factor.
    """
    if not is_joint(rule):
        return dcdw, rule
    decay = rule.decay_lambda * rule.grad_scale
    w_largest, dcdw_largest = (ops.largest(x, rule.layer_axis) for x in (w, dcdw))
    w_scale = ops.power_of_two(w_largest)
    decay_scale = decay * ops.where(w_largest > 0, w_scale, 0)
    scale = ops.power_of_two(ops.maximum(decay_scale, dcdw_largest))
    scale = ops.maximum(scale, 2.0**-100)  # its inverse must not overflow
    signed = -scale if rule.maximize else scale
    total = multiply_add(ops, dcdw / signed, decay_scale / scale, w / w_scale)
    return total, without_decay(rule)._replace(grad_scale=rule.grad_scale / scale)


def multiply_add(ops: Ops, a: Any, b: Any, x: Any) -> Any:
    """A + b * x with nearly a single rounding, also where the two terms cancel.

    The factors are split into halves, whose products are exact, and the rounding error of the sum
    is added to it (Dekker 1971, doi:10.1007/BF01397083).
    """
    b_high, x_high = ops.upper_half(b), ops.upper_half(x)
    b_low, x_low = b - b_high, x - x_high
    product = b_high * x_high
    total, rest = two_sum(a, product)
    exact = total + (rest + ((b_high * x_low + b_low * x_high) + b_low * x_low))
    return ops.finite_or(exact, total)


def without_decay(rule: Rule) -> Rule:
    """The rule to use with the joint gradient, which contains decay and sign."""
    return rule._replace(decay_lambda=0.0, maximize=False, joint_norm=False)


def _scaled(ops: Ops, w_norm: Norm, dcdw_norm: Norm, rule: Rule) -> tuple[Rule, Any, Any]:
    """The rule for norms scaled to be near 1, the scale of its denominator, and a ratio of 1."""
    # Dividing by the loss scale may leave the range; the undivided scale is then near enough.
    unscaled = dcdw_norm.scale / rule.grad_scale
    in_range = (unscaled > 0) & (unscaled < float("inf"))
    # A norm of 0 has the scale 1, which must not count in the maximum of the scales.
    moves = dcdw_norm.scaled != 0
    scale = ops.where(moves, ops.where(in_range, unscaled, dcdw_norm.scale), 0)
    scale = ops.maximum(scale, rule.decay_lambda * w_norm.scale)
    scale = ops.power_of_two(ops.maximum(scale, rule.eps))
    scaled = rule._replace(
        decay_lambda=rule.decay_lambda * w_norm.scale / scale,
        eps=ops.like(rule.eps, scale) / scale,
        grad_scale=rule.grad_scale * ops.where(moves, scale / dcdw_norm.scale, 1),
    )
    # A scaled ratio never comes near these bounds, so even a bounded 1 differs from all others.
    one = ops.maximum(scale / ops.maximum(w_norm.scale, scale * 2.0**-100), 2.0**-100)
    return scaled, scale, one


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


def measure(ops: Ops, w: Any, dcdw: Any, rule: Rule) -> Measured:
    """The norms and ratios of `step`, with the axes that the norms have."""
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
