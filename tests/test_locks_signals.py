"""Exceptions, signal handlers and forks at each moment of a block leave nothing registered."""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from textwrap import dedent

import pytest
from conftest import traced
from test_locks import A, B, Spans, _nothing_is_left, can_enter, held, join, start  # noqa: F401
from test_threads import run
from test_writes import sent_by_a_thread, sent_by_the_system

from lars_tree._core import locks

# ---- Exceptions and handlers at each moment


def at_moment(number, call, send):
    """Make a call and run `send` at one of its moments; return False if it has fewer moments.

    The moments are the points where Python checks for signals: when a function starts, after calls,
    and when a loop starts again.
    """
    moments = iter(range(number, -1, -1))
    previous = {}  # by id(frame), because a reference to the frame would keep its block alive

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
    """The other thread leaves its block when this thread is about to wait."""
    spans = Spans(A)
    return held(lambda: A, spans.asked), spans


each_case = pytest.mark.parametrize("case", [alone, beside_another, after_another])


def at_each_moment(case, send):
    """Enter one block per moment and run `send` at it; return whether each block was locked."""
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
        time.sleep(0.1)  # so that the signal arrives just before or during the wait for the lock
        signal.pthread_kill(thread, number)

    return start(send)


@pytest.mark.skipif(sys.platform == "win32", reason="signals do not interrupt locks there")
def test_waiting_can_be_interrupted():
    """Threads that wait for this thread continue, even while the exception is referenced."""
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
            pytest.fail("two threads are within blocks of the same memory")
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
def test_a_forked_child_has_only_the_blocks_of_its_own_thread():
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_another_thread_reads_an_array_can_update():
    code = """
    import os, threading, time, numpy as np
    from lars_tree import lars_update
    from lars_tree._backends.numpy import BACKEND
    inside, leave, memory = threading.Event(), threading.Event(), BACKEND.memory
    def slow(x):
        if threading.current_thread() is thread:
            inside.set(); leave.wait(30)
        return memory(x)
    type(BACKEND).memory = lambda self, x: slow(x)
    def update():
        w = np.ones((4, 2))[:, 0]
        lars_update(w, 1.0, 0.1, out=w)
    thread = threading.Thread(target=update); thread.start(); inside.wait(30)
    child = os.fork()
    if not child:
        update(); os._exit(0)
    deadline = time.monotonic() + 20
    while not (found := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not found[0]:
        os.kill(child, 9)
    leave.set(); thread.join()
    print(found[0] == child, found[1])"""
    assert run(dedent(code)) == "True 0"
