"""Checks and increments of the counters in the state of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Kind
from lars_tree._backends.memory import overlapping, span
from lars_tree._backends.wrapper import rewrapped, unwrap
from lars_tree._core import overlaps
from lars_tree._core.operands import Operand, Row
from lars_tree._core.writes import Writes

NAMES = ("step", "skipped")

_MIN_BYTES = 4  # a shorter counter may overflow silently within one training run


def check(state: dict[str, Any], written: bool) -> None:
    """Check that counters are 0-d integer arrays; if `written`, also writable and not shared."""
    counters = {name: unwrap(state[name]) for name in NAMES if name in state}
    for name, x in counters.items():
        text = _fault(x)
        if text:
            text = f"expected an integer array of shape () and at least 32 bits, got {text}"
            headline = "state does not belong to Lars"
            raise errors.error(errors.StateError, "state", headline, [((name,), text)])
        backend = _backends.find(x)
        fault = backend.out_fault(x) if written and backend else None
        if fault:
            raise _unwritable(name, f"it is {fault}")
    if written and len(counters) == len(NAMES):
        (one, x), (other, y) = counters.items()
        if x is y or _sharing(x, [Operand(y)]):
            raise _unwritable(other, f"it shares memory with {one}")


def check_apart(
    counters: Mapping[str, Any], rows: list[Row], paths: Callable[[], list[errors.Path]]
) -> None:
    """Check that no counter shares memory with weights or velocities that are written."""
    targets = overlaps.targets([row for row in rows if row.leaf.out is not None])
    for name in counters if targets else ():
        found = _sharing(counters[name], [target.array for target in targets])
        if found:
            leaf, argument, _ = targets[found[0]]
            path = errors.path_string(paths()[leaf.leaf_index]) or "the array"
            raise _unwritable(name, f"it shares memory with {path} of {argument}")


def spans(state: dict[str, Any]) -> list[tuple[int, int]]:
    """The memory ranges of the counters whose memory is known."""
    memories = (Operand(unwrap(state[name])).memory for name in NAMES if name in state)
    found = (span(memory) for memory in memories if memory is not None)
    return [(start, start + size) for start, size in found]


def _fault(x: Any) -> str | None:
    """Describe x if it is not a valid counter; otherwise return None."""
    backend = _backends.find(x)
    if backend is None:
        return errors.describe(x)
    fault = backend.fault(x)
    if fault:
        return fault
    facts = backend.facts(x)
    # A dtype of the array API standard need not have an itemsize.
    is_long = getattr(facts.dtype, "itemsize", _MIN_BYTES) >= _MIN_BYTES
    can_count = getattr(facts.dtype, "is_signed", True)  # torch cannot add to its unsigned types
    if facts.kind is Kind.INTEGER and facts.shape == () and is_long and can_count:
        return None
    return f"{facts.dtype} of shape {facts.shape}"


def _unwritable(name: str, text: str) -> errors.LarsTreeError:
    return errors.error(errors.OutError, "state", "state cannot be written to", [((name,), text)])


def _sharing(counter: Any, others: list[Operand]) -> list[int]:
    """The indices of the operands that are known to share memory with a counter."""
    x = Operand(counter)
    if x.memory is None:
        return []
    device = str(x.facts.device)  # CPU memory of all libraries is one address space
    near = [
        (i, other.memory)
        for i, other in enumerate(others)
        if other.memory is not None and str(other.facts.device) == device
    ]
    found = overlapping([x.memory], [memory for _, memory in near])
    return sorted(near[k][0] for _, k in found)


def counted(counter: Any, name: str, taken: Any) -> Any:
    """The new value of a counter; `taken` is a bool or a bool array."""
    backend, old = _backends.find(taken), unwrap(counter)
    if backend is None:  # a bool of Python
        count = old + int(taken is (name == "step"))
    else:  # `choose`, because libraries that do not promote dtypes cannot add a bool to a number
        counts = old + 1, old
        count = backend.choose(taken, *(counts if name == "step" else counts[::-1]))
    return rewrapped(np.asarray(count) if isinstance(count, np.generic) else count, counter)


def count_in_place(counters: Mapping[str, Any], taken: Any, writes: Writes) -> None:
    for name, counter in counters.items():
        backend = _backends.find(counter)
        if backend is not None:
            writes.add(backend, counter, counted(counter, name, taken))
