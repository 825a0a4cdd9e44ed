"""Updates in place are complete or not made at all.

This holds whichever allocation fails, and whenever a signal handler or another thread raises an
exception.
"""

from __future__ import annotations

import ctypes
import dis
import os
import signal
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from conftest import need, to_library, to_numpy, traced

import lars_tree
from lars_tree import Container, Lars, lars_update
from lars_tree._backends.cpu import twin
from lars_tree._core import writes

FOLDER = os.path.dirname(lars_tree.__file__)


# ---- Cases: calls on the general path, each with all arrays that the call may write to


def strided(start):
    return np.stack([np.arange(start, start + 4.0), np.zeros(4)], 1)[:, 0]


def weights():
    return {"strided": strided(1), "dense": np.arange(3.0, 6), "other": strided(7)}


def gradients():
    return {"strided": np.full(4, 0.5), "dense": np.full(3, 0.25), "other": np.full(4, 0.125)}


def of_strides():
    w = weights()
    return w, lambda: lars_update(w, gradients(), 0.1, decay_lambda=0.1, out=w)


def of_rates():
    w = weights()
    rates = {"strided": 0.1, "dense": np.array([0.1, 0.2, 0.3]), "other": 0.1}
    return w, lambda: lars_update(w, gradients(), rates, out=w)


def of_momentum():
    w, opt = weights(), Lars(0.1)
    state = opt.init(w)
    opt.update(w, gradients(), state, out=w)
    return [w, state], lambda: opt.update(w, gradients(), state, out=w)


def of_skipping():
    w, opt = weights(), Lars(0.1, nonfinite="skip")
    state, g = opt.init(w), gradients()
    g["other"][1] = np.nan
    return [w, state], lambda: opt.update(w, g, state, out=w)


def of_raising():
    w, opt = weights(), Lars(0.1, nonfinite="raise")
    state = opt.init(w)
    return [w, state], lambda: opt.update(w, gradients(), state, out=w)


def of_kept_weights():
    w = weights()
    out = {key: np.zeros_like(x) for key, x in w.items()}
    g = {**gradients(), "dense": None}
    return out, lambda: lars_update(w, g, 0.1, out=out)


def of_two_libraries():
    torch = need("torch")
    w = {**weights(), "torch": torch.ones(3), "half": torch.ones(3, dtype=torch.bfloat16)}
    g = {**gradients(), "torch": torch.ones(3), "half": torch.ones(3, dtype=torch.bfloat16)}
    opt = Lars(0.1)
    state = opt.init(w)
    return [w, state], lambda: opt.update(w, g, state, out=w)


def of_a_tensor_as_rate():
    torch = need("torch")
    w = {"numpy": strided(1), "torch": torch.ones(3)}
    rates = {"numpy": 0.1, "torch": torch.tensor([0.1, 0.2, 0.3])}
    return w, lambda: lars_update(w, {"numpy": 1.0, "torch": torch.ones(3)}, rates, out=w)


def of_a_library_that_writes_itself():
    need("array_api_strict")
    w = {"numpy": strided(1)}
    w |= {key: to_library("array_api_strict", np.ones(3)) for key in "ab"}
    g = {key: to_library("array_api_strict", np.full(3, 0.5)) for key in "ab"}
    return w, lambda: lars_update(w, {**g, "numpy": 1.0}, 0.1, out=w)


def in_chunks():
    """The results for `a` and `b` are too large to be buffered, unlike those for `strided`."""
    w = {"strided": strided(1), **{key: np.ones((40_000, 2))[:, 0] for key in "ab"}}
    return w, lambda: lars_update(w, 1.0, 0.1, out=w)


CASES = [
    *(of_strides, of_rates, of_momentum, of_skipping, of_raising, of_kept_weights),
    *(of_two_libraries, of_a_tensor_as_rate, of_a_library_that_writes_itself, in_chunks),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def contents(trees):
    leaves = Container({"": trees}).leaves()
    exact = [x.double() if hasattr(x, "double") else x for x in leaves]  # numpy has no bfloat16
    return [to_numpy(x).tobytes() for x in exact]


@pytest.fixture(autouse=True)
def _little_room(monkeypatch):
    monkeypatch.setattr(writes, "MAX_HELD", 2**18)


# ---- Exceptions at each moment


def sent_by_a_thread():
    """Raise an exception as if another thread had requested it."""
    ident = ctypes.c_ulong(threading.get_ident())
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def sent_by_the_system():
    signal.raise_signal(signal.SIGINT)


def interrupted_at(number, call, send):
    """Run `call`, and `send` at signal check `number` of `Writes.make`; False if there are fewer.

    Python checks for signals when a function starts, after calls, and when a loop starts again.
    """
    moments = iter(range(number, -1, -1))
    previous = {}

    def follow(frame, event, _):
        if event == "opcode":
            before = previous.get(frame, "RESUME")
            previous[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            looks = before.startswith(("RESUME", "CALL", "JUMP_BACKWARD", "BEFORE_WITH"))
            if looks and next(moments, None) == 0:
                send()
        return trace(frame, event, _)

    def trace(frame, event, _):
        # Trace `make`, and the functions that it calls.
        inside = frame.f_back is not None and frame.f_back.f_trace is not None
        if frame.f_code is not writes.Writes.make.__code__ and not inside:
            return None
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes = True
        return follow

    traced(trace, call)
    return next(moments, None) is None


@each_case
@pytest.mark.parametrize("send", [sent_by_a_thread, sent_by_the_system])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_at_any_moment_leaves_all_written_or_nothing(case, send):
    if case is in_chunks and sys.version_info[:2] == (3, 12):
        pytest.skip("CPython 3.12 crashes: a traced generator continues in another thread")
    trees, call = case()
    before = contents(trees)
    call()
    after = contents(trees)
    outcomes, moment = [], 0
    while True:
        trees, call = case()
        reached = interrupted_at(moment, call, send)
        outcomes.append(contents(trees))
        assert outcomes[-1] in (before, after), moment
        if not reached:
            break
        moment += 1
    assert moment > 15
    assert outcomes[0] == before
    assert outcomes[-1] == after


# ---- No memory


@pytest.mark.parametrize(
    "case", [of_strides, of_rates, of_momentum, of_kept_weights, of_two_libraries]
)
def test_a_failing_allocation_leaves_all_written_or_nothing(case, monkeypatch):
    """Allocations fail only in the call that writes: elsewhere, a failure may crash Python."""
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no test modules")
    deque, number = writes.deque, 0

    def without_memory(*args):
        # Only one allocation fails; if all failed, Python might unwind forever.
        testcapi.set_nomemory(number, number + 1)
        try:
            deque(*args)
        finally:
            testcapi.remove_mem_hooks()

    failed = True
    while failed:
        trees, call = case()
        before = contents(trees)
        number += 1
        with monkeypatch.context() as patch:
            patch.setattr(writes, "deque", without_memory)
            try:
                call()
                failed = False
            except MemoryError:
                assert contents(trees) == before, number
    assert contents(trees) != before
    assert number > 1


def test_no_memory_for_one_leaf_leaves_the_others_unchanged(monkeypatch):
    """The computation of a result fails before anything is written."""
    trees, call = of_momentum()
    before = contents(trees)
    stepped = twin._step_piece
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return stepped(*args)

    monkeypatch.setattr(twin, "_step_piece", fail)
    with pytest.raises(MemoryError):
        call()
    assert contents(trees) == before
    call()
    assert contents(trees) != before


def test_arrays_that_a_library_has_written_are_restored():
    """The second write of the library fails."""
    need("array_api_strict")
    trees, call = of_a_library_that_writes_itself()
    before = contents(trees)
    backend = lars_tree._backends.find(trees["a"])
    write, calls = backend.write, []

    def fail(out, x):
        calls.append(out)
        if len(calls) == 2:
            raise OSError("the second write")
        write(out, x)

    backend.write = fail
    try:
        with pytest.raises(OSError, match="the second write"):
            call()
    finally:
        del backend.write
    assert calls[0] is trees["a"]
    assert contents(trees) == before


@pytest.mark.parametrize("rows", [1, 200_000])
def test_strided_weights_take_little_memory(rows):
    w, g = np.ones((rows, 20), np.float32)[:, ::2], np.ones(10, np.float32)
    lars_update(w, g, 0.1, out=w)
    tracemalloc.start()
    try:
        lars_update(w, g, 0.1, decay_lambda=0.1, out=w)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
