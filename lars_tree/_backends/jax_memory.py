"""JAX arrays in CPU memory: read them as numpy arrays, and create them from numpy arrays."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_tree._backends.base import MAX_AXES
from lars_tree._backends.memory import NumpyArray

_DTYPES_OF_KERNEL = frozenset(
    np.dtype(x)
    for x in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
)
_ALIGNMENT = 64  # in bytes: JAX copies memory with a smaller alignment
_LONG = 2**16  # in bytes: below this size, a copy is faster than allocating aligned memory


def device_to_view(x: Any) -> Any:
    """The CPU device of an array that can be read as a numpy array; None for all other objects."""
    kind = type(x)
    # In JAX 0.8, the class of a tracer derives from `jax.Array`.
    if not issubclass(kind, jax.Array) or issubclass(kind, jax.core.Tracer):
        return None
    if x.dtype not in _DTYPES_OF_KERNEL or x.ndim > MAX_AXES:
        return None
    return None if x.is_deleted() else _cpu_device(x.sharding)


@lru_cache(256)
def _cpu_device(sharding: Any) -> Any:
    """The CPU device of this process that holds a whole array with this sharding, or None."""
    devices = list(sharding.device_set)
    if len(devices) > 1 or not (sharding.is_fully_addressable and sharding.is_fully_replicated):
        return None
    return devices[0] if devices[0].platform == "cpu" else None


def empty_like(x: jax.Array) -> NumpyArray:
    """New memory of the size of x; it is aligned if it is long, so that JAX does not copy it."""
    size = x.dtype.itemsize * math.prod(x.shape)
    if size < _LONG:
        return np.empty(x.shape, x.dtype)
    memory: NumpyArray = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    memory = memory[start : start + size].view(x.dtype)
    return memory.reshape(x.shape)


def copy(x: jax.Array) -> NumpyArray:
    new = empty_like(x)
    new[...] = np.asarray(x)
    return new


def put(xs: list[Any], sharding: Any, committed: bool) -> list[jax.Array]:
    """Convert numpy arrays to JAX arrays with this sharding, committed to it if `committed`.

    The results may share the memory of xs, which must not be written to afterwards. One call for
    many arrays takes half the time of one call for each.
    """
    (device,) = sharding.device_set
    with jax.enable_x64(True), jax.default_device(device):
        new: list[jax.Array] = jax.device_put(xs, sharding if committed else None)
        return new
