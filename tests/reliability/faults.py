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


@attack("Every bad leaf is refused", "tensors", count=100_000, short=400, plain=True, needs=("torch",))
def tensors(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_tensors as bad

    def valid(function: str, mode: str) -> calls.Call:
        return calls.make(function, mode, bad.valid, bad.new_counter)

    return calls.attempts(rng, [*bad.FAULTS, *bad.GOOD], valid, bad.strided, bad.seen, bad.numbers)


@attack("Every bad leaf is refused", "arrays of JAX", count=100_000, short=150, plain=True, needs=("jax", "torch"))
def jax_arrays(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_jax as bad

    def valid(function: str, mode: str) -> calls.Call:
        kind = bad if mode == "new" else bad.arrays
        return calls.make(function, mode, kind.valid, kind.new_counter)

    faults = [*bad.FAULTS, *bad.IMMUTABLE, *bad.GOOD]
    return calls.attempts(rng, faults, valid, bad.strided, bad.seen, bad.numbers)


@attack("Every bad leaf is refused", "parameters", count=100_000, short=200, plain=True, needs=("torch",))
def parameters(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_parameters

    return bad_parameters.attempts(rng)
