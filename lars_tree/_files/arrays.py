"""Leaves and elements: arrays of any library as numpy arrays that can be written, and back.

A leaf is looked at first (`check`), and copied to CPU memory only when its turn comes to be written
(`fetch`): memory is bounded by the largest leaf.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Backend, Values
from lars_tree._core.wrapper import unwrap
from lars_tree.errors import Line, Path

Array = np.ndarray[Any, Any]


class Entry(NamedTuple):
    """What will be written under a name: elements in C order and little-endian."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    leaf: Any

    def fetch(self) -> Array:
        """The elements, in CPU memory and contiguous."""
        backend = _backends.find(self.leaf)
        assert backend is not None
        if backend.name == "torch":  # whose own numpy() lacks bfloat16
            return _of_torch(backend, self.leaf, self.dtype)
        return np.asarray(backend.to_numpy(self.leaf), dtype=self.dtype, order="C")

    @property
    def nbytes(self) -> int:
        """The bytes of the elements."""
        return prod(self.shape) * self.dtype.itemsize


class Lazy(Entry):
    """An entry of which only the dtype and the shape are known: `leaf` makes the elements."""

    def fetch(self) -> Array:
        """The elements, made now; they are kept nowhere."""
        return np.asarray(self.leaf(), dtype=self.dtype, order="C")


def check(leaves: Mapping[str, tuple[Path, Any]]) -> dict[str, Entry]:
    """What is to be written for these (path, leaf) pairs; nothing is copied yet.

    Raises:
        LeafError: something that is no array, or one without elements to write.
        DtypeError: elements of a type that numpy and ml_dtypes do not know.
    """
    entries: dict[str, Entry] = {}
    faults: dict[type[errors.LarsTreeError], list[Line]] = {}
    for name, (path, leaf) in leaves.items():
        x = unwrap(leaf)
        text = _fault(x)
        if text:
            faults.setdefault(errors.LeafError, []).append((path, text))
            continue
        dtype = _dtype(x)
        if dtype is None:
            text = f"expected numbers or truth values, got {x.dtype}"
            faults.setdefault(errors.DtypeError, []).append((path, text))
            continue
        entries[name] = Entry(dtype, tuple(map(int, x.shape)), x)
    for kind, lines in faults.items():
        raise errors.error(kind, "tree", "tree holds something that cannot be saved", lines)
    return entries


def _fault(x: Any) -> str | None:
    backend = _backends.find(x)
    if backend is None:
        return f"expected an array, got {errors.describe(x)}"
    fault = backend.fault(x)
    if fault:
        return f"expected dense data, got {fault}"
    # Dask computes when it is asked to; a tracer has no elements, a shard only some of them.
    if backend.name != "dask" and backend.values(x) is Values.TRACED:
        return "expected elements, got an array that is traced or sharded: gather it first"
    if not all(isinstance(length, int) for length in x.shape):
        return f"expected a known shape, got {x.shape}"
    return None


def _dtype(x: Any) -> np.dtype[Any] | None:
    """The dtype of an array of any library, little-endian; None if it is not one of numbers."""
    known = isinstance(x.dtype, np.dtype)
    dtype = x.dtype if known else dtype_named(str(x.dtype).rpartition(".")[2])
    if dtype is None or not (dtype.kind in "biufc" or is_extension(dtype)):
        return None
    return dtype.newbyteorder("<")


def is_extension(dtype: np.dtype[Any]) -> bool:
    """Whether it is a type of ml_dtypes, such as bfloat16."""
    return dtype.isbuiltin == 2


def dtype_named(name: str) -> np.dtype[Any] | None:
    """The dtype of numpy or ml_dtypes that has this name."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        scalar = getattr(ml_dtypes, name, None)
        return None if scalar is None else np.dtype(scalar)


def _of_torch(backend: Backend, x: Any, dtype: np.dtype[Any]) -> Array:
    x = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not x.numel():
        return np.empty(x.shape, dtype)
    # Not by numpy(): that makes the storage of the user's tensor one that can never be resized.
    memory = backend.memory(x)
    assert memory is not None
    elements: Array = memory.reshape(-1).view(dtype).reshape(memory.shape)
    return elements


def fill_torch(size: int, fill: Callable[[Array], Array]) -> Any:
    """A tensor of which fill(memory) has written the elements, to this many bytes.

    The memory is torch's own: tensors over that of numpy take a slower way in updates.

    Raises:
        ValueError: torch does not have the dtype of what `fill` returned.
    """
    import torch

    tensor = torch.empty(size, dtype=torch.uint8)
    bytes_ = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    x = fill(np.ctypeslib.as_array(bytes_) if size else np.empty(0, np.uint8))
    dtype = getattr(torch, x.dtype.name, None)
    if dtype is None:
        raise ValueError(f"torch has no {x.dtype}: load it as numpy")
    return tensor.view(dtype).reshape(x.shape)


def to_torch(x: Array) -> Any:
    """The same elements as a tensor.

    Raises:
        ValueError: torch has no such dtype.
    """

    def fill(memory: Array) -> Array:
        elements: Array = memory.view(_native(x.dtype)).reshape(x.shape)
        elements[...] = x
        return elements

    return fill_torch(x.nbytes, fill)


def to_jax(x: Array) -> Any:
    """The same elements as a JAX array.

    Raises:
        ValueError: JAX would round them to a shorter dtype.
    """
    import jax.numpy as jnp
    from jax.dtypes import canonicalize_dtype

    dtype = _native(x.dtype)
    if canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"JAX has no {dtype} now: set jax_enable_x64, or load it as numpy")
    return jnp.asarray(x.astype(dtype, copy=False))


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in the byte order of this machine."""
    return dtype.newbyteorder("=")
