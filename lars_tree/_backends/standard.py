"""Any library that follows the array API standard, such as CuPy, through array-api-compat.

If array-api-compat is missing, or an array lacks something that the standard requires, the array
has a fault, so that errors name its path and a Container that holds it can be shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lars_tree._backends.arrays import ArraysBackend, NamespaceOps
from lars_tree._backends.base import Backend, Facts, Kind, NativeArray, Values
from lars_tree._backends.memory import READ_ONLY_MAP, NumpyArray, is_mapped_read_only, span

try:
    import array_api_compat
except ModuleNotFoundError:
    array_api_compat = None

_KINDS = {
    "real floating": Kind.REAL,
    "complex floating": Kind.COMPLEX,
    "integral": Kind.INTEGER,
}


class StandardOps(NamespaceOps):
    """The functions of the standard, which lacks frexp."""

    def round_to_power_of_two(self, x: NativeArray) -> NativeArray:
        if hasattr(self.xp, "frexp"):
            return super().round_to_power_of_two(x)
        return self.xp.pow(self.one(x) * 2, self.xp.floor(self.xp.log2(x)))

    def one(self, x: NativeArray) -> NativeArray:
        return self.xp.ones((), dtype=x.dtype, device=array_api_compat.device(x))


class StandardBackend(ArraysBackend):
    """The arrays of one namespace."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.ops = xp, StandardOps(xp)
        self.name = xp.__name__.removeprefix("array_api_compat.")

    def fault(self, x: NativeArray) -> str | None:
        if array_api_compat is None:
            needs = "which needs array-api-compat: pip install array-api-compat"
            return f"an array of {self.name}, {needs}"
        if not hasattr(x, "device"):  # MLX
            text = "which has no `device` and so does not follow the array API standard"
            return f"an array of {self.name}, {text}: convert it with numpy.asarray"
        return None

    def facts(self, x: NativeArray) -> Facts:
        kinds = (kind for name, kind in _KINDS.items() if self.xp.isdtype(x.dtype, name))
        device = array_api_compat.device(x)
        return Facts(tuple(x.shape), next(kinds, Kind.OTHER), x.dtype, device)

    def values(self, x: NativeArray) -> Values:
        if array_api_compat.is_lazy_array(x):
            return Values.TRACED
        return Values.CPU if "cpu" in str(array_api_compat.device(x)).lower() else Values.DEVICE

    def to_numpy(self, x: NativeArray) -> NumpyArray:
        if self.values(x) is Values.DEVICE:
            x = array_api_compat.to_device(x, "cpu")
        return np.from_dlpack(x)

    def full(self, number: complex, like: NativeArray) -> NativeArray:
        is_complex = isinstance(number, complex) or self.xp.isdtype(like.dtype, "complex floating")
        dtype = self.xp.complex128 if is_complex else self.xp.float64
        return self.xp.asarray(number, dtype=dtype, device=array_api_compat.device(like))

    def copy(self, x: NativeArray, stop_gradients: bool) -> NativeArray:
        return self.xp.asarray(x, copy=True)

    def zeros(self, w: NativeArray, dtype: Any) -> NativeArray:
        return self.xp.zeros_like(w, dtype=dtype)

    def counter(self, w: NativeArray) -> NativeArray:
        return self.xp.zeros((), dtype=self.xp.int64, device=array_api_compat.device(w))

    def velocity_dtype(self, w: NativeArray) -> Any:
        # The standard has no half precision, but libraries add float16 and bfloat16.
        return self.xp.float32 if "float16" in str(w.dtype) else w.dtype

    def out_fault(self, x: NativeArray) -> str | None:
        if not array_api_compat.is_writeable_array(x):
            return "immutable or read-only"
        memory = self.memory(x) if self.values(x) is Values.CPU else None
        return READ_ONLY_MAP if memory is not None and is_mapped_read_only(*span(memory)) else None

    def memory(self, x: NativeArray) -> NumpyArray | None:
        try:
            if hasattr(x, "__cuda_array_interface__"):
                return np.asarray(_DeviceMemory(x))
            return np.from_dlpack(x)
        except (BufferError, TypeError, ValueError, RuntimeError, AttributeError):
            return None  # not every library or device has addresses

    def bits(self, x: NativeArray) -> int:
        is_integer = self.xp.isdtype(x.dtype, ("integral", "bool"))
        return int((self.xp.iinfo if is_integer else self.xp.finfo)(x.dtype).bits)

    def widen(self, x: Any, w: NativeArray) -> NativeArray:
        xp = self.xp
        if not array_api_compat.is_array_api_obj(x) or isinstance(x, np.ndarray):
            x = xp.asarray(x, device=array_api_compat.device(w))
        is_complex = xp.isdtype(x.dtype, "complex floating")
        return xp.astype(x, xp.complex128 if is_complex else xp.float64)

    def narrow(self, x: NativeArray, w: NativeArray) -> NativeArray:
        return self.xp.astype(x, w.dtype)


class _DeviceMemory:
    """The memory of an array on a GPU, for numpy's array interface, which has the same fields."""

    def __init__(self, x: NativeArray) -> None:
        self._keep = x  # numpy's view keeps this object alive, and with it the memory
        self.__array_interface__ = {**x.__cuda_array_interface__, "version": 3}


_BACKENDS: dict[str, StandardBackend] = {}


def backend_of(x: Any) -> Backend | None:
    """The backend for the namespace of x; None if x only claims to have a namespace."""
    try:
        is_missing = array_api_compat is None
        xp = x.__array_namespace__() if is_missing else array_api_compat.array_namespace(x)
        return _BACKENDS.setdefault(xp.__name__, StandardBackend(xp))
    except Exception:  # the method of an unknown class may raise anything
        return None
