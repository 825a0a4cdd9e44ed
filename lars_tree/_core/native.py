"""The native engine: collects the leaves of an update that the kernel supports, for all libraries.

The kernel reads the arrays of each library through a `Reader`. The leaves that the kernel does not
support are in `Native.rest`. Nothing is written before `Native.step`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lars_tree import _backends, _native
from lars_tree._backends import base
from lars_tree._backends.cpu.twin import measured
from lars_tree._backends.wrapper import is_wrapped, unwrap
from lars_tree._numerics.formula import Measured, is_joint

if TYPE_CHECKING:
    from lars_tree._core.writes import Writes
    from lars_tree._native._kernel import Plan

Span = tuple[int, int]  # a memory range: its start and end address


class Native:
    """The leaves of an update that the native engine updates.

    Attributes:
        plan: The layers of these leaves; None if the kernel is not in use.
        results: The new arrays; None if the update is in place or is only measured.
        odd: The indices of the leaves that could not be added to the plan by the library of the
            first array: wrapped arrays, arrays of other libraries, and `rest`.
        rest: The indices of the leaves that are not in the plan.
    """

    def __init__(
        self,
        columns: base.Columns,
        *,
        measures: bool = False,
        takes_none: bool = False,
        without: Collection[int] = (),
    ) -> None:
        self.columns = columns
        self.plan: Plan | None = _native.plan()
        self.results: base.StepResults | None = None
        if columns.outs is None and not measures:
            nothing: list[Any] = [None] * len(columns.ws)
            self.results = base.StepResults(nothing, columns.velocities and list(nothing))
        self._parts: list[_Part] = []
        self._counted: tuple[base.Backend, Any] | None = None
        self._shards: dict[base.Backend, base.Shards] = {}
        self._takes_none = takes_none
        found = (_backends.find(unwrap(x)) for x in columns.ws if x is not None)
        backend = None if takes_none else next(filter(None, found), None)
        indices = [i for i in range(len(columns.ws)) if i not in without] if without else None
        self.odd = self.rest = self._offer(backend, columns, indices)
        if self.odd and backend is not None and self.plan is not None:
            self._offer_again(backend)
        if without:
            self.odd = self.rest = sorted({*self.rest, *without})

    def _offer(
        self, backend: base.Backend | None, columns: base.Columns, indices: list[int] | None
    ) -> list[int]:
        if backend is None or self.plan is None:
            return list(range(len(columns.ws))) if indices is None else indices
        start = len(self.plan.written)
        rest = backend.prepare(self.plan, columns, self.results, indices)
        written = slice(start, len(self.plan.written))
        self._parts.append(_Part(backend, columns, indices, rest, written))
        return rest

    def _offer_again(self, tried: base.Backend | None) -> None:
        """Offer the leaves in `odd`, unwrapped, to the libraries of their weights."""
        bare = _unwrapped(self.columns, self.odd)

        def backend_to_try(index: int) -> base.Backend | None:
            backend = _backends.find(bare.ws[index])
            is_new = backend is not tried or any(map(is_wrapped, self.columns.row(index)))
            return backend if is_new else None

        groups = base.grouped(self.odd, backend_to_try)
        offers = (self._offer(backend, bare, indices) for backend, indices in groups.items())
        self.rest = sorted(index for rest in offers for index in rest)

    @property
    def must_be_finite(self) -> bool:
        """Whether a leaf in the plan has the option nonfinite="raise" or "skip"."""
        return self.plan is not None and self.plan.must_be_finite

    def count(self, counter: Any) -> bool:
        """Let the kernel increment a counter in its step; return False if it cannot."""
        backend = _backends.find(counter)
        if self.plan is None or backend is None or not backend.count(self.plan, counter):
            return False
        self._counted = backend, counter
        return True

    def overlaps(self, written: list[Span] | None = None, read: list[Span] | None = None) -> bool:
        """Whether memory that the kernel writes is used by another leaf or by another engine.

        `written` and `read` are the memory ranges that other engines use; the written ranges must
        not overlap one another.
        """
        plan = self.plan
        if plan is None or not (written or read):
            return plan is not None and plan.overlaps()
        return plan.overlaps(written or []) or plan.overlaps([], read or [])

    def spans(self) -> list[Span]:
        return [] if self.plan is None else self.plan.spans()

    def announce(self) -> None:
        """Tell the libraries which of their arrays the kernel writes to."""
        if self.plan is None:
            return
        for part in self._parts:
            part.backend.announce(self.plan.written[part.written])
        for shards in self._shards.values():
            shards.announce()
        if self._counted is not None:
            backend, counter = self._counted
            backend.announce([counter])

    def trust(self, leaves: list[base.Leaf]) -> list[base.Leaf]:
        """Add the unchecked sharded leaves that pass a cheap pre-check to the plan; return them."""
        if self._takes_none:
            return []
        return [leaf for shards, group in self._sharded(leaves) for leaf in shards.trust(group)]

    def take(self, leaves: list[base.Leaf]) -> dict[int, base.StepResult]:
        """Add the checked sharded leaves to the plan; return all sharded results by leaf index."""
        for shards, group in self._sharded(leaves):
            shards.take([leaf for leaf in group if leaf.leaf_index not in shards.results])
        return {i: new for shards in self._shards.values() for i, new in shards.results.items()}

    def _sharded(self, leaves: list[base.Leaf]) -> Iterator[tuple[base.Shards, list[base.Leaf]]]:
        if self.plan is None:
            return
        for backend, group in base.grouped(leaves, lambda leaf: leaf.backend).items():
            shards = self._shards.get(backend) or backend.shards(self.plan)
            if shards is not None:
                yield shards, group
                if shards.results:
                    self._shards[backend] = shards

    def measured(self) -> dict[int, Measured]:
        """The norms and ratios by leaf index, as arrays of the library of the weights."""
        if self.plan is None or not self.plan.indices:
            return {}
        indices, rows = self.plan.indices, measured(self.plan)
        if any(is_joint(self.columns.rules[index]) for index in indices):
            # With `joint_norm`, the plan has no norm of the gradient, so a second plan measures it.
            rules = [rule._replace(joint_norm=False) for rule in self.columns.rules]
            plan = Native(self.columns._replace(rules=rules), measures=True).plan
            rows[:, 1] = measured(plan)[:, 1] if plan is not None else np.nan
        found: dict[int, Measured] = {}
        ws = [unwrap(self.columns.ws[index]) for index in indices]
        groups = base.grouped(range(len(ws)), lambda i: _backends.find(ws[i]))
        for backend, group in groups.items():
            assert backend is not None
            numbers = backend.numbers(rows[group], [ws[i] for i in group])
            found |= zip((indices[i] for i in group), numbers, strict=True)
        return found

    def norms(self, bounds: bool = False) -> bytearray | None:
        """The norms of all layers, including shards; None if there are no layers."""
        if self.plan is None or not (self.plan.indices or self._shards):
            return None
        norms = self.plan.norms(bounds=bounds)
        for shards in self._shards.values():
            shards.reduce(norms)
        return norms

    def nonfinite(self) -> tuple[bytearray | None, dict[int, str] | None]:
        """The norms, and the option `nonfinite` of each leaf that would not be finite, by index.

        Both are None if there are no layers.
        """
        norms = self.norms(bounds=True)
        if self.plan is None or norms is None:
            return None, None
        indices = dict(enumerate(self.plan.indices))
        for shards in self._shards.values():
            indices |= shards.leaf_indices
        bad = {indices[row] for row in self.plan.nonfinite(norms)}
        for shards in self._shards.values():
            bad = shards.agree(bad)
        return norms, {index: self.columns.rules[index].nonfinite for index in bad}

    def step(self, norms: bytearray | None = None) -> None:
        if self.plan is None:
            return
        if norms is None:
            self.plan.step()
        else:
            self.plan.apply(norms)

    def keep(self, writes: Writes) -> None:
        """Copy the old values to the results: to new arrays, or to each `out` that is not w."""
        for part in self._parts:
            for index in part.taken():
                w, _, out, velocity = part.columns.row(index)
                if self.results is None:
                    if out is not w and w is not None:
                        writes.add(part.backend, out, w)
                    continue
                for results, old in zip(self.results, (w, velocity), strict=True):
                    if results is not None and old is not None:
                        results[index] = part.backend.copy(old, stop_gradients=True)

    def copy(self, writes: Writes) -> None:
        """After the step, copy the results of shards that are not in their final memory yet."""
        for backend, shards in self._shards.items():
            for target, values in shards.copies:
                if self.results is None:
                    writes.add(backend, target, values)
                else:
                    backend.write(target, values)

    def finish(self) -> None:
        """Convert new arrays to the array types of their libraries."""
        if self.results is not None:
            for part in self._parts:
                part.backend.finish(part.columns, self.results, part.taken())


class _Part(NamedTuple):
    """The leaves that were offered to one library.

    All leaves at `indices` (None means all leaves) were added to the plan, except `rest`. `written`
    is the slice of `Plan.written` that has the arrays of this library.
    """

    backend: base.Backend
    columns: base.Columns
    indices: list[int] | None
    rest: list[int]
    written: slice

    def taken(self) -> Iterable[int]:
        """The indices of the offered leaves except `rest`, including leaves that are None."""
        offered = range(len(self.columns.ws)) if self.indices is None else self.indices
        if not self.rest:
            return offered
        rest = set(self.rest)
        return [index for index in offered if index not in rest]


def _unwrapped(columns: base.Columns, indices: list[int]) -> base.Columns:
    def unwrapped(xs: list[Any]) -> list[Any]:
        new = list(xs)
        for index in indices:
            new[index] = unwrap(new[index])
        return new

    ws, dcdws, outs, rules, velocities, counters = columns
    new = unwrapped(ws), unwrapped(dcdws), outs and unwrapped(outs), rules
    return base.Columns(*new, velocities and unwrapped(velocities), counters)
