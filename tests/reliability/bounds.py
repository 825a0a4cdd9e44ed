"""Bounds: no update reads or writes outside of its arrays.

Each array ends directly before a page of memory that can be neither read nor written, or begins
directly behind one: any access to that page ends the process. Weights that are not written and
gradients are in memory that is mapped read-only. Bytes between the elements of strided arrays must
keep their values, and the results must have the bits of the same update of ordinary arrays.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

import lars_tree as lt
from tests.reliability.attack import Attempts, attack

PAGE = mmap.PAGESIZE
PATTERN = 0x3B  # a small positive number in every format
SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 4095, 4097]
LARGE = [140_001, 270_000, 600_001]  # several threads, and several chunks


class Guarded:
    """An array between two pages without access; its axes may have gaps."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> None:
        item = extent = np.dtype(dtype).itemsize
        strides = []
        for length in reversed(shape):
            if rng.random() < 0.15:
                extent += item * int(rng.integers(1, 4))
            strides.insert(0, extent)
            extent *= max(length, 1)
        steps = zip(strides, shape, strict=True)
        size = item + sum(stride * (length - 1) for stride, length in steps) if all(shape) else 0
        self.room = max(-(-size // PAGE), 1) * PAGE
        mapped = mmap.mmap(-1, self.room + 2 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.bytes = np.frombuffer(mapped, np.uint8)[PAGE:-PAGE]
        self.bytes[:] = PATTERN
        shift = min(int(rng.choice([0, 0, 0, 1, item // 2])), self.room - size)  # not aligned
        start = self.room - size - shift if rng.random() < 0.5 else shift
        self.array = np.ndarray(shape, dtype, mapped, PAGE + start, strides)
        self.is_gap = np.ones(self.room, bool)
        if size:
            elements = as_strided(self.is_gap[start:], (*shape, item), (*strides, 1))
            elements[...] = False
        self.layout = f"{dtype} {shape}, strides {strides}, from byte {start} of {self.room}"

    def protect(self, read_only: bool) -> None:
        access = [(self.address, PAGE, 0), (self.address + PAGE + self.room, PAGE, 0)]
        if read_only:
            access.append((self.address + PAGE, self.room, mmap.PROT_READ))
        for address, size, flags in access:
            if mprotect(address, size, flags):
                raise OSError("mprotect failed")

    def gaps(self) -> bytes:
        """All bytes that belong to no element."""
        return self.bytes[self.is_gap].tobytes()


mprotect = getattr(ctypes.CDLL(None), "mprotect", None)
if mprotect is not None:
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Memories = dict[str, dict[str, Guarded]]  # by argument and leaf


def made(rng: np.random.Generator, in_place: bool) -> Memories:
    """Weights, gradients, results and velocities of one or two leaves."""
    found: Memories = {"w": {}, "g": {}, "out": {}, "v": {}}
    sizes = LARGE if rng.random() < 0.04 else SIZES
    for key in ["a", "b"][: int(rng.integers(1, 3))]:
        n = int(rng.choice(sizes))
        shape = [(n,), (n,), (n // 3, 3), (2, 1, n)][rng.integers(4)]
        dtype = str(rng.choice(["f2", "f4", "f8", "c8"]))
        gradient = dtype if dtype == "c8" else str(rng.choice(["f2", "f4", "f8"]))
        velocity = "f4" if dtype == "f2" else dtype
        for name, kind in zip(found, (dtype, gradient, dtype, velocity), strict=True):
            x = found[name][key] = Guarded(rng, shape, kind)
            x.array[...] = rng.standard_normal(shape) / 8
            x.protect(name == "g" or (name == "w" and not in_place))
    return found


def update(rng: np.random.Generator) -> str | None:
    """Make one update, and the same of ordinary arrays."""
    in_place, moves = rng.random() < 0.6, rng.random() < 0.5
    memories, threads = made(rng, in_place), int(rng.integers(1, 9))
    options = {
        "joint_norm": bool(rng.random() < 0.3),
        "nonfinite": str(rng.choice(["propagate", "skip"])),
    }
    layouts = {name: [x.layout for x in group.values()] for name, group in memories.items()}
    text = f"{threads} threads, {options}, {in_place=}, {moves=}, {layouts}"
    print(text, file=sys.stderr, flush=True)  # shown if the process crashes
    arrays = {name: {k: x.array for k, x in group.items()} for name, group in memories.items()}
    copies = {name: {k: x.copy() for k, x in group.items()} for name, group in arrays.items()}
    everything = [x for group in memories.values() for x in group.values()]
    gaps = [x.gaps() for x in everything]
    lt.set_num_threads(threads)
    opt = lt.Lars(0.1, momentum=0.9 if moves else 0.0, weight_decay=0.1, **options)
    for given in (arrays, copies):
        state = opt.init(given["w"])
        if moves:
            state["velocity"] = given["v"]
        opt.update(given["w"], given["g"], state, out=given["w" if in_place else "out"])
    if [x.gaps() for x in everything] != gaps:
        return f"bytes outside of the elements were changed: {text}"
    if any(x.tobytes() != copies[n][k].tobytes() for n in arrays for k, x in arrays[n].items()):
        return f"the results differ from those of ordinary arrays: {text}"
    return None


@attack(
    "No update reads or writes outside of its arrays",
    "updates of random arrays between guard pages",
    count=5_000,
    short=300,
    seconds=60,
    plain=True,
)
def of_updates(rng: np.random.Generator) -> Attempts:
    while True:
        yield update(rng)
