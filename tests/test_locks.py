"""Updates of the same memory in different threads wait for each other; other updates do not."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_tree._core import locks

A, B, BOTH = [(0, 8)], [(8, 16)], [(4, 12)]
PATIENCE = 30  # seconds until a test that hangs fails


class Spans:
    """A `spans` argument for `locks.writing` that counts its calls.

    `writing` makes a call only while two threads are in such blocks; `wait()` waits for a call.
    """

    def __init__(self, spans):
        self.spans, self.calls, self.asked = spans, 0, threading.Event()

    def __call__(self):
        self.calls += 1
        self.asked.set()
        return self.spans

    def wait(self):
        assert self.asked.wait(PATIENCE)


def start(*works):
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads


def join(threads):
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def held(spans, until=None):
    """Run another thread that stays in a block until the context ends or `until` is set."""
    inside, leave = threading.Event(), until or threading.Event()

    def hold():
        with locks.writing(spans):
            inside.set()
            leave.wait(PATIENCE)

    threads = start(hold)
    assert inside.wait(PATIENCE)
    try:
        yield
    finally:
        leave.set()
        join(threads)


def can_enter(spans):
    def enter():
        with locks.writing(lambda: spans):
            pass

    join(start(enter))


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert locks._registered() == []
    assert locks._blocks == {}


# ---- Which block waits for which


def test_other_memory_is_free():
    with locks.writing(lambda: A):
        can_enter(B)
        can_enter([(4, 4)])
        can_enter(locks.of(A))
        with locks.writing(lambda: locks.of(A)):
            can_enter(locks.of(B))


def test_the_thread_that_came_first_writes_first():
    log, spans = [], Spans(BOTH)

    def second():
        with locks.writing(spans):
            log.append("second")

    with locks.writing(lambda: A):
        threads = start(second)
        spans.wait()
        log.append("first")
    join(threads)
    assert log == ["first", "second"]


def test_spans_are_called_once_and_only_beside_another_thread():
    alone, beside = Spans(A), Spans(A)
    with locks.writing(alone), locks.writing(alone):
        pass
    with locks.writing(beside):
        can_enter(B)
        can_enter(B)
    assert (alone.calls, beside.calls) == (0, 1)


def test_a_thread_that_comes_again_queues_behind_waiting_threads():
    log, spans = [], [Spans(A) for _ in range(3)]

    def wait(number):
        with locks.writing(spans[number]):
            log.append(number)

    threads = []
    with locks.writing(lambda: A):
        for number, asked in enumerate(spans):
            threads += start(lambda number=number: wait(number))
            asked.wait()
    with locks.writing(lambda: A):
        log.append("again")
    join(threads)
    assert log == [0, 1, 2, "again"]


@pytest.mark.parametrize("inner", [A, B])
def test_a_nested_block_precedes_threads_that_wait_for_the_outer_one(inner):
    log, spans = [], Spans(A + B)

    def wait():
        with locks.writing(spans):
            log.append("waited")

    with locks.writing(lambda: A):
        threads = start(wait)
        spans.wait()
        with locks.writing(lambda: inner):
            log.append("nested")
        with locks.writing(lambda: inner):
            log.append("nested")
    join(threads)
    assert log == ["nested", "nested", "waited"]


def test_a_nested_block_waits_for_one_that_runs():
    """The nested block waits even if the running block was entered after the outer block."""
    log, inner, leave = [], Spans(B), threading.Event()

    def release():
        inner.wait()
        log.append("runs")
        leave.set()

    with locks.writing(lambda: A), held(lambda: B, leave):
        threads = start(release)
        with locks.writing(inner):
            log.append("nested")
    join(threads)
    assert log == ["runs", "nested"]


def test_a_waiting_thread_checks_again_for_blocks_nested_meanwhile():
    """The thread waits for one block, then for a nested block entered after its own block."""
    log, spans = [], Spans(A + B)
    first = threading.Event()

    def wait():
        with locks.writing(spans):
            log.append("waited")

    with locks.writing(lambda: [(20, 21)]), held(lambda: A, first):
        threads = start(wait)
        spans.wait()
        with locks.writing(lambda: B):
            first.set()
            while len(locks._registered()) > 3:
                time.sleep(0.001)
            log.append("nested")
    join(threads)
    assert log == ["nested", "waited"]


spans_of = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)).map(lambda x: (x[0], sum(x))))


@given(a=spans_of, b=spans_of)
def test_spans_overlap_where_they_share_an_address(a, b):
    shared = {x for span in a for x in range(*span)} & {x for span in b for x in range(*span)}
    assert locks.overlap(sorted(a), sorted(b)) == bool(shared)


@pytest.mark.parametrize("nested", [False, True])
def test_no_update_of_many_threads_is_lost(nested):
    """Each update writes two elements; nested updates first lock an object that threads share."""
    w, owners = np.zeros(4), [object() for _ in range(3)]
    pairs = [(0, 1), (1, 2), (2, 3), (3, 0)]
    counts = np.zeros(4)
    base = w.__array_interface__["data"][0]

    def step(pair):
        with locks.writing(lambda: [(base + 8 * i, base + 8 * i + 8) for i in pair]):
            old = w[list(pair)]
            time.sleep(0)  # lets another thread run
            w[list(pair)] = old + 1

    def work(seed):
        rng = random.Random(seed)
        for _ in range(150):
            pair = rng.choice(pairs)
            if nested:
                with locks.writing(lambda: locks.of(owners[seed % 3])):
                    step(pair)
            else:
                step(pair)

    for seed in range(6):
        rng = random.Random(seed)
        for _ in range(150):
            counts[list(rng.choice(pairs))] += 1
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        join(start(*(lambda seed=seed: work(seed) for seed in range(6))))
    finally:
        sys.setswitchinterval(interval)
    assert w.tolist() == counts.tolist()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers")
def test_nobody_waits_for_a_block_that_was_interrupted_while_it_waited():
    class Interruption(Exception):
        pass

    def interrupt(*arguments):
        raise Interruption

    entered = threading.Event()

    def enter():
        with locks.writing(lambda: B):
            entered.set()

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with held(lambda: A):
            in_main = locks.writing(lambda: BOTH)
            later = threading.Timer(0.1, enter)  # then the main thread waits for A
            later.daemon = True
            later.start()
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(Interruption), in_main:
                pass
            assert entered.wait(PATIENCE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
