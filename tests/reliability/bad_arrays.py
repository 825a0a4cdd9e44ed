"""Leaves of numpy that are refused, and unusual ones that are updated like all others."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock, Mock

import ml_dtypes
import numpy as np
import pandas
from numpy.lib.stride_tricks import as_strided

from lars_tree import (
    Array,
    BackendError,
    DtypeError,
    LeafError,
    NonFiniteError,
    OutError,
    ShapeError,
    StateError,
    StructureError,
)
from tests.reliability.calls import (
    LARS,
    UPDATE,
    Call,
    Fault,
    counter,
    everywhere,
    leaf,
    weights,
)

Array_ = np.ndarray
KEPT: list[Any] = []  # the objects behind weak proxies
WRITES = ("in place", "into out")


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
    """A view whose rows are one row, and writeable."""
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


# Not arrays, with the class of the error for them as weights or gradients.
OBJECTS: dict[str, tuple[Callable[[Array_], Any], type]] = {
    "an object": (lambda x: object(), LeafError),
    "a string": (always("1.0"), LeafError),
    "bytes": (lambda x: x.tobytes(), LeafError),
    "a bytearray": (lambda x: bytearray(x.tobytes()), LeafError),
    "a memoryview": (lambda x: memoryview(x), LeafError),
    "a bool": (always(True), LeafError),
    "a class": (always(np.ndarray), LeafError),
    "a function": (always(len), LeafError),
    "a generator": (lambda x: iter(x), LeafError),
    "a set": (lambda x: {1.0}, LeafError),
    "a range": (always(range(6)), LeafError),
    "an ellipsis": (always(...), LeafError),
    "a fraction": (lambda x: __import__("fractions").Fraction(1, 2), LeafError),
    "a mock": (lambda x: Mock(spec=np.ndarray), LeafError),
    "a magic mock": (lambda x: MagicMock(spec=np.ndarray), LeafError),
    "a proxy": (Proxy, LeafError),
    "a weak proxy": (weak, LeafError),
    "a dead weak proxy": (dead, LeafError),
    "something with __array__": (lambda x: Claims(), LeafError),
    "something that raises": (lambda x: Raises(), LeafError),
    "a data frame": (pandas.DataFrame, LeafError),
    "a series": (lambda x: pandas.Series(x.ravel()), LeafError),
    "a masked array": (lambda x: np.ma.masked_less(x, 0), LeafError),
    "a list of numbers": (lambda x: x.ravel().tolist(), StructureError),
    "a nested list": (lambda x: x.tolist(), StructureError),
    "an empty list": (lambda x: [], StructureError),
    "an empty dict": (lambda x: {}, StructureError),
    "a dict": (lambda x: {"x": x}, StructureError),
    "a tuple": (lambda x: (x,), StructureError),
}
DTYPES: dict[str, Callable[[Array_], Any]] = {
    **{f"{dtype}": as_type(dtype) for dtype in ("i1", "u1", "i2", "i4", "u4", "i8", "u8", "?")},
    **{f"{dtype}": as_type(dtype) for dtype in ("O", "S8", "U8", "V8")},
    "dates": lambda x: x.astype("i8").astype("M8[s]"),
    "durations": lambda x: x.astype("i8").astype("m8[s]"),
    "records": lambda x: np.zeros(x.shape, [("x", "f4"), ("y", "f4")]),
    "text of any length": lambda x: np.array([["a"] * 3] * 2, np.dtypes.StringDType()),
    "float8": as_type(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": as_type(ml_dtypes.float8_e5m2),
    "int4": as_type(ml_dtypes.int4),
    "bfloat16 of the other byte order": lambda x: x.astype(ml_dtypes.bfloat16).view(
        np.dtype(ml_dtypes.bfloat16).newbyteorder()
    ),
}
SHAPES = [(3, 2), (2, 2), (1, 2, 3), (2, 3, 1), (6,), (2,), (0,), (0, 3), (2, 0), (4, 3)]

# The first arguments of Fault.
FAULTS = [
    *(Fault(f"dcdw is {n}", leaf("gs", f), e, "dcdw") for n, (f, e) in OBJECTS.items()),
    *(Fault(f"dcdw has dtype {n}", leaf("gs", f), DtypeError, "dcdw") for n, f in DTYPES.items()),
    *(Fault(f"dcdw has shape {s}", leaf("gs", reshaped(*s)), ShapeError, "dcdw") for s in SHAPES),
    Fault("dcdw is complex", leaf("gs", as_type(complex)), DtypeError, "dcdw"),
    Fault("dcdw is a complex number", leaf("gs", always(1j)), DtypeError, "dcdw"),
    Fault("dcdw is a numpy bool", leaf("gs", always(np.True_)), DtypeError, "dcdw"),
    Fault("dcdw is a tensor", leaf("gs", torch_tensor), BackendError, "dcdw"),
    *(
        Fault(
            f"dcdw has shape {s}", leaf("gs", reshaped(*s)), ShapeError, "dcdw", functions=(LARS,)
        )
        for s in [(3,), (1, 3), (2, 1), (1,), ()]
    ),
    Fault("dcdw is a number", leaf("gs", always(0.5)), ShapeError, "dcdw", functions=(LARS,)),
    *(
        Fault(f"dcdw is {x}", leaf("gs", filled(x), nonfinite="raise"), NonFiniteError, "dcdw")
        for x in (np.nan, np.inf, -np.inf)
    ),
    *(
        Fault(f"w is {x}", leaf("ws", filled(x), nonfinite="raise"), NonFiniteError, "dcdw")
        for x in (np.nan, np.inf)
    ),
    *(
        Fault(f"w is {n}", weights(f), LeafError, "w")
        for n, (f, e) in OBJECTS.items()
        if e is LeafError
    ),
    *(Fault(f"w has dtype {n}", weights(f), DtypeError, "w") for n, f in DTYPES.items()),
    *(
        Fault(f"w has shape {s}", weights(reshaped(*s)), ShapeError, "dcdw")
        for s in [(3, 2), (2, 2), (6,), (3,), (1, 3), (2, 1), (), (0,), (2, 0)]
    ),
    Fault("w is complex", weights(as_type(complex)), DtypeError, "dcdw"),
    Fault("w is a number", weights(always(1.0)), LeafError, "w"),
    Fault("w is a complex number", weights(always(1j)), LeafError, "w"),
    Fault("w is None", weights(always(None)), StructureError, "dcdw", functions=(UPDATE,)),
    Fault("w is None", weights(always(None)), StructureError, "state", functions=(LARS,)),
    Fault("w is a tensor", weights(torch_tensor), BackendError, "dcdw"),
    Fault("w is read-only", leaf("ws", read_only), OutError, "out", ("in place",)),
    Fault("w is mapped read-only", leaf("ws", mapped("r")), OutError, "out", ("in place",)),
    Fault("w is mapped read-only but", leaf("ws", lying_map), OutError, "out", ("in place",)),
    Fault("w repeats a row", leaf("ws", repeated), OutError, "out", ("in place",)),
    Fault("w overlaps itself", leaf("ws", sliding), OutError, "out", ("in place",)),
    Fault("w is tied", tied("ws"), OutError, "out", ("in place",)),
    Fault("w is shifted by 1", shifted("ws"), OutError, "out", ("in place",)),
    Fault("w is shifted by 5", shifted("ws", 5), OutError, "out", ("in place",)),
    *(
        Fault(f"out is {n}", leaf("outs", f), e, "out", ("into out",))
        for n, (f, e) in OBJECTS.items()
        if n != "a masked array"
    ),
    Fault(
        "out is masked", leaf("outs", OBJECTS["a masked array"][0]), OutError, "out", ("into out",)
    ),
    Fault("out is None", leaf("outs", always(None)), LeafError, "out", ("into out",)),
    Fault("out is a number", leaf("outs", always(1.0)), LeafError, "out", ("into out",)),
    Fault("out is a scalar", leaf("outs", always(np.float32(1))), OutError, "out", ("into out",)),
    Fault("out is a tensor", leaf("outs", torch_tensor), BackendError, "out", ("into out",)),
    *(
        Fault(f"out has dtype {n}", leaf("outs", f), OutError, "out", ("into out",))
        for n, f in {
            **DTYPES,
            **{n: as_type(n) for n in ("f8", "f2", "g", "c8")},
            "bfloat16": as_type(ml_dtypes.bfloat16),
            "the other byte order": swapped,
        }.items()
    ),
    *(
        Fault(f"out has shape {s}", leaf("outs", reshaped(*s)), OutError, "out", ("into out",))
        for s in [*SHAPES, (3,), (1, 3), (2, 1), (1,), (), (2, 3, 3)]
    ),
    Fault("out is read-only", leaf("outs", read_only), OutError, "out", ("into out",)),
    Fault("out is mapped read-only", leaf("outs", mapped("r")), OutError, "out", ("into out",)),
    Fault("out is mapped read-only but", leaf("outs", lying_map), OutError, "out", ("into out",)),
    Fault("out repeats a row", leaf("outs", repeated), OutError, "out", ("into out",)),
    Fault("out overlaps itself", leaf("outs", sliding), OutError, "out", ("into out",)),
    Fault("out is tied", tied("outs"), OutError, "out", ("into out",)),
    Fault("out is shifted by 1", shifted("outs"), OutError, "out", ("into out",)),
    Fault("out is shifted by 5", shifted("outs", 5), OutError, "out", ("into out",)),
]

STATES = [
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), e, "state", functions=(LARS,))
        for n, (f, e) in OBJECTS.items()
    ),
    Fault(
        "velocity is None", leaf("velocities", always(None)), LeafError, "state", functions=(LARS,)
    ),
    Fault(
        "velocity is 0.0", leaf("velocities", always(0.0)), LeafError, "state", functions=(LARS,)
    ),
    Fault(
        "velocity is a tensor",
        leaf("velocities", torch_tensor),
        BackendError,
        "state",
        functions=(LARS,),
    ),
    *(
        Fault(
            f"velocity has dtype {n}", leaf("velocities", f), StateError, "state", functions=(LARS,)
        )
        for n, f in {
            **DTYPES,
            **{n: as_type(n) for n in ("f8", "f2", "g", "c8")},
            "bfloat16": as_type(ml_dtypes.bfloat16),
            "the other byte order": swapped,
        }.items()
    ),
    *(
        Fault(
            f"velocity has shape {s}",
            leaf("velocities", reshaped(*s)),
            StateError,
            "state",
            functions=(LARS,),
        )
        for s in [*SHAPES, (3,), (1, 3), (2, 1), (1,), ()]
    ),
    *(
        Fault(f"velocity {n}", spoil, OutError, "state", WRITES, (LARS,))
        for n, spoil in {
            "is read-only": leaf("velocities", read_only),
            "is mapped read-only": leaf("velocities", mapped("r")),
            "is mapped read-only but": leaf("velocities", lying_map),
            "repeats a row": leaf("velocities", repeated),
            "overlaps itself": leaf("velocities", sliding),
            "is tied": tied("velocities"),
            "is shifted": shifted("velocities"),
            "overlaps out": crossed("velocities", "outs"),
            "is shifted from out": crossed("velocities", "outs", 5),
        }.items()
    ),
    *(
        Fault(f"{name} is {n}", counter(name, f), StateError, "state", functions=(LARS,))
        for name in ("step", "skipped")
        for n, f in {
            "an int": int,
            "None": always(None),
            "a string": always("3"),
            "a float": lambda x: x.astype(float),
            "a bool": lambda x: x.astype(bool),
            "complex": lambda x: x.astype(complex),
            "short": lambda x: x.astype(np.int16),
            "an object": lambda x: x.astype(object),
            "a date": lambda x: x.astype("M8[s]"),
            "a vector": lambda x: x[None],
            "a list": lambda x: [x],
            "masked": np.ma.masked_array,
            "a proxy": Proxy,
        }.items()
    ),
    *(
        Fault(f"{name} is {n}", spoil, OutError, "state", WRITES, (LARS,))
        for name in ("step", "skipped")
        for n, spoil in {
            "read-only": counter(name, read_only),
            "a scalar": counter(name, lambda x: x[()]),
        }.items()
    ),
]


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


STATES += [
    Fault("skipped is step", tie_counters, OutError, "state", WRITES, (LARS,)),
    Fault("step in out", counter_in("outs"), OutError, "state", WRITES, (LARS,)),
    Fault("step in velocity", counter_in("velocities"), OutError, "state", WRITES, (LARS,)),
]

# Unusual inputs that are valid.
LAYOUTS: dict[str, Callable[[Array_], Any]] = {
    "in Fortran order": np.asfortranarray,
    "strided": strided,
    "backwards": backwards,
    "unaligned": unaligned,
    "a field of records": in_record,
    "of a subclass": lambda x: x.view(Subclass),
    "a matrix": lambda x: x.view(np.matrix),
    "an Array": Array,
    "mapped": mapped("r+"),
    "mapped privately": mapped("c"),
    "of the other byte order": swapped,
}
READ: dict[str, Callable[[Array_], Any]] = {
    **LAYOUTS,
    "read-only": read_only,
    "mapped read-only": mapped("r"),
    "mapped read-only but": lying_map,
    "repeating a row": repeated,
    "overlapping itself": sliding,
}
NUMBERS: dict[str, Callable[[Array_], Any]] = {
    "a number": always(0.5),
    "an int": always(1),
    "a big int": always(10**30),
    "a numpy number": always(np.float16(0.5)),
    "of shape ()": reshaped(),
    "of shape (3,)": reshaped(3),
    "of shape (1, 3)": reshaped(1, 3),
    "of shape (2, 1)": reshaped(2, 1),
}
FORMATS = ("f2", "f4", "f8", "g", ml_dtypes.bfloat16)


def in_format(dtype: Any) -> Callable[[Call, int], None]:
    """All arrays of a leaf have a format, or the velocity float32 for a short one."""

    def spoil(call: Call, i: int) -> None:
        everywhere(as_type(dtype))(call, i)
        if call.velocities is not None and np.dtype(dtype).itemsize == 2:
            call.velocities[i] = call.velocities[i].astype(np.float32)

    return spoil


GOOD = [
    *(Fault(f"dcdw is {n}", leaf("gs", f), None) for n, f in READ.items()),
    *(Fault(f"dcdw is {n}", leaf("gs", f), None, functions=(UPDATE,)) for n, f in NUMBERS.items()),
    *(Fault(f"dcdw is of {f}", leaf("gs", as_type(f)), None) for f in FORMATS),
    *(Fault(f"all are of {f}", in_format(f), None) for f in FORMATS),
    *(Fault(f"all are complex {f}", everywhere(as_type(f)), None) for f in ("c8", "c16", "G")),
    *(
        Fault(f"w is {n}", leaf("ws", f), None, modes=("new", "into out"))
        for n, f in READ.items()
        if "byte" not in n
    ),
    *(
        Fault(f"w is {n}", leaf("ws", f), None, modes=("in place",))
        for n, f in LAYOUTS.items()
        if "byte" not in n
    ),
    *(
        Fault(f"out is {n}", leaf("outs", f), None, modes=("into out",))
        for n, f in LAYOUTS.items()
        if "byte" not in n
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), None, functions=(LARS,))
        for n, f in LAYOUTS.items()
        if "byte" not in n
    ),
    Fault("w is tied", tied("ws"), None, modes=("new", "into out")),
    Fault("w is shifted", shifted("ws"), None, modes=("new", "into out")),
    Fault("dcdw is tied", tied("gs"), None),
    Fault("dcdw is shifted", shifted("gs"), None),
    *(Fault(f"{x} interleaved", interleaved(x), None) for x in ("ws", "gs")),
    Fault("out interleaved", interleaved("outs"), None, modes=WRITES),
    Fault("velocity interleaved", interleaved("velocities"), None, functions=(LARS,)),
    *(
        Fault(f"dcdw and {side} by {by} overlaps", crossed("gs", side, by), None, modes=WRITES)
        for side in ("outs", "ws")
        for by in (0, 1, 5)
    ),
    *(
        Fault(f"w and out by {by} overlaps", crossed("ws", "outs", by), None, modes=("into out",))
        for by in (0, 1, 5)
    ),
    *(
        Fault(
            f"dcdw and velocity by {by} overlaps",
            crossed("gs", "velocities", by),
            None,
            functions=(LARS,),
        )
        for by in (0, 1, 5)
    ),
    Fault("dcdw is None", leaf("gs", always(None)), None),
]
