"""Ways to make a tensor of torch bad or unusual; `tensor_faults.py` has the tables."""

from __future__ import annotations

import ctypes
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.reliability import bad_arrays as arrays
from tests.reliability.bad_arrays import partner
from tests.reliability.calls import Call, everywhere, leaf


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


def in_format(dtype: torch.dtype) -> Callable[[Call, int], None]:
    def spoil(call: Call, i: int) -> None:
        everywhere(as_type(dtype))(call, i)
        if call.velocities is not None and dtype.itemsize == 2:
            call.velocities[i] = call.velocities[i].float()

    return spoil


def conjugated(call: Call, i: int) -> None:
    everywhere(as_type(torch.complex64))(call, i)
    leaf("outs", torch.conj)(call, i)
