"""The rule and its momentum in decimals of 60 digits, with no code of the package."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from typing import Any, Literal

import numpy as np

from lars_tree._backends.memory import NumpyArray

Convention = Literal["paper", "torch"]
Norms = tuple[Decimal, Decimal]

_CONTEXT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)


@dataclass(frozen=True)
class ExactRule:
    """The options of the rule that are the same for all steps; see `check_update_laws`."""

    trust_coefficient: float = 1.0
    eps: float = 0.0
    joint_norm: bool = False

    def direction(
        self, w: list[float], dcdw: list[float], decay: float, norms: Norms | None = None
    ) -> tuple[NumpyArray, NumpyArray]:
        """The weights, and ratio * (g + decay * w), for one layer; arrays of Decimals.

        If w and dcdw are only a part of the layer, `norms` has to be given: the norms of the whole
        w and dcdw, or with `joint_norm`, those of w and dcdw + decay * w.
        """
        beta = Decimal(decay)
        x, g = (np.array([Decimal(y) for y in values], object) for values in (w, dcdw))
        decayed = g + beta * x
        w_norm, g_norm = norms or (_norm(x), _norm(decayed if self.joint_norm else g))
        ratio = Decimal(1)
        if w_norm and g_norm:
            denominator = g_norm if self.joint_norm else g_norm + beta * w_norm
            ratio = Decimal(self.trust_coefficient) * w_norm / (denominator + Decimal(self.eps))
        return x, ratio * decayed

    def step(
        self,
        w: list[float],
        dcdw: list[float],
        lr: float,
        decay: float,
        norms: Norms | None = None,
    ) -> tuple[NumpyArray, NumpyArray]:
        """The new weights of one layer, and the larger of |w| and |step| for each element."""
        with localcontext(_CONTEXT):
            x, direction = self.direction(w, dcdw, decay, norms)
            step = Decimal(lr) * direction
            return x - step, np.maximum(abs(x), abs(step))


class ExactRun:
    """The steps of one layer with momentum.

    With the convention "paper", the rate scales each contribution to the velocity: v = m v + lr d.
    With "torch", it scales the velocity: v = m v + d, and the step is lr v.
    """

    def __init__(
        self, rule: ExactRule, momentum: float, convention: Convention, nesterov: bool = False
    ) -> None:
        self._rule, self._convention, self._nesterov = rule, convention, nesterov
        self._momentum = Decimal(momentum)
        self._velocity: Any = Decimal(0)
        self._size: Any = Decimal(0)  # the velocity if all contributions had the same sign

    def step(
        self, w: list[float], dcdw: list[float], lr: float, decay: float
    ) -> tuple[NumpyArray, NumpyArray]:
        """The new weights, and for each element the size at which rounding errors are measured."""
        with localcontext(_CONTEXT):
            x, direction = self._rule.direction(w, dcdw, decay)
            inner, outer = Decimal(1), Decimal(lr)
            if self._convention == "paper":
                inner, outer = outer, inner
            new = inner * direction
            self._velocity = self._momentum * self._velocity + new
            self._size = self._momentum * self._size + abs(new)
            step, size = self._velocity, self._size
            if self._nesterov:
                step, size = new + self._momentum * step, abs(new) + self._momentum * size
            return x - outer * step, np.maximum(abs(x), outer * size)


def exact_norm(value: float, count: int = 1) -> Decimal:
    """The 2-norm of `count` elements of this value."""
    with localcontext(_CONTEXT):
        return (count * Decimal(value) ** 2).sqrt()


def _norm(values: NumpyArray) -> Decimal:
    return sum((x * x for x in values), Decimal(0)).sqrt()
