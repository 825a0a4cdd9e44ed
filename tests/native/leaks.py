"""Leak checks: call the kernel many times, then compare reference counts and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from numbers import Number
from pathlib import Path

import numpy as np
import pytest
from conftest import CI

from lars_tree import native_available

if not native_available():
    assert not CI or os.environ.get("LARS_TREE_NATIVE") == "0", "the kernel was not built"
    pytest.skip("the native kernel is not built", allow_module_level=True)

# AddressSanitizer is slow, and keeps freed memory to detect use after free.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
CALLS = 200 if SANITIZED else 2_000
MAX_GROWTH = 16  # bytes per call: less than the size of any object or block


def check(call, given, calls=CALLS):
    """Call many times, and assert that neither references to `given` nor memory leak."""
    call()  # fills caches
    gc.collect()
    # Other modules also use some numbers and strings (like "propagate"), and may release
    # references to them.
    own = [x for x in given if not isinstance(x, Number | str)]
    shared = [x for x in given if isinstance(x, Number | str)]
    shared += [None, True, False, NotImplemented, np.ndarray, ValueError, RuntimeError]
    before = [sys.getrefcount(x) for x in own], [sys.getrefcount(x) for x in shared]
    objects = len(gc.get_objects())
    for _ in range(calls):
        call()
    gc.collect()
    counts = [sys.getrefcount(x) for x in own]
    assert counts == before[0], (counts, before[0])
    for x, count in zip(shared, before[1], strict=True):
        assert abs(sys.getrefcount(x) - count) < calls // 10, x
    assert len(gc.get_objects()) - objects < calls // 10
    if SANITIZED:
        return
    # A leak shows in every round; other allocations of the process do not.
    for measure in (allocated, resident):
        growths = (growth(measure, call, calls) for _ in range(3))
        assert any(x < MAX_GROWTH * calls for x in growths), "the memory of the process grows"


def growth(measure, call, calls):
    before = measure()
    for _ in range(calls):
        call()
    return measure() - before


NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class MallInfo(ctypes.Structure):
    """The result of glibc's mallinfo2, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def allocated():
    """The exact number of bytes that malloc has allocated; 0 without glibc's mallinfo2."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident():
    """The resident memory of the process in bytes; 0 if the system has no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def raising(*_):
    raise ValueError("on purpose")


def expecting(error, call):
    """A function that asserts that `call` raises this error."""

    def checked():
        try:
            call()
        except error:
            return
        pytest.fail(f"expected {error.__name__}")

    return checked


def returning(expected, call):
    """A function that asserts that `call` returns this object, or an object of this type."""

    def checked():
        result = call()
        assert result is expected or type(result) is expected, result

    return checked
