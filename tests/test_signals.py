"""Updates in place do not replace signal handlers, and processes can fork during an update."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections import deque
from textwrap import dedent

import numpy as np
import pytest
from conftest import interrupted_at, need
from test_threads import run
from test_writes import contents, in_chunks, of_momentum, of_strides, of_two_libraries

from lars_tree._backends.cpu import twin
from lars_tree._core import writes


def test_no_handler_is_swapped(monkeypatch):
    def fail(*args):
        raise AssertionError("a handler was swapped")

    for name in ("signal", "siginterrupt", "set_wakeup_fd"):
        monkeypatch.setattr(signal, name, fail)
    monkeypatch.setattr(writes, "MAX_HELD", 2**18)
    for case in (of_strides, of_momentum, in_chunks):
        trees, call = case()
        before = contents(trees)
        call()
        assert contents(trees) != before


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_of_two_signals_within_an_update_both_are_handled(monkeypatch):
    """As always in Python, the second exception has the first as its context."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    calls = []

    def fail(number, frame):
        calls.append(number)
        raise ValueError(number)

    stepped = twin._step_piece

    def at_once(*args):
        deque(map(ctypes.PyDLL(None)["raise"], numbers), 0)  # Python runs the handlers later
        return stepped(*args)

    monkeypatch.setattr(twin, "_step_piece", at_once)
    trees, call = of_strides()
    before = contents(trees)
    old = [signal.signal(number, fail) for number in numbers]
    try:
        with pytest.raises(ValueError) as caught:
            call()
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
    assert sorted(calls) == sorted(numbers)
    assert {caught.value.args[0], caught.value.__context__.args[0]} == set(numbers)
    assert contents(trees) == before


@pytest.mark.parametrize("case", [of_strides, of_two_libraries])
def test_ctrl_c_at_any_line_restores_the_settings_of_numpy_and_torch(case):
    """At each line of the code that changes them."""
    torch = need("torch")
    modules = ["numpy._core._ufunc_config", "torch.autograd.grad_mode", "torch.utils._contextlib"]
    files = tuple(importlib.import_module(name).__file__ for name in modules)
    line, errors = 0, np.geterr()
    while interrupted_at(line, files, case()[1]):
        assert np.geterr() == errors, line
        assert torch.is_grad_enabled(), line
        line += 1
    assert line > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_during_an_update_has_the_handlers_of_its_parent():
    code = """
    import os, signal, threading, numpy as np, lars_tree
    from lars_tree._backends.cpu import twin
    inside, forked, stepped = threading.Event(), threading.Event(), twin._step_piece
    def wait(*args):
        inside.set(); forked.wait(30)
        return stepped(*args)
    twin._step_piece = wait
    def fork():
        inside.wait()
        child = os.fork()
        if child == 0:
            os._exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)
        statuses.append(os.waitpid(child, 0)[1])
        forked.set()
    statuses = []
    thread = threading.Thread(target=fork); thread.start()
    w = np.ones((4, 2))[:, 0]
    lars_tree.lars_update(w, 1.0, 0.1, out=w)
    thread.join()
    print(statuses)"""
    assert run(dedent(code)) == "[0]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_during_the_first_update_can_update():
    """The fork happens while another thread slowly imports the backend."""
    code = """
    import os, sys, threading, time, numpy as np, lars_tree
    importing = threading.Event()
    class Slow:
        def find_spec(self, name, path=None, target=None):
            if name in ("lars_tree._backends.numpy", "numpy.ma"):
                importing.set(); time.sleep(0.3)
    sys.meta_path.insert(0, Slow())
    update = lambda: lars_tree.lars_update({"a": np.ones((3, 2))[:, 0]}, 1.0, 0.1)
    thread = threading.Thread(target=update); thread.start(); importing.wait()
    child = os.fork()
    if child == 0:
        update(); os._exit(0)
    deadline = time.monotonic() + 20
    while not (found := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not found[0]:
        os.kill(child, 9)
    thread.join()
    print(found[0] == child, found[1])"""
    assert run(dedent(code)) == "True 0"


def test_the_thread_that_imported_threading_first_need_not_be_the_main_one():
    code = """
    import _thread, time
    def work():
        import numpy as np, lars_tree, threading
        w = np.ones((4, 2))[:, 0]
        lars_tree.lars_update(w, 1.0, 0.1, out=w)
        done.append((w.tolist(), threading.current_thread() is threading.main_thread()))
    done = []
    _thread.start_new_thread(work, ())
    while not done: time.sleep(0.01)
    print(done[0])"""
    assert run(dedent(code)).startswith("([0.9, 0.9, 0.9, 0.9], ")
