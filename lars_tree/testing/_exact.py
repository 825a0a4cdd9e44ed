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
) -> Exact:
    """One step of one layer; `norms` are given where w and dcdw are a part of it."""
    with localcontext(CONTEXT):
        ws, gs, rate, decay = _exact(w), _exact(dcdw), Decimal(lr), Decimal(decay_lambda)
        w_norm, g_norm = norms or (norm(w), norm(dcdw))
        below = g_norm + decay * w_norm
        ratio = Decimal(1)
        if w_norm and below:
            ratio = Decimal(trust_coefficient) * w_norm / below
        steps = [rate * ratio * (g + decay * x) for x, g in zip(ws, gs, strict=True)]
        pairs = list(zip(ws, steps, strict=True))
        return Exact([x - u for x, u in pairs], [max(abs(x), abs(u)) for x, u in pairs])


def norm(values: list[float], times: int = 1) -> Decimal:
    """The 2-norm of the values, each of them as many times."""
    with localcontext(CONTEXT):
        return (times * sum((x * x for x in _exact(values)), Decimal(0))).sqrt()


def _exact(values: list[float]) -> list[Decimal]:
    return [Decimal(x) for x in values]
