"""numpy: ndarray and its subclasses, memory maps, and numpy's scalars."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import _native
from lars_tree._backends import base
from lars_tree._backends.base import Columns, Leaf, StepResult, StepResults, Writes
from lars_tree._backends.cpu import twin
from lars_tree._backends.memory import (
    READ_ONLY_MAP,
    NumpyArray,
    is_foreign,
    is_mapped_read_only,
    span,
)
from lars_tree._numerics.formula import Measured, Rule

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan


class NumpyBackend(base.Backend):
    """Arrays in CPU memory."""

    name = "numpy"

    def facts(self, x: NumpyArray) -> base.Facts:
        return base.Facts(x.shape, base.kind_of_numpy(x.dtype), x.dtype, "cpu")

    def values(self, x: NumpyArray) -> base.Values:
        return base.Values.CPU

    def full(self, number: complex, like: NumpyArray) -> NumpyArray:
        is_complex = isinstance(number, complex) or like.dtype.kind == "c"
        return np.asarray(number, dtype=np.complex128 if is_complex else np.float64)

    def copy(self, x: NumpyArray, stop_gradients: bool) -> NumpyArray:
        return x.copy() if not isinstance(x, np.memmap) else np.array(x)

    def fault(self, x: NumpyArray) -> str | None:
        # `np.ma` would import the module, perhaps while another thread forks.
        if isinstance(x, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
            return "a masked array: LARS has no missing elements; fill them first"
        return None

    def out_fault(self, x: NumpyArray) -> str | None:
        if isinstance(x, np.generic):
            return "a numpy scalar, which is immutable: use the returned value"
        if not x.flags.writeable:
            return "read-only"
        if is_foreign(x) and is_mapped_read_only(*span(x)):
            return READ_ONLY_MAP
        return None

    def sizes(self, xs: list[NumpyArray]) -> tuple[list[int], list[int]]:
        return [x.size for x in xs], [x.nbytes for x in xs]

    def memory(self, x: NumpyArray) -> NumpyArray | None:
        return np.asarray(x) if isinstance(x, np.ndarray) else None

    def zeros(self, w: NumpyArray, dtype: Any) -> NumpyArray:
        return np.zeros_like(w, dtype, subok=not isinstance(w, np.memmap))

    def counter(self, w: NumpyArray) -> NumpyArray:
        return np.zeros((), np.int64)

    def prepare(
        self, plan: Plan, columns: Columns, results: StepResults | None, indices: list[int] | None
    ) -> list[int]:
        if results is None:
            return plan.prepare(_READER, *columns[:5], None, None, indices)
        rest = plan.prepare(_MAKER, *columns[:5], *results, indices)
        return rest and plan.prepare(_MAKER_FOR_MAPS, *columns[:5], *results, rest)

    def count(self, plan: Plan, counter: NumpyArray) -> bool:
        return plan.count(counter)

    def update(self, leaves: list[Leaf], writes: Writes) -> list[StepResult]:
        return [self._step(leaf, writes) for leaf in leaves]

    def _step(self, leaf: Leaf, writes: Writes) -> StepResult:
        new, velocity = leaf.out, leaf.velocity
        if new is None:
            new = np.empty_like(leaf.w, subok=not isinstance(leaf.w, np.memmap))
            velocity = None if velocity is None else np.array(velocity)  # also for a numpy scalar
        moving = None if velocity is None else raw(velocity)
        arrays = raw(leaf.w), raw(leaf.dcdw), raw(new), leaf.rule, moving
        if leaf.out is None:
            twin.update(*arrays)
        else:
            twin.prepare(*arrays, writes)
        return StepResult(new[()] if isinstance(leaf.w, np.generic) else new, velocity)

    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        return [twin.measure(raw(leaf.w), raw(leaf.dcdw), leaf.rule) for leaf in leaves]

    def all_finite(self, xs: list[NumpyArray]) -> bool:
        return all(bool(np.isfinite(x).all()) for x in xs)

    def choose(self, flag: Any, a: NumpyArray, b: NumpyArray) -> NumpyArray:
        return a if flag else b

    def write(self, out: NumpyArray, x: NumpyArray) -> None:
        np.asarray(out)[...] = x

    def copied_memory(self, out: NumpyArray, x: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
        return raw(out), raw(x)


def as_bits(x: NumpyArray) -> NumpyArray | None:
    """A uint16 view of a bfloat16 array; None for any other dtype."""
    return x.view(np.uint16) if base.is_bfloat16(x.dtype) and x.dtype.isnative else None


def raw(x: NumpyArray) -> NumpyArray:
    """A view for `twin.update`: exactly an ndarray, with bfloat16 as bits (uint16)."""
    x = np.asarray(x)
    return x.view(np.uint16) if base.is_bfloat16(x.dtype) else x


_TYPES = (np.ndarray, np.memmap)
_READER = _native.reader(_TYPES, Rule._fields, as_bits=as_bits)
_MAKER = _native.reader(
    (np.ndarray,), Rule._fields, make=np.empty_like, copy=np.copy, as_bits=as_bits
)
# As with numpy's own operations, the result of a memory map is not a memory map. This reader is
# slower, so it reads only what _MAKER does not support.
_MAKER_FOR_MAPS = _native.reader(
    _TYPES, Rule._fields, make=partial(np.empty_like, subok=False), copy=np.copy, as_bits=as_bits
)
BACKEND = NumpyBackend()
