"""Arrays of JAX that are refused, and unusual ones that are updated like all others."""

from __future__ import annotations

import os
from typing import Any

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
from tests.reliability.bad_arrays import SHAPES, always, tied
from tests.reliability.calls import LARS, UPDATE, Call, Fault, counter, everywhere, leaf, weights

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
    "a mock": lambda x: arrays.Mock(spec=Array),
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


def nonfinite(x: float) -> list[Fault]:
    return [
        Fault(
            f"{side} has {x}",
            leaf(side, lambda y: y.at[1, 1].set(x), nonfinite="raise"),
            NonFiniteError,
            "dcdw",
            NEW,
        )
        for side in ("gs", "ws")
    ]


def two_devices(side: str) -> Any:
    """A leaf whose other arrays are on another device."""

    def spoil(call: Call, i: int) -> None:
        everywhere(on_device(1))(call, i)
        leaf(side, on_device(2))(call, i)

    return spoil


FAULTS = [
    *(Fault(f"dcdw is {n}", leaf("gs", f), LeafError, "dcdw", NEW) for n, f in FAULTY.items()),
    *(Fault(f"dcdw is {n}", leaf("gs", f), DtypeError, "dcdw", NEW) for n, f in DTYPES.items()),
    *(Fault(f"dcdw is {n}", leaf("gs", f), BackendError, "dcdw", NEW) for n, f in OTHERS.items()),
    *(
        Fault(f"dcdw has shape {s}", leaf("gs", reshaped(*s)), ShapeError, "dcdw", NEW)
        for s in SHAPES
    ),
    *(
        Fault(f"dcdw has shape {s}", leaf("gs", reshaped(*s)), ShapeError, "dcdw", NEW, (LARS,))
        for s in [(3,), (1, 3), (2, 1), (1,), ()]
    ),
    Fault("dcdw is complex", leaf("gs", as_type(complex)), DtypeError, "dcdw", NEW),
    Fault("dcdw on a device", two_devices("gs"), BackendError, "dcdw", NEW),
    *nonfinite(np.nan),
    *nonfinite(np.inf),
    *(Fault(f"w is {n}", weights(f), LeafError, "w", NEW) for n, f in FAULTY.items()),
    *(Fault(f"w is {n}", weights(f), DtypeError, "w", NEW) for n, f in DTYPES.items()),
    *(Fault(f"w is {n}", weights(f), BackendError, "dcdw", NEW) for n, f in OTHERS.items()),
    Fault("w is complex", weights(as_type(complex)), DtypeError, "dcdw", NEW),
    *(
        Fault(f"w has shape {s}", weights(reshaped(*s)), ShapeError, "dcdw", NEW)
        for s in [(3, 2), (6,), (3,), (1, 3), (2, 1), (), (0,)]
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), LeafError, "state", NEW, (LARS,))
        for n, f in FAULTY.items()
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), BackendError, "state", NEW, (LARS,))
        for n, f in OTHERS.items()
    ),
    *(
        Fault(f"velocity is {n}", leaf("velocities", f), StateError, "state", NEW, (LARS,))
        for n, f in {**DTYPES, **{n: as_type(n) for n in ("f8", "f2", "c8")}}.items()
    ),
    *(
        Fault(
            f"velocity has shape {s}",
            leaf("velocities", reshaped(*s)),
            StateError,
            "state",
            NEW,
            (LARS,),
        )
        for s in [*SHAPES, (3,), (1, 3), (2, 1), (1,), ()]
    ),
    Fault("velocity on a device", two_devices("velocities"), BackendError, "state", NEW, (LARS,)),
    *(
        Fault(f"{name} is {n}", counter(name, f), StateError, "state", NEW, (LARS,))
        for name in ("step", "skipped")
        for n, f in {
            "an int": int,
            "None": always(None),
            "a float": lambda x: x.astype(float),
            "a bool": lambda x: x.astype(bool),
            "short": lambda x: x.astype(np.int16),
            "a vector": lambda x: x[None],
            "deleted": deleted,
        }.items()
    ),
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
    *(Fault(f"all are {n}", everywhere(f), None, modes=NEW) for n, f in LAYOUTS.items()),
    *(Fault(f"dcdw is of {f}", leaf("gs", as_type(f)), None, modes=NEW) for f in FORMATS),
    *(Fault(f"all are of {f}", in_format(f), None, modes=NEW) for f in FORMATS),
    *(Fault(f"all are {f}", everywhere(as_type(f)), None, modes=NEW) for f in ("c8", "c16")),
    *(
        Fault(f"dcdw is {n}", leaf("gs", f), None, modes=NEW, functions=(UPDATE,))
        for n, f in {
            "a number": always(0.5),
            "an int": always(1),
            **{f"of shape {s}": reshaped(*s) for s in [(), (3,), (1, 3), (2, 1)]},
        }.items()
    ),
    Fault("w is tied", tied("ws"), None, modes=NEW),
    Fault("dcdw is None", leaf("gs", always(None)), None, modes=NEW),
    Fault("all are of numpy", everywhere(np.asarray), None, modes=NEW),
]
