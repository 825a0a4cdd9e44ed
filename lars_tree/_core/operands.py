"""Operands: the arrays of leaves with their properties, which are read once for each array."""

from __future__ import annotations

from typing import Any, NamedTuple

from lars_tree import _backends
from lars_tree._backends.base import Facts, Kind, Leaf
from lars_tree._backends.memory import NumpyArray
from lars_tree._core.options import option_name


class Operand:
    """An array with the properties that its backend reports; `backend` is None for non-arrays."""

    fault: str | None = None
    # The backend is asked for these properties only if the array has no fault:
    facts = Facts((), Kind.OTHER, None, None)
    varying: frozenset[Any] = frozenset()

    def __init__(self, x: Any) -> None:
        self.x = x
        self.backend = backend = _backends.find(x)
        if backend is not None:
            self.fault = backend.fault(x)
            if not self.fault:
                self.facts = backend.facts(x)
                self.varying = backend.varying(x)

    @property
    def memory(self) -> NumpyArray | None:
        # Not a cached_property: before Python 3.12, it has a lock, which another thread may hold
        # during a fork.
        if not hasattr(self, "_memory"):
            self._memory = None if self.backend is None else self.backend.memory(self.x)
        return self._memory


class Row(NamedTuple):
    """A leaf with its operands; `options` has the options that are arrays, by name."""

    leaf: Leaf
    w: Operand
    dcdw: Operand
    out: Operand
    velocity: Operand
    options: list[tuple[str, Operand]]


def with_operands(leaves: list[Leaf]) -> list[Row]:
    """The leaves with their operands; an array that many leaves use is read once."""
    known: dict[int, Operand] = {}
    options: dict[int, list[tuple[str, Operand]]] = {}

    def read(x: Any) -> Operand:
        operand = known.get(id(x))
        if operand is None:
            operand = known[id(x)] = Operand(x)
        return operand

    rows = []
    for leaf in leaves:
        rule = leaf.rule
        if id(rule) not in options:
            given = [(name, x) for name, x in rule._asdict().items() if _is_array(x)]
            options[id(rule)] = [(option_name(name), read(x)) for name, x in given]
        arrays = (read(leaf.w), read(leaf.dcdw), read(leaf.out), read(leaf.velocity))
        rows.append(Row(leaf, *arrays, options[id(rule)]))
    return rows


def _is_array(x: Any) -> bool:
    return _backends.find(x) is not None
