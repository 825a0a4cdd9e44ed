"""The memory of arrays: whether arrays overlap, and whether memory can be written to.

The numpy arrays given here may describe the memory of any device, so they are never read.
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

# If numpy needs more steps than this to decide whether two interleaved views overlap, assume that
# they do.
_MAX_WORK: Any = 10_000

READ_ONLY_MAP = "read-only: its memory is mapped read-only"


def overlaps_itself(x: NumpyArray) -> bool:
    """Whether two elements of x share memory, as after a broadcast."""
    if x.flags.forc or not x.size:
        return False
    extent = x.itemsize
    for stride, length in sorted(zip(map(abs, x.strides), x.shape, strict=True)):
        if length > 1 and stride < extent:
            # Interleaved axes: compare elements that differ first in the index of each axis.
            rests = (x[(0,) * axis] for axis in range(x.ndim))
            return any(_share(rest[:1], rest[1:]) for rest in rests)
        extent += stride * (length - 1)
    return False


def same(a: NumpyArray, b: NumpyArray) -> bool:
    """Whether a and b have the same elements in memory, in the same order."""
    starts = [x.__array_interface__["data"][0] for x in (a, b)]
    layouts = [(x.shape, x.strides, x.itemsize) for x in (a, b)]
    return starts[0] == starts[1] and layouts[0] == layouts[1]


def overlapping(
    written: list[NumpyArray], read: list[NumpyArray] | None = None
) -> Iterator[tuple[int, int]]:
    """Pairs of indices of arrays that share an element.

    With `read`, the first index is an index of `written`, and the second is an index of `read`.
    Without `read`, both are indices of `written`, in ascending order.
    """
    arrays, count = [*written, *(read or [])], len(written)
    # (end, index) of the previous arrays that end after the start of the current array.
    reaching: list[tuple[int, int]] = []
    for start, end, i in sorted((*byte_bounds(x), i) for i, x in enumerate(arrays) if x.size):
        reaching = [(stop, j) for stop, j in reaching if stop > start]
        for _, j in reaching:
            a, b = min(i, j), max(i, j)
            if (read is None or a < count <= b) and _share(arrays[a], arrays[b]):
                yield a, b if read is None else b - count
        reaching.append((end, i))


def _share(a: NumpyArray, b: NumpyArray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=_MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def span(x: NumpyArray) -> tuple[int, int]:
    """The address of the first byte of an array, and the number of bytes up to its end."""
    start, end = byte_bounds(x)
    return start, end - start if x.size else 0


def is_mapped_read_only(address: int, size: int) -> bool:
    """Whether part of this memory is mapped read-only; False if this is unknown."""
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
    """Whether the first and the last page can be written to; False if unknown (before Linux 5.14).

    This does the same as `is_writable` in `_native/memory.hpp`. It takes microseconds, while
    reading all maps of a large process takes milliseconds.
    """
    advise, page = _madvise(), mmap.PAGESIZE
    starts = {x - x % page for x in (address, address + size - 1)}
    return advise is not None and all(advise(x, page, _POPULATE_WRITE) == 0 for x in starts)


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    import ctypes  # imported late: needed only for memory of other libraries

    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def is_foreign(x: NumpyArray) -> bool:
    """Whether numpy did not allocate the memory of x, so that the flag `writeable` may be wrong."""
    owner: Any = x
    while issubclass(type(owner), np.ndarray):
        owner, array = owner.base, owner
    return owner is not None or not array.flags.owndata
