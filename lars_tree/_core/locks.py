"""Locks by address: only updates that write to the same memory wait for each other.

Each update is a block:

    with writing(spans):
        ...

A block waits for all earlier blocks of other threads that overlap with it, so no thread starves.
In this order, a nested block has the position of the outermost block of its thread, so that it
never waits for a block that waits for its own thread. A block also waits for later blocks that
overlap with it and already run.

No lock protects the registry: a signal handler could run while its thread holds that lock, and then
wait for a thread that needs the lock. Instead, each change is one call of a C function, during
which no handler runs and no exception is raised:

* A block is a lock that its thread holds from before the registration until the end of the block.
  A block ends in `RLock.__exit__`. Waiting for a block is one call that acquires and releases the
  lock.
* `_blocks` is a dict, which preserves the order of registration. It holds weak references, so a
  block disappears from it when the last strong reference is gone, for whatever reason.
* `_last` is the end of a linked list of admissions. Only one thread succeeds in appending the next
  admission; a thread that fails checks again whether it must wait.

tests/test_locks_signals.py interrupts a block at each moment.
"""

from __future__ import annotations

import _thread
import operator
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

Spans = list[tuple[int, int]]

_RLock: Any = _thread.RLock
_call: Callable[[Callable[[], Any]], Any] = operator.call


def writing(spans: Callable[[], Spans]) -> _Block:
    """A context manager for an update in place; other updates of the same memory wait for its end.

    To prevent deadlocks, assign levels to memory, such as 1 for optimizers and 2 for arrays. All
    memory of one block must have the same level, and a nested block must have a higher level than
    the block around it. Without such levels, deadlocks are possible.

    >>> import threading
    >>> def work():
    ...     with writing(lambda: [(0, 8)]):
    ...         print("alone")
    >>> with writing(lambda: [(4, 12)]):
    ...     thread = threading.Thread(target=work)
    ...     thread.start()
    ...     print("first")
    first
    >>> thread.join()
    alone

    `spans` returns the (start, end) addresses of all memory that is written. It is called at most
    once, possibly by another thread, and only while two threads are in blocks.
    """
    block = _Block()
    block.spans = spans
    return block


def of(x: object) -> Spans:
    """Spans that represent an object, to serialise its updates; they overlap with no array."""
    return [(id(x), id(x) + 1)]


class _Block(_RLock):  # type: ignore[misc]
    """A block can be entered once; its thread holds the lock while the block waits and runs."""

    __slots__ = ("admitted", "known", "outer", "over", "spans")

    spans: Callable[[], Spans]
    known: Spans  # the result of `spans`, sorted, without empty spans
    outer: _Block | None  # the outermost block of its thread; None if it is this block
    admitted: bool  # whether the block runs; only set if another thread was in a block
    over: bool  # whether the block ended; only set if another block still refers to it

    def __enter__(self) -> None:
        self.acquire()  # never waits, as no other thread knows the block yet
        mine: Sequence[_Block] = _mine() if _blocks else ()
        self.outer = mine[0] if mine else None
        self.admitted = self.over = False
        try:
            _blocks[ref(self, _forget)] = None
            if len(_blocks) > len(mine) + 1:
                self._wait()
        except BaseException:
            self.release()
            self.over, self.outer, mine = True, None, ()
            raise

    def _wait(self) -> None:
        while True:
            admission = _latest()
            others, blocker = self._others()
            if blocker is not None:
                deque(map(_call, (blocker.acquire, blocker.release)), 0)
                blocker.over = True
            elif not others or _follow(admission, self):
                return

    def _others(self) -> tuple[bool, _Block | None]:
        """Whether other threads have blocks, and a block that this block must wait for."""
        blocks = _registered()
        indices = {block: index for index, block in enumerate(blocks)}
        others = [block for block in blocks if not block._is_owned()]
        for block in others:
            ahead = indices.get(block.outer or block, -1) < indices[self.outer or self]
            if (ahead or block.admitted) and overlap(self._spans(), block._spans()):
                return True, block
        return bool(others), None

    def _spans(self) -> Spans:
        try:
            return self.known
        except AttributeError:
            self.known = sorted(span for span in self.spans() if span[0] < span[1])
            return self.known


def overlap(a: Spans, b: Spans) -> bool:
    """Whether two sorted lists of spans share an address; no span may be empty.

    >>> overlap([(0, 9), (2, 3)], [(4, 5)]), overlap([(0, 4), (5, 9)], [(4, 5)])
    (True, False)
    """
    i = j = 0
    while i < len(a) and j < len(b):
        (start, end), (other_start, other_end) = a[i], b[j]
        if end <= other_start:
            i += 1
        elif other_end <= start:
            j += 1
        else:
            return True
    return False


# All blocks in the order of registration.
_blocks: dict[ref[_Block], None] = {}
_forget: Callable[[Any], Any] = _blocks.pop

# The last known admission: {"block": weak reference, "next": the next admission}. A block that
# was entered while no other thread had a block is not in this list.
_last: dict[str, Any] = {}


def _registered() -> list[_Block]:
    found = [weak() for weak in list(_blocks)]
    return [block for block in found if block is not None and not block.over]


def _mine() -> list[_Block]:
    """The registered blocks of this thread, the outermost first."""
    found = [weak() for weak in list(_blocks)]
    return [block for block in found if block is not None and block._is_owned()]


def _latest() -> dict[str, Any]:
    """Return the last admission, after marking all blocks that were admitted up to it."""
    global _last
    admission = _last
    while "next" in admission:
        admission = admission["next"]
        block = admission["block"]()
        if block is not None:
            block.admitted = True
    _last = admission
    return admission


def _follow(admission: dict[str, Any], block: _Block) -> bool:
    """Admit a block, unless another block was admitted after this admission."""
    mine = {"block": ref(block)}
    return admission.setdefault("next", mine) is mine


def _forget_other_threads() -> None:
    for weak in list(_blocks):
        block = weak()
        if block is not None and not block._is_owned():
            del _blocks[weak]  # held by a thread that does not exist in the child


if hasattr(os, "register_at_fork"):
    # Another thread may be in a block during a fork; in the child that block would never end.
    os.register_at_fork(after_in_child=_forget_other_threads)
