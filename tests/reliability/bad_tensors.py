"""Tensors of torch that are refused, and unusual ones that are updated like all others."""

from __future__ import annotations

import ctypes
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lars_tree import (
    BackendError,
    DtypeError,
    LeafError,
    NonFiniteError,
    OutError,
    ShapeError,
    StateError,
)
from tests.reliability import bad_arrays as arrays
from tests.reliability.bad_arrays import WRITES, always, partner, tied
from tests.reliability.calls import LARS, UPDATE, Call, Fault, counter, everywhere, leaf, weights

SHAPES = arrays.SHAPES


def valid(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.copy())


def new_counter(value: int) -> Tensor:
    return torch.tensor(value)


def numbers(x: Any) -> tuple[str, np.ndarray]:
    if type(x) in (float, int):
        return "", np.array(x, np.float64)
    x = x.x if type(x) is Wrapper else x.detach().as_subclass(Tensor)
    name = str(x.real.dtype if x.is_complex() else x.dtype).removeprefix("torch.")
    wide = x.resolve_conj().resolve_neg()
    wide = wide.to(torch.complex128 if x.is_complex() else torch.float64, copy=True)
    return name if name in ("float16", "bfloat16", "float32") else "float64", wide.numpy()


def strided(x: Tensor) -> Tensor:
    wide = torch.full((2, 6), 7, dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def seen(x: Any) -> Any:
    """What a refused call must not change, with the counter by which autograd sees changes."""
    if isinstance(x, np.ndarray):
        return arrays.seen(x)
    is_dense = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided
    if not is_dense or x.is_nested:
        return id(x)
    facts = id(x), x.dtype, x.shape, x.requires_grad, id(x.grad), x.is_inference()
    if x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_zerotensor(x):
        return facts
    if torch._is_functional_tensor(x):
        return facts
    storage = x.untyped_storage()
    memory = ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
    version = None if x.is_inference() else x._version
    return facts, x.stride(), x.data_ptr(), version, memory


def quietly(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """make, without torch's warnings that a class is a prototype."""

    def convert(x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(x)

    return convert


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def halved(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes // 2)
    return x


def escaped(x: Tensor) -> Tensor:
    found: list[Tensor] = []
    torch.func.vmap(lambda y: (found.append(y), y)[1])(x.expand(4, *x.shape))
    return found[0]


def escaped_from_grad(x: Tensor) -> Tensor:
    found: list[Tensor] = []
    torch.func.grad(lambda y: (found.append(y), y.sum())[1])(x)
    return found[0]


def fake(x: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


def functional_subclass(x: Tensor) -> Tensor:
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(x)


def read_only_map(x: Tensor) -> Tensor:
    return torch.from_numpy(arrays.lying_map(x.numpy()))


def mapped_file(shared: bool) -> Callable[[Tensor], Tensor]:
    def convert(x: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile() as file:
            file.write(x.numpy().tobytes())
            file.flush()
            found = torch.from_file(file.name, shared, x.numel(), dtype=x.dtype)
        return found.view(x.shape)

    return convert


def jax_array(x: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(x.numpy())


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


class Subclass(Tensor):
    pass


class Wrapper(Tensor):
    """A subclass without memory of its own, as libraries make them."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def bare(y: Any) -> Any:
            return y.x if isinstance(y, Wrapper) else y

        args, kwargs = torch.utils._pytree.tree_map(bare, (args, kwargs or {}))
        found = function(*args, **kwargs)
        is_new = isinstance(found, Tensor) and not any(found is y for y in args)
        return Wrapper(found) if is_new else found


def shifted(side: str, by: int = 1) -> Callable[[Call, int], None]:
    return crossed(side, side, by)


def crossed(one: str, other: str, by: int) -> Callable[[Call, int], None]:
    """A leaf overlaps with the leaf of an argument at another path."""

    def spoil(call: Call, i: int) -> None:
        ours, theirs, k = getattr(call, one), getattr(call, other), partner(call, i)
        memory = torch.zeros(12)
        views = [memory[start : start + 6].view(2, 3) for start in (0, by)]
        views[0].copy_(theirs[k])
        views[1].copy_(ours[i])
        theirs[k], ours[i] = views

    return spoil


def tied_data(side: str) -> Callable[[Call, int], None]:
    """Two tensors have one storage."""

    def spoil(call: Call, i: int) -> None:
        leaves = getattr(call, side)
        leaves[i] = leaves[partner(call, i)].detach()

    return spoil


def differentiable(spoil: Callable[[Call, int], None]) -> Callable[[Call, int], None]:
    def spoiled(call: Call, i: int) -> None:
        spoil(call, i)
        call.options["stop_gradients"] = False

    return spoiled


def as_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


def reshaped(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(np.resize(x.numpy(), shape))


def many_axes(x: Tensor) -> Tensor:
    return x.view((*x.shape, *[1] * 63))


# Tensors that cannot be computed with.
FAULTY: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse by rows": quietly(lambda x: x.to_sparse_csr()),
    "sparse by columns": quietly(lambda x: x.to_sparse_csc()),
    "sparse by blocks": quietly(lambda x: x.to_sparse_bsr((1, 1))),
    "of mkldnn": lambda x: x.to_mkldnn(),
    "nested": quietly(lambda x: torch.nested.nested_tensor([x])),
    "jagged": quietly(lambda x: torch.nested.nested_tensor([x], layout=torch.jagged)),
    "masked": quietly(lambda x: torch.masked.masked_tensor(x, x > 0)),
    "meta": lambda x: x.to("meta"),
    "freed": freed,
    "half freed": halved,
    "a zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "fake": fake,
    "functional": torch._to_functional_tensor,
    "a FunctionalTensor": functional_subclass,
    "escaped from vmap": escaped,
    "lazy": lambda x: torch.nn.UninitializedParameter(),
    "of 65 axes": many_axes,
}
DTYPES: dict[str, Callable[[Tensor], Any]] = {
    **{
        str(x): as_type(x) for x in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
    },
    **{str(x): as_type(x) for x in (torch.uint16, torch.uint32, torch.uint64, torch.bool)},
    **{str(x): as_type(x) for x in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)},
    "float8_e4m3fnuz": as_type(torch.float8_e4m3fnuz),
    "complex32": quietly(as_type(torch.complex32)),
    "quantized": quietly(lambda x: torch.quantize_per_tensor(x, 0.125, 0, torch.qint8)),
    "quantized by channel": quietly(
        lambda x: torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 1, torch.quint8)
    ),
}
OBJECTS: dict[str, tuple[Callable[[Tensor], Any], type]] = {
    "an object": (lambda x: object(), LeafError),
    "a string": (always("1.0"), LeafError),
    "a storage": (lambda x: x.untyped_storage(), LeafError),
    "a module": (lambda x: torch.nn.Linear(2, 3), LeafError),
    "a proxy": (arrays.Proxy, LeafError),
    "a mock": (lambda x: arrays.Mock(spec=Tensor), LeafError),
    "a size": (always(torch.Size([2, 3])), arrays.StructureError),
    "a list": (lambda x: x.tolist(), arrays.StructureError),
    "an array": (lambda x: x.numpy().copy(), BackendError),
    "an array of jax": (jax_array, BackendError),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "conjugated": lambda x: torch.complex(x, x).conj(),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}

FAULTS = [
    *(Fault(f"dcdw is {n}", leaf("gs", f), LeafError, "dcdw") for n, f in FAULTY.items()),
    *(Fault(f"dcdw is {n}", leaf("gs", f), e, "dcdw") for n, (f, e) in OBJECTS.items()),
    *(Fault(f"dcdw is {n}", leaf("gs", f), DtypeError, "dcdw") for n, f in DTYPES.items()),
    *(Fault(f"dcdw has shape {s}", leaf("gs", reshaped(*s)), ShapeError, "dcdw") for s in SHAPES),
    Fault("dcdw is complex", leaf("gs", as_type(torch.complex64)), DtypeError, "dcdw"),
    *(
        Fault(
            f"dcdw has shape {s}", leaf("gs", reshaped(*s)), ShapeError, "dcdw", functions=(LARS,)
        )
        for s in [(3,), (1, 3), (2, 1), (1,), ()]
    ),
    *(Fault(f"w is {n}", weights(f), LeafError, "w") for n, f in FAULTY.items()),
    *(
        Fault(f"w is {n}", weights(f), e, "dcdw" if e is BackendError else "w")
        for n, (f, e) in OBJECTS.items()
        if e is not arrays.StructureError
    ),
    *(Fault(f"w is {n}", weights(f), DtypeError, "w") for n, f in DTYPES.items()),
    Fault("w is complex", weights(as_type(torch.complex64)), DtypeError, "dcdw"),
    *(
        Fault(f"w has shape {s}", weights(reshaped(*s)), ShapeError, "dcdw")
        for s in [(3, 2), (6,), (3,), (1, 3), (2, 1), (), (0,)]
    ),
    *(
        Fault(f"{name} {n}", spoil(side), OutError, "out", (mode,))
        for name, side, mode in (("w", "ws", "in place"), ("out", "outs", "into out"))
        for n, spoil in {
            "repeats a row": lambda side: leaf(side, lambda x: x[:1].expand(2, 3)),
            "overlaps itself": lambda side: leaf(side, lambda x: x.as_strided((2, 3), (1, 1))),
            "is mapped read-only": lambda side: leaf(side, read_only_map),
            "is tied": tied,
            "is tied by its data": tied_data,
            "is shifted by 1": shifted,
            "is shifted by 5": lambda side: shifted(side, 5),
            "needs a gradient": lambda side: differentiable(
                leaf(side, lambda x: x.requires_grad_())
            ),
        }.items()
    ),
    *(
        Fault(f"out is {n}", leaf("outs", f), OutError, "out", ("into out",))
        for n, f in FAULTY.items()
    ),
    *(
        Fault(f"out is {n}", leaf("outs", f), e, "out", ("into out",))
        for n, (f, e) in OBJECTS.items()
    ),
    *(
        Fault(f"out is {n}", leaf("outs", f), OutError, "out", ("into out",))
        for n, f in {
            **DTYPES,
            **{str(x): as_type(x) for x in (torch.float64, torch.float16, torch.bfloat16)},
            "complex": as_type(torch.complex64),
            "negated": VIEWS["negated"],
        }.items()
    ),
    *(
        Fault(f"out has shape {s}", leaf("outs", reshaped(*s)), OutError, "out", ("into out",))
        for s in [*SHAPES, (3,), (1, 3), (2, 1), (1,), ()]
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), LeafError, "state", functions=(LARS,))
        for n, f in FAULTY.items()
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), e, "state", functions=(LARS,))
        for n, (f, e) in OBJECTS.items()
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), StateError, "state", functions=(LARS,))
        for n, f in {
            **DTYPES,
            **{str(x): as_type(x) for x in (torch.float64, torch.float16, torch.bfloat16)},
            "complex": as_type(torch.complex64),
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
            "repeats a row": leaf("velocities", lambda x: x[:1].expand(2, 3)),
            "overlaps itself": leaf("velocities", lambda x: x.as_strided((2, 3), (1, 1))),
            "is mapped read-only": leaf("velocities", read_only_map),
            "is tied": tied("velocities"),
            "is shifted": shifted("velocities"),
            "overlaps out": crossed("velocities", "outs", 1),
            "is negated": leaf("velocities", VIEWS["negated"]),
        }.items()
    ),
    *(
        Fault(f"{name} is {n}", counter(name, f), StateError, "state", functions=(LARS,))
        for name in ("step", "skipped")
        for n, f in {
            "an int": int,
            "a float": lambda x: x.double(),
            "a bool": lambda x: x.bool(),
            "short": lambda x: x.short(),
            "unsigned": lambda x: x.to(torch.uint32),
            "a vector": lambda x: x[None],
            "meta": lambda x: x.to("meta"),
            "sparse": lambda x: x[None].to_sparse(),
            "freed": freed,
        }.items()
    ),
]


def nonfinite(x: float) -> list[Fault]:
    def convert(t: Tensor) -> Tensor:
        t[1, 1] = x
        return t

    return [
        Fault(f"{side} has {x}", leaf(side, convert, nonfinite="raise"), NonFiniteError, "dcdw")
        for side in ("gs", "ws")
    ]


def conjugated(call: Call, i: int) -> None:
    everywhere(as_type(torch.complex64))(call, i)
    leaf("outs", torch.conj)(call, i)


FAULTS.append(Fault("out is conjugated", conjugated, OutError, "out", ("into out",)))
FAULTS += nonfinite(float("nan")) + nonfinite(float("inf"))

LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": strided,
    "at an offset": lambda x: torch.cat([torch.ones(1), x.flatten()])[1:].view(2, 3),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "a parameter with a gradient": torch.nn.Parameter,
    "of a subclass": lambda x: x.as_subclass(Subclass),
    "an imaginary part": lambda x: torch.complex(x, x).imag,
    "in a file": mapped_file(True),
    "in a private file": mapped_file(False),
    "in shared memory": lambda x: x.clone().share_memory_(),
    "of numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "a wrapper": Wrapper,
}
READ = {
    **LAYOUTS,
    "not a leaf": lambda x: x.clone().requires_grad_() * 1,
    "repeating a row": lambda x: x[:1].expand(2, 3),
    "overlapping itself": lambda x: x.as_strided((2, 3), (1, 1)),
    "mapped read-only": read_only_map,
    "negated": VIEWS["negated"],
    "made for inference": inference,
    "escaped from grad": escaped_from_grad,
}
FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def in_format(dtype: torch.dtype) -> Callable[[Call, int], None]:
    def spoil(call: Call, i: int) -> None:
        everywhere(as_type(dtype))(call, i)
        if call.velocities is not None and dtype.itemsize == 2:
            call.velocities[i] = call.velocities[i].float()

    return spoil


GOOD = [
    *(Fault(f"dcdw is {n}", leaf("gs", f), None) for n, f in READ.items()),
    *(
        Fault(f"dcdw is {n}", leaf("gs", f), None, functions=(UPDATE,))
        for n, f in {
            "a number": always(0.5),
            "an int": always(1),
            **{f"of shape {s}": reshaped(*s) for s in [(), (3,), (1, 3), (2, 1)]},
        }.items()
    ),
    *(Fault(f"dcdw is of {f}", leaf("gs", as_type(f)), None) for f in FORMATS),
    *(Fault(f"all are of {f}", in_format(f), None) for f in FORMATS),
    *(
        Fault(f"all are {f}", everywhere(as_type(f)), None)
        for f in (torch.complex64, torch.complex128)
    ),
    Fault("all are conjugated", everywhere(VIEWS["conjugated"]), None, modes=("new",)),
    *(Fault(f"w is {n}", leaf("ws", f), None, modes=("new", "into out")) for n, f in READ.items()),
    *(Fault(f"w is {n}", leaf("ws", f), None, modes=("in place",)) for n, f in LAYOUTS.items()),
    *(Fault(f"out is {n}", leaf("outs", f), None, modes=("into out",)) for n, f in LAYOUTS.items()),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), None, functions=(LARS,))
        for n, f in LAYOUTS.items()
    ),
    Fault("w is tied", tied("ws"), None, modes=("new", "into out")),
    Fault("w is shifted", shifted("ws"), None, modes=("new", "into out")),
    Fault("dcdw is tied", tied("gs"), None),
    *(
        Fault(f"dcdw and {side} by {by} overlaps", crossed("gs", side, by), None, modes=WRITES)
        for side in ("outs", "ws")
        for by in (0, 1, 5)
    ),
    *(
        Fault(f"w and out by {by} overlaps", crossed("ws", "outs", by), None, modes=("into out",))
        for by in (0, 1, 5)
    ),
    Fault("dcdw is None", leaf("gs", always(None)), None),
]
