"""Steps of the native engine without the rest of the package, for the tests of the kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from lars_tree import _native
from lars_tree._backends.base import Columns, StepResults
from lars_tree._backends.numpy import as_bits
from lars_tree._numerics.formula import Rule

# Limits the memory of a process, so that it cannot start any thread.
NO_MORE_THREADS = """
import resource, threading
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 7 * 2**20,) * 2)
try:
    threading.Thread(target=print).start()
    raise AssertionError("the limit does not hold")
except RuntimeError:
    pass
def checksum(arrays):
    found = 0
    for x in arrays:
        found = zlib.crc32(x, found)  # copies nothing
    return found
"""


def options_of(**options: Any) -> dict[str, Any]:
    """The options of a call of `advance`, with defaults for lr and stop_gradients."""
    return {"lr": 0.1, "stop_gradients": True, **options}


def numpy_reader(**changes: Any) -> Any:
    """A reader of numpy arrays; `changes` replaces arguments of `Reader`."""
    how = {"make": np.empty_like, "copy": np.copy, "as_bits": as_bits, **changes}
    return _native.kernel.Reader((np.ndarray,), Rule._fields, **how)


def results_for(columns: Columns) -> StepResults | tuple[()]:
    """Lists for the results, or () if the results are written to `outs`."""
    if columns.outs is not None:
        return ()
    return StepResults(*(None if x is None else [None] * len(x) for x in columns[:5:4]))


def taken(reader: Any, *columns: Any, counter: Any = None, threads: int = 1) -> Any:
    """A plan with all leaves, and the lists that get the results.

    None if a leaf or the counter is not supported, or if memory overlaps.
    """
    given = Columns(*columns)
    plan, results = _native.kernel.Plan(threads, _native.instruction_set), results_for(given)
    if counter is not None and not plan.count(counter):
        return None
    if plan.prepare(reader, *given[:5], *results) or plan.overlaps():
        return None
    return plan, tuple(results) or (given.outs, given.velocities)


def stepped(reader: Any, *columns: Any, **options: Any) -> Any:
    """The new weights and velocities, or None if `taken` returns None."""
    found = taken(reader, *columns, **options)
    if found is None:
        return None
    plan, results = found
    plan.step()
    return results
