"""Interrupts steps at random moments, and checks all that this may have changed.

`signals.py` has the steps. A moment counts only if it was inside the step.
"""

from __future__ import annotations

import _thread
import ctypes
import gc
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np

from tests.reliability.attack import ROOT, Attempts

PATIENCE = 60.0  # seconds after which a thread hangs
PACKAGE = f"{ROOT}/lars_tree/"


class Case(NamedTuple):
    """Weights before a step."""

    step: Callable[[], Any]
    contents: Callable[[], Any]  # a copy of everything that the step writes


class Timer:
    """Sends SIGALRM to the process, at any moment: also while C code runs.

    If `count` is 2, the handler of the first signal starts the timer for the second.
    """

    number: signal.Signals | None = signal.SIGALRM

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def start(self, delay: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, delay)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Thread:
    """Interrupts the thread that made it by a call in another thread."""

    count = 1

    def __init__(self, send: Callable[[], Any], number: signal.Signals | None) -> None:
        """`send` sends this signal, or raises a KeyboardInterrupt if there is no number."""
        self.number = number
        self._send = send
        self._asked, self._sent, self._delay = 0, 0, 0.0
        self._waits = threading.Semaphore(0)
        sys.setswitchinterval(1e-5)  # so that the thread can send while Python code runs
        threading.Thread(target=self._work, daemon=True).start()

    def start(self, delay: float) -> None:
        self._delay = delay
        self._asked += 1
        self._waits.release()

    def stop(self) -> None:
        while self._sent < self._asked:
            time.sleep(1e-5)

    def _work(self) -> None:
        while True:
            self._waits.acquire()
            time.sleep(self._delay)
            self._send()
            self._sent += 1


def thread_that_signals(number: signal.Signals) -> Thread:
    main = threading.get_ident()
    return Thread(lambda: signal.pthread_kill(main, number), number)


def thread_that_raises() -> Thread:
    main, error = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(KeyboardInterrupt)
    return Thread(lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(main, error), None)


# ---- One interruption


class Interruption:
    """A step that is interrupted.

    Attributes:
        moments: The line that each signal or exception interrupted; None if it came before or
            after the step.
        signals: The number of calls of the handler.
        raised: The number of exceptions that came out of the step.
        error: The last exception. It is kept, as in a notebook: with it, generators and other
            objects in the frames of the step stay alive, so that they cannot clean up.
        fault: What else was raised.
        seconds: The time that the step took, if it was not interrupted.
    """

    def __init__(self, sender: Timer | Thread, gap: float = 0.0) -> None:
        """`gap` is the time between the first signal and the second."""
        self.sender, self.gap = sender, gap
        self.moments: list[str | None] = []
        self.signals = self.raised = 0
        self.error: BaseException | None = None
        self.fault = ""
        self.seconds = 0.0

    def handle(self, _: int, frame: FrameType | None) -> None:
        """The handler of the signal."""
        lines = []
        while frame is not None:
            lines.append((frame, frame.f_lineno))
            frame = frame.f_back
        self.signals += 1
        if any(frame.f_code is Interruption.handle.__code__ for frame, _ in lines):
            return  # the handler of the first signal has not raised yet: this does not count
        if any(frame.f_code.co_name == "__del__" for frame, _ in lines):
            return  # Python only prints exceptions in destructors, such as that of ZipFile
        self.moments.append(_moment(lines[::-1]))
        if self.moments[-1] and len(self.moments) < self.sender.count:
            self.sender.start(self.gap)
        raise KeyboardInterrupt

    def run(self, step: Callable[[], Any], delay: float) -> None:
        gc.disable()  # Python only prints exceptions in callbacks of the collector, such as JAX's
        try:
            try:
                start = time.perf_counter()
                self.sender.start(delay)
                _inside(step)
                self.seconds = time.perf_counter() - start
            finally:
                self.sender.stop()
        except BaseException as error:
            self.error = error
            if not isinstance(error, KeyboardInterrupt):
                self.fault = f"{error!r} was raised"
            self._count(error)
        finally:
            gc.enable()

    def _count(self, error: BaseException | None) -> None:
        while error is not None:  # the second exception has the first as its context
            if isinstance(error, KeyboardInterrupt):
                self.raised += 1
                if self.sender.number is None:
                    self.moments.append(_moment(list(_lines(error.__traceback__))))
            error = error.__context__


def _inside(step: Callable[[], Any]) -> None:
    """The frame of this function marks the frames of the step."""
    step()


def _lines(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _moment(lines: Sequence[tuple[FrameType, int]]) -> str | None:
    """The innermost line of the package, and of all code; None outside of the step."""
    codes = [frame.f_code for frame, _ in lines]
    if _inside.__code__ not in codes[:-1]:
        return None
    inner = lines[codes.index(_inside.__code__) + 1 :]
    ours = [x for x in inner if x[0].f_code.co_filename.startswith(PACKAGE)]
    shown = [
        f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{line} in {frame.f_code.co_name}"
        for frame, line in (*ours[-1:], inner[-1])
    ]
    return " > ".join(dict.fromkeys(shown))


# ---- What a step must leave as it was, even if it is interrupted


_LIBC = ctypes.CDLL(None)
_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGALRM


class _Action(ctypes.Structure):
    """What C does at a signal; the flags have the one that `siginterrupt` sets."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * (4 if sys.platform == "darwin" else 128)),
        ("flags", ctypes.c_int),
        ("reserved", ctypes.c_ubyte * 64),
    )


def _action(number: int) -> tuple[int, int]:
    action = _Action()
    _LIBC.sigaction(number, None, ctypes.byref(action))
    return action.handler or 0, action.flags


def _surroundings() -> dict[str, Any]:
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    torch = sys.modules.get("torch")
    return {
        "a handler": [*map(signal.getsignal, _SIGNALS)],
        "a handler of C, or siginterrupt": [*map(_action, _SIGNALS)],
        "the wakeup fd": wakeup,
        "the blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "the number of open files": len(os.listdir("/dev/fd")),
        "numpy's errstate": np.geterr(),
        "the grad mode of torch": torch and torch.is_grad_enabled(),
    }


def _hangs(step: Callable[[], Any]) -> bool:
    """Take a step in another thread, which waits forever for a lock that this thread kept."""
    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return thread.is_alive()


def _threads_end(count: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while _thread._count() > count and time.monotonic() < deadline:
        time.sleep(0.001)
    return _thread._count() <= count


# ---- Attempts


class _Kind:
    """Attempts with one kind of case."""

    def __init__(self, make: Callable[[], Case]) -> None:
        self.make = make
        case = make()
        self.states = [case.contents()]
        for _ in range(2):
            case.step()
            self.states.append(case.contents())
        self.length = statistics.median(self._seconds() for _ in range(20))

    def _seconds(self) -> float:
        case, start = self.make(), time.perf_counter()
        case.step()
        return time.perf_counter() - start

    def attempt(self, interruption: Interruption, delay: float, wakeups: int) -> str | None:
        """As an item of `Attempts`; the moments of the interruption say whether it counts."""
        case, threads = self.make(), _thread._count()
        before = _surroundings()
        interruption.run(case.step, delay * self.length)
        after, received = _surroundings(), _received(wakeups)
        moments, is_signal = len(interruption.moments), interruption.sender.number is not None
        if not moments:
            self.length += (interruption.seconds - self.length) / 10
        found = case.contents()
        if interruption.fault:
            return interruption.fault
        if interruption.raised != moments or not (is_signal or moments):
            return f"{interruption.raised} exceptions for {moments} interruptions"
        if received != interruption.signals:
            return f"the wakeup fd got {received} signals of {interruption.signals}"
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            return "; ".join(f"{x} was {before[x]!r}, is {after[x]!r}" for x in changed)
        if found not in self.states[:2]:
            return f"torn: {found!r:.300}"
        if _hangs(case.step):
            return f"the next step, in another thread, hangs for {PATIENCE:.0f} s"
        expected = self.states[self.states.index(found) + 1]
        if case.contents() != expected:
            return f"after the next step: {case.contents()!r:.300}"
        return None if _threads_end(threads) else f"a thread is left after {PATIENCE:.0f} s"


def attempts(
    kinds: Sequence[Callable[[], Case]], sender: Timer | Thread, rng: np.random.Generator
) -> Attempts:
    """Interrupt steps of new cases, each kind in turn."""
    prepared = [_Kind(make) for make in kinds]
    current = Interruption(sender)
    with _signals(sender.number, lambda *args: current.handle(*args)) as wakeups:
        while True:
            for kind in prepared:
                happened = moments = None
                while happened is None and (not moments or None in moments):
                    current = Interruption(sender, gap=10 ** rng.uniform(-5, -3.5))
                    happened = kind.attempt(current, rng.uniform(0.001, 1.1), wakeups)
                    moments = current.moments
                    moments += [None] * (sender.count - len(moments))
                where = " and ".join(map(str, moments or []))
                yield None if happened is None else f"interrupted at {where}: {happened}"


@contextmanager
def _signals(number: signal.Signals | None, handler: Any) -> Iterator[int]:
    """Handle a signal, and yield a pipe to read the signals from."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    old = None if number is None else signal.signal(number, handler)
    try:
        yield reader
    finally:
        if number is not None:
            signal.signal(number, old)
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def _received(wakeups: int) -> int:
    try:
        return len(os.read(wakeups, 1 << 10))
    except BlockingIOError:
        return 0
