"""Overlaps: which arrays share memory with those that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

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
        # If addresses are unknown, two uses of one and the same array are still found.
        first: dict[Operand, Target] = {}
        for target, memory in memories:
            if memory is None and first.setdefault(target.array, target) is not target:
                yield first[target.array], target


def _by_device(rows: list[Row]) -> Iterable[list[Row]]:
    """The leaves with an `out` by address space, so that CPU memory of all libraries is one."""
    written = [row for row in rows if row.leaf.out is not None]
    return grouped(written, lambda row: str(row.w.facts.device)).values()


def detach_inputs(rows: list[Row]) -> list[Leaf]:
    """The leaves, with copies of those inputs that would be overwritten before they are read.

    An input may be the same memory as the `out` of its own leaf, which reads it first.
    """
    new = {row.leaf.leaf_index: row.leaf for row in rows}
    for group in _by_device(rows):
        for leaf, role in _overwritten(group):
            new[leaf.leaf_index] = _COPIES[role](new[leaf.leaf_index])
    return list(new.values())


def _overwritten(group: list[Row]) -> Iterator[tuple[Leaf, str]]:
    """The inputs that are written by another leaf, or in another order of their elements."""
    written = [(x, x.array.memory) for x in targets(group) if x.array.memory is not None]
    # One array may be an input of many leaves.
    readers: dict[Operand, list[tuple[Leaf, str]]] = {}
    for row in group:
        inputs = [("w", row.w), ("dcdw", row.dcdw)]
        if isinstance(row.leaf.rule.lr_before_momentum, np.ndarray):
            inputs += [("lr", x) for _, x in row.options if x.x is row.leaf.rule.lr_before_momentum]
        for role, x in inputs:
            if x is not row.out:
                readers.setdefault(x, []).append((row.leaf, role))
    read = [(x, x.memory) for x in readers if x.memory is not None]
    for i, j in overlapping([x for _, x in written], [x for _, x in read]):
        (target, memory), (x, other) = written[i], read[j]
        for reader, role in readers[x]:
            own = reader is target.leaf and role != "lr" and target.argument == "out"
            if not (own and same(memory, other)):
                yield reader, role


_COPIES: dict[str, Callable[[Leaf], Leaf]] = {
    "w": lambda leaf: leaf._replace(w=leaf.backend.copy(leaf.w, stop_gradients=True)),
    "dcdw": lambda leaf: leaf._replace(dcdw=leaf.backend.copy(leaf.dcdw, stop_gradients=True)),
    "lr": lambda leaf: leaf._replace(
        rule=leaf.rule._replace(lr_before_momentum=leaf.rule.lr_before_momentum.copy())
    ),
}
