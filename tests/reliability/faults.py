"""Faults: a bad leaf is refused before anything is changed, at every position.

The tree has seven leaves in a dict, a list, a tuple and a Container. One leaf of w, dcdw, `out` or
the velocity, or a counter, is bad; another leaf may be strided, have no gradient or be guarded by
`nonfinite`, so that all engines take part. Updates are in place, into a new `out` and without
`out`; with `lars_update` and with `Lars.update`. The error has the class and argument of the page
[Errors](errors.md), and names the leaf. Afterwards all bytes of all arrays, also those between the
elements of views, the counters, torch's version counters, the nodes of all trees and the signal
handlers are as before. Inputs that look alike but are valid give the numbers of the reference,
within 1 ulp (float64: 4), and leave the other inputs unchanged.

Two faults cannot be found. A memory map of a file that was truncated later has no memory, and
whoever reads it is killed by the system (SIGBUS). And on a GPU, a step of `lars_tree.torch.Lars`
that is like the last one does not look at the shapes of contiguous tensors again: if a parameter
became a view of the same memory with another shape, the step is that of the old shape.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from tests.reliability import calls, outcomes
from tests.reliability.attack import Attempts, attack

CLAIM = (
    "A bad leaf is refused with its path, and nothing is changed; a valid one is updated exactly"
)
NEEDS = ("ml_dtypes", "pandas", "torch")


@attack(CLAIM, "leaves of numpy", count=100_000, short=470, plain=True, needs=NEEDS)
def arrays(rng: np.random.Generator) -> Attempts:
    from tests.reliability import array_faults, bad_arrays

    return _mutable(rng, array_faults, bad_arrays)


@attack(CLAIM, "leaves of torch", count=100_000, short=410, plain=True, needs=(*NEEDS, "jax"))
def tensors(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_tensors, tensor_faults

    return _mutable(rng, tensor_faults, bad_tensors)


def _mutable(rng: np.random.Generator, faults: ModuleType, bad: ModuleType) -> Attempts:
    """Attempts with arrays of a library that can be written to, from its two modules."""

    def valid(function: str, mode: str) -> calls.Call:
        return calls.make(function, mode, bad.valid, bad.new_counter)

    every = calls.cases([*faults.FAULTS, *faults.STATES, *faults.GOOD])
    return outcomes.attempts(rng, every, valid, bad.strided, bad.seen, bad.numbers)


@attack(CLAIM, "leaves of JAX", count=100_000, short=140, plain=True, needs=(*NEEDS, "jax"))
def jax_arrays(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_jax as bad

    def valid(function: str, mode: str) -> calls.Call:
        kind = bad if mode == "new" else bad.arrays  # arrays of JAX are immutable
        return calls.make(function, mode, kind.valid, kind.new_counter)

    every = calls.cases([*bad.FAULTS, *bad.IMMUTABLE, *bad.GOOD])
    return outcomes.attempts(rng, every, valid, bad.strided, bad.seen, bad.numbers)


@attack(
    "`lars_tree.torch.Lars` refuses bad tensors by name, and nothing is changed",
    "parameters, gradients and buffers in three groups",
    count=100_000,
    short=150,
    plain=True,
    needs=(*NEEDS, "jax"),
)
def parameters(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_parameters

    return bad_parameters.attempts(rng)
