"""The interpreter exits cleanly while daemon threads are inside an update.

Before Python 3.14 such a thread is ended by pthread_exit, which on glibc unwinds C++ frames.
Destructors that then run must not use Python objects without the GIL: see call_python in
_native/python.hpp.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import CI

import lars_tree
from lars_tree import _native

if _native.kernel is None and (not CI or os.environ.get("LARS_TREE_NATIVE") == "0"):
    pytest.skip("the native kernel was not built, or is turned off", allow_module_level=True)


def start(code):
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


EXIT = """
import sys, threading, time
import numpy as np
from lars_tree import Lars, lars_update
class Walked(dict):  # walked in Python, called by the kernel
    def items(self):
        return dict.items(self)
def tree(size, count, make=dict):
    return make({i: make(a=np.ones(size, np.float32)) for i in range(count)})
def in_place():
    w, g = tree(300_000, 3), tree(300_000, 3)
    return lambda: lars_update(w, g, 1e-6, out=w)
def into_new_arrays():
    w, g = tree(300_000, 3), tree(300_000, 3)
    return lambda: lars_update(w, g, 1e-6)
def walked_in_python():
    w, g = [tree(10, 60), tree(10, 60, Walked)], [tree(10, 60), tree(10, 60, Walked)]
    return lambda: lars_update(w, g, 1e-6, out=w)
def momentum():
    w, g = tree(30_000, 20), tree(30_000, 20)
    optimizer = Lars(0.1)
    state = optimizer.init(w)
    return lambda: optimizer.update(w, g, state)
def run(work, threads):
    sys.setswitchinterval(1e-5)
    running = threading.Barrier(threads + 1)
    def loop():
        update = work()
        update()
        running.wait()
        while True:
            update()
    for _ in range(threads):
        threading.Thread(target=loop, daemon=True).start()
    running.wait()
    time.sleep(0.01)
"""


def test_a_daemon_thread_inside_an_update_does_not_crash_the_exit():
    works = ["in_place", "into_new_arrays", "walked_in_python", "momentum"]
    codes = [f"{EXIT}\nrun({work}, {threads})" for work in works for threads in (1, 2, 4)]
    if CI or find_spec("torch"):  # the work runs on its OpenMP team
        codes += [f"import torch\n{EXIT}\nrun(in_place, {threads})" for threads in (1, 2, 4)]
    processes = [start(code) for code in codes]
    assert [result(process) for process in processes] == [(0, "", "")] * len(codes)


# Ends a thread inside each kind of call into Python, as Python does while it exits: the GIL is
# released, and pthread_exit unwinds the stack. Prints the calls whose threads ended; the other
# threads sleep.
END = """
import ctypes, os, threading, time
import numpy as np
from lars_tree import _native
from lars_tree._numerics.formula import Rule
library = ctypes.CDLL(None)
ids = {}
def end(*_):
    ids[threading.current_thread().name] = threading.get_native_id()
    library.pthread_exit(None)
class Key:
    def __hash__(self):
        return 0
    def __eq__(self, other):
        end()
class Number(int):
    def __del__(self):
        end()
class Memory(ctypes.c_double * 5):
    def __del__(self):
        end()
class Counter(ctypes.c_int64):
    def __del__(self):
        end()
class Index:
    def __index__(self):
        end()
def plan_of(ws=None, make=np.empty_like, copy=np.copy, moves=None):
    ws = ws or [np.ones(5)]
    reader = _native.kernel.Reader((np.ndarray,), Rule._fields, make=make, copy=copy)
    plan = _native.kernel.Plan(1, 0)
    columns = ws, [np.ones(5)], None, [Rule(0.1, momentum=0.9 if moves else 0.0)]
    plan.prepare(reader, *columns, moves and [np.ones(5)], [None], [None])
    return plan
def counted():
    plan = plan_of()
    plan.count(np.frombuffer(Counter(), np.int64))
def collect(tree, kind_of=lambda node: 0, others=print, kinds={list: 3, dict: 1}):
    _native.kernel.collect(tree, [], kinds, kind_of, others)
def match(tree, prefix, others=print):
    _native.kernel.match(tree, prefix, [], True, {list: 3, dict: 1, set: 4}, lambda node: 0, others)
def release():
    ws = [np.frombuffer(Memory())]
    def make(w):
        ws.clear()  # the buffer holds the last reference
        return np.ones(5)
    plan_of(ws, make)
calls = {
    "make": lambda: plan_of(make=end),
    "copy": lambda: plan_of(copy=end, moves=True),
    "release of a buffer": release,
    "release of a plan": lambda: plan_of([np.frombuffer(Memory())]),
    "release of a counter": counted,
    "release of a reader": lambda: _native.kernel.Reader((Number(),), Rule._fields),
    "number of threads": lambda: _native.kernel.Plan(Index(), 0),
    "kind": lambda: collect([0], kind_of=end),
    "release of a kind": lambda: collect([0], kind_of=lambda node: Number()),
    "other node": lambda: collect([{0}], kinds={list: 3, set: 4}, others=end),
    "other node with a prefix": lambda: match([{0}], [{0}], others=end),
    "key": lambda: match({Key(): 0}, {Key(): 0}),
}
for name, call in calls.items():
    threading.Thread(target=call, name=name, daemon=True).start()
    until = time.monotonic() + 60
    while name not in ids and time.monotonic() < until:
        time.sleep(0.001)
time.sleep(0.2)
print([name for name in calls if not os.path.exists(f"/proc/self/task/{ids[name]}")])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="pthread_exit unwinds nothing here")
def test_a_thread_that_is_ended_inside_a_call_into_python_unwinds_nothing():
    assert result(start(END)) == (0, "[]\n", "")


# Functions that never run Python code, never wait for a lock, and never allocate an object that the
# garbage collector tracks.
HARMLESS = {
    *("PyBool_FromLong", "PyDict_Check", "PyDict_Next", "PyDict_Size", "PyErr_ExceptionMatches"),
    *("PyErr_Occurred", "PyEval_SaveThread", "PyFloat_AsDouble", "PyFloat_Check"),
    *(
        "PyIter_Check",
        "PyList_Check",
        "PyList_CheckExact",
        "PyList_GetItem",
        "PyList_Size",
        "PyLong_FromLong",
    ),
    *("PySequence_Size", "PyTuple_Check", "PyTuple_CheckExact", "PyTuple_GetItem", "PyTuple_Size"),
    *("PyType_GetSlot", "PyUnicode_Check", "PyUnicode_CompareWithASCIIString", "Py_NewRef"),
    *("Py_TYPE", "Py_XNewRef"),
}
# Functions that are called only before any C++ object owns a resource.
FIRST = {"PyArg_ParseTuple", "PyArg_ParseTupleAndKeywords", "PyCapsule_GetPointer"}
FIRST |= {"PyInit__kernel", "PyModuleDef_Init"}


SOURCES = list(Path(lars_tree.__file__).parent.joinpath("_native").glob("*.?pp"))


@pytest.mark.skipif(not SOURCES and not CI, reason="the sources of the kernel are not installed")
def test_the_kernel_calls_python_by_call_python():
    called = set()
    for file in SOURCES:
        code = re.sub(r"//.*", "", file.read_text())
        code = re.sub(r"call_python\(\[[^]]*\][^;]*;", "", code)
        called |= set(re.findall(r"\b(Py[A-Z]?[a-z]*_\w+)\(", code))
    assert len(called) > 10
    assert called - HARMLESS - FIRST == set()
