"""How the tests of leaks call the kernel many times, and what must then be as before."""

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

# AddressSanitizer is slow, and keeps freed memory, to see its use.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
CALLS = 1_000 if SANITIZED else 10_000
MOST_BYTES = 16  # of growth for each call: less than any object or block has


def check(call, given, calls=CALLS):
    """Call it many times; `given` are the objects whose references are counted."""
    call()  # fills caches
    gc.collect()
    # Constants are shared with all that is loaded, which may let go of some ("propagate", once).
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
    # A leak is there in every round; what else the process does is not.
    for measure in (allocated, resident):
        growths = (growth(measure, call, calls) for _ in range(3))
        assert any(x < MOST_BYTES * calls for x in growths), "the memory of the process grows"


def growth(measure, call, calls):
    before = measure()
    for _ in range(calls):
        call()
    return measure() - before


NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class MallInfo(ctypes.Structure):
    """What glibc tells of its memory, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def allocated():
    """The bytes that malloc has given out, where the C library tells: to the byte."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident():
    """The bytes of memory that the process has in use, where the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def raising(*_):
    raise ValueError("on purpose")


def expecting(error, call):
    """The call, which is to raise this error."""

    def checked():
        try:
            call()
        except error:
            return
        pytest.fail(f"expected {error.__name__}")

    return checked


def giving(expected, call):
    """The call, which is to give this object, or one of this type."""

    def checked():
        result = call()
        assert result is expected or type(result) is expected, result

    return checked
