"""One step of a flat list of leaves, each with its own `Rule`.

The phases, with the class or module of each:

prepare     add the leaves that the kernel supports to its plan            `Native`
check       check all other leaves; nothing has been written yet           `checks`
overlap     find written memory that another leaf uses, in any engine      `overlaps`
run         compute the results of the other leaves, but do not write them `_backends`
norms       sum squared norms of sharded layers over the processes         `Native`
decide      apply or skip the step, by the option `nonfinite`              `nonfinite`
write       write all arrays, or none                                      `writes`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from lars_tree import _backends, errors
from lars_tree._backends import base, memory
from lars_tree._backends.wrapper import rewrapped, unwrap
from lars_tree._core import checks, counters, locks, nonfinite, overlaps
from lars_tree._core.native import Native, Span
from lars_tree._core.operands import Operand, Row
from lars_tree._core.writes import Writes
from lars_tree._numerics.formula import Rule, is_zero


class Caller(NamedTuple):
    """The parts of an update that depend on the caller.

    Attributes:
        paths: Returns the path of each leaf.
        refuse_extra: Raises if another argument has an array where w has None.
        same_shapes: Whether gradients must have the shapes of their weights.
        last: C functions to call after all arrays were written, see `Writes.then`.
        words: The caller's names for the arguments.
        engine: An engine for some of the leaves, which are not offered to other engines.
    """

    paths: Callable[[], list[errors.Path]]
    refuse_extra: Callable[[], None] = lambda: None
    same_shapes: bool = False
    last: tuple[Callable[[], Any], ...] = ()
    words: errors.Words = errors.WORDS
    engine: base.Engine | None = None

    @property
    def indices(self) -> Collection[int]:
        return () if self.engine is None else self.engine.indices


class Result(NamedTuple):
    """The results in leaf order. With an `out`, `ws` has the arrays of `out`.

    `taken` is whether the step applies: a bool, or a bool array (traced, lazy or on a device).
    """

    ws: list[Any]
    velocities: list[Any] | None
    taken: Any


def execute(columns: base.Columns, caller: Caller) -> Result:
    """Update all leaves, or raise and write nothing."""
    native = Native(columns, without=caller.indices)
    if native.rest or caller.last or native.must_be_finite:
        return _execute(columns, caller, native)
    step = columns.counters.get("step")
    if step is not None and not native.count(step):
        return _execute(columns, caller, native)
    if native.overlaps():
        return _execute(columns, caller, Native(columns, takes_none=True))
    native.announce()
    with _writing(native, [], columns):
        # Signal handlers run before or after a native call, never during it.
        native.step()
    return _result(native, {}, True)


def _execute(columns: base.Columns, caller: Caller, native: Native) -> Result:
    """The general path, for updates that a single call of the kernel cannot make."""
    rows, trusted = checked(columns, caller, native.rest, native)
    written, read = _spans(rows, columns)
    # This compares memory ranges, which is fast; `check_apart` compares single elements.
    leaves = (*(row.leaf for row in rows), *trusted)
    others = [leaf for leaf in leaves if leaf.leaf_index not in caller.indices]
    if native.overlaps(written, read) or _must_wait(native, others):
        native = Native(columns, takes_none=True)
        rows, trusted = checked(columns, caller, native.rest, native)
    # No leaf of the native engine overlaps with these rows.
    checks.check_apart(rows, caller.paths, caller.words)
    counters.check_apart(columns.counters, rows, caller.paths)
    with _writing(native, rows, columns):
        writes = Writes(native.plan)
        results, taken = _run(native, overlaps.detach_inputs(rows) + trusted, caller, writes)
        if columns.outs is not None:
            counters.count_in_place(columns.counters, taken, writes)
            for call in caller.last:
                writes.then(call)
            if writes.plan is not None:
                native.announce()
            writes.make()
    return _result(native, results, taken)


def checked(
    columns: base.Columns,
    caller: Caller,
    indices: list[int] | None = None,
    native: Native | None = None,
) -> tuple[list[Row], list[base.Leaf]]:
    """Check the arrays of the leaves with these indices (None means all leaves).

    Returns the rows of the leaves that passed the full check, and the leaves that need no full
    check, because they passed a cheap pre-check of the caller's engine or of the native engine.
    """
    leaves = _leaves(columns, caller, range(len(columns.ws)) if indices is None else indices)
    trusted = [] if caller.engine is None else caller.engine.trusted(leaves)
    if native is not None:
        trusted += native.trust([leaf for leaf in leaves if leaf.leaf_index not in caller.indices])
    if trusted:
        known = {leaf.leaf_index for leaf in trusted}
        leaves = [leaf for leaf in leaves if leaf.leaf_index not in known]
    rows = checks.check(leaves, caller.paths, same_shapes=caller.same_shapes, words=caller.words)
    return rows, trusted


def _leaves(columns: base.Columns, caller: Caller, indices: Iterable[int]) -> list[base.Leaf]:
    """The leaves whose weights are arrays, unwrapped; raises if another array is missing."""
    found = ((index, *map(unwrap, columns.row(index))) for index in indices)
    rows = [(i, x, None if _backends.is_float0(g) else g, *others) for i, x, g, *others in found]
    if any(x is None and any(y is not None for y in row) for _, x, *row in rows):
        caller.refuse_extra()
    leaves: list[base.Leaf] = []
    others: list[tuple[int, Any, Any, Any]] = []
    non_arrays: dict[str, list[errors.Line]] = {"w": [], "out": [], "state": []}
    writes, moves = columns.outs is not None, columns.velocities is not None
    for index, x, dcdw, out, velocity in rows:
        if x is None:
            continue
        backend, rule = _backends.find(x), columns.rules[index]
        if backend is None:
            others.append((index, x, dcdw, out if writes else x))
        elif writes and out is None:
            non_arrays["out"].append((caller.paths()[index], "expected an array, got None"))
        elif moves and velocity is None and _needs_velocity(backend, x, rule, dcdw):
            non_arrays["state"].append((caller.paths()[index], "expected a velocity, got None"))
        else:
            is_number = issubclass(type(dcdw), (int, float, complex)) and type(dcdw) is not bool
            gradient = backend.full(_machine_number(dcdw), x) if is_number else dcdw
            leaves.append(base.Leaf(index, x, gradient, out, rule, backend, velocity))
    # Without any array, w is not a tree of weights, but for example a model.
    keeps = bool(others) and any(_backends.find(unwrap(x)) for x in columns.ws)
    for index, x, dcdw, out in others:
        if dcdw is not None or not keeps or checks.is_module(x):
            non_arrays["w"].append((caller.paths()[index], errors.not_an_array(x)))
        elif out is not x:
            text = f"expected the same object as in {caller.words.w}: it is not an array"
            non_arrays["out"].append((caller.paths()[index], text))
    for argument, lines in non_arrays.items():
        if lines:
            headline = f"{caller.words.name(argument)} holds something that is not an array"
            raise caller.words.error(errors.LeafError, argument, headline, lines)
    return leaves


def _needs_velocity(backend: base.Backend, x: Any, rule: Rule, dcdw: Any) -> bool:
    if dcdw is None or is_zero(rule.momentum):
        return False
    # `facts` must not be called for weights that have a fault.
    return bool(backend.fault(x)) or backend.facts(x).kind in base.FLOATING


def _machine_number(x: complex) -> complex:
    """The number as a float or complex; an int out of the range of float becomes infinite."""
    if isinstance(x, complex):
        return x
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _spans(rows: list[Row], columns: base.Columns) -> tuple[list[Span], list[Span]]:
    """The CPU memory ranges that leaves with an `out` (and counters) write, and that they read."""
    rows = [row for row in rows if row.leaf.out is not None]
    written = [x for row in rows for x in (row.out, row.velocity)]
    read = [x for row in rows for x in (row.w, row.dcdw, *(x for _, x in row.options))]
    return _merged_spans([*written, *map(Operand, columns.counters.values())]), _merged_spans(read)


def _merged_spans(arrays: list[Operand]) -> list[Span]:
    """The memory ranges of the arrays in CPU memory; ranges that overlap are merged."""
    found: list[Span] = []
    for x in arrays:
        if x.backend is None or x.backend.values(x.x) is not base.Values.CPU or x.memory is None:
            continue
        start, size = memory.span(x.memory)
        if size:
            found.append((start, start + size))
    merged: list[Span] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _is_guarded(native: Native, steps: list[base.Leaf]) -> bool:
    """Whether `nonfinite` may prevent the step of the native engine or of these leaves."""
    return native.must_be_finite or any(leaf.rule.nonfinite != "propagate" for leaf in steps)


def _must_wait(native: Native, others: list[base.Leaf]) -> bool:
    """Whether values outside CPU memory decide whether the native engine may write."""
    steps = [leaf for leaf in others if leaf.dcdw is not None]
    if not _is_guarded(native, steps):
        return False
    return any(leaf.backend.values(leaf.w) is not base.Values.CPU for leaf in steps)


def _writing(native: Native, rows: list[Row], columns: base.Columns) -> AbstractContextManager[Any]:
    """The lock that makes updates of the same memory by other threads wait."""
    if columns.outs is None:
        return nullcontext()
    return locks.writing(lambda: [*native.spans(), *_spans(rows, columns)[0]])


def _run(
    native: Native, leaves: list[base.Leaf], caller: Caller, writes: Writes
) -> tuple[dict[int, base.StepResult], Any]:
    """The results by leaf index, and whether the step applies, as in `Result.taken`.

    The results of leaves with an `out` are valid only after `writes.make()`.
    """
    steps = [leaf for leaf in leaves if leaf.dcdw is not None]
    shards = native.take([leaf for leaf in steps if leaf.leaf_index not in caller.indices])
    results = dict(shards)
    guarded = _is_guarded(native, [leaf for leaf in steps if leaf.leaf_index not in caller.indices])
    taken: Any = True
    if caller.engine is not None:
        own = [leaf for leaf in steps if leaf.leaf_index in caller.engine.indices]
        refused, taken = caller.engine.update(own, writes)
        if refused:
            raise nonfinite.error(refused, caller.paths, caller.words)
        results |= {leaf.leaf_index: base.StepResult(leaf.out, leaf.velocity) for leaf in own}
    steps = [leaf for leaf in steps if leaf.leaf_index not in results]
    for backend, group in base.grouped(steps, lambda leaf: leaf.backend).items():
        given = [leaf._replace(out=None) for leaf in group] if guarded else group
        new = backend.update(given, writes)
        results |= {leaf.leaf_index: x for leaf, x in zip(group, new, strict=True)}
    if guarded:
        writes.norms, bad = native.nonfinite()
        others = [leaf for leaf in leaves if leaf.leaf_index not in shards]
        guards, taken = nonfinite.guard(others, results, caller.paths, caller.words, bad)
        results |= guards
    elif shards:
        writes.norms = native.norms()
    if taken is False:
        native.keep(writes)
        writes.plan = None
    else:
        if native.results is not None:
            native.step(writes.norms)
        native.copy(writes)
    for leaf in leaves:
        if leaf.dcdw is None or (taken is False and leaf.leaf_index in shards):
            results[leaf.leaf_index] = _kept(leaf, writes)
        elif guarded and leaf.leaf_index not in shards:
            results[leaf.leaf_index] = writes.result(leaf, results[leaf.leaf_index])
    return results, taken


def _kept(leaf: base.Leaf, writes: Writes) -> base.StepResult:
    """The unchanged weights and velocity as results: copied, unless there is an `out`."""
    if leaf.out is None:
        return nonfinite.copies(leaf)
    if leaf.out is not leaf.w:
        writes.add(leaf.backend, leaf.out, leaf.w)
    return base.StepResult(leaf.out, leaf.velocity)


def _result(native: Native, others: dict[int, base.StepResult], taken: Any) -> Result:
    """All results in leaf order; results of wrapped weights are wrapped again."""
    columns = native.columns
    if native.results is None:
        return Result(columns.outs or [], columns.velocities, taken)
    native.finish()
    ws, velocities = native.results
    for index in native.rest:
        new = others.get(index, base.StepResult(*columns.row(index)[::3]))  # not an array
        ws[index] = new.w
        if velocities is not None:
            velocities[index] = new.velocity
    for index in native.odd:
        w, _, _, velocity = columns.row(index)
        ws[index] = rewrapped(ws[index], w)
        if velocities is not None:
            velocities[index] = rewrapped(velocities[index], velocity)
    return Result(ws, velocities, taken)
