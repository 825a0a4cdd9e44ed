"""The native engine's share of an update: the leaves that the kernel supports, of all libraries.

The kernel reads the arrays of each library by its `Reader`. The leaves that it does not support are
the `rest`. Nothing is written before the plan is stepped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lars_tree import _backends, _native
from lars_tree._backends.base import Backend, Columns, News
from lars_tree.array import Array, unwrap

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan

Span = tuple[int, int]


class Share:
    """What the native engine takes of these columns.

    Attributes:
        plan: The layers to be stepped; None without the kernel.
        news: The results, where they are new arrays.
        odd: The places of leaves that were not taken as they are.
        rest: The places of those that were not taken out of their wrappers either.
    """

    def __init__(
        self, columns: Columns, *, measures: bool = False, takes_none: bool = False
    ) -> None:
        self.columns = columns
        self.plan: Plan | None = _native.plan()
        self.news = None if columns.outs is not None or measures else _nothing_yet(columns)
        # Which library took leaves, among which places (None for all), and where those of its
        # arrays are among plan.written that are written to. Others may add more to the plan.
        self._parts: list[tuple[Backend, Columns, list[int] | None, slice]] = []
        first = next((x for x in columns.ws if x is not None), None)
        backend = None if takes_none else _backends.find(unwrap(first))
        self.odd = self.rest = self._offer(backend, columns, None)
        if self.odd and backend is not None and self.plan is not None:
            self._offer_again(backend)

    def _offer(
        self, backend: Backend | None, columns: Columns, places: list[int] | None
    ) -> list[int]:
        if backend is None or self.plan is None:
            return list(range(len(columns.ws))) if places is None else places
        start = len(self.plan.written)
        rest = backend.prepare(self.plan, columns, self.news, places)
        self._parts.append((backend, columns, places, slice(start, len(self.plan.written))))
        return rest

    def _offer_again(self, tried: Backend | None) -> None:
        """Offer arrays out of their wrappers, and those of other libraries."""
        bare = _unwrapped(self.columns, self.odd)
        groups: dict[Backend | None, list[int]] = {}
        for place in self.odd:
            backend = _backends.find(bare.ws[place])
            if backend is tried and not any(isinstance(x, Array) for x in self.columns.row(place)):
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
        return self.plan is not None and backend is not None and backend.count(self.plan, counter)

    def overlaps(self, written: list[Span] | None = None, read: list[Span] | None = None) -> bool:
        """Whether memory that is written here is used twice, also by others.

        Args:
            written: The stretches of memory that others write to; none of them overlap.
            read: Those that others read.
        """
        plan = self.plan
        return plan is not None and (plan.overlaps(written or []) or plan.overlaps([], read or []))

    def spans(self) -> list[Span]:
        """The stretches of memory that are written to."""
        return [] if self.plan is None else self.plan.spans()

    def announce(self) -> None:
        """Have the libraries know which arrays are written to."""
        if self.plan is None:
            return
        for backend, _, _, its_own in self._parts:
            backend.announce(self.plan.written[its_own])

    def nonfinite(self) -> tuple[bytearray | None, dict[int, str] | None]:
        """The norms of all layers; what `nonfinite` is where results would not be finite, by place.

        None where there are no layers.
        """
        if self.plan is None or not self.plan.places:
            return None, None
        norms, rules = self.plan.norms(bounds=True), self.columns.rules
        return norms, {place: rules[place].nonfinite for place in self.plan.nonfinite(norms)}

    def step(self, norms: bytearray | None = None) -> None:
        """Step all layers; by these norms, where they are known already."""
        if self.plan is None:
            return
        if norms is None:
            self.plan.step()
        else:
            self.plan.apply(norms)

    def keep(self) -> None:
        """Let the results out of place be what the leaves have."""
        for backend, columns, places, _ in self._parts if self.news is not None else ():
            for place in range(len(columns.ws)) if places is None else places:
                for news, old in zip(self.news, columns.row(place)[::3], strict=True):
                    if news is not None and news[place] is not None:
                        news[place] = backend.copy(old, stop_gradients=True)

    def finish(self) -> None:
        """Make new arrays what their libraries want."""
        if self.news is not None:
            for backend, columns, places, _ in self._parts:
                backend.finish(columns, self.news, places)


def _nothing_yet(columns: Columns) -> News:
    nothing = [None] * len(columns.ws)
    return News(nothing, None if columns.velocities is None else list(nothing))


def _unwrapped(columns: Columns, places: list[int]) -> Columns:
    """Columns with the native arrays of leaves that are an Array."""
    new = [None if xs is None else list(xs) for xs in columns[:3]]
    velocities = None if columns.velocities is None else list(columns.velocities)
    for xs in (*new, velocities):
        for place in places if xs is not None else ():
            xs[place] = unwrap(xs[place])
    return columns._replace(**dict(zip(("ws","dcdws","outs"), new)), velocities=velocities)
