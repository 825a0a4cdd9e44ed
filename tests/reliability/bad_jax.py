"""Arrays of JAX that are refused, and unusual ones that are updated like all others."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import Mock

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
from tests.reliability.array_faults import guarded, of
from tests.reliability.bad_arrays import always, tied
from tests.reliability.calls import LARS, UPDATE, Call, Fault, each, everywhere, leaf, weights

jax.config.update("jax_enable_x64", True)
NEW = ("new",)
Array = jax.Array


def valid(x: np.ndarray) -> Array:
    return jnp.asarray(x.copy())


def new_counter(value: int) -> Array:
    return jnp.asarray(value, np.int32)


def numbers(x: Any) -> tuple[str, np.ndarray]:
    return arrays.numbers(np.asarray(x) if isinstance(x, Array) else x)


def strided(x: Any) -> Any:
    """JAX has no strided arrays: here, one on another device."""
    return x if isinstance(x, np.ndarray) else jax.device_put(x, jax.devices()[1]) * 1


def seen(x: Any) -> Any:
    if type(x) is not type(jnp.ones(1)) or x.is_deleted():
        return arrays.seen(x)
    if isinstance(x.dtype, np.dtype) and x.ndim <= 64:
        return id(x), x.dtype, x.shape, x.sharding, np.asarray(x).tobytes()
    return id(x)


def deleted(x: Array) -> Array:
    x = x + 0
    x.delete()
    return x


def donated(x: Array) -> Array:
    x = x + 0
    jax.jit(lambda y: y + 1, donate_argnums=0)(x)
    return x


def escaped(x: Array) -> Any:
    found: list[Any] = []
    jax.jit(lambda y: (found.append(y), y)[1])(x)
    return found[0]


def escaped_from_vmap(x: Array) -> Any:
    found: list[Any] = []
    jax.vmap(lambda y: (found.append(y), y)[1])(jnp.stack([x, x]))
    return found[0]


def on_device(k: int) -> Any:
    return lambda x: jax.device_put(x, jax.devices()[k])


def sharded(x: Array) -> Array:
    mesh = jax.make_mesh((2,), ("x",))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))


def as_type(dtype: Any) -> Any:
    return lambda x: x.astype(dtype)


def reshaped(*shape: int) -> Any:
    return lambda x: jnp.asarray(np.resize(np.asarray(x), shape))


FAULTY = {
    "deleted": deleted,
    "donated": donated,
    "a reference": lambda x: jax.new_ref(x),
    "of 65 axes": lambda x: x.reshape((2, 3, *[1] * 63)),
    "a shape": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    "escaped from jit": escaped,
    "escaped from vmap": escaped_from_vmap,
    "a string": always("1.0"),
    "a proxy": arrays.Proxy,
    "a mock": lambda x: Mock(spec=Array),
}
DTYPES = {
    **{str(n): as_type(n) for n in ("i1", "u1", "i2", "i4", "u4", "i8", "u8", "?")},
    "float8": as_type(jnp.float8_e4m3fn),
    "int4": as_type(jnp.int4),
    "keys": lambda x: jax.random.split(jax.random.key(0), 6).reshape(2, 3),
}
OTHERS = {
    "an array": lambda x: np.asarray(x),
    "a tensor": lambda x: arrays.torch_tensor(np.asarray(x)),
}


def two_devices(side: str) -> Any:
    """A leaf whose other arrays are on another device."""

    def spoil(call: Call, i: int) -> None:
        everywhere(on_device(1))(call, i)
        leaf(side, on_device(2))(call, i)

    return spoil


def filled(value: float) -> Any:
    return lambda x: x.at[1, 1].set(value)


def shapes(*given: tuple[int, ...]) -> dict[str, Any]:
    return {str(shape): reshaped(*shape) for shape in given}


SHAPES = shapes((3, 2), (2, 2), (1, 2, 3), (2, 3, 1), (6,), (2,), (0,), (0, 3), (2, 0), (4, 3))
BROADCAST = shapes((3,), (1, 3), (2, 1), (1,), ())
ALL_SHAPES = {**SHAPES, **BROADCAST}
OF_W = {name: f for name, f in ALL_SHAPES.items() if name != "(1, 2, 3)"}
OTHER_DTYPES = {**DTYPES, **{name: as_type(name) for name in ("f8", "f2", "c8")}}
NONFINITE = {str(x): filled(x) for x in (np.nan, np.inf)}
COUNTERS = {
    "an int": int,
    "None": always(None),
    "a float": as_type(float),
    "a bool": as_type(bool),
    "short": as_type(np.int16),
    "a vector": lambda x: x[None],
    "deleted": deleted,
}
MOVED = {"modes": NEW, "functions": (LARS,)}
FAULTS = [
    *each("dcdw is", "gs", FAULTY, LeafError, "dcdw", NEW),
    *each("dcdw is", "gs", DTYPES, DtypeError, "dcdw", NEW),
    *each("dcdw is", "gs", OTHERS, BackendError, "dcdw", NEW),
    *each("dcdw has shape", "gs", SHAPES, ShapeError, "dcdw", NEW),
    *each("dcdw has shape", "gs", BROADCAST, ShapeError, "dcdw", **MOVED),
    *each("dcdw has", guarded("gs"), NONFINITE, NonFiniteError, "dcdw", NEW),
    Fault("dcdw is complex", leaf("gs", as_type(complex)), DtypeError, "dcdw", NEW),
    Fault("dcdw on a device", two_devices("gs"), BackendError, "dcdw", NEW),
    *each("w is", weights, FAULTY, LeafError, "w", NEW),
    *each("w is", weights, DTYPES, DtypeError, "w", NEW),
    *each("w is", weights, OTHERS, BackendError, "dcdw", NEW),
    *each("w has shape", weights, OF_W, ShapeError, "dcdw", NEW),
    *each("w has", guarded("ws"), NONFINITE, NonFiniteError, "dcdw", NEW),
    Fault("w is complex", weights(as_type(complex)), DtypeError, "dcdw", NEW),
    *each("velocity is", "velocities", FAULTY, LeafError, "state", **MOVED),
    *each("velocity is", "velocities", OTHERS, BackendError, "state", **MOVED),
    *each("velocity is", "velocities", OTHER_DTYPES, StateError, "state", **MOVED),
    *each("velocity has shape", "velocities", ALL_SHAPES, StateError, "state", **MOVED),
    Fault("velocity on a device", two_devices("velocities"), BackendError, "state", **MOVED),
    *each("step is", of("step"), COUNTERS, StateError, "state", **MOVED),
    *each("skipped is", of("skipped"), COUNTERS, StateError, "state", **MOVED),
]
# In place, among arrays of numpy.
IMMUTABLE = [
    Fault("w is immutable", everywhere(valid), OutError, "out", ("in place", "into out")),
    Fault("out is immutable", leaf("outs", valid), BackendError, "out", ("into out",)),
]
LAYOUTS = {
    "on a device": on_device(0),
    "sharded": sharded,
    "an Array": arrays.Array,
    "of the host": lambda x: jax.device_put(x, jax.devices()[0]) * 1,
}
FORMATS = ("f2", "f4", "f8", jnp.bfloat16)


def in_format(dtype: Any) -> Any:
    def spoil(call: Call, i: int) -> None:
        everywhere(as_type(dtype))(call, i)
        if call.velocities is not None and np.dtype(dtype).itemsize == 2:
            call.velocities[i] = call.velocities[i].astype(np.float32)

    return spoil


GOOD = [
    *each("all are", everywhere, LAYOUTS, None, "", NEW),
    *each("dcdw is of", "gs", {str(x): as_type(x) for x in FORMATS}, None, "", NEW),
    *(Fault(f"all are of {dtype}", in_format(dtype), None, "", NEW) for dtype in FORMATS),
    *each("all are", everywhere, {x: as_type(x) for x in ("c8", "c16")}, None, "", NEW),
    *each("dcdw is", "gs", {"0.5": always(0.5), "1": always(1)}, None, "", NEW, (UPDATE,)),
    *each("dcdw has shape", "gs", BROADCAST, None, "", NEW, (UPDATE,)),
    Fault("w is tied", tied("ws"), None, "", NEW),
    Fault("dcdw is None", leaf("gs", always(None)), None, "", NEW),
    Fault("all are of numpy", everywhere(np.asarray), None, "", NEW),
]
