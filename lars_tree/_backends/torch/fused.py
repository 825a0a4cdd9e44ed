"""The fused engine: Triton kernels that update any number of tensors with two launches over the data.

`kernels.py` has the kernels. A step launches `sum_squares` and `apply` once for each combination of
dtypes, and two small kernels, `add_sums` and `find_coefficients`, once. The kernels find the
tensors by tables in device memory, which are reused until an address changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.base import grouped
from lars_tree._backends.torch import tensors
from lars_tree._backends.torch.layers import Layer
from lars_tree._backends.torch.stand_ins import TENSOR_TYPES
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Rule

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALIGNMENT = 16  # bytes that a thread loads at once

MAX_TABLES = 16  # the number of tables that are kept

T = TypeVar("T")


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels, so that they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def is_available(device: torch.device) -> bool:
    """Whether Triton supports this device."""
    if find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return is_interpreted()
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type in ("cuda", "xpu")


def supports(layer: Layer) -> bool:
    """Whether the kernels can update this layer, which passed all checks."""
    return _layout(layer) is not None


class _Layout(NamedTuple):
    """The arguments of the kernels that are compiled into them, and the runs of elements.

    Elements are contiguous in runs of `inner`, which start `stride` elements apart.
    """

    dtypes: tuple[Any, Any, Any]  # of w, dcdw and velocity
    is_strided: bool
    is_aligned: bool
    inner: int
    stride: int


def _layout(layer: Layer) -> _Layout | None:
    w, velocity = layer.w, layer.velocity
    written = [layer.out] if velocity is None else [layer.out, velocity]
    addresses = 0
    shape, strides = w.shape, w.stride()
    for x in (w, layer.dcdw, *written):
        if type(x) not in TENSOR_TYPES or x.dtype not in DTYPES or x.is_neg():
            return None
        if x is not w and x.stride() != strides and x.numel() > 1:
            return None
        addresses |= x.data_ptr()
    runs = (max(w.numel(), 1), 0) if w.is_contiguous() else _runs(shape, strides)
    if runs is None:
        return None
    dtypes = (w.dtype, layer.dcdw.dtype, None if velocity is None else velocity.dtype)
    return _Layout(dtypes, bool(runs[1]), addresses % ALIGNMENT == 0, *runs)


def _runs(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """The length of runs of contiguous elements, and their distance; 0 if there is one run.

    None if the elements are in no such order. The order of axes does not matter, because it is the
    same for all tensors of a layer.

    >>> _runs((2, 3, 4), (100, 4, 1))
    (12, 100)
    >>> _runs((2, 3, 4), (1, 2, 6))
    (24, 0)
    """
    axes = sorted((stride, n) for n, stride in zip(shape, strides, strict=True) if n != 1)
    inner, count, distance = 1, 1, 0
    for stride, n in axes:
        if stride < inner:
            return None
        if count == 1 and stride == inner:
            inner *= n
        elif count == 1:
            count, distance = n, stride
        elif stride == distance * count:
            count *= n
        else:
            return None
    return inner, distance


class _Launch(NamedTuple):
    """Layers that one launch of each kernel updates.

    Their chunks are consecutive in the table of chunks; those of layers that adapt come first.
    """

    dtypes: tuple[Any, Any, Any]  # of w, dcdw and velocity
    constants: dict[str, Any]
    first: int
    adapting: int  # the number of chunks
    total: int


class _Table(NamedTuple):
    """The layers and chunks in device memory, and the launches. `host` is their pinned copy."""

    layers: Tensor
    chunks: Tensor
    launches: list[_Launch]
    host: Tensor


class Fused:
    """`LayerEngine` for layers that `supports`."""

    name = "fused"

    def __init__(self, layers: list[Layer]) -> None:
        from lars_tree._backends.torch import kernels

        self._kernels = kernels
        self._device = layers[0].w.device
        self._written = [x for layer in layers for x in layer[2:4] if x is not None]
        indices: dict[Rule, int] = {}
        rows = []
        for layer in layers:
            layout = _layout(layer)
            assert layout is not None, "the kernels support the layer"
            index = indices.setdefault(layer.rule, len(indices))
            addresses = (0 if x is None else x.data_ptr() for x in layer[:4])
            rows.append(_Row(*addresses, layer.w.numel(), index, layout))
        self._rules = list(indices)
        joint = any(map(formula.is_joint, self._rules))
        is_double = any(torch.float64 in row.layout.dtypes for row in rows)
        self._scales = len(formula.SCALES) if is_double else 1
        self._constants = {"JOINT": joint, "SCALES": self._scales}
        with self._on_device() as stream:
            adapts = tuple(rule.adapt for rule in self._rules)
            key = (self._device, stream, adapts, tuple(rows))
            self._table = _kept(_TABLES, key, lambda: self._tabulate(rows))
            self._numbers = self._numbers_of_rules(stream)

    def norms(self) -> Tensor:
        chunks, layers = self._table.chunks, self._table.layers
        sums = self._empty(len(chunks), 2, self._scales)
        norms = self._empty(len(layers), 2, 2)
        with self._on_device():
            for launch in self._table.launches:
                if launch.adapting:
                    self._kernels.sum_squares[(launch.adapting,)](
                        *(chunks, layers, self._numbers, sums, launch.first),
                        **{**launch.constants, **self._constants},
                    )
            self._kernels.add_sums[(len(layers),)](
                layers, sums, norms, SCALES=self._scales, **_ONE_WARP
            )
        return norms

    def write(self, norms: Tensor, unless: Tensor | None) -> None:
        coefficients = self._coefficients(norms)
        self._apply(coefficients, unless, None)
        tensors.bump_versions(self._written)

    def nonfinite(self, norms: Tensor) -> Tensor:
        """Whether each layer would not be finite, if its rule has the option `nonfinite`."""
        chunks = self._table.chunks
        bad = torch.zeros(len(chunks), dtype=torch.int32, device=self._device)
        self._apply(self._coefficients(norms), None, bad)
        counts = torch.zeros(len(self._table.layers), dtype=torch.int32, device=self._device)
        return counts.index_add_(0, chunks[:, 0], bad) != 0

    def _coefficients(self, norms: Tensor) -> Tensor:
        layers = self._table.layers
        found = self._empty(len(layers), self._kernels.COEFFICIENTS)
        with self._on_device():
            self._kernels.find_coefficients[(len(layers),)](
                layers, self._numbers, norms, found, SCALES=self._scales, **_ONE_WARP
            )
        return found

    def _apply(self, coefficients: Tensor, unless: Tensor | None, bad: Tensor | None) -> None:
        given = self._table.chunks, self._table.layers, coefficients, unless, bad
        with self._on_device():
            for launch in self._table.launches:
                velocity = launch.dtypes[2] and self._triton_dtype(launch.dtypes[2])
                self._kernels.apply[(launch.total,)](
                    *(*given, launch.first),
                    V=velocity,
                    STORES=bad is None,
                    **{**launch.constants, **self._constants},
                )

    def _tabulate(self, rows: list[_Row]) -> _Table:
        size = int(self._kernels.CHUNK)
        firsts, counts = [0] * len(rows), [0] * len(rows)
        chunks: list[tuple[int, int]] = []
        launches = []
        for layout, members in grouped(range(len(rows)), lambda i: rows[i].layout[:3]).items():
            start = end = len(chunks)
            for adapts in (True, False):
                for i in members:
                    if self._rules[rows[i].rule].adapt is adapts:
                        count = -(-rows[i].size // size)
                        if adapts:
                            firsts[i], counts[i] = len(chunks), count
                        chunks += ((i, k) for k in range(count))
                end = len(chunks) if adapts else end
            constants = self._constants_of(*layout)
            if len(chunks) > start:
                total = len(chunks) - start
                launches.append(_Launch(layout[0], constants, start, end - start, total))
        columns = zip(rows, firsts, counts, strict=True)
        numbers = [
            (*row[:5], row.layout.inner, row.layout.stride, first, count, row.rule)
            for row, first, count in columns
        ]
        flat = np.fromiter(chain(*numbers, *chunks), np.int64)
        sent, host = self._sent(torch.from_numpy(flat))
        split = len(numbers) * len(self._kernels.LAYER_COLUMNS)
        return _Table(sent[:split].view(len(numbers), -1), sent[split:].view(-1, 2), launches, host)

    def _constants_of(
        self, dtypes: tuple[Any, Any, Any], is_strided: bool, is_aligned: bool
    ) -> dict[str, Any]:
        w, dcdw = map(self._triton_dtype, dtypes[:2])
        layout = {"W": w, "G": dcdw, "STRIDED": is_strided, "ALIGNED": is_aligned}
        return {**layout, "num_warps": 8, **_COMPILER}

    def _triton_dtype(self, dtype: torch.dtype) -> Any:
        return getattr(self._kernels.tl, str(dtype).removeprefix("torch."))

    def _numbers_of_rules(self, stream: Hashable) -> Tensor:
        """The numbers and flags of all rules, in device memory."""
        columns = [*self._kernels.RULE_COLUMNS, *self._kernels.FLAG_COLUMNS[:-1]]
        given = [
            [*(getattr(rule, name) for name in columns), rule.nonfinite != "propagate"]
            for rule in self._rules
        ]
        known = tuple(
            tuple(0.0 if _is_on_device(x) else float(x) for x in numbers) for numbers in given
        )
        table, _ = _kept(
            _NUMBERS,
            (self._device, stream, known),
            lambda: self._sent(torch.tensor(known, dtype=torch.float64)),
        )
        if any(_is_on_device(x) for numbers in given for x in numbers):
            table = table.clone()
            for row, numbers in zip(table, given, strict=True):
                for i, x in enumerate(numbers):
                    if _is_on_device(x):
                        row[i] = x.detach()
        return table

    def _sent(self, host: Tensor) -> tuple[Tensor, Tensor]:
        """A copy on the device, made without waiting, and the pinned memory it is made from."""
        if self._device.type == "cpu":
            return host, host
        host = host.pin_memory()
        if _is_capturing(self._device):  # each replay of the graph reads the memory again
            _CAPTURED.append(host)
        return host.to(self._device, non_blocking=True), host

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)

    @contextmanager
    def _on_device(self) -> Iterator[Hashable]:
        """Make the device current, as Triton requires; gives the identity of its current stream."""
        if self._device.type == "cpu":
            yield 0
            return
        module = torch.get_device_module(self._device)
        with module.device(self._device):
            yield module.current_stream(self._device).stream_id


class _Row(NamedTuple):
    w: int
    dcdw: int
    out: int
    velocity: int
    size: int
    rule: int
    layout: _Layout


# A sum of products must be rounded as written, or `formula.multiply_add` would not be exact.
_COMPILER = {"enable_fp_fusion": False}
_ONE_WARP = {"num_warps": 1, **_COMPILER}

_TABLES: dict[Hashable, _Table] = {}
_NUMBERS: dict[Hashable, tuple[Tensor, Tensor]] = {}
_CAPTURED: list[Tensor] = []


def _kept(cache: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """The value of a key, made if it is not in the cache; drops the least recently used values."""
    value = cache.pop(key, None) or make()
    while len(cache) >= MAX_TABLES:
        cache.pop(next(iter(cache)), None)
    cache[key] = value
    return value


def _is_on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_cpu


def _is_capturing(device: torch.device) -> bool:
    module = torch.get_device_module(device)
    return bool(getattr(module, "is_current_stream_capturing", bool)())
