"""The writes of one update in place: collected first, then made all together or not at all.

Between two instructions, Python may run a signal handler, or raise an exception that another thread
requested. Therefore CPU memory is written by a single call that executes no Python and allocates
nothing: `deque` exhausts an iterator that calls C functions. The first function is the native
kernel, which raises only before its first write; the other functions copy results that were
computed before.

Two groups of arrays cannot be written in this call:

* Arrays that only their library can write to: the library may fail or run Python. They are written
  first; their old values are saved, and restored if anything fails.
* Arrays whose results would take much memory. They are updated in chunks, in a separate thread,
  where no signal handler runs and to which no other thread can send an exception. If memory runs
  out after the first chunk was written, the update is incomplete; this cannot be prevented.

tests/test_writes.py makes each allocation fail, and interrupts the writes at each moment.
"""

from __future__ import annotations

import _thread
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import setitem
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree._backends.base import Backend, Leaf, StepResult
from lars_tree._backends.memory import NumpyArray

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan

Call = Callable[[], Any]

_call: Callable[[Call], Any] = operator.call

# The maximum total size, in bytes, of results that wait in memory until they are written. Arrays
# whose results do not fit, such as memory maps larger than memory, are updated in chunks.
MAX_HELD = 2**26


class Writes:
    """The writes of one update; `plan` has the layers that the native kernel updates."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan
        self.norms: bytearray | None = None  # the norms of the plan, if they are known already
        self._copies: list[tuple[NumpyArray, NumpyArray]] = []
        self._chunked: list[Call] = []
        self._foreign: dict[Backend, list[tuple[Any, Any]]] = {}
        self._steps: list[Call] = []
        self._shared: dict[Backend, list[Any]] = {}
        self._last: list[Call] = []
        self._room = MAX_HELD

    def add(self, backend: Backend, out: Any, x: Any) -> None:
        """Add a copy of x to `out`, which has the same shape."""
        memory = backend.copied_memory(out, x)
        if memory is None:
            self._foreign.setdefault(backend, []).append((out, x))
        else:
            self.copy(*memory)
            self.announce(backend, [out])

    def result(self, leaf: Leaf, new: StepResult) -> StepResult:
        """If the leaf has an `out`, add copies of the results; return the final arrays."""
        if leaf.out is None:
            return new
        self.add(leaf.backend, leaf.out, new.w)
        if leaf.velocity is not None:
            self.add(leaf.backend, leaf.velocity, new.velocity)
        return StepResult(leaf.out, leaf.velocity)

    def announce(self, backend: Backend, outs: Iterable[Any]) -> None:
        """Let `make` tell the library that other code writes to these arrays."""
        self._shared.setdefault(backend, []).extend(outs)

    def copy(self, target: NumpyArray, values: NumpyArray) -> None:
        self._copies.append((target, np.asarray(values, target.dtype)))

    def holds(self, size: int) -> bool:
        """Reserve memory for results until they are written; return False if there is no room."""
        if size > self._room:
            return False
        self._room -= size
        return True

    def step(self, step: Call) -> None:
        """Add a call that computes and writes, and that must run in this thread, unprotected."""
        self._steps.append(step)

    def step_in_chunks(self, step: Call) -> None:
        """Add a call that computes and writes, part by part."""
        self._chunked.append(step)

    def then(self, last: Call) -> None:
        """Add a last call, of a C function that runs no Python and cannot fail.

        >>> from functools import partial
        >>> state = {"buffer": None}    # an existing key: setting it allocates no memory
        >>> writes = Writes()
        >>> writes.then(partial(setitem, state, "buffer", "new"))
        >>> writes.make()
        >>> state
        {'buffer': 'new'}
        """
        self._last.append(last)

    def make(self) -> None:
        """Write everything, or raise and write nothing."""
        done = [False]
        foreign = [(backend, backend.writers(pairs)) for backend, pairs in self._foreign.items()]
        writers = [write for _, writes in foreign for write in writes]
        writers += self._steps
        others = bool(self._copies or self._chunked or (self._last and self._foreign))
        if writers and self.plan is not None:
            others |= bool(self.plan.spans())
        held: list[Call] = []
        if writers and len(writers) + others > 1:  # a single write leaves nothing to restore
            for backend, pairs in self._foreign.items():
                old = [(out, backend.copy(out, stop_gradients=True)) for out, _ in pairs]
                held += backend.writers(old)
        for backend, outs in self._shared.items():
            backend.announce(outs)
        write = self._at_once([partial(setitem, done, 0, True)])
        try:
            for each in writers:
                each()
            if self._chunked:
                _aside([*self._chunked, write])
            else:
                write()
        except BaseException:
            if not done[0]:
                for each in held:
                    each()
            raise

    def _at_once(self, last: list[Call]) -> Call:
        """A call that makes all writes to CPU memory, then the calls in `last`, without Python."""
        calls: list[Call] = []
        if self.plan is not None:  # first, because no other call may raise
            calls = [self.plan.step if self.norms is None else partial(self.plan.apply, self.norms)]
        calls += (partial(setitem, target, ..., values) for target, values in self._copies)
        return partial(deque, map(_call, [*calls, *self._last, *last]), 0)


def _aside(calls: list[Call]) -> None:
    """Make calls in a new thread, where nothing interrupts them, and wait for the thread."""
    started, ended = [False], _thread.allocate_lock()
    failures: list[BaseException] = []

    def work() -> Iterator[None]:
        try:
            yield  # the new thread starts here, and may raise an exception requested from outside
            for each in calls:
                each()
        except BaseException as error:  # raised again by the calling thread
            failures.append(error)
        finally:
            ended.release()

    ended.acquire()
    worker = work()
    next(worker, None)
    if failures:  # interrupted before it waited for its thread
        raise failures[0]
    start: list[Call] = [
        partial(_thread.start_new_thread, next, (worker, None)),
        partial(setitem, started, 0, True),
    ]
    # Each of these is one C call, within which no exception comes between two steps. They are
    # prepared here, because an exception can come at the first line of any Python function.
    wait: list[Call] = [ended.acquire, ended.release]
    begin, *waits = [map(_call, x) for x in (start, wait, wait, wait)]
    make = deque[Any](maxlen=0).extend
    try:
        try:
            make(begin)
            make(waits[0])
        except BaseException:
            if started[0]:
                make(waits[1])
            raise
    except BaseException:
        if started[0]:
            make(waits[2])  # if a second exception ended the wait
        raise
    if failures:
        raise failures[0]
