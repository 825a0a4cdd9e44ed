"""Where arrays lie in memory.

Works on addresses alone: the arrays given here are numpy arrays that may stand for memory of any
device, and are never read.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

NumpyArray = np.ndarray[Any, Any]

# How hard to try to prove that two interleaved views share no element, before assuming they do.
_MAX_WORK: Any = 10_000


def overlaps_itself(x: NumpyArray) -> bool:
    """Whether two elements may share memory, as in the result of a broadcast."""
    if x.flags.forc or not x.size:
        return False
    extent = x.itemsize
    for stride, length in sorted(zip(map(abs, x.strides), x.shape, strict=True)):
        if length > 1 and stride < extent:
            return True
        extent += stride * (length - 1)
    return False


def same(a: NumpyArray, b: NumpyArray) -> bool:
    """Whether a and b are the very same elements in the same places."""
    return _layout(a) == _layout(b)


def _layout(x: NumpyArray) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    return x.__array_interface__["data"][0], x.shape, x.strides, x.itemsize


def overlapping(
    written: list[NumpyArray], read: list[NumpyArray] | None = None
) -> Iterator[tuple[int, int]]:
    """Pairs of indices of arrays that share an element.

    Both among `written`, the first index the smaller one; or, where `read` is given, the first
    among `written` and the second among `read`.
    """
    lists = [written] if read is None else [written, read]
    bounds = sorted(
        (*byte_bounds(x), side, i)
        for side, xs in enumerate(lists)
        for i, x in enumerate(xs)
        if x.size
    )
    # For each side the (end, index) of those arrays seen that may reach into the next ones.
    reaching: list[list[tuple[int, int]]] = [[] for _ in lists]
    for start, end, side, i in bounds:
        for k, ends in enumerate(reaching):
            reaching[k] = [(stop, j) for stop, j in ends if stop > start]
        other = 0 if read is None else 1 - side
        for _, j in reaching[other]:
            if _share(lists[side][i], lists[other][j]):
                yield (i, j) if (side < other or (side == other and i < j)) else (j, i)
        reaching[side].append((end, i))


def _share(a: NumpyArray, b: NumpyArray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def span(x: NumpyArray) -> tuple[int, int]:
    """The address of the first byte of an array, and the number of bytes up to its last one."""
    start, end = byte_bounds(x)
    return start, end - start if x.size else 0


def is_mapped_read_only(address: int, size: int) -> bool:
    """Whether part of this memory is mapped for reading alone, where the system tells (Linux)."""
    maps = Path("/proc/self/maps")
    if not size or _can_be_written(address, size) or not maps.exists():
        return False
    for line in maps.read_text().splitlines():
        span, permissions = line.split()[:2]
        start, end = (int(word, 16) for word in span.split("-"))
        if start < address + size and address < end and "w" not in permissions:
            return True
    return False


def _can_be_written(address: int, size: int) -> bool:
    """Whether the first and the last page can be written to, where the system tells (Linux 5.14).

    As `is_writable` of `_native/memory.hpp`; takes microseconds, where reading all maps takes
    milliseconds in a process with many.
    """
    advise, page = _madvise(), mmap.PAGESIZE
    places = {place - place % page for place in (address, address + size - 1)}
    return advise is not None and all(advise(place, page, _POPULATE_WRITE) == 0 for place in places)


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    import ctypes  # for memory of other libraries alone

    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def is_foreign(x: NumpyArray) -> bool:
    """Whether numpy did not allocate the memory of x: then its writeable flag may be wrong."""
    owner: Any = x
    while issubclass(type(owner), np.ndarray):
        owner, array = owner.base, owner
    return owner is not None or not array.flags.owndata
