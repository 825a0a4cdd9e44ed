"""JAX arrays in CPU memory: which of them are read as numpy arrays, and how new ones are made."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_tree._backends.base import MOST_AXES
from lars_tree._memory import NumpyArray

# What the kernel steps.
_DTYPES = frozenset(
    np.dtype(x)
    for x in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
)
# JAX keeps memory that is aligned to this many bytes as it is, and copies other memory.
_ALIGNMENT = 64
# In bytes: below this size, a copy is faster than allocating aligned memory.
_LONG = 2**16


def device_to_view(x: Any) -> Any:
    """The CPU device of an array that can be read as a numpy array; None for all other objects.

    A tracer is of none of the classes that derive from `jax.Array`.
    """
    if not issubclass(type(x), jax.Array) or x.dtype not in _DTYPES or x.ndim > MOST_AXES:
        return None
    return None if x.is_deleted() else _cpu_device(x.sharding)


@lru_cache(256)
def _cpu_device(sharding: Any) -> Any:
    """The CPU device that has all of an array, if it is one of this process."""
    devices = list(sharding.device_set)
    if len(devices) > 1 or not (sharding.is_fully_addressable and sharding.is_fully_replicated):
        return None
    return devices[0] if devices[0].platform == "cpu" else None


def empty_like(x: jax.Array) -> NumpyArray:
    """New memory for an array; a long one is aligned, so that JAX need not copy it."""
    size = x.dtype.itemsize * math.prod(x.shape)
    if size < _LONG:
        return np.empty(x.shape, x.dtype)
    memory: NumpyArray = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    memory = memory[start : start + size].view(x.dtype)
    return memory.reshape(x.shape)


def copy(x: jax.Array) -> NumpyArray:
    """The elements in such memory."""
    new = empty_like(x)
    new[...] = np.asarray(x)
    return new


def put(xs: list[Any], sharding: Any, committed: bool) -> list[jax.Array]:
    """Numpy arrays as JAX arrays that are there, and may be bound to it.

    They may share the memory, which nobody may write to any more. One call for many arrays takes
    half the time of one for each.
    """
    (device,) = sharding.device_set
    with jax.enable_x64(True), jax.default_device(device):
        new: list[jax.Array] = jax.device_put(xs, sharding if committed else None)
        return new
