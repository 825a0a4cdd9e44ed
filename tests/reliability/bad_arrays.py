"""Ways to make an array of numpy bad or unusual; `array_faults.py` has the tables."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from lars_tree import Array
from tests.reliability.calls import Call, everywhere

Array_ = np.ndarray
KEPT: list[Any] = []  # the objects behind weak proxies


def valid(x: Array_) -> Array_:
    return x.copy()


def new_counter(value: int) -> Array_:
    return np.array(value)


def numbers(x: Any) -> tuple[str, Array_]:
    x = x.data if type(x) is Array else np.asarray(x)
    name = x.real.dtype.newbyteorder("=").name
    wide = np.array(x, np.complex128 if x.dtype.kind == "c" else np.float64)
    return name if name in ("float16", "bfloat16", "float32") else "float64", wide


def strided(x: Array_) -> Array_:
    """The same values in every other element of a larger array."""
    wide = np.full((2, 6), 7, x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def seen(x: Any) -> Any:
    """What a refused call must not change: the elements, of views also those between them."""
    if type(x) is Array:
        x = x.data
    if not issubclass(type(x), np.ndarray):
        return id(x)
    facts = x.dtype, x.shape, x.strides, x.flags.writeable, x.__array_interface__["data"]
    while isinstance(x.base, np.ndarray):
        x = x.base
    return id(x), facts, None if x.dtype.hasobject else x.tobytes()


class Proxy:
    """A wrapper whose `__class__` is that of the wrapped object."""

    def __init__(self, x: Any) -> None:
        self.__dict__["_x"] = x

    @property
    def __class__(self) -> Any:
        return type(self._x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._x, name)


class Subclass(np.ndarray):
    pass


class Claims:
    """Claims an array protocol that it does not follow."""

    shape, dtype, size, ndim = (2, 3), np.dtype(np.float32), 6, 2

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array_:
        return np.ones((2, 3), np.float32)


class Raises:
    """Every attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def weak(x: Array_) -> Any:
    KEPT.append(x.view(Subclass))
    return weakref.proxy(KEPT[-1])


def dead(x: Array_) -> Any:
    return weakref.proxy(x.copy().view(Subclass))


def torch_tensor(x: Array_) -> Any:
    import torch

    return torch.from_numpy(x.copy())


def read_only(x: Array_) -> Array_:
    x.flags.writeable = False
    return x


def mapped(mode: str) -> Callable[[Array_], Array_]:
    """A memory map with the values, opened with this mode."""

    def convert(x: Array_) -> Array_:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(64) + x.tobytes())
            file.flush()
            return np.memmap(file.name, x.dtype, mode, 64, x.shape)

    return convert


def lying_map(x: Array_) -> Array_:
    """Memory that is mapped read-only, in an array that claims to be writeable."""
    import ctypes

    with tempfile.TemporaryFile() as file:
        file.write(x.tobytes())
        file.flush()
        pages = mmap.mmap(file.fileno(), x.nbytes, prot=mmap.PROT_READ)
    address = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]
    KEPT.append(pages)
    memory = (ctypes.c_char * x.nbytes).from_address(address)
    return np.frombuffer(memory, x.dtype).reshape(x.shape)


def repeated(x: Array_) -> Array_:
    """A writeable view in which all rows share the memory of one row."""
    return as_strided(x, x.shape, (0, x.itemsize))


def sliding(x: Array_) -> Array_:
    """A view whose rows overlap in two elements."""
    return as_strided(x, x.shape, (x.itemsize, x.itemsize))


def unaligned(x: Array_) -> Array_:
    memory = bytearray(x.nbytes + 1)
    view = np.frombuffer(memory, x.dtype, x.size, 1).reshape(x.shape)
    view[...] = x
    return view


def in_record(x: Array_) -> Array_:
    record = np.zeros(x.shape, [("flag", "u1"), ("x", x.dtype), ("end", "u2")])
    record["x"] = x
    return record["x"]


def backwards(x: Array_) -> Array_:
    return x[::-1, ::-1].copy()[::-1, ::-1]


def swapped(x: Array_) -> Array_:
    return x.astype(x.dtype.newbyteorder())


def as_type(dtype: Any) -> Callable[[Array_], Array_]:
    return lambda x: x.astype(dtype)


def reshaped(*shape: int) -> Callable[[Array_], Array_]:
    return lambda x: np.resize(x, shape)


def always(x: Any) -> Callable[[Array_], Any]:
    return lambda _: x


def partner(call: Call, i: int) -> int:
    call.partner = (i + 3) % 7
    return call.partner


def tied(side: str) -> Callable[[Call, int], None]:
    """Two leaves are the same array."""

    def spoil(call: Call, i: int) -> None:
        leaves = getattr(call, side)
        leaves[i] = leaves[partner(call, i)]

    return spoil


def shifted(side: str, by: int = 1) -> Callable[[Call, int], None]:
    """Two leaves overlap: one starts `by` elements after the other."""

    def spoil(call: Call, i: int) -> None:
        leaves, other = getattr(call, side), partner(call, i)
        memory = np.zeros(12, np.float32)
        views = [memory[start : start + 6].reshape(2, 3) for start in (0, by)]
        views[0][...], views[1][...] = leaves[other], leaves[i]
        leaves[other], leaves[i] = views

    return spoil


def crossed(one: str, other: str, by: int = 1) -> Callable[[Call, int], None]:
    """A leaf of one argument overlaps with the leaf of another argument at another path."""

    def spoil(call: Call, i: int) -> None:
        ours, theirs, k = getattr(call, one), getattr(call, other), partner(call, i)
        memory = np.zeros(12, np.float32)
        views = [memory[start : start + 6].reshape(2, 3) for start in (0, by)]
        views[0][...], views[1][...] = theirs[k], ours[i]
        theirs[k], ours[i] = views

    return spoil


def without_partner(spoil: Callable[[Call, int], None]) -> Callable[[Call, int], None]:
    def spoiled(call: Call, i: int) -> None:
        spoil(call, i)
        call.partner = None

    return spoiled


def interleaved(side: str) -> Callable[[Call, int], None]:
    """Two leaves share a buffer, but no element."""

    def spoil(call: Call, i: int) -> None:
        leaves, other = getattr(call, side), partner(call, i)
        memory = np.zeros((2, 6), np.float32)
        memory[:, ::2], memory[:, 1::2] = leaves[i], leaves[other]
        leaves[i], leaves[other] = memory[:, ::2], memory[:, 1::2]

    return spoil


def filled(value: float) -> Callable[[Array_], Array_]:
    def convert(x: Array_) -> Array_:
        x.flat[4] = value
        return x

    return convert


def tie_counters(call: Call, i: int) -> None:
    call.counters["skipped"] = call.counters["step"]


def counter_in(side: str) -> Callable[[Call, int], None]:
    """The step counter lies in the memory of a leaf."""

    def spoil(call: Call, i: int) -> None:
        leaves = getattr(call, side)
        memory = np.zeros(8, np.float32)
        memory[:6] = leaves[i].ravel()
        leaves[i] = memory[:6].reshape(2, 3)
        call.counters["step"] = memory[4:6].view(np.int64)[0:1].reshape(())

    return spoil


def in_format(dtype: Any) -> Callable[[Call, int], None]:
    """All arrays of a leaf have a format, or the velocity float32 for a short one."""

    def spoil(call: Call, i: int) -> None:
        everywhere(as_type(dtype))(call, i)
        if call.velocities is not None and np.dtype(dtype).itemsize == 2:
            call.velocities[i] = call.velocities[i].astype(np.float32)

    return spoil
