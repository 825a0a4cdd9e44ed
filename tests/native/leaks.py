"""Leak checks: call the kernel many times, then compare reference counts and memory."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from numbers import Number

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
    """Call many times, and assert that neither references to `given` nor memory leak.

    A leak grows with the number of calls; what other code in the process allocates does not. So
    if anything grows, it is measured again with more calls.
    """
    call()  # fills caches
    gc.freeze()  # garbage collections skip all objects that exist now, which saves time
    try:
        for factor in (1, 10, 100):
            grown = growth(call, given, factor * calls)
            if not grown:
                return
    finally:
        gc.unfreeze()
    pytest.fail(f"{factor * calls} calls leak: {', '.join(grown)}")


def growth(call, given, calls):
    """What has changed after so many calls, as a list of texts."""
    # Other modules also use some numbers and strings (like "propagate"), and may release
    # references to them.
    own = [x for x in given if not isinstance(x, Number | str)]
    shared = [x for x in given if isinstance(x, Number | str)]
    shared += [None, True, False, NotImplemented, np.ndarray, ValueError, RuntimeError]

    def measured():
        gc.collect()
        counts = [[sys.getrefcount(x) for x in xs] for xs in (own, shared)]
        return *counts, sys.getallocatedblocks(), allocated()

    counts, shared_counts, blocks, size = measured()
    for _ in range(calls):
        call()
    new_counts, new_shared_counts, new_blocks, new_size = measured()
    assert new_counts == counts, (new_counts, counts)
    changes = [new - old for new, old in zip(new_shared_counts, shared_counts, strict=True)]
    grown = [
        f"{change} references to {x!r}"
        for x, change in zip(shared, changes, strict=True)
        if abs(change) > calls // 10
    ]
    if new_blocks - blocks > calls // 10:
        grown.append(f"{new_blocks - blocks} blocks of Python")
    if new_size - size > MAX_GROWTH * calls:
        grown.append(f"{new_size - size} bytes")
    return grown


NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class MallInfo(ctypes.Structure):
    """The result of glibc's mallinfo2, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


_mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
if _mallinfo is not None:
    _mallinfo.restype = MallInfo


def allocated():
    """The exact number of bytes that malloc has allocated; 0 without glibc's mallinfo2."""
    if _mallinfo is None:
        return 0
    info = _mallinfo()
    return info.uordblks + info.hblkhd


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
