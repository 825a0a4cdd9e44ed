"""Updates of the same memory wait for each other; others, and those of one thread, do not."""

from __future__ import annotations

import dis
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from textwrap import dedent

import numpy as np
import pytest
from conftest import traced
from hypothesis import given
from hypothesis import strategies as st
from test_threads import run
from test_writes import sent_by_a_thread, sent_by_the_system

from lars_tree._core import locks

A, B, BOTH = [(0, 8)], [(8, 16)], [(4, 12)]
PATIENCE = 30  # seconds until a test that hangs fails


class Spans:
    """Spans that tell when they were asked for: another thread is within a block then."""

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
    """Another thread within a block, which leaves it in the end or at an event."""
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


# ---- Who waits for whom


def test_other_memory_is_free():
    with locks.writing(lambda: A):
        can_enter(B)
        can_enter(locks.of(A))
        with locks.writing(lambda: locks.of(A)):
            can_enter(locks.of(B))


def test_the_same_memory_is_written_by_the_thread_that_came_first():
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


def test_spans_are_asked_for_once_and_only_beside_another_thread():
    alone, beside = Spans(A), Spans(A)
    with locks.writing(alone), locks.writing(alone):
        pass
    with locks.writing(beside):
        can_enter(B)
        can_enter(B)
    assert (alone.calls, beside.calls) == (0, 1)


def test_a_thread_that_comes_again_comes_after_those_that_wait():
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
def test_a_nested_block_comes_before_those_that_wait_for_the_outer_one(inner):
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
    """Also where that one came after the outer block."""
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


def test_who_waits_looks_again_at_what_was_nested_meanwhile():
    """It waits for one block, and then for one that was not there when it came."""
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


spans_of = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)).map(lambda x: (x[0], sum(x))))


@given(a=spans_of, b=spans_of)
def test_spans_overlap_where_they_share_an_address(a, b):
    shared = {x for span in a for x in range(*span)} & {x for span in b for x in range(*span)}
    assert locks.overlap(sorted(a), sorted(b)) == bool(shared)


@pytest.mark.parametrize("nested", [False, True])
def test_no_update_of_many_threads_is_lost(nested):
    """Of pairs of elements; where nested, each thread first locks an object that another has."""
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


# ---- Exceptions and handlers at each moment


def at_moment(number, call, send):
    """Make a call, and something at that moment of it; whether it had so many.

    Python looks for signals when a function starts, after calls, and when a loop starts again.
    """
    moments = iter(range(number, -1, -1))
    previous = {}  # by the ids of frames: a frame would keep its block

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_filename != locks.__file__ and code is not call.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "call":
            previous[id(frame)] = "RESUME"
        elif event == "opcode":
            before = previous[id(frame)]
            previous[id(frame)] = dis.opname[code.co_code[frame.f_lasti]]
            looks = before.startswith(("RESUME", "CALL", "JUMP_BACKWARD"))
            if looks and next(moments, None) == 0:
                send()
        return trace

    traced(trace, call)
    return next(moments, None) is None


def alone():
    return nullcontext(), Spans(A)


def beside_another():
    return held(lambda: B), Spans(A)


def after_another():
    """The other thread leaves when this one is about to wait."""
    spans = Spans(A)
    return held(lambda: A, spans.asked), spans


each_case = pytest.mark.parametrize("case", [alone, beside_another, after_another])


def at_each_moment(case, send):
    """Enter a block, and `send` at each moment; whether blocks that were entered were held."""
    number, reached, entered = 0, True, []
    while reached:
        other, spans = case()

        def call(spans=spans):
            with locks.writing(spans):
                entered.append(locks._registered()[-1]._is_owned())

        with other:
            reached = at_moment(number, call, partial(send, spans))
            assert not any(block._is_owned() for block in locks._registered()), number
        assert locks._blocks == {}, number
        can_enter(A)
        number += 1
    assert number > 10
    return entered


@each_case
@pytest.mark.parametrize("send", [sent_by_a_thread, sent_by_the_system])
def test_an_exception_at_any_moment_leaves_nothing_registered(case, send):
    assert all(at_each_moment(case, lambda _: send()))


@each_case
def test_a_handler_may_update_the_same_memory_at_any_moment(case):
    calls = []

    def handle(spans):
        with locks.writing(spans):
            calls.append(1)

    entered = at_each_moment(case, handle)
    assert all(entered)
    assert len(entered) == len(calls) + 1


def send_when_waiting(thread, number):
    """Send a signal to a thread as soon as it waits for a block."""

    def send():
        while sys._current_frames()[thread].f_code.co_name != "_wait":
            time.sleep(0.001)
        time.sleep(0.1)  # Python looks for signals right before a lock is waited for, or in there
        signal.pthread_kill(thread, number)

    return start(send)


@pytest.mark.skipif(sys.platform == "win32", reason="signals do not interrupt locks there")
def test_waiting_can_be_interrupted():
    """Who waits for this thread goes on then, even while the exception is kept."""
    spans, behind = Spans(A + B), Spans(B)

    def wait():
        with locks.writing(behind):
            pass

    def wait_behind():
        spans.wait()
        threads.extend(start(wait))
        behind.wait()
        threads.extend(send_when_waiting(main, signal.SIGINT))

    with held(lambda: A):
        main, threads = threading.get_ident(), []
        first = start(wait_behind)
        with pytest.raises(KeyboardInterrupt) as caught, locks.writing(spans):
            pytest.fail("two threads are within")
        join(first + threads)
        assert len(locks._registered()) == 1
    can_enter(A)
    del caught


@pytest.mark.skipif(sys.platform == "win32", reason="signals do not interrupt locks there")
def test_a_handler_may_update_while_its_thread_waits():
    log, spans, leave = [], Spans(A), threading.Event()

    def handle(*_):
        with locks.writing(lambda: B):
            log.append("handler")
        leave.set()

    old = signal.signal(signal.SIGUSR1, handle)
    try:
        with held(lambda: A, leave):
            threads = send_when_waiting(threading.get_ident(), signal.SIGUSR1)
            with locks.writing(spans):
                log.append("waited")
            join(threads)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert log == ["handler", "waited"]


def test_an_error_in_a_block_ends_it():
    with pytest.raises(ZeroDivisionError) as caught, locks.writing(lambda: A):
        1 / 0  # noqa: B018
    assert locks._blocks == {}
    assert caught.value


def test_an_error_of_spans_leaves_nothing():
    def fail():
        raise ZeroDivisionError

    with held(lambda: A), pytest.raises(ZeroDivisionError), locks.writing(fail):
        pass


# ---- Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_the_blocks_of_its_own_thread_alone():
    code = """
    import os, threading
    from lars_tree._core import locks
    inside, leave = threading.Event(), threading.Event()
    def hold():
        with locks.writing(lambda: [(0, 8)]):
            inside.set(); leave.wait(30)
    thread = threading.Thread(target=hold); thread.start(); inside.wait()
    def wait():
        with locks.writing(spans): log.append("second")
    def spans():
        asked.set()
        return [(8, 9)]
    asked, log = threading.Event(), []
    with locks.writing(lambda: [(8, 16)]):
        child = os.fork()
        if not child:
            with locks.writing(lambda: [(0, 8)]): pass
            other = threading.Thread(target=wait); other.start(); asked.wait(30)
            log.append("first")
    if not child:
        other.join()
        os._exit(log != ["first", "second"] or len(locks._blocks))
    status = os.waitpid(child, 0)[1]
    leave.set(); thread.join()
    print(status, len(locks._blocks))"""
    assert run(dedent(code)) == "0 0"
