"""DTensor shards in CPU memory, stepped by the native engine.

The layers that this process holds become layers of the plan of the update. The plan gives the norms
of them; their squares are added up over the processes, as in `sharded.py`, before the plan is
applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.base import Leaf, New
from lars_tree._backends.reader import READER
from lars_tree._backends.sharded import (
    SAFE_SUM,
    SCALES,
    add_up,
    gradient_of,
    groups_of,
    is_sharded,
    number,
    partial_fault,
    shard_of,
)
from lars_tree._backends.stand_ins import PLAIN_TYPES
from lars_tree._backends.tensors import as_real, bump_versions, leaf_like, targets
from lars_tree._rule import Rule

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan

_EXPONENTS = np.log2(SCALES)


class Shards:
    """`base.Shards` for DTensors."""

    def __init__(self, plan: Plan, is_plain_step: Callable[[Leaf], bool]) -> None:
        self.news: dict[int, New] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._plan = plan
        self._is_plain_step = is_plain_step
        self._parts: list[_Part] = []
        self._written: list[Tensor] = []

    @property
    def places(self) -> dict[int, int]:
        return {row: part.leaf.place for part in self._parts for row in part.rows}

    def trust(self, leaves: list[Leaf]) -> list[Leaf]:
        leaves = [leaf for leaf in leaves if _looks_right(leaf)]
        news = [targets(leaf) for leaf in leaves]
        columns = _Columns([], [], [], [], [])
        for leaf, new in zip(leaves, news, strict=True):
            columns.add(map(shard_of, (leaf.w, leaf.dcdw, *new)), leaf.rule)
        first = len(self._plan.indices)
        rest = set(self._plan.prepare(READER, *columns))
        taken = [i for i in range(len(leaves)) if i not in rest]
        for row, i in enumerate(taken, first):
            self._keep(leaves[i], news[i], range(row, row + 1))
        return [leaves[i] for i in taken]

    def take(self, leaves: list[Leaf]) -> None:
        with torch.no_grad():
            for leaf in leaves:
                if is_sharded(leaf.w) and leaf.w.is_cpu and self._is_plain_step(leaf):
                    self._take(leaf, targets(leaf))

    def _take(self, leaf: Leaf, new: New) -> None:
        first, axis = len(self._plan.indices), leaf.rule.layer_axis
        columns = _Columns([], [], [], [], [])
        if leaf.w.device_mesh.get_coordinate() is not None:  # else it has no part in it
            options = leaf.rule._asdict().items()
            numbers: Any = {name: float(number(x)) for name, x in options if _is_array(x)}
            rule = leaf.rule._replace(layer_axis=None, stop_gradients=True, **numbers)
            w = shard_of(leaf.w)
            gradient = gradient_of(leaf.dcdw, leaf.w).expand(w.shape)
            arrays = [w, gradient, *map(shard_of, new)]
            stacks: list[Any] = [None if x is None else _stack(x, axis) for x in arrays]
            dense: list[Any] = [None if x is None else _readable(x) for x in stacks]
            if leaf.out is leaf.w:
                dense[0] = dense[2]
            self.copies += (
                pair for pair in zip(stacks[2:], dense[2:], strict=True) if pair[0] is not pair[1]
            )
            layers = ([None] * len(dense[0]) if x is None else x.unbind() for x in dense)
            for layer in zip(*layers, strict=True):
                columns.add(layer, rule)
            rest = self._plan.prepare(READER, *columns)
            assert not rest, "checked arrays are readable"
        self._keep(leaf, new, range(first, first + len(columns.ws)))

    def _keep(self, leaf: Leaf, new: New, rows: range) -> None:
        self._parts.append(_Part(leaf, rows))
        if leaf.out is None:
            self.news[leaf.place] = New(leaf_like(new.w, leaf.w), new.velocity)
        else:
            self.news[leaf.place] = new
            self._written += (x for x in new if x is not None)

    def reduce(self, norms: bytearray) -> None:
        parts = [part for part in self._in_order() if part.leaf.rule.adapt]
        groups = _groups((part.leaf.w, part.leaf.rule.layer_axis) for part in parts)
        # A leaf that no other process has a part of is a whole layer: its norms are complete.
        shared = [(part.rows, some) for part, some in zip(parts, groups, strict=True) if some]
        places = [row for rows, _ in shared for row in rows]
        table = np.frombuffer(norms).reshape(-1, _ROW)
        squares = torch.from_numpy(_squares(table[places]))
        add_up(squares, ((len(rows), some) for rows, some in shared))
        table[places, :_COLUMNS] = _roots(squares.numpy())

    def agree(self, bad: set[int]) -> set[int]:
        leaves = [part.leaf for part in self._in_order()]
        leaves = [leaf for leaf in leaves if leaf.rule.nonfinite != "propagate"]
        flags = torch.tensor([float(leaf.place in bad) for leaf in leaves])
        add_up(flags, ((1, some) for some in _groups((leaf.w, None) for leaf in leaves)))
        return bad.union(leaf.place for leaf, flag in zip(leaves, flags, strict=True) if flag > 0)

    def announce(self) -> None:
        bump_versions([*self._written, *map(shard_of, self._written)])

    def _in_order(self) -> list[_Part]:
        """The same in all processes, whatever each of them trusts."""
        return sorted(self._parts, key=lambda part: part.leaf.place)


class _Part(NamedTuple):
    """A leaf, and the rows of the plan that have its layers in this process."""

    leaf: Leaf
    rows: range


class _Columns(NamedTuple):
    """The lists that `Plan.prepare` takes."""

    ws: list[Any]
    dcdws: list[Any]
    outs: list[Any]
    rules: list[Rule]
    velocities: list[Any]

    def add(self, arrays: Iterable[Any], rule: Rule) -> None:
        columns = self.ws, self.dcdws, self.outs, self.velocities
        for column, x in zip(columns, arrays, strict=True):
            column.append(x)
        self.rules.append(rule)


def _looks_right(leaf: Leaf) -> bool:
    """Whether the arrays of a leaf are laid out alike; what is here of them the plan looks at."""
    w = leaf.w
    if leaf.dcdw is None or not is_sharded(w) or not w.is_cpu or partial_fault(w):
        return False
    if w.device_mesh.get_coordinate() is None:
        return False
    ours, shape = w._spec, w.shape
    for x in (leaf.dcdw, leaf.velocity, leaf.out):
        if x is None or x is w:
            continue
        if not is_sharded(x) or x.shape != shape:
            return False
        spec = x._spec
        if spec.placements != ours.placements or spec.mesh != ours.mesh:
            return False
    return True


def _groups(given: Iterable[tuple[Any, int | None]]) -> list[list[Any]]:
    """The groups of each DTensor; each comes with its layer axis."""
    known: dict[Any, list[Any]] = {}
    found = []
    for w, axis in given:
        key = id(w.device_mesh), w.placements, None if axis is None else axis % w.ndim
        if key not in known:
            known[key] = groups_of(w, axis)
        found.append(known[key])
    return found


def _stack(x: Tensor, layer_axis: int | None) -> Tensor:
    """The layers along a first axis; complex numbers as pairs."""
    stack = x[None] if layer_axis is None else x.movedim(layer_axis, 0)
    return as_real(stack)


def _readable(x: Tensor) -> Tensor:
    """A tensor whose layers the kernel can read: a contiguous copy where x itself is not."""
    is_aligned = x.data_ptr() % x.element_size() == 0
    if type(x) in PLAIN_TYPES and x.is_contiguous() and is_aligned and not x.is_neg():
        return x
    return x.resolve_neg().clone(memory_format=torch.contiguous_format)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape")


# A row of the norms of a plan: those of w and of dcdw, three numbers each, and two more.
_ROW, _COLUMNS = 8, 6


def _squares(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The squared norms by layer, w and dcdw, and scale."""
    high, exponent = (rows[:, i:_COLUMNS:3, None] for i in (0, 2))
    with np.errstate(all="ignore"):
        scaled = np.ldexp(high, (exponent + _EXPONENTS).astype(np.intc))
        squares: np.ndarray[Any, Any] = scaled * scaled
        return squares


def _roots(sums: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first columns of the rows for norms with these squares."""
    plain, of_large, _ = np.moveaxis(sums, -1, 0)
    is_safe = (plain > SAFE_SUM[0]) & (plain < SAFE_SUM[1])
    which = np.where(is_safe, 0, np.where(of_large > SAFE_SUM[0], 1, 2))
    high = np.sqrt(np.take_along_axis(sums, which[..., None], -1)[..., 0])
    found = np.stack([high, np.zeros_like(high), -_EXPONENTS[which]], -1)
    rows: np.ndarray[Any, Any] = found.reshape(-1, _COLUMNS)
    return rows
