"""One step of many arrays side by side. Knows no trees, and of the options the rules alone.

prepare     the native engine takes the leaves that it supports          `Native`
check       all others, with every message; nothing was written so far   `_checks`
overlap     of what is written with all else, whichever engine has it
run         the results of the others, kept until they are written       `_backends`
norms       of whole leaves, where processes hold parts of them          `Native`
decide      what `nonfinite` asks for                                    `_nonfinite`
write       all arrays, or none                                          `_writes`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from lars_tree import _backends, _checks, _counters, _memory, _nonfinite, _overlaps, errors
from lars_tree._backends.base import FLOATING, Backend, Columns, Engine, Leaf, New, Values
from lars_tree._core import locks
from lars_tree._core.native import Native, Span
from lars_tree._core.wrapper import rewrapped, unwrap
from lars_tree._operands import Operand, Row
from lars_tree._rule import Rule, is_zero
from lars_tree._writes import Writes


class Caller(NamedTuple):
    """What is told of the caller: in errors, and by the end of the step.

    Attributes:
        paths: Gives the path of each leaf.
        refuse_extra: Raises if there are values where w has None.
        same_shapes: Whether gradients must have the shapes of their weights.
        last: Functions in C that are called when all was written, see `Writes.then`.
        words: What the caller calls the arguments.
        engine: What takes some of the leaves instead of the engines that are chosen by their type.
    """

    paths: Callable[[], list[errors.Path]]
    refuse_extra: Callable[[], None] = lambda: None
    same_shapes: bool = False
    last: tuple[Callable[[], Any], ...] = ()
    words: errors.Words = errors.WORDS
    engine: Engine | None = None

    @property
    def places(self) -> Collection[int]:
        """Those that the engine takes."""
        return () if self.engine is None else self.engine.places


class Result(NamedTuple):
    """What a step makes of the leaves, in their order; what was written to is not here again.

    `taken` says whether the step was taken: a bool, or an array of one that is not known yet.
    """

    ws: list[Any]
    velocities: list[Any] | None
    taken: Any


def execute(columns: Columns, caller: Caller) -> Result:
    """Step all leaves, or raise and write nothing."""
    native = Native(columns, without=caller.places)
    if native.rest or caller.last or native.must_be_finite:
        return _execute(columns, caller, native)
    step = columns.counters.get("step")
    if step is not None and not native.count(step):
        return _execute(columns, caller, native)
    if native.overlaps():
        return _execute(columns, caller, Native(columns, takes_none=True))
    native.announce()
    with _writing(native, [], columns):
        # Python handles signals when a native call is over: before this one, or after it.
        native.step()
    return _result(native, {}, True)


def _execute(columns: Columns, caller: Caller, native: Native) -> Result:
    """The same where there is more to do than one call of the kernel."""
    rows, trusted = checked(columns, caller, native.rest, native)
    written, read = _spans(rows, columns.counters)
    # Memory is compared by ranges here; the checks compare single elements.
    if native.overlaps(written, read) or _must_wait(
        native, [*(row.leaf for row in rows), *trusted]
    ):
        native = Native(columns, takes_none=True)
        rows, trusted = checked(columns, caller, native.rest, native)
    # All of them, now that there is no other leaf that they overlap with.
    _checks.check_apart(rows, caller.paths, caller.words)
    _counters.check_apart(columns.counters, [row.leaf for row in rows], caller.paths)
    with _writing(native, rows, columns):
        writes = Writes(native.plan)
        results, taken = _run(native, _overlaps.detach_inputs(rows) + trusted, caller, writes)
        if columns.outs is not None:
            _counters.count_in_place(columns.counters, taken, writes)
            for call in caller.last:
                writes.then(call)
            if writes.plan is not None:
                native.announce()
            writes.make()
    return _result(native, results, taken)


def checked(
    columns: Columns,
    caller: Caller,
    places: list[int] | None = None,
    native: Native | None = None,
) -> tuple[list[Row], list[Leaf]]:
    """The leaves at these places (None: all) that hold arrays, with nothing wrong with them.

    And those that the engine of the caller answers for, or the native engine takes without a check.
    """
    leaves = _leaves(columns, caller, range(len(columns.ws)) if places is None else places)
    trusted = [] if caller.engine is None else caller.engine.trusted(leaves)
    if native is not None:
        trusted += native.trust([leaf for leaf in leaves if leaf.place not in caller.places])
    if trusted:
        known = {leaf.place for leaf in trusted}
        leaves = [leaf for leaf in leaves if leaf.place not in known]
    rows = _checks.check(leaves, caller.paths, same_shapes=caller.same_shapes, words=caller.words)
    return rows, trusted


def _leaves(columns: Columns, caller: Caller, places: Iterable[int]) -> list[Leaf]:
    """The leaves that hold arrays, out of their wrappers; others must stay as they are."""
    rows = [(place, *map(unwrap, columns.row(place))) for place in places]
    if any(x is None and any(y is not None for y in row) for _, x, *row in rows):
        caller.refuse_extra()
    leaves: list[Leaf] = []
    non_arrays: dict[str, list[errors.Line]] = {"w": [], "out": [], "state": []}
    writes, moves = columns.outs is not None, columns.velocities is not None
    for place, x, dcdw, out, velocity in rows:
        if x is None:
            continue
        backend, rule = _backends.find(x), columns.rules[place]
        if backend is None:
            if dcdw is not None or (writes and out is not x):
                text = f"expected an array, got {errors.describe(x)}"
                non_arrays["w"].append((caller.paths()[place], text))
        elif writes and out is None:
            non_arrays["out"].append((caller.paths()[place], "expected an array, got None"))
        elif moves and velocity is None and _needs_velocity(backend, x, rule, dcdw):
            non_arrays["state"].append((caller.paths()[place], "expected a velocity, got None"))
        else:
            is_number = issubclass(type(dcdw), (int, float, complex)) and type(dcdw) is not bool
            gradient = backend.full(_machine_number(dcdw), x) if is_number else dcdw
            leaves.append(Leaf(place, x, gradient, out, rule, backend, velocity))
    for argument, lines in non_arrays.items():
        if lines:
            headline = f"{caller.words.name(argument)} holds something that is no array"
            raise caller.words.error(errors.LeafError, argument, headline, lines)
    return leaves


def _needs_velocity(backend: Backend, x: Any, rule: Rule, dcdw: Any) -> bool:
    if dcdw is None or is_zero(rule.momentum):
        return False
    # What is wrong with weights that cannot move is for the checks to say.
    return bool(backend.fault(x)) or backend.facts(x).kind in FLOATING


def _machine_number(x: complex) -> complex:
    """The number as a float or complex: an int may be longer than any."""
    if isinstance(x, complex):
        return x
    try:
        return float(x)
    except OverflowError:
        return math.copysign(math.inf, x > 0 or -1)


def _spans(rows: list[Row], counters: Mapping[str, Any]) -> tuple[list[Span], list[Span]]:
    """The CPU memory ranges that are written and read, of leaves with an `out`."""
    rows = [row for row in rows if row.leaf.out is not None]
    written = [x for row in rows for x in (row.out, row.velocity)]
    read = [x for row in rows for x in (row.w, row.dcdw, *(x for _, x in row.options))]
    return _merged_spans([*written, *map(Operand, counters.values())]), _merged_spans(read)


def _merged_spans(arrays: list[Operand]) -> list[Span]:
    """As few memory ranges as these arrays fill."""
    found: list[Span] = []
    for x in arrays:
        if x.backend is None or x.backend.values(x.x) is not Values.HERE or x.memory is None:
            continue
        start, size = _memory.span(x.memory)
        if size:
            found.append((start, start + size))
    merged: list[Span] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _must_wait(native: Native, others: list[Leaf]) -> bool:
    """Whether what others get decides on the step, and is not known when the kernel steps."""
    guarded = native.must_be_finite or any(x.rule.nonfinite != "propagate" for x in others)
    steps = [leaf for leaf in others if leaf.dcdw is not None]
    return guarded and any(leaf.backend.values(leaf.w) is not Values.HERE for leaf in steps)


def _writing(native: Native, rows: list[Row], columns: Columns) -> AbstractContextManager[Any]:
    """Hold off updates of other threads that write to the same memory."""
    if columns.outs is None:
        return nullcontext()
    return locks.writing(lambda: [*native.spans(), *_spans(rows, columns.counters)[0]])


def _run(
    native: Native, leaves: list[Leaf], caller: Caller, writes: Writes
) -> tuple[dict[int, New], Any]:
    """The results by place, and whether the step is taken: a bool, or an array of one.

    Those of leaves with an `out` are there when the writes are made.
    """
    steps = [leaf for leaf in leaves if leaf.dcdw is not None]
    shards = native.take([leaf for leaf in steps if leaf.place not in caller.places])
    guarded = native.must_be_finite or any(leaf.rule.nonfinite != "propagate" for leaf in steps)
    results = dict(shards)
    if caller.engine is not None:
        taken_by_it = [leaf for leaf in steps if leaf.place in caller.engine.places]
        for out, new in caller.engine.results(taken_by_it):
            writes.add(taken_by_it[0].backend, out, new)
        results |= {leaf.place: New(leaf.out, leaf.velocity) for leaf in taken_by_it}
    steps = [leaf for leaf in steps if leaf.place not in results]
    for backend, group in _nonfinite.by_backend(steps).items():
        given = [leaf._replace(out=None) for leaf in group] if guarded else group
        news = backend.update(given, writes)
        results |= {leaf.place: new for leaf, new in zip(group, news, strict=True)}
    taken: Any = True
    if guarded:
        writes.norms, bad = native.nonfinite()
        others = [leaf for leaf in leaves if leaf.place not in shards]
        guards, taken = _nonfinite.guard(others, results, caller.paths, caller.words, bad)
        results |= guards
    elif shards:
        writes.norms = native.norms()
    if taken is False:
        native.keep(writes)
        writes.plan = None
    else:
        if native.news is not None:
            native.step(writes.norms)
        native.copy(writes)
    for leaf in leaves:
        if leaf.dcdw is None or (taken is False and leaf.place in shards):
            results[leaf.place] = _kept(leaf, writes)
        elif guarded and leaf.place not in shards:
            results[leaf.place] = writes.result(leaf, results[leaf.place])
    return results, taken


def _kept(leaf: Leaf, writes: Writes) -> New:
    """Weights that stay as they are, in memory of their own; and so their velocity."""
    if leaf.out is None:
        return _nonfinite.copies(leaf)
    if leaf.out is not leaf.w:
        writes.add(leaf.backend, leaf.out, leaf.w)
    return New(leaf.out, leaf.velocity)


def _result(native: Native, others: dict[int, New], taken: Any) -> Result:
    """All results in the order of the leaves, in wrappers where the leaves were."""
    columns = native.columns
    if native.news is None:
        return Result(columns.outs or [], columns.velocities, taken)
    native.finish()
    ws, velocities = native.news
    for place in native.rest:
        new = others.get(place, New(*columns.row(place)[::3]))  # no array: it stays as it is
        ws[place] = new.w
        if velocities is not None:
            velocities[place] = new.velocity
    for place in native.odd:
        w, _, _, velocity = columns.row(place)
        ws[place] = rewrapped(ws[place], w)
        if velocities is not None:
            velocities[place] = rewrapped(velocities[place], velocity)
    return Result(ws, velocities, taken)
