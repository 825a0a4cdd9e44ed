"""Tensors of torch that are refused, and unusual ones that are updated like all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import torch

from lars_tree import (
    BackendError,
    DtypeError,
    LeafError,
    NonFiniteError,
    OutError,
    ShapeError,
    StateError,
    StructureError,
)
from tests.reliability import bad_arrays
from tests.reliability import bad_tensors as bad
from tests.reliability.array_faults import HERE, INTO, NEW, VELOCITY, WRITES, guarded, of
from tests.reliability.bad_arrays import always, tied
from tests.reliability.bad_tensors import as_type, crossed, quietly, reshaped, shifted
from tests.reliability.calls import LARS, UPDATE, Fault, each, everywhere, leaf, weights

Convert = Callable[[Any], Any]

# Tensors that cannot be computed with.
FAULTY: dict[str, Convert] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse by rows": quietly(lambda x: x.to_sparse_csr()),
    "sparse by columns": quietly(lambda x: x.to_sparse_csc()),
    "sparse by blocks": quietly(lambda x: x.to_sparse_bsr((1, 1))),
    "of mkldnn": lambda x: x.to_mkldnn(),
    "nested": quietly(lambda x: torch.nested.nested_tensor([x])),
    "jagged": quietly(lambda x: torch.nested.nested_tensor([x], layout=torch.jagged)),
    "masked": quietly(lambda x: torch.masked.masked_tensor(x, x > 0)),
    "meta": lambda x: x.to("meta"),
    "freed": bad.freed,
    "half freed": bad.halved,
    "a zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "fake": bad.fake,
    "functional": torch._to_functional_tensor,
    "a FunctionalTensor": bad.functional_subclass,
    "escaped from vmap": bad.escaped,
    "lazy": lambda x: torch.nn.UninitializedParameter(),
    "of 65 axes": bad.many_axes,
}
DTYPES: dict[str, Convert] = {
    **{
        str(x): as_type(x) for x in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    },
    **{str(x): as_type(x) for x in (torch.int64, torch.uint16, torch.uint32)},
    **{str(x): as_type(x) for x in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)},
    **{str(x): as_type(x) for x in (torch.uint64, torch.bool)},
    "float8_e4m3fnuz": as_type(torch.float8_e4m3fnuz),
    "complex32": quietly(as_type(torch.complex32)),
    "quantized": quietly(lambda x: torch.quantize_per_tensor(x, 0.125, 0, torch.qint8)),
    "quantized by channel": quietly(
        lambda x: torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 1, torch.quint8)
    ),
}
OBJECTS: dict[str, Convert] = {
    "an object": lambda x: object(),
    "a string": always("1.0"),
    "a storage": lambda x: x.untyped_storage(),
    "a module": lambda x: torch.nn.Linear(2, 3),
    "a proxy": bad_arrays.Proxy,
    "a mock": lambda x: Mock(spec=torch.Tensor),
}
NODES: dict[str, Convert] = {
    "a size": always(torch.Size([2, 3])),
    "a list": lambda x: x.tolist(),
}
OTHERS: dict[str, Convert] = {
    "an array": lambda x: x.numpy().copy(),
    "an array of jax": bad.jax_array,
}
VIEWS: dict[str, Convert] = {
    "conjugated": lambda x: torch.complex(x, x).conj(),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


def shapes(*given: tuple[int, ...]) -> dict[str, Convert]:
    return {str(shape): reshaped(*shape) for shape in given}


def filled(value: float) -> Convert:
    return lambda x: x.index_fill_(1, torch.tensor([1]), value)


SHAPES = shapes((3, 2), (2, 2), (1, 2, 3), (2, 3, 1), (6,), (2,), (0,), (0, 3), (2, 0), (4, 3))
BROADCAST = shapes((3,), (1, 3), (2, 1), (1,), ())
ALL_SHAPES = {**SHAPES, **BROADCAST}
OF_W = {name: f for name, f in ALL_SHAPES.items() if name != "(1, 2, 3)"}
OTHER_DTYPES = {
    **DTYPES,
    **{str(x): as_type(x) for x in (torch.float64, torch.float16, torch.bfloat16)},
    "complex": as_type(torch.complex64),
}
READ_ONLY: dict[str, Convert] = {
    "mapped read-only": bad.read_only_map,
    "repeating a row": lambda x: x[:1].expand(2, 3),
    "overlapping itself": lambda x: x.as_strided((2, 3), (1, 1)),
}
NONFINITE = {str(x): filled(x) for x in (float("nan"), float("inf"))}
TRACKED: dict[str, Convert] = {"tracked by autograd": lambda x: x.requires_grad_()}


def tracked(side: str) -> Any:
    return lambda convert: bad.differentiable(leaf(side, convert))


def pairs(side: str) -> dict[str, Any]:
    return {
        "tied": tied(side),
        "tied by its data": bad.tied_data(side),
        "shifted": shifted(side),
        "shifted by 5": shifted(side, 5),
    }


FAULTS = [
    *each("dcdw is", "gs", {**FAULTY, **OBJECTS}, LeafError, "dcdw"),
    *each("dcdw is", "gs", NODES, StructureError, "dcdw"),
    *each("dcdw is", "gs", OTHERS, BackendError, "dcdw"),
    *each("dcdw is", "gs", DTYPES, DtypeError, "dcdw"),
    *each("dcdw has shape", "gs", SHAPES, ShapeError, "dcdw"),
    *each("dcdw has shape", "gs", BROADCAST, ShapeError, "dcdw", **VELOCITY),
    *each("dcdw has", guarded("gs"), NONFINITE, NonFiniteError, "dcdw"),
    Fault("dcdw is complex", leaf("gs", as_type(torch.complex64)), DtypeError, "dcdw"),
    *each("w is", weights, {**FAULTY, **OBJECTS}, LeafError, "w"),
    *each("w is", weights, OTHERS, BackendError, "dcdw"),
    *each("w is", weights, DTYPES, DtypeError, "w"),
    *each("w has shape", weights, OF_W, ShapeError, "dcdw"),
    *each("w has", guarded("ws"), NONFINITE, NonFiniteError, "dcdw"),
    Fault("w is complex", weights(as_type(torch.complex64)), DtypeError, "dcdw"),
    *each("w is", "ws", READ_ONLY, OutError, "out", HERE),
    *each("w is", tracked("ws"), TRACKED, OutError, "out", HERE),
    *(Fault(f"w is {n}", spoil, OutError, "out", HERE) for n, spoil in pairs("ws").items()),
    *each("out is", "outs", {**FAULTY, **READ_ONLY}, OutError, "out", INTO),
    *each("out is", "outs", OBJECTS, LeafError, "out", INTO),
    *each("out is", "outs", NODES, StructureError, "out", INTO),
    *each("out is", "outs", OTHERS, BackendError, "out", INTO),
    *each("out is", "outs", OTHER_DTYPES, OutError, "out", INTO),
    *each("out has shape", "outs", ALL_SHAPES, OutError, "out", INTO),
    *each("out is", tracked("outs"), TRACKED, OutError, "out", INTO),
    *(Fault(f"out is {n}", spoil, OutError, "out", INTO) for n, spoil in pairs("outs").items()),
    Fault("out is negated", leaf("outs", VIEWS["negated"]), OutError, "out", INTO),
    Fault("out is conjugated", bad.conjugated, OutError, "out", INTO),
]
COUNTERS: dict[str, Convert] = {
    "an int": int,
    "a float": lambda x: x.double(),
    "a bool": lambda x: x.bool(),
    "short": lambda x: x.short(),
    "unsigned": lambda x: x.to(torch.uint32),
    "a vector": lambda x: x[None],
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x[None].to_sparse(),
    "freed": bad.freed,
}
SHARED = {
    **{f"velocity is {n}": spoil for n, spoil in pairs("velocities").items()},
    "velocity is shifted from out": crossed("velocities", "outs", 1),
    "velocity is negated": leaf("velocities", VIEWS["negated"]),
}
STATES = [
    *each("velocity is", "velocities", {**FAULTY, **OBJECTS}, LeafError, "state", **VELOCITY),
    *each("velocity is", "velocities", NODES, StructureError, "state", **VELOCITY),
    *each("velocity is", "velocities", OTHERS, BackendError, "state", **VELOCITY),
    *each("velocity is", "velocities", OTHER_DTYPES, StateError, "state", **VELOCITY),
    *each("velocity has shape", "velocities", SHAPES, StateError, "state", **VELOCITY),
    *each("velocity has shape", "velocities", BROADCAST, StateError, "state", **VELOCITY),
    *each("velocity is", "velocities", READ_ONLY, OutError, "state", WRITES, (LARS,)),
    *(Fault(n, spoil, OutError, "state", WRITES, (LARS,)) for n, spoil in SHARED.items()),
    *each("step is", of("step"), COUNTERS, StateError, "state", **VELOCITY),
    *each("skipped is", of("skipped"), COUNTERS, StateError, "state", **VELOCITY),
]

LAYOUTS: dict[str, Convert] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": bad.strided,
    "at an offset": lambda x: torch.cat([torch.ones(1), x.flatten()])[1:].view(2, 3),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "a parameter with a gradient": torch.nn.Parameter,
    "of a subclass": lambda x: x.as_subclass(bad.Subclass),
    "an imaginary part": lambda x: torch.complex(x, x).imag,
    "in a file": bad.mapped_file(True),
    "in a private file": bad.mapped_file(False),
    "in shared memory": lambda x: x.clone().share_memory_(),
    "of numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "a wrapper": bad.Wrapper,
}
READ = {
    **LAYOUTS,
    "not a leaf": lambda x: x.clone().requires_grad_() * 1,
    "repeating a row": lambda x: x[:1].expand(2, 3),
    "overlapping itself": lambda x: x.as_strided((2, 3), (1, 1)),
    "mapped read-only": bad.read_only_map,
    "negated": VIEWS["negated"],
    "made for inference": bad.inference,
    "escaped from grad": bad.escaped_from_grad,
}

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS: dict[str, Convert] = {"0.5": always(0.5), "1": always(1)}
COMPLEX = {str(x): as_type(x) for x in (torch.complex64, torch.complex128)}
GOOD = [
    *each("dcdw is", "gs", READ, None),
    *each("dcdw is", "gs", NUMBERS, None, functions=(UPDATE,)),
    *each("dcdw has shape", "gs", BROADCAST, None, functions=(UPDATE,)),
    *each("dcdw is of", "gs", {str(x): as_type(x) for x in FORMATS}, None),
    *(Fault(f"all are of {dtype}", bad.in_format(dtype), None) for dtype in FORMATS),
    *each("all are", everywhere, COMPLEX, None),
    Fault("all are conjugated", everywhere(VIEWS["conjugated"]), None, modes=NEW),
    *each("w is", "ws", READ, None, "", (*NEW, *INTO)),
    *each("w is", "ws", LAYOUTS, None, "", HERE),
    *each("out is", "outs", LAYOUTS, None, "", INTO),
    *each("velocity is", "velocities", LAYOUTS, None, **VELOCITY),
    *(Fault(f"w is {n}", spoil, None, "", (*NEW, *INTO)) for n, spoil in pairs("ws").items()),
    *(Fault(f"dcdw is {n}", spoil, None) for n, spoil in pairs("gs").items()),
    *(
        Fault(f"{one} and {other} by {by} overlaps", crossed(one, other, by), None, "", modes)
        for one, other, modes in (
            ("gs", "outs", WRITES),
            ("gs", "ws", WRITES),
            ("ws", "outs", INTO),
        )
        for by in (0, 1, 5)
    ),
    Fault("dcdw is None", leaf("gs", always(None)), None),
]
