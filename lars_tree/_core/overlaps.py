"""Finds arrays that share memory with an array that is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lars_tree._backends.base import Leaf, grouped
from lars_tree._backends.memory import overlapping, same
from lars_tree._core.operands import Operand, Row


class Target(NamedTuple):
    """An array that is written."""

    leaf: Leaf
    argument: str
    array: Operand


def targets(group: list[Row]) -> list[Target]:
    """The weights and velocities that an update of these leaves writes."""
    outs = [Target(row.leaf, "out", row.out) for row in group]
    moving = (row for row in group if row.leaf.velocity is not None)
    return outs + [Target(row.leaf, "state", row.velocity) for row in moving]


def shared(rows: list[Row]) -> Iterator[tuple[Target, Target]]:
    """Pairs of written arrays that share memory, such as tied weights."""
    for group in _by_device(rows):
        memories = [(target, target.array.memory) for target in targets(group)]
        known = [(target, memory) for target, memory in memories if memory is not None]
        for i, j in overlapping([memory for _, memory in known]):
            yield known[i][0], known[j][0]
        # If addresses are unknown, only two uses of the same array object can be found.
        first: dict[Operand, Target] = {}
        for target, memory in memories:
            if memory is None and first.setdefault(target.array, target) is not target:
                yield first[target.array], target


def _by_device(rows: list[Row]) -> Iterable[list[Row]]:
    """The leaves with an `out`, grouped by address space; all CPU memory is one address space."""
    written = [row for row in rows if row.leaf.out is not None]
    return grouped(written, lambda row: str(row.w.facts.device)).values()


def detach_inputs(rows: list[Row]) -> list[Leaf]:
    """The leaves, with copies of the inputs that would be overwritten before they are read.

    An input that has the same elements in memory as the `out` of its leaf is not copied, because
    each element is read before it is written.
    """
    new = {row.leaf.leaf_index: row.leaf for row in rows}
    for group in _by_device(rows):
        for reader, role in _overwritten(group):
            leaf = new[reader.leaf_index]
            if role == "rule":
                rate = leaf.rule.lr_before_momentum.copy()
                copied: Any = leaf.rule._replace(lr_before_momentum=rate)
            else:
                copied = leaf.backend.copy(getattr(leaf, role), stop_gradients=True)
            new[leaf.leaf_index] = leaf._replace(**{role: copied})
    return list(new.values())


def _overwritten(group: list[Row]) -> Iterator[tuple[Leaf, str]]:
    """The inputs that another leaf overwrites, or that their own leaf overwrites in another order.

    Yields the leaf, and the name of the field of `Leaf` that contains the input.
    """
    written = [(x, x.array.memory) for x in targets(group) if x.array.memory is not None]
    readers: dict[Operand, list[tuple[Leaf, str]]] = {}
    for row in group:
        inputs = [("w", row.w), ("dcdw", row.dcdw)]
        rate = row.leaf.rule.lr_before_momentum
        if isinstance(rate, np.ndarray):
            inputs += [("rule", x) for _, x in row.options if x.x is rate]
        for role, x in inputs:
            if x is not row.out:
                readers.setdefault(x, []).append((row.leaf, role))
    read = [(x, x.memory) for x in readers if x.memory is not None]
    for i, j in overlapping([x for _, x in written], [x for _, x in read]):
        (target, memory), (x, other) = written[i], read[j]
        for reader, role in readers[x]:
            own = reader is target.leaf and role != "rule" and target.argument == "out"
            if not (own and same(memory, other)):
                yield reader, role
