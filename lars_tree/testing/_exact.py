"""The rule again, in decimals of 60 digits, for the laws. Knows nothing of the package."""

from __future__ import annotations

from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from typing import NamedTuple

CONTEXT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)


class Exact(NamedTuple):
    """The new weights, and the larger of |w| and the step at each element."""

    w_new: list[Decimal]
    scale: list[Decimal]


def step(
    w: list[float],
    dcdw: list[float],
    lr: float,
    decay_lambda: float,
    trust_coefficient: float,
    norms: tuple[Decimal, Decimal] | None = None,
    joint_norm: bool = False,
) -> Exact:
    """One step of one layer; `norms` are given where w and dcdw are a part of it.

    With `joint_norm` the second one is that of dcdw + decay_lambda * w.
    """
    with localcontext(CONTEXT):
        ws, gs, rate, decay = _exact(w), _exact(dcdw), Decimal(lr), Decimal(decay_lambda)
        decayed = [g + decay * x for x, g in zip(ws, gs, strict=True)]
        w_norm, below = norms or (_norm(ws), _norm(decayed if joint_norm else gs))
        ratio = Decimal(1)
        if w_norm and below:
            below = below if joint_norm else below + decay * w_norm
            ratio = Decimal(trust_coefficient) * w_norm / below
        steps = [rate * ratio * x for x in decayed]
        pairs = list(zip(ws, steps, strict=True))
        return Exact([x - u for x, u in pairs], [max(abs(x), abs(u)) for x, u in pairs])


def norm(values: list[float], times: int = 1) -> Decimal:
    """The 2-norm of the values, each of them as many times."""
    with localcontext(CONTEXT):
        return _norm(_exact(values), times)


def _norm(values: list[Decimal], times: int = 1) -> Decimal:
    return (times * sum((x * x for x in values), Decimal(0))).sqrt()


def _exact(values: list[float]) -> list[Decimal]:
    return [Decimal(x) for x in values]
