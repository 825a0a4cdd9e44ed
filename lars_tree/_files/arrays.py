"""Conversion of leaves: from arrays of any library to numpy arrays that can be written, and back.

All leaves are checked first. Each leaf is copied to CPU memory only when it is written, so
the extra memory is at most the size of the largest leaf.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Values
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.wrapper import unwrap
from lars_tree.errors import Line, Path


class Entry(NamedTuple):
    """An array to write, or an array in a file. The dtype is little-endian."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], NumpyArray]

    def fetch(self) -> NumpyArray:
        """The elements in C order."""
        return np.asarray(self.read(), dtype=self.dtype, order="C")


def check(leaves: Mapping[str, tuple[Path, Any]]) -> dict[str, Entry]:
    """The entries to write for these (path, leaf) pairs. Nothing is copied yet."""
    entries: dict[str, Entry] = {}
    faults: dict[type[errors.LarsTreeError], list[Line]] = {}
    for name, (path, leaf) in leaves.items():
        x = unwrap(leaf)
        fault = _fault(x)
        if fault:
            faults.setdefault(errors.LeafError, []).append((path, fault))
        elif dtype := _dtype(x):
            entries[name] = Entry(dtype, tuple(map(int, x.shape)), partial(_to_numpy, x, dtype))
        else:
            fault = f"expected numbers or bools, got {x.dtype}"
            faults.setdefault(errors.DtypeError, []).append((path, fault))
    for kind, lines in faults.items():
        raise errors.error(kind, "tree", "tree has leaves that cannot be saved", lines)
    return entries


def _fault(x: Any) -> str | None:
    backend = _backends.find(x)
    if backend is None:
        return errors.not_an_array(x)
    fault = backend.fault(x)
    if fault:
        return f"expected dense data, got {fault}"
    # A tracer has no elements, a shard only a part of them. Dask arrays are computed on writing.
    if backend.name != "dask" and backend.values(x) is Values.TRACED:
        return "expected elements, got an array that is traced or sharded: gather it first"
    if not all(isinstance(length, int) for length in x.shape):
        return f"expected a known shape, got {x.shape}"
    return None


def _dtype(x: Any) -> np.dtype[Any] | None:
    """The numpy dtype of an array of any library, little-endian; None unless numeric or bool."""
    known = isinstance(x.dtype, np.dtype)
    dtype = x.dtype if known else dtype_named(str(x.dtype).rpartition(".")[2])
    if dtype is None or not (dtype.kind in "biufc" or is_extension(dtype)):
        return None
    return little_endian(dtype)


def little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in little-endian order, marked "<" only on big-endian machines.

    The native kernel does not support dtypes with an explicit byte order.
    """
    dtype = dtype.newbyteorder("<")
    return dtype.newbyteorder("=") if dtype.isnative else dtype


def is_extension(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype comes from ml_dtypes, such as bfloat16."""
    return dtype.isbuiltin == 2


def dtype_named(name: str) -> np.dtype[Any] | None:
    """The dtype of numpy or ml_dtypes that has this name."""
    try:
        return np.dtype(name)
    except TypeError:
        with errors.requiring(f"dtype {name}", "'lars-tree[io]'"):
            import ml_dtypes

        scalar = getattr(ml_dtypes, name, None)
        return None if scalar is None else np.dtype(scalar)


def _to_numpy(x: Any, dtype: np.dtype[Any]) -> NumpyArray:
    backend = _backends.find(x)
    assert backend is not None
    if backend.name != "torch":
        return backend.to_numpy(x)
    x = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not x.numel():
        return np.empty(x.shape, dtype)
    # Tensor.numpy() would not support bfloat16, and would make the storage impossible to resize.
    memory = backend.memory(x)
    assert memory is not None
    return memory.reshape(-1).view(dtype).reshape(memory.shape)


_DISABLED = "is disabled in JAX: set jax_enable_x64, or load it as numpy"


def _unsupported(dtype: np.dtype[Any], shape: tuple[int, ...], library: str) -> str | None:
    """Why a library cannot hold an array of this dtype without a change; None if it may."""
    if library == "torch":
        import torch

        return None if hasattr(torch, dtype.name) else f"torch has no {dtype}: load it as numpy"
    if library == "jax":
        from jax.dtypes import canonicalize_dtype

        is_counter = shape == () and dtype.kind in "iu"  # `to_jax` looks at its value
        if canonicalize_dtype(dtype.newbyteorder("=")) != dtype and not is_counter:
            return f"{dtype} {_DISABLED}"
    return None


def check_supported(path: object, view: Any, library: str = "numpy") -> None:
    """Raise a FileError that names each array whose dtype the library does not have."""
    faults = []
    for name in view.names:
        text = view.unsupported(name)
        if text is None and library != "numpy":
            dtype, shape = view.dtype_and_shape(name)
            text = _unsupported(dtype, shape, library)
        if text:
            faults.append((name, text))
    if faults:
        raise errors.file_faults(path, faults)


def fill_torch(size: int, fill: Callable[[NumpyArray], NumpyArray]) -> Any:
    """A tensor of this many bytes, allocated by torch; `fill` writes them and returns the array.

    Tensors in memory allocated by numpy would be updated more slowly.
    """
    import torch

    tensor = torch.empty(size, dtype=torch.uint8)
    bytes_ = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    x = fill(np.ctypeslib.as_array(bytes_) if size else np.empty(0, np.uint8))
    return tensor.view(getattr(torch, x.dtype.name)).reshape(x.shape)


def to_torch(x: NumpyArray) -> Any:
    """A tensor with the same elements."""

    def fill(memory: NumpyArray) -> NumpyArray:
        elements: NumpyArray = memory.view(x.dtype.newbyteorder("=")).reshape(x.shape)
        elements[...] = x
        return elements

    return fill_torch(x.nbytes, fill)


def to_jax(x: NumpyArray) -> Any:
    """A JAX array with the same elements; a ValueError for a number that JAX cannot hold.

    A counter that numpy saved as int64 becomes an int32, as `Lars.init` makes it of JAX arrays.
    """
    import jax.numpy as jnp
    from jax.dtypes import canonicalize_dtype

    shorter = x.astype(canonicalize_dtype(x.dtype.newbyteorder("=")), copy=False)
    if x.dtype.kind in "iu" and x.shape == () and shorter != x:
        raise ValueError(f"{x.dtype} {_DISABLED}")
    return jnp.asarray(shorter)
