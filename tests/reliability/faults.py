"""Faults.

Placeholder.
"""

from __future__ import annotations

import numpy as np

from tests.reliability import calls
from tests.reliability.attack import Attempts, attack


@attack("Every bad leaf is refused", "arrays", count=100_000, short=400, plain=True, needs=("torch",))
def arrays(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_arrays as bad

    def valid(function: str, mode: str) -> calls.Call:
        return calls.make(function, mode, bad.valid, bad.new_counter)

    faults = [*bad.FAULTS, *bad.STATES, *bad.GOOD]
    return calls.attempts(rng, faults, valid, bad.strided, bad.seen, bad.numbers)
