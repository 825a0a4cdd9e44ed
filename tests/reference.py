"""A slow and exact implementation of the LARS rule in mpmath, for comparison.

This module shares no code with the package. `worst_error` measures the error of a result in units
in the last place (ulp) of max(|w|, |u|) at each element, where u is the step (w_new = w - u).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mpmath import mp, mpc, mpf

mp.prec = 400

# By name: significand bits, and the exponents of the smallest and largest normal number.
FORMATS = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}


class Step(NamedTuple):
    """The exact step u and the new weights w - u, elementwise, and the ratio.

    The ratio is the local rate divided by lr; with one lr per element, at the largest lr.
    """

    u: list
    w_new: list
    ratio: mpf


def norm(values: Sequence) -> mpf:
    return mp.sqrt(mp.fsum(abs(v) ** 2 for v in values))


def lars(
    w: Sequence,
    dcdw: Sequence,
    lr: float | Sequence[float],
    *,
    decay_lambda: float = 0.0,
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
    adapt: bool = True,
    trust_clip: bool = False,
    joint_norm: bool = False,
    grad_scale: float = 1.0,
    maximize: bool = False,
) -> Step:
    """One step of a layer. The arrays are flat sequences of floats or complex numbers."""
    w = [_exact(x) for x in w]
    g = [(-1 if maximize else 1) * _exact(x) / mpf(grad_scale) for x in dcdw]
    beta = mpf(decay_lambda)
    decayed = [gi + beta * wi for wi, gi in zip(w, g, strict=True)]
    denominator = norm(decayed) if joint_norm else norm(g)
    ratio = None  # undefined
    if adapt and norm(w) != 0 and denominator != 0:
        denominator += mpf(eps) + (0 if joint_norm else beta * norm(w))
        ratio = mpf(trust_coefficient) * norm(w) / denominator
    rates = [mpf(lr)] * len(w) if isinstance(lr, float) else [mpf(float(x)) for x in lr]
    local = rates
    if ratio is not None:
        local = [min(ratio, rate) if trust_clip else rate * ratio for rate in rates]
    u = [rate * x for rate, x in zip(local, decayed, strict=True)]
    if ratio is None or (trust_clip and ratio >= max(rates)):
        ratio = mpf(1)
    elif trust_clip:
        ratio /= max(rates)
    return Step(u, [wi - ui for wi, ui in zip(w, u, strict=True)], ratio)


def _exact(x: complex) -> mpf | mpc:
    return mpc(x.real, x.imag) if isinstance(x, complex) else mpf(x)


def ulp(x: mpf, name: str) -> mpf:
    """The distance between neighbouring numbers of the format at the magnitude of x."""
    bits, smallest, _ = FORMATS[name]
    exponent = smallest if x == 0 else max(mp.frexp(x)[1] - 1, smallest)
    return mpf(2) ** (exponent - bits + 1)


def clipped(x: mpf, name: str) -> mpf:
    """x, limited to the power of two above the largest number of the format."""
    end = mpf(2) ** (FORMATS[name][2] + 1)
    return max(-end, min(end, x))


def worst_error(actual: Sequence[float], w: Sequence[float], step: Step, name: str) -> float:
    """The largest error in ulps of max(|w|, |u|); infinite for NaN."""
    worst = mpf(0)
    for new, wi, ui, exact in zip(actual, w, step.u, step.w_new, strict=True):
        if new != new:
            return float("inf")
        size = max(abs(mpf(wi)), min(abs(ui), mpf(2) ** FORMATS[name][2]))
        error = abs(clipped(_exact(new), name) - clipped(exact, name)) / ulp(size, name)
        worst = max(worst, error)
    return float(worst)


class Moved(NamedTuple):
    """The exact weights and velocity after a step with momentum, and the change of the weights."""

    w_new: list
    v_new: list
    change: list


def move(
    w: Sequence, v: Sequence, step: Step, momentum: float, nesterov: bool = False, rate: float = 1.0
) -> Moved:
    """The step with v' = m v + u and w' = w - rate v'; with nesterov, w' = w - rate (u + m v')."""
    m = mpf(momentum)
    v_new = [m * _exact(vi) + ui for vi, ui in zip(v, step.u, strict=True)]
    change = [ui + m * vi for ui, vi in zip(step.u, v_new, strict=True)] if nesterov else v_new
    change = [mpf(rate) * x for x in change]
    return Moved([_exact(wi) - x for wi, x in zip(w, change, strict=True)], v_new, change)
