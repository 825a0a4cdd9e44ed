"""Dask arrays: the update stays lazy and keeps the chunks of the weights."""

from __future__ import annotations

import math
from typing import Any

import dask
import dask.array as da
import numpy as np

from lars_tree._backends.arrays import ArraysBackend, NamespaceOps
from lars_tree._backends.base import Facts, Values, kind_of_numpy
from lars_tree._backends.memory import NumpyArray


class DaskOps(NamespaceOps):
    """dask.array, which lacks `isdtype`."""

    def is_complex(self, x: da.Array) -> bool:
        return bool(x.dtype.kind == "c")


_MAX_AXES = 32  # Dask cannot rechunk arrays with more axes


class DaskBackend(ArraysBackend):
    """Lazy arrays; an update does not compute them."""

    name = "dask"
    ops = DaskOps(da)

    def facts(self, x: da.Array) -> Facts:
        return Facts(x.shape, kind_of_numpy(x.dtype), x.dtype, None)

    def values(self, x: da.Array) -> Values:
        return Values.TRACED

    def fetch(self, xs: list[da.Array]) -> list[NumpyArray]:
        return [np.asarray(x) for x in dask.compute(*xs)]

    def full(self, number: complex, like: da.Array) -> da.Array:
        is_complex = isinstance(number, complex) or like.dtype.kind == "c"
        return da.asarray(np.asarray(number, np.complex128 if is_complex else np.float64))

    def copy(self, x: da.Array, stop_gradients: bool) -> da.Array:
        return x.copy()

    def zeros(self, w: da.Array, dtype: Any) -> da.Array:
        return da.zeros(w.shape, dtype=dtype, chunks=w.chunks)

    def counter(self, w: da.Array) -> da.Array:
        return da.zeros((), dtype=np.int64)

    def fault(self, x: da.Array) -> str | None:
        if any(math.isnan(length) for length in x.shape):
            return "a dask array of unknown shape: call its compute_chunk_sizes() first"
        if x.ndim > _MAX_AXES:
            return f"a dask array of {x.ndim} axes, where Dask computes with {_MAX_AXES} at most"
        return None

    def out_fault(self, x: da.Array) -> str | None:
        return "a dask array, which is immutable: leave out `out` and use the returned value"

    def widen(self, x: Any, w: da.Array) -> da.Array:
        x = da.asarray(x)
        double = np.complex128 if x.dtype.kind == "c" else np.float64
        return x.astype(np.result_type(double, x.dtype))


BACKEND = DaskBackend()
