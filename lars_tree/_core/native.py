"""The native engine's share of an update: the leaves that the kernel supports, of all libraries.

The kernel reads the arrays of each library by its `Reader`. The leaves that it does not support are
the `rest`. Nothing is written before the plan is stepped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lars_tree import _backends, _native
from lars_tree._backends.base import Backend, Columns, Leaf, New, News, Shards
from lars_tree._backends.cpu import measured
from lars_tree._core.wrapper import is_wrapped, unwrap
from lars_tree._nonfinite import by_backend
from lars_tree._rule import Measured, is_joint

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan
    from lars_tree._writes import Writes

Span = tuple[int, int]  # the addresses of a memory range: its start and end


class Native:
    """What the native engine takes of these columns.

    Attributes:
        plan: The layers to be stepped; None without the kernel.
        news: The results, where they are new arrays.
        odd: The places of leaves that were not taken as they are.
        rest: The places of those that were not taken out of their wrappers either.
    """

    def __init__(
        self,
        columns: Columns,
        *,
        measures: bool = False,
        takes_none: bool = False,
        without: Collection[int] = (),
    ) -> None:
        self.columns = columns
        self.plan: Plan | None = _native.plan()
        self.news = None if columns.outs is not None or measures else _nothing_yet(columns)
        self._parts: list[_Part] = []
        self._counted: tuple[Backend, Any] | None = None
        self._shards: dict[Backend, Shards] = {}
        self._takes_none = takes_none
        found = (_backends.find(unwrap(x)) for x in columns.ws if x is not None)
        backend = None if takes_none else next(filter(None, found), None)
        places = [i for i in range(len(columns.ws)) if i not in without] if without else None
        self.odd = self.rest = self._offer(backend, columns, places)
        if self.odd and backend is not None and self.plan is not None:
            self._offer_again(backend)
        if without:
            self.odd = self.rest = sorted({*self.rest, *without})

    def _offer(
        self, backend: Backend | None, columns: Columns, places: list[int] | None
    ) -> list[int]:
        if backend is None or self.plan is None:
            return list(range(len(columns.ws))) if places is None else places
        start = len(self.plan.written)
        rest = backend.prepare(self.plan, columns, self.news, places)
        written = slice(start, len(self.plan.written))
        self._parts.append(_Part(backend, columns, places, rest, written))
        return rest

    def _offer_again(self, tried: Backend | None) -> None:
        """Offer arrays out of their wrappers, and those of other libraries."""
        bare = _unwrapped(self.columns, self.odd)
        groups: dict[Backend | None, list[int]] = {}
        for place in self.odd:
            backend = _backends.find(bare.ws[place])
            if backend is tried and not any(map(is_wrapped, self.columns.row(place))):
                backend = None
            groups.setdefault(backend, []).append(place)
        offers = (self._offer(backend, bare, places) for backend, places in groups.items())
        self.rest = sorted(place for rest in offers for place in rest)

    @property
    def must_be_finite(self) -> bool:
        """Whether the rule of a leaf does not propagate infinity and NaN."""
        return self.plan is not None and self.plan.must_be_finite

    def count(self, counter: Any) -> bool:
        """Have the kernel add one to a counter when the step is taken; whether it can."""
        backend = _backends.find(counter)
        if self.plan is None or backend is None or not backend.count(self.plan, counter):
            return False
        self._counted = backend, counter
        return True

    def overlaps(self, written: list[Span] | None = None, read: list[Span] | None = None) -> bool:
        """Whether memory that is written here is used twice, also by others.

        Args:
            written: The memory ranges that others write to; none of them overlap.
            read: Those that others read.
        """
        plan = self.plan
        if plan is None or not (written or read):
            return plan is not None and plan.overlaps()
        return plan.overlaps(written or []) or plan.overlaps([], read or [])

    def spans(self) -> list[Span]:
        """The memory ranges that are written to."""
        return [] if self.plan is None else self.plan.spans()

    def announce(self) -> None:
        """Have the libraries know which arrays are written to."""
        if self.plan is None:
            return
        for part in self._parts:
            part.backend.announce(self.plan.written[part.written])
        for shards in self._shards.values():
            shards.announce()
        if self._counted is not None:
            backend, counter = self._counted
            backend.announce([counter])

    def trust(self, leaves: list[Leaf]) -> list[Leaf]:
        """Take those of unchecked leaves that are spread over processes and look right."""
        if self._takes_none:
            return []
        return [leaf for shards, group in self._spread(leaves) for leaf in shards.trust(group)]

    def take(self, leaves: list[Leaf]) -> dict[int, New]:
        """Take those of checked leaves that are spread over processes, beside those trusted.

        Returns:
            The results of both, by place.
        """
        for shards, group in self._spread(leaves):
            shards.take([leaf for leaf in group if leaf.place not in shards.news])
        news = (shards.news.items() for shards in self._shards.values())
        return {place: new for items in news for place, new in items}

    def _spread(self, leaves: list[Leaf]) -> Iterator[tuple[Shards, list[Leaf]]]:
        if self.plan is None:
            return
        for backend, group in by_backend(leaves).items():
            shards = self._shards.get(backend) or backend.shards(self.plan)
            if shards is not None:
                yield shards, group
                if shards.news:
                    self._shards[backend] = shards

    def measured(self) -> dict[int, Measured]:
        """What the steps are made of, by place: numbers of the libraries of the weights."""
        if self.plan is None or not self.plan.indices:
            return {}
        places, rows = self.plan.indices, measured(self.plan)
        if any(is_joint(self.columns.rules[place]) for place in places):
            # The denominators are norms of sums: those of gradients alone are measured as well.
            rules = [rule._replace(joint_norm=False) for rule in self.columns.rules]
            plan = Native(self.columns._replace(rules=rules), measures=True).plan
            rows[:, 1] = measured(plan)[:, 1] if plan is not None else np.nan
        found: dict[int, Measured] = {}
        ws = [unwrap(self.columns.ws[place]) for place in places]
        groups: dict[Backend, list[int]] = {}
        for i, w in enumerate(ws):
            backend = _backends.find(w)
            assert backend is not None
            groups.setdefault(backend, []).append(i)
        for backend, group in groups.items():
            numbers = backend.numbers(rows[group], [ws[i] for i in group])
            found |= zip((places[i] for i in group), numbers, strict=True)
        return found

    def norms(self, bounds: bool = False) -> bytearray | None:
        """The norms of all layers, of the whole of them; None where there are no layers."""
        if self.plan is None or not (self.plan.indices or self._shards):
            return None
        norms = self.plan.norms(bounds=bounds)
        for shards in self._shards.values():
            shards.reduce(norms)
        return norms

    def nonfinite(self) -> tuple[bytearray | None, dict[int, str] | None]:
        """The norms; what `nonfinite` is where results would not be finite, by place, or None."""
        norms = self.norms(bounds=True)
        if self.plan is None or norms is None:
            return None, None
        places = dict(enumerate(self.plan.indices))
        for shards in self._shards.values():
            places |= shards.places
        bad = {places[row] for row in self.plan.nonfinite(norms)}
        for shards in self._shards.values():
            bad = shards.agree(bad)
        return norms, {place: self.columns.rules[place].nonfinite for place in bad}

    def step(self, norms: bytearray | None = None) -> None:
        """Step all layers; by these norms, where they are known already."""
        if self.plan is None:
            return
        if norms is None:
            self.plan.step()
        else:
            self.plan.apply(norms)

    def keep(self, writes: Writes) -> None:
        """Let the results be what the leaves have: in new arrays, or in `outs` that are others."""
        for part in self._parts:
            for place in part.taken():
                w, _, out, velocity = part.columns.row(place)
                if self.news is None:
                    if out is not w and w is not None:
                        writes.add(part.backend, out, w)
                    continue
                for news, old in zip(self.news, (w, velocity), strict=True):
                    if news is not None and old is not None:
                        news[place] = part.backend.copy(old, stop_gradients=True)

    def copy(self, writes: Writes) -> None:
        """Copy results to where they belong that were not made there, after the step."""
        for backend, shards in self._shards.items():
            for target, values in shards.copies:
                if self.news is None:
                    writes.add(backend, target, values)
                else:
                    backend.write(target, values)

    def finish(self) -> None:
        """Make new arrays what their libraries want."""
        if self.news is not None:
            for part in self._parts:
                part.backend.finish(part.columns, self.news, part.taken())


class _Part(NamedTuple):
    """What one library was offered: among `places` (None for all) it took all but the rest.

    `written` says which of the arrays that the plan writes to are its own.
    """

    backend: Backend
    columns: Columns
    places: list[int] | None
    rest: list[int]
    written: slice

    def taken(self) -> Iterable[int]:
        """The places of the leaves that it took, also of those that hold nothing."""
        offered = range(len(self.columns.ws)) if self.places is None else self.places
        if not self.rest:
            return offered
        rest = set(self.rest)
        return [place for place in offered if place not in rest]


def _nothing_yet(columns: Columns) -> News:
    nothing = [None] * len(columns.ws)
    return News(nothing, None if columns.velocities is None else list(nothing))


def _unwrapped(columns: Columns, places: list[int]) -> Columns:
    """Columns with the native arrays of leaves that are an Array."""

    def bare(xs: list[Any]) -> list[Any]:
        new = list(xs)
        for place in places:
            new[place] = unwrap(new[place])
        return new

    ws, dcdws, outs, rules, velocities, counters = columns
    return Columns(
        bare(ws),
        bare(dcdws),
        outs and bare(outs),
        rules,
        velocities and bare(velocities),
        counters,
    )
