"""Arrays that are to be written to, and which others share memory with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lars_tree import _memory
from lars_tree._backends.base import Leaf
from lars_tree._operands import Operand, Row


class Target(NamedTuple):
    """An array that is to be written to."""

    leaf: Leaf
    argument: str
    array: Operand


def _targets(group: list[Row]) -> list[Target]:
    outs = [Target(row.leaf, "out", row.out) for row in group]
    moving = (row for row in group if row.leaf.velocity is not None)
    return outs + [Target(row.leaf, "state", row.velocity) for row in moving]


def shared(rows: list[Row]) -> Iterator[tuple[Target, Target]]:
    """Pairs of arrays that are both to be written to and share memory, as tied weights do."""
    for group in _by_device(rows):
        targets = _targets(group)
        memories = [(target, target.array.memory) for target in targets]
        known = [(target, memory) for target, memory in memories if memory is not None]
        for i, j in _memory.overlapping([memory for _, memory in known]):
            yield known[i][0], known[j][0]
        # Where the library does not tell addresses, the very same array is seen all the same.
        first: dict[Operand, Target] = {}
        for target, memory in memories:
            if memory is None and first.setdefault(target.array, target) is not target:
                yield first[target.array], target


def _by_device(rows: list[Row]) -> list[list[Row]]:
    """The leaves with an `out` by the address space that they live in: all CPU memory is one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.leaf.out is not None:
            groups.setdefault(str(row.w.facts.device), []).append(row)
    return list(groups.values())


def detach_inputs(rows: list[Row]) -> list[Leaf]:
    """The leaves with copies of those inputs that `out` would overwrite before they are read.

    An input may be the very same memory as the `out` of its own leaf: it is read first.
    """
    new = {row.leaf.place: row.leaf for row in rows}
    for group in _by_device(rows):
        for leaf, role in _overwritten(group):
            new[leaf.place] = _COPIES[role](new[leaf.place])
    return list(new.values())


def _overwritten(group: list[Row]) -> Iterator[tuple[Leaf, str]]:
    """The inputs that are written to as a part of another leaf, or in another order."""
    written = [(x, x.array.memory) for x in _targets(group) if x.array.memory is not None]
    # An array may serve many leaves: it is one input with many readers.
    readers: dict[Operand, list[tuple[Leaf, str]]] = {}
    for row in group:
        inputs = [("w", row.w), ("dcdw", row.dcdw)]
        if isinstance(row.leaf.rule.lr_before_momentum, np.ndarray):
            inputs += [("lr", x) for _, x in row.options if x.x is row.leaf.rule.lr_before_momentum]
        for role, x in inputs:
            if x is not row.out:
                readers.setdefault(x, []).append((row.leaf, role))
    read = [(x, x.memory) for x in readers if x.memory is not None]
    for i, j in _memory.overlapping([x for _, x in written], [x for _, x in read]):
        (target, memory), (x, other) = written[i], read[j]
        for reader, role in readers[x]:
            own = reader is target.leaf and role != "lr" and target.argument == "out"
            if not (own and _memory.same(memory, other)):
                yield reader, role


_COPIES: dict[str, Callable[[Leaf], Leaf]] = {
    "w": lambda leaf: leaf._replace(w=leaf.backend.copy(leaf.w, stop_gradients=True)),
    "dcdw": lambda leaf: leaf._replace(dcdw=leaf.backend.copy(leaf.dcdw, stop_gradients=True)),
    "lr": lambda leaf: leaf._replace(
        rule=leaf.rule._replace(lr_before_momentum=leaf.rule.lr_before_momentum.copy())
    ),
}
