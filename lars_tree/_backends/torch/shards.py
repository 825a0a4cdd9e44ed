"""DTensor shards in CPU memory, updated by the native engine.

The shards of this process become layers of the plan of the update. The plan computes their norms;
before it is applied, the squared norms are summed over the processes, as in `sharded.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.arrays import NamespaceOps
from lars_tree._backends.base import Leaf, StepResult
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.torch import sharded
from lars_tree._backends.torch.layers import Layer
from lars_tree._backends.torch.reader import READER
from lars_tree._backends.torch.stand_ins import TENSOR_TYPES
from lars_tree._backends.torch.tensors import bump_versions, leaf_like, targets, without_autograd
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._numerics.formula import SCALES, norm_of_sums

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan


class Shards:
    """`base.Shards` for DTensors."""

    def __init__(self, plan: Plan, steps_in_memory: Callable[[Leaf], bool]) -> None:
        self.results: dict[int, StepResult] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._plan = plan
        self._steps_in_memory = steps_in_memory
        self._parts: list[_Part] = []
        self._written: list[Tensor] = []

    @property
    def leaf_indices(self) -> dict[int, int]:
        return {row: part.leaf.leaf_index for part in self._parts for row in part.rows}

    def trust(self, leaves: list[Leaf]) -> list[Leaf]:
        leaves = [leaf for leaf in leaves if _looks_right(leaf)]
        results = [targets(leaf) for leaf in leaves]
        layers = []
        for leaf, new in zip(leaves, results, strict=True):
            shards = map(sharded.shard_of, (leaf.w, leaf.dcdw, *new))
            layers.append(Layer._make([*shards, leaf.rule]))
        first = len(self._plan.indices)
        rest = set(self._add(layers))
        taken = [i for i in range(len(leaves)) if i not in rest]
        for row, i in enumerate(taken, first):
            self._keep(leaves[i], results[i], range(row, row + 1))
        return [leaves[i] for i in taken]

    @without_autograd
    def take(self, leaves: list[Leaf]) -> None:
        for leaf in leaves:
            if sharded.is_sharded(leaf.w) and leaf.w.is_cpu and self._steps_in_memory(leaf):
                self._take(leaf, targets(leaf))

    def _take(self, leaf: Leaf, new: StepResult) -> None:
        first = len(self._plan.indices)
        layers = []
        for *tensors, rule in sharded.layers_here(leaf, new):
            readable = [None if x is None else _readable(x) for x in tensors]
            if leaf.out is leaf.w:
                readable[0] = readable[2]
            pairs = zip(tensors[2:], readable[2:], strict=True)
            self.copies += (pair for pair in pairs if pair[0] is not pair[1])
            options = rule._asdict().items()
            numbers: Any = {name: float(x) for name, x in options if isinstance(x, Tensor)}
            known = rule._replace(stop_gradients=True, layer_axis=None, **numbers)
            layers.append(Layer._make([*readable, known]))
        rest = self._add(layers)
        assert not rest, "checked arrays are readable"
        self._keep(leaf, new, range(first, first + len(layers)))

    def _add(self, layers: list[Layer]) -> list[int]:
        names = ("w", "dcdw", "out", "rule", "velocity")
        columns: Any = [[getattr(layer, name) for layer in layers] for name in names]
        return self._plan.prepare(READER, *columns)

    def _keep(self, leaf: Leaf, new: StepResult, rows: range) -> None:
        self._parts.append(_Part(leaf, rows))
        if leaf.out is None:
            self.results[leaf.leaf_index] = StepResult(leaf_like(new.w, leaf.w), new.velocity)
        else:
            self.results[leaf.leaf_index] = new
            self._written += (x for x in new if x is not None)

    def reduce(self, norms: bytearray) -> None:
        parts = [part for part in self._in_order() if part.leaf.rule.adapt]
        groups = _groups((part.leaf.w, part.leaf.rule.layer_axis) for part in parts)
        # A leaf that is not shared with other processes already has its final norms.
        shared = [(part.rows, some) for part, some in zip(parts, groups, strict=True) if some]
        indices = [row for rows, _ in shared for row in rows]
        table = np.frombuffer(norms).reshape(-1, _ROW)
        squares = torch.from_numpy(_squares(table[indices]))
        sharded.add_up(squares, ((len(rows), some) for rows, some in shared))
        table[indices, :_COLUMNS] = _norms(squares.numpy())

    def agree(self, bad: set[int]) -> set[int]:
        leaves = [part.leaf for part in self._in_order()]
        leaves = [leaf for leaf in leaves if leaf.rule.nonfinite != "propagate"]
        flags = torch.tensor([float(leaf.leaf_index in bad) for leaf in leaves])
        sharded.add_up(flags, ((1, some) for some in _groups((leaf.w, None) for leaf in leaves)))
        return bad.union(
            leaf.leaf_index for leaf, flag in zip(leaves, flags, strict=True) if flag > 0
        )

    def announce(self) -> None:
        bump_versions([*self._written, *map(sharded.shard_of, self._written)])

    def _in_order(self) -> list[_Part]:
        """The parts in leaf order, the only order that is the same in all processes."""
        return sorted(self._parts, key=lambda part: part.leaf.leaf_index)


class _Part(NamedTuple):
    """A leaf, and the plan rows of its layers in this process."""

    leaf: Leaf
    rows: range


def _looks_right(leaf: Leaf) -> bool:
    """Whether the tensors of a leaf are sharded alike; the plan checks the shards themselves."""
    w = leaf.w
    if leaf.dcdw is None or not sharded.is_sharded(w) or not w.is_cpu or sharded.partial_fault(w):
        return False
    if not sharded.is_in_mesh(w):
        return False
    ours, shape = w._spec, w.shape
    for x in (leaf.dcdw, leaf.velocity, leaf.out):
        if x is None or x is w:
            continue
        if not sharded.is_sharded(x) or x.shape != shape:
            return False
        spec = x._spec
        if spec.placements != ours.placements or spec.mesh != ours.mesh:
            return False
    return True


def _groups(given: Iterable[tuple[Any, int | None]]) -> list[list[Any]]:
    """The process groups of each DTensor, given with its layer axis."""
    known: dict[Any, list[Any]] = {}
    found = []
    for w, axis in given:
        key = id(w.device_mesh), w.placements, None if axis is None else axis % w.ndim
        if key not in known:
            known[key] = sharded.groups_of(w, axis)
        found.append(known[key])
    return found


def _readable(x: Tensor) -> Tensor:
    """The tensor if the kernel can read it, otherwise a contiguous copy."""
    is_aligned = x.data_ptr() % x.element_size() == 0
    if type(x) in TENSOR_TYPES and x.is_contiguous() and is_aligned and not x.is_neg():
        return x
    return x.resolve_neg().clone(memory_format=torch.contiguous_format)


# The norms of a plan have 8 columns (`Norms` in rule.hpp): three for w, three for dcdw, and two
# that are not used here.
_ROW, _COLUMNS = 8, 6


@without_warnings
def _squares(rows: NumpyArray) -> NumpyArray:
    """The squared norms; their axes are the layer, the array (w or dcdw), and the scale."""
    high, exponent = (rows[:, i:_COLUMNS:3, None] for i in (0, 2))
    scaled = np.ldexp(high, (exponent + np.log2(SCALES)).astype(np.intc))
    squares: NumpyArray = scaled * scaled
    return squares


@without_warnings
def _norms(sums: NumpyArray) -> NumpyArray:
    """The first six columns of the norms of the plan, computed from the scaled squares."""
    norm = norm_of_sums(NamespaceOps(np), *np.moveaxis(sums, -1, 0))
    found = np.stack([norm.scaled, np.zeros_like(norm.scaled), np.log2(norm.scale)], -1)
    rows: NumpyArray = found.reshape(-1, _COLUMNS)
    return rows
