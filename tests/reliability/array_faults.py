"""Leaves of numpy that are refused, and unusual ones that are updated like all others."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any
from unittest.mock import MagicMock, Mock

import ml_dtypes
import numpy as np
import pandas

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
from tests.reliability import bad_arrays as bad
from tests.reliability.bad_arrays import (
    always,
    as_type,
    crossed,
    filled,
    interleaved,
    reshaped,
    shifted,
    tied,
)
from tests.reliability.calls import LARS, UPDATE, Fault, counter, each, everywhere, leaf, weights

Convert = Callable[[Any], Any]
NEW, HERE, INTO = ("new",), ("in place",), ("into out",)
WRITES = (*HERE, *INTO)

# Not arrays.
OBJECTS: dict[str, Convert] = {
    "an object": lambda x: object(),
    "a string": always("1.0"),
    "bytes": lambda x: x.tobytes(),
    "a bytearray": lambda x: bytearray(x.tobytes()),
    "a memoryview": lambda x: memoryview(x),
    "a bool": always(True),
    "a class": always(np.ndarray),
    "a function": always(len),
    "a generator": lambda x: iter(x),
    "a set": lambda x: {1.0},
    "a range": always(range(6)),
    "an ellipsis": always(...),
    "a fraction": lambda x: Fraction(1, 2),
    "a mock": lambda x: Mock(spec=np.ndarray),
    "a magic mock": lambda x: MagicMock(spec=np.ndarray),
    "a proxy": bad.Proxy,
    "a weak proxy": bad.weak,
    "a dead weak proxy": bad.dead,
    "something with __array__": lambda x: bad.Claims(),
    "something that raises": lambda x: bad.Raises(),
    "a data frame": pandas.DataFrame,
    "a series": lambda x: pandas.Series(x.ravel()),
    "a masked array": lambda x: np.ma.masked_less(x, 0),
}
MASKED = "a masked array"
UNMASKED = {name: f for name, f in OBJECTS.items() if name != MASKED}
# Nodes, where the weights have a leaf.
NODES: dict[str, Convert] = {
    "a list of numbers": lambda x: x.ravel().tolist(),
    "a nested list": lambda x: x.tolist(),
    "an empty list": lambda x: [],
    "an empty dict": lambda x: {},
    "a dict": lambda x: {"x": x},
    "a tuple": lambda x: (x,),
}
DTYPES: dict[str, Convert] = {
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


def shapes(*given: tuple[int, ...]) -> dict[str, Convert]:
    return {str(shape): reshaped(*shape) for shape in given}


# No array of these shapes broadcasts to (2, 3); all of the others do.
SHAPES = shapes((3, 2), (2, 2), (1, 2, 3), (2, 3, 1), (6,), (2,), (0,), (0, 3), (2, 0), (4, 3))
BROADCAST = shapes((3,), (1, 3), (2, 1), (1,), ())
ALL_SHAPES = {**SHAPES, **BROADCAST}
OF_W = {name: f for name, f in ALL_SHAPES.items() if name != "(1, 2, 3)"}
OTHER_DTYPES = {
    **DTYPES,
    **{name: as_type(name) for name in ("f8", "f2", "g", "c8")},
    "bfloat16": as_type(ml_dtypes.bfloat16),
    "the other byte order": bad.swapped,
}
READ_ONLY = {
    "read-only": bad.read_only,
    "mapped read-only": bad.mapped("r"),
    "mapped read-only, but not marked": bad.lying_map,
    "repeating a row": bad.repeated,
    "overlapping itself": bad.sliding,
}
NONFINITE = {str(x): filled(x) for x in (np.nan, np.inf, -np.inf)}


def guarded(side: str) -> Any:
    return lambda convert: leaf(side, convert, nonfinite="raise")


def pairs(side: str) -> dict[str, Any]:
    """Two leaves of one argument that share memory."""
    return {"tied": tied(side), "shifted": shifted(side), "shifted by 5": shifted(side, 5)}


FAULTS = [
    *each("dcdw is", "gs", OBJECTS, LeafError, "dcdw"),
    *each("dcdw is", "gs", NODES, StructureError, "dcdw"),
    *each("dcdw has dtype", "gs", DTYPES, DtypeError, "dcdw"),
    *each("dcdw has shape", "gs", SHAPES, ShapeError, "dcdw"),
    *each("dcdw has shape", "gs", BROADCAST, ShapeError, "dcdw", functions=(LARS,)),
    *each("dcdw has", guarded("gs"), NONFINITE, NonFiniteError, "dcdw"),
    Fault("dcdw is complex", leaf("gs", as_type(complex)), DtypeError, "dcdw"),
    Fault("dcdw is a complex number", leaf("gs", always(1j)), DtypeError, "dcdw"),
    Fault("dcdw is a numpy bool", leaf("gs", always(np.True_)), DtypeError, "dcdw"),
    Fault("dcdw is a tensor", leaf("gs", bad.torch_tensor), BackendError, "dcdw"),
    Fault("dcdw is 0.5", leaf("gs", always(0.5)), ShapeError, "dcdw", functions=(LARS,)),
    *each("w is", weights, OBJECTS, LeafError, "w"),
    *each("w has dtype", weights, DTYPES, DtypeError, "w"),
    *each("w has shape", weights, OF_W, ShapeError, "dcdw"),
    *each("w has", guarded("ws"), NONFINITE, NonFiniteError, "dcdw"),
    Fault("w is complex", weights(as_type(complex)), DtypeError, "dcdw"),
    Fault("w is a number", weights(always(1.0)), LeafError, "w"),
    Fault("w is a complex number", weights(always(1j)), LeafError, "w"),
    Fault("w is None", weights(always(None)), StructureError, "dcdw", functions=(UPDATE,)),
    Fault("w is None", weights(always(None)), StructureError, "state", functions=(LARS,)),
    Fault("w is a tensor", weights(bad.torch_tensor), BackendError, "dcdw"),
    *each("w is", "ws", READ_ONLY, OutError, "out", HERE),
    *(Fault(f"w is {n}", spoil, OutError, "out", HERE) for n, spoil in pairs("ws").items()),
    *(Fault(f"out is {n}", spoil, OutError, "out", INTO) for n, spoil in pairs("outs").items()),
    *each("out is", "outs", UNMASKED, LeafError, "out", INTO),
    *each("out is", "outs", NODES, StructureError, "out", INTO),
    *each("out has dtype", "outs", OTHER_DTYPES, OutError, "out", INTO),
    *each("out has shape", "outs", ALL_SHAPES, OutError, "out", INTO),
    *each("out is", "outs", READ_ONLY, OutError, "out", INTO),
    Fault("out is masked", leaf("outs", OBJECTS[MASKED]), OutError, "out", INTO),
    Fault("out is None", leaf("outs", always(None)), LeafError, "out", INTO),
    Fault("out is a number", leaf("outs", always(1.0)), LeafError, "out", INTO),
    Fault("out is a scalar", leaf("outs", always(np.float32(1))), OutError, "out", INTO),
    Fault("out is a tensor", leaf("outs", bad.torch_tensor), BackendError, "out", INTO),
]
COUNTERS: dict[str, Convert] = {
    "an int": int,
    "None": always(None),
    "a string": always("3"),
    "a float": as_type(float),
    "a bool": as_type(bool),
    "complex": as_type(complex),
    "short": as_type(np.int16),
    "an object": as_type(object),
    "a date": as_type("M8[s]"),
    "a vector": lambda x: x[None],
    "a list": lambda x: [x],
    "masked": np.ma.masked_array,
    "a proxy": bad.Proxy,
}
FIXED = {"read-only": bad.read_only, "a scalar": lambda x: x[()]}
SHARED = {
    **{f"velocity is {n}": spoil for n, spoil in pairs("velocities").items()},
    "velocity is shifted from out": crossed("velocities", "outs"),
    "skipped is step": bad.tie_counters,
    "step in out": bad.counter_in("outs"),
    "step in velocity": bad.counter_in("velocities"),
}


def of(name: str) -> Any:
    return lambda convert: counter(name, convert)


VELOCITY = {"functions": (LARS,)}
STATES = [
    *each("velocity is", "velocities", OBJECTS, LeafError, "state", **VELOCITY),
    *each("velocity is", "velocities", NODES, StructureError, "state", **VELOCITY),
    *each("velocity has dtype", "velocities", OTHER_DTYPES, StateError, "state", **VELOCITY),
    *each("velocity has shape", "velocities", ALL_SHAPES, StateError, "state", **VELOCITY),
    *each("velocity is", "velocities", READ_ONLY, OutError, "state", WRITES, (LARS,)),
    *each(
        "velocity is",
        "velocities",
        {"None": always(None), "0.0": always(0.0)},
        LeafError,
        "state",
        **VELOCITY,
    ),
    *each(
        "velocity is",
        "velocities",
        {"a tensor": bad.torch_tensor},
        BackendError,
        "state",
        **VELOCITY,
    ),
    *(Fault(n, spoil, OutError, "state", WRITES, (LARS,)) for n, spoil in SHARED.items()),
    *(
        fault
        for name in ("step", "skipped")
        for fault in (
            *each(f"{name} is", of(name), COUNTERS, StateError, "state", **VELOCITY),
            *each(f"{name} is", of(name), FIXED, OutError, "state", WRITES, (LARS,)),
        )
    ),
]

# Unusual inputs that are valid.
LAYOUTS: dict[str, Convert] = {
    "in Fortran order": np.asfortranarray,
    "strided": bad.strided,
    "backwards": bad.backwards,
    "unaligned": bad.unaligned,
    "a field of records": bad.in_record,
    "of a subclass": lambda x: x.view(bad.Subclass),
    "a matrix": lambda x: x.view(np.matrix),
    "an Array": Array,
    "mapped": bad.mapped("r+"),
    "mapped privately": bad.mapped("c"),
    "of the other byte order": bad.swapped,
}
READ: dict[str, Convert] = {
    **LAYOUTS,
    "read-only": bad.read_only,
    "mapped read-only": bad.mapped("r"),
    "mapped read-only but": bad.lying_map,
    "repeating a row": bad.repeated,
    "overlapping itself": bad.sliding,
}
NUMBERS: dict[str, Convert] = {
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


TYPES = {str(np.dtype(x)): as_type(x) for x in FORMATS}
COMPLEX = {x: as_type(x) for x in ("c8", "c16", "G")}
# The dtype of a result is that of w, and new arrays have the byte order of the machine.
OURS = {name: f for name, f in LAYOUTS.items() if name != "of the other byte order"}
OURS_READ = {name: f for name, f in READ.items() if name != "of the other byte order"}
GOOD = [
    *each("dcdw is", "gs", READ, None),
    *each("dcdw is", "gs", NUMBERS, None, functions=(UPDATE,)),
    *each("dcdw is of", "gs", TYPES, None),
    *(Fault(f"all are of {dtype}", bad.in_format(dtype), None) for dtype in FORMATS),
    *each("all are", everywhere, COMPLEX, None),
    *each("w is", "ws", OURS_READ, None, "", (*NEW, *INTO)),
    *each("w is", "ws", OURS, None, "", HERE),
    *each("out is", "outs", OURS, None, "", INTO),
    *each("velocity is", "velocities", OURS, None, **VELOCITY),
    *(Fault(f"w is {n}", spoil, None, "", (*NEW, *INTO)) for n, spoil in pairs("ws").items()),
    *(Fault(f"dcdw is {n}", spoil, None) for n, spoil in pairs("gs").items()),
    *(Fault(f"{side} interleaved", interleaved(side), None) for side in ("ws", "gs")),
    Fault("out interleaved", interleaved("outs"), None, modes=WRITES),
    Fault("velocity interleaved", interleaved("velocities"), None, **VELOCITY),
    *(
        Fault(
            f"{one} and {other} by {by} overlaps",
            crossed(one, other, by),
            None,
            "",
            modes,
            functions,
        )
        for one, other, modes, functions in (
            ("gs", "outs", WRITES, (UPDATE, LARS)),
            ("gs", "ws", WRITES, (UPDATE, LARS)),
            ("ws", "outs", INTO, (UPDATE, LARS)),
            ("gs", "velocities", WRITES, (LARS,)),
        )
        for by in (0, 1, 5)
    ),
    Fault("dcdw is None", leaf("gs", always(None)), None),
]
