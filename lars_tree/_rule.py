"""The LARS formula for one array: its only statement in Python.

    ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps),   g = dcdw / grad_scale
    w_new = w - lr * ratio * (g + decay_lambda * w)

With `joint_norm` the denominator is |g + decay_lambda * w| + eps. That is the step of the same
formula, without decay, along the gradient g + decay_lambda * w: see `joint`.

The step is linear in dcdw and w, with two coefficients that depend on norms alone. So it is made of
`coefficients`, which works with any kind of number (floats and `_backends/wide.py`, arrays
elsewhere), and `apply`. `step` joins them for libraries that compute with whole arrays.

With momentum a velocity v takes the step u in, and moves the weights (`along`, `move`):

    v_new = momentum * v + u
    w_new = w - rate * v_new,   or with nesterov   w - rate * (u + momentum * v_new)

where the velocity takes in u = (1 - dampening) * lr * ratio * (g + decay_lambda * w).

Knows nothing of trees (`_tree.py`) or of grouping (`update.py`). `_native/kernel.hpp` states the
rule again for CPU memory, and `tests/reference.py`, independently, in mpmath:
`tests/test_numbers.py` holds both to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

Number = Any


class Rule(NamedTuple):
    """The options of the rule for one leaf; the defaults are those of `lars_update`.

    The kernel reads the fields by their places. `momentum`, `rate` and `nesterov` matter only with
    a velocity, `rate` also with `trust_clip`. `lr` is in what the velocity takes in, as in the
    paper, `rate` in what it moves the weights by, as in torch: their product is the rate that
    `trust_clip` refers to. `maximize` turns the gradient round, not the decay. Among the names of
    `axis_name` () says that along all other mesh axes each device has whole layers.
    """

    lr: Any
    decay_lambda: Any = 0.0
    trust_coefficient: Any = 1.0
    eps: Any = 0.0
    grad_scale: Any = 1.0
    adapt: bool = True
    trust_clip: bool = False
    nonfinite: str = "propagate"
    layer_axis: int | None = None
    stop_gradients: bool = True
    momentum: Any = 0.0
    rate: Any = 1.0
    nesterov: bool = False
    maximize: bool = False
    joint_norm: bool = False
    dampening: Any = 0.0
    axis_name: frozenset[Any] | None = None


def coefficients(
    w_norm: Number, dcdw_norm: Number, rule: Rule, where: Callable[..., Any], one: Number = 1
) -> tuple[Number, Number]:
    """What to multiply dcdw and w by, so that their sum is the step."""
    return _along_both(trust_ratio(w_norm, dcdw_norm, rule, where, one), rule)


def _along_both(ratio: Number, rule: Rule) -> tuple[Number, Number]:
    rate = rule.lr * ratio * (1 - rule.dampening)
    return rate / rule.grad_scale, rate * rule.decay_lambda


def trust_ratio(
    w_norm: Number,
    dcdw_norm: Number,
    rule: Rule,
    where: Callable[..., Any],
    one: Number = 1,
    *,
    bounded: bool = True,
) -> Number:
    """How far a layer may go, in units of its gradient; norms may be None where adapt is False.

    `one` is a ratio of 1 in the units of the norms, for callers that scale them. With bounded=False
    it is the ratio divided by the rate, before `trust_clip` limits it to 1.
    """
    if not rule.adapt:
        return one
    # A layer initialised to zeros must train, and one without a gradient takes its plain decay:
    # both have ratio 1. Dividing by 1 there keeps NaN out of the derivative of the other branch.
    undefined = (w_norm == 0) | (dcdw_norm == 0)
    denominator = dcdw_norm / rule.grad_scale
    if not rule.joint_norm:  # else it is the norm of the sum
        denominator = denominator + rule.decay_lambda * w_norm
    denominator = denominator + rule.eps
    ratio = rule.trust_coefficient * w_norm / where(undefined, 1, denominator)
    if rule.trust_clip:  # LARC: the local rate is min(ratio, rate), which is rate times the result
        rate = rule.lr * rule.rate * one
        relative = ratio / where(rate == 0, one, rate) * one
        ratio = where(ratio > rate, one, relative) if bounded else relative
    return where(undefined, one, ratio)


def is_joint(rule: Rule) -> bool:
    """Whether the norm of g + decay_lambda * w is asked for, and is not that of g."""
    return rule.joint_norm and rule.adapt and not is_zero(rule.decay_lambda)


def apply(w: Any, dcdw: Any, on_dcdw: Number, on_w: Number | None) -> Any:
    """The weights after the step; None for no decay, so that 0 * inf does not make NaN of it."""
    return (w if on_w is None else (1 - on_w) * w) - on_dcdw * dcdw


def along(w: Any, dcdw: Any, on_dcdw: Number, on_w: Number | None) -> Any:
    """The step itself, to be subtracted from the weights; None as in `apply`."""
    return on_dcdw * dcdw if on_w is None else on_dcdw * dcdw + on_w * w


def move(w: Any, velocity: Any, step: Any, rule: Rule) -> tuple[Any, Any]:
    """The weights and the velocity after a step with momentum."""
    velocity = rule.momentum * velocity + step
    moved_by = step + rule.momentum * velocity if rule.nesterov else velocity
    return w - rule.rate * moved_by, velocity


def is_zero(number: Any) -> bool:
    """Whether an option is known to be 0, as an array is not."""
    return isinstance(number, (int, float)) and number == 0


NUMBERS = ("lr", "decay_lambda", "trust_coefficient", "eps", "grad_scale")
MOTION_NUMBERS = ("momentum", "rate", "dampening")


class Ops(Protocol):
    """What `step` asks of an array library."""

    def norms(self, w: Any, dcdw: Any, layer_axis: int | None) -> tuple[Norm, Norm]:
        """2-norms of both over all axes but layer_axis, these kept with length 1."""

    def largest(self, x: Any, layer_axis: int | None) -> Any:
        """The largest magnitude over the same axes, a constant to differentiation."""

    def power_of_two(self, x: Any) -> Any:
        """A power of two within a factor of two of x > 0, else 1; a constant to differentiation."""

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Elementwise choice; a and b may be numbers."""

    def upper_half(self, x: Any) -> Any:
        """The number rounded to half as many bits; the rest has the others."""

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
    """The weights after a step, and the velocity, in the precision of w and dcdw, over the whole
    range of exponents. Without a velocity there is none to be returned.

    The rule is homogeneous. Scale w, or scale dcdw, decay_lambda and eps together, and the part of
    the step along dcdw scales like w, the part along w not at all. So norms are scaled to be near
    1, where no square can overflow or vanish, and scaling by powers of two changes no bit.
    """
    dcdw, rule = joint(ops, w, dcdw, rule)
    decays = not is_zero(rule.decay_lambda)
    if rule.adapt:
        w_norm, dcdw_norm = ops.norms(w, dcdw, rule.layer_axis)
        scaled, _, one = _scaled(ops, w_norm, dcdw_norm, rule)
        dcdw = dcdw / dcdw_norm.scale
        ratio = trust_ratio(w_norm.scaled, dcdw_norm.scaled, scaled, ops.where, one)
        # Where it is 1 the step has nothing to do with norms, nor with their scales.
        is_one = ratio == one
        pairs = zip(_along_both(1, rule), _along_both(ratio, scaled), strict=True)
        on_dcdw, on_w = (ops.where(is_one, plain, adapted) for plain, adapted in pairs)
        # The scale comes last: a subnormal number times anything has few digits left.
        dcdw, on_dcdw = on_dcdw * dcdw, ops.where(is_one, dcdw_norm.scale, w_norm.scale)
    else:
        on_dcdw, on_w = _along_both(1, rule)
    if rule.maximize:
        on_dcdw = -on_dcdw
    if velocity is None:
        return apply(w, dcdw, on_dcdw, on_w if decays else None), None
    change = along(w, dcdw, on_dcdw, on_w if decays else None)
    return move(w, velocity, change, rule)


def joint(ops: Ops, w: Any, dcdw: Any, rule: Rule) -> tuple[Any, Rule]:
    """The gradient dcdw + decay * w and the rule without decay, where `joint_norm` asks for that.

    Without decay the norm of the gradient is the denominator. The sum is scaled to be near 1, so
    that nothing overflows; the scale goes into that of the loss.
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
    total = sum_of_products(ops, dcdw / signed, decay_scale / scale, w / w_scale)
    return total, without_decay(rule)._replace(grad_scale=rule.grad_scale / scale)


def sum_of_products(ops: Ops, a: Any, b: Any, x: Any) -> Any:
    """A + b * x, nearly as if it was rounded once, also where the two cancel.

    Numbers are split into halves, whose products are exact, and the error of the sum is added to it
    (Dekker 1971, doi:10.1007/BF01397083).
    """
    b_high, x_high = ops.upper_half(b), ops.upper_half(x)
    b_low, x_low = b - b_high, x - x_high
    product = b_high * x_high
    total = a + product
    part = total - a
    rest = (a - (total - part)) + (product - part)
    exact = total + (rest + ((b_high * x_low + b_low * x_high) + b_low * x_low))
    return ops.finite_or(exact, total)


def without_decay(rule: Rule) -> Rule:
    """The rule for the sum of dcdw and decay_lambda * grad_scale * w, in the place of dcdw."""
    return rule._replace(decay_lambda=0.0, maximize=False, joint_norm=False)


def _scaled(ops: Ops, w_norm: Norm, dcdw_norm: Norm, rule: Rule) -> tuple[Rule, Any, Any]:
    """The rule for norms scaled to be near 1, the scale of its denominator, and a ratio of 1."""
    # The scale of a gradient may leave the range with that of the loss: before, it is near enough.
    unscaled = dcdw_norm.scale / rule.grad_scale
    in_range = (unscaled > 0) & (unscaled < float("inf"))
    # A norm of 0 has the scale 1, which must not count beside those of others.
    moves = dcdw_norm.scaled != 0
    scale = ops.where(moves, ops.where(in_range, unscaled, dcdw_norm.scale), 0)
    scale = ops.maximum(scale, rule.decay_lambda * w_norm.scale)
    scale = ops.power_of_two(ops.maximum(scale, rule.eps))
    scaled = rule._replace(
        decay_lambda=rule.decay_lambda * w_norm.scale / scale,
        eps=ops.like(rule.eps, scale) / scale,
        grad_scale=rule.grad_scale * ops.where(moves, scale / dcdw_norm.scale, 1),
    )
    # A scaled ratio is nowhere near these bounds: at one of them it is still told apart from 1.
    one = ops.maximum(scale / ops.maximum(w_norm.scale, scale * 2.0**-100), 2.0**-100)
    return scaled, scale, one


def mesh_axes(rule: Rule) -> frozenset[Any]:
    """The mesh axes over which norms are summed."""
    return (rule.axis_name or frozenset()) - {()}


class Measured(NamedTuple):
    """What the step of a layer is made of, all without the scale of the loss.

    `unclipped` is the ratio that `trust_clip` limits to 1.
    """

    w_norm: Any
    g_norm: Any
    ratio: Any
    unclipped: Any


def measure(ops: Ops, w: Any, dcdw: Any, rule: Rule) -> Measured:
    """The norms and the ratio of `step`, with the axes that the norms have."""
    w_norm, dcdw_norm = ops.norms(w, dcdw, rule.layer_axis)
    g_norm = dcdw_norm.scaled * (dcdw_norm.scale / rule.grad_scale)
    if is_joint(rule):
        dcdw, rule = joint(ops, w, dcdw, rule)
        w_norm, dcdw_norm = ops.norms(w, dcdw, rule.layer_axis)
    scaled, scale, one = _scaled(ops, w_norm, dcdw_norm, rule)

    def ratio(bounded: bool) -> Any:
        norms = w_norm.scaled, dcdw_norm.scaled
        found = trust_ratio(*norms, scaled, ops.where, one, bounded=bounded)
        return ops.where(found == one, 1, found * (w_norm.scale / scale))

    return Measured(
        w_norm.scaled * w_norm.scale,
        g_norm,
        ratio(bounded=True),
        ratio(bounded=False),
    )
