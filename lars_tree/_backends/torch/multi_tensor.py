"""Steps of many tensors at once, by the engines `Fused` and `Foreach`, in two phases.

`prepare` computes the norms of all layers, and sums those of shards over the processes; the
resulting step writes the new values. Neither waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree._backends.base import Leaf, StepResult, grouped
from lars_tree._backends.torch import fused, sharded, stand_ins, tensors
from lars_tree._backends.torch.foreach import Foreach
from lars_tree._backends.torch.fused_rows import Row, row_of
from lars_tree._backends.torch.layers import (
    Layer,
    LayerEngine,
    alike,
    layers,
    of_leaf,
)
from lars_tree._backends.torch.transfers import index
from lars_tree._backends.torch.vectors import one_rule
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Measured, Norm, Rule

Pairs = Sequence[tuple[Leaf, StepResult]]  # leaves, and the tensors to write the results to


class _Part(NamedTuple):
    """The layers that one engine updates on one device; `indices` are their indices in the step."""

    engine: LayerEngine
    indices: list[int]
    norms: Tensor


class _Shared(NamedTuple):
    """The layers of a sharded leaf in this process, and the processes that share them.

    Every process of a group has the same number of these layers, which may be 0.
    """

    indices: range
    groups: list[Any]
    device: torch.device


class Step(NamedTuple):
    """A step whose norms are known."""

    parts: list[_Part]
    counts: list[int]  # of the layers of each leaf in this process
    groups: list[list[Any]]  # the processes that share each leaf
    outs: list[Tensor]
    device: torch.device  # of the first leaf

    def repeatable(self) -> Step | None:
        """This step without its tensors, for `again`; None if an engine does not support this."""
        parts: list[_Part] = []
        for part in self.parts:
            if not isinstance(part.engine, fused.Fused):
                return None
            parts.append(part._replace(engine=part.engine.without_tensors()))
        return self._replace(parts=parts, outs=[])

    def again(self, rules: dict[int, Rule], outs: list[Tensor]) -> Step:
        """The same step for new values of the tensors, or new tensors at the same addresses.

        `rules` has a new rule for each old rule, by id, which differs only in its numbers.
        """
        parts: list[_Part] = []
        for engine, indices, _ in self.parts:
            assert isinstance(engine, fused.Fused)
            new = engine.again(rules, [] if parts else outs)
            parts.append(_Part(new, indices, new.norms()))
        return self._replace(parts=parts, outs=outs)

    @tensors.without_autograd
    def nonfinite(self) -> Tensor:
        """Whether each leaf would not be finite in any process, as `LayerEngine.nonfinite`.

        All leaves must be on one device.
        """
        found = torch.zeros(len(self.counts), device=self.device)
        owners = [leaf for leaf, n in enumerate(self.counts) for _ in range(n)]
        for engine, indices, norms in self.parts:
            rows = index([owners[i] for i in indices], self.device)
            found.index_add_(0, rows, engine.nonfinite(norms).to(found.dtype))
        sharded.add_up(found, [(1, groups) for groups in self.groups])
        return found > 0

    @property
    def devices(self) -> list[torch.device]:
        return list({part.norms.device: None for part in self.parts})

    def write(
        self, unless: Tensor | None = None, streams: Sequence[AbstractContextManager[Any]] = ()
    ) -> None:
        """Write all results, or the old values if `unless`, a number on a device, is not 0.

        A caller in another thread than `prepare` must pass the streams that `prepare` used.
        """
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(stream)
            stack.enter_context(tensors.writing_to(self.outs))
            for engine, _, norms in self.parts:
                keeps = None if unless is None else unless.to(norms.device, non_blocking=True)
                engine.write(norms, keeps)


def fused_row(layer: Layer, may_fuse: bool) -> Row | None:
    """The row of a layer for `Fused`; None if `Foreach` updates the layer."""
    row = row_of(layer) if may_fuse else None
    return row if row is not None and fused.is_available(layer.w.device) else None


def is_on_accelerator(leaf: Leaf) -> bool:
    return not leaf.w.is_cpu


@tensors.without_autograd
def prepare(pairs: Pairs, may_fuse: Callable[[Leaf], bool] = is_on_accelerator) -> Step:
    """Compute the norms. Only leaves that `may_fuse` are updated by Triton kernels."""
    intercepted = stand_ins.is_intercepted()
    flat: list[Layer] = []
    counts: list[int] = []
    rows: list[Row | None] = []
    every: list[list[Any]] = []
    shared: list[_Shared] = []
    for leaf, new in pairs:
        is_sharded = sharded.is_sharded(leaf.w)
        some = sharded.layers_here(leaf, new) if is_sharded else layers(leaf, new)
        every.append(sharded.groups_of(leaf.w) if is_sharded else [])
        if is_sharded and leaf.rule.adapt:
            here = range(len(flat), len(flat) + len(some))
            groups = sharded.groups_of(leaf.w, leaf.rule.layer_axis)
            shared.append(_Shared(here, groups, leaf.w.device))
        fuses = may_fuse(leaf) and not intercepted
        rows += (fused_row(layer, fuses) for layer in some)
        flat += some
        counts.append(len(some))
    parts = []
    by_engine = grouped(range(len(flat)), lambda i: (rows[i] is None, flat[i].w.device))
    for (is_foreach, _), indices in by_engine.items():
        members = [flat[i] for i in indices]
        known = [row for i in indices if (row := rows[i]) is not None]
        engine: Foreach | fused.Fused = (
            Foreach(members) if is_foreach else fused.Fused(members, known)
        )
        parts.append(_Part(engine, indices, engine.norms()))
    if any(leaf.groups for leaf in shared):
        _complete(parts, shared)
    outs = [x for _, new in pairs for x in new if x is not None]
    return Step(parts, counts, every, outs, pairs[0][0].w.device)


def _complete(parts: list[_Part], shared: list[_Shared]) -> None:
    """Replace the norms of shards by those of whole layers."""
    for device, some in grouped(parts, lambda part: part.norms.device).items():
        joined = some[0].norms if len(some) == 1 else torch.cat([part.norms for part in some])
        rows = {i: row for row, i in enumerate(i for part in some for i in part.indices)}
        # Leaves without layers here are included, so that all processes find the groups in the same
        # order: norms are summed over one dimension of the mesh after the other.
        here = [leaf for leaf in shared if leaf.device == device]
        order = [rows[i] for leaf in here for i in leaf.indices]
        sharded.complete(joined, order, [(len(leaf.indices), leaf.groups) for leaf in here])
        if len(some) > 1:
            sizes = [len(part.indices) for part in some]
            for part, norms in zip(some, joined.split(sizes), strict=True):
                part.norms.copy_(norms)


@tensors.without_autograd
def measure(leaves: list[Leaf]) -> list[Measured]:
    """The norms and ratios of leaves. For sharded leaves, these are those of whole layers."""
    # The norms are reported even of leaves that do not adapt.
    adapting = [leaf._replace(rule=leaf.rule._replace(adapt=True)) for leaf in leaves]
    separate = [leaf._replace(rule=leaf.rule._replace(joint_norm=False)) for leaf in adapting]
    counts, norms = _norms(separate)
    is_joint = any(formula.is_joint(leaf.rule) for leaf in leaves)
    joint_norms = _norms(adapting)[1] if is_joint else norms
    rules = [leaf.rule for leaf, n in zip(leaves, counts, strict=True) for _ in range(n)]
    found = iter(_measured(rules, norms, joint_norms))
    by_leaf = [list(islice(found, n)) for n in counts]
    return [_of_leaf(*pair) for pair in zip(leaves, by_leaf, strict=True)]


def _norms(leaves: list[Leaf]) -> tuple[list[int], list[Tensor]]:
    """The number of layers of each leaf in this process, and the norms of each layer."""
    step = prepare([(leaf, StepResult(leaf.w)) for leaf in leaves])
    found: dict[int, Tensor] = {}
    for part in step.parts:
        found |= zip(part.indices, part.norms.unbind(), strict=True)
    return step.counts, [found[i] for i in range(len(found))]


class _KnownNorms(tensors.TorchOps):
    """Operations for layers whose norms are known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(torch)
        w, dcdw = table.unbind(1)
        self.known = Norm(*w.unbind(-1)), Norm(*dcdw.unbind(-1))

    def norms(self, w: Any, dcdw: Any, layer_axis: int | None) -> tuple[Norm, Norm]:
        return self.known


def _measured(rules: list[Rule], norms: list[Tensor], joint_norms: list[Tensor]) -> list[Measured]:
    found: dict[int, Measured] = {}
    groups = grouped(range(len(rules)), lambda i: (norms[i].device, alike(rules[i])))
    for indices in groups.values():
        rule = one_rule([rules[i] for i in indices], _like(norms[indices[0]]))
        separate, joint = (
            _KnownNorms(torch.stack([x[i] for i in indices])) for x in (norms, joint_norms)
        )
        if formula.is_joint(rule):
            vectors = formula.measure(joint, None, None, formula.without_decay(rule))
            g_norm = separate.known[1].scaled * (separate.known[1].scale / rule.grad_scale)
            vectors = vectors._replace(g_norm=g_norm)
        else:
            vectors = formula.measure(separate, None, None, rule)
        numbers = zip(*(vector.unbind() for vector in vectors), strict=True)
        found |= zip(indices, map(Measured._make, numbers), strict=True)
    return [found[i] for i in range(len(rules))]


def _like(x: Tensor) -> dict[str, Any]:
    return {"dtype": x.dtype, "device": x.device}


def _of_leaf(leaf: Leaf, measured: list[Measured]) -> Measured:
    if sharded.is_sharded(leaf.w):
        return sharded.gathered(leaf, measured)
    return of_leaf(measured, leaf.rule)
