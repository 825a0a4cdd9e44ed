"""The fused engine: Triton kernels that update any number of tensors in two passes over the data.

`kernels.py` has the kernels. A step launches `sum_squares` and `apply` once for each combination of
dtypes, and two small kernels, `add_sums` and `find_coefficients`, once. The kernels find the
tensors by tables in device memory, which are reused until an address changes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.base import grouped
from lars_tree._backends.torch import tensors
from lars_tree._backends.torch.fused_rows import Layout, Row, row_of
from lars_tree._backends.torch.layers import Layer
from lars_tree._backends.torch.transfers import is_capturing, keep, make_room, sent
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Rule

T = TypeVar("T")


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels, so that they run on CPU tensors.

    Triton reads the variable whenever it defines or calls a kernel, so it must also have been set
    when Triton, which defines kernels of its own, was imported.
    """
    if not _asks_for_interpreter():
        return False
    own = getattr(sys.modules.get("triton.language"), "sum", None)
    return type(own).__name__ != "JITFunction"


def _asks_for_interpreter() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    if device.type == "cpu":
        return is_interpreted() and _has_triton()
    if device.type not in ("cuda", "xpu") or not tensors.has_float64(device):
        return False
    if _asks_for_interpreter() or not _has_triton():  # the interpreter reads only CPU memory
        return False
    return is_capturing(device) or _works(device)


@lru_cache
def _has_triton() -> bool:
    """Whether Triton is installed, in a version that compiles the kernels."""
    if find_spec("triton") is None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)


@lru_cache
def _works(device: torch.device) -> bool:
    """Whether a small step gives the right numbers; if not, a warning says why.

    Triton supports only some devices, and needs a C compiler when it is first used.
    """
    try:
        with tensors.may_wait(device):
            w, dcdw = (torch.tensor(x, device=device) for x in ([3.0, 4.0], [0.0, 10.0]))
            velocity = torch.zeros(2, device=device)
            layer = Layer(w, dcdw, w, velocity, Rule(1.0, momentum=0.5))
            row = row_of(layer)
            assert row is not None
            engine = Fused([layer], [row])
            engine.write(engine.norms(), None)
            found = w.tolist(), velocity.tolist()
        fault = "" if found == ([3.0, -1.0], [0.0, 5.0]) else f"it computes {found}"
    except Exception as error:  # any error means that Triton cannot be used, and is reported
        fault = f"{type(error).__name__}: {error}"
    if fault:
        text = f"lars_tree cannot use Triton on {device}, so steps are slower: {fault}"
        warnings.warn(text, stacklevel=2)
    return not fault


class _Launch(NamedTuple):
    """Layers that one launch of each kernel updates.

    Their chunks are consecutive in the table of chunks; those of layers that adapt come first.
    """

    layout: Layout
    first: int
    adapting: int  # the number of chunks
    total: int


class _Table(NamedTuple):
    """The layers and chunks in device memory, and the launches."""

    layers: Tensor
    chunks: Tensor
    launches: list[_Launch]


class Fused:
    """`LayerEngine` by Triton kernels."""

    name = "fused"

    def __init__(self, layers: list[Layer], rows: list[Row]) -> None:
        from lars_tree._backends.torch import kernels

        self._kernels = kernels
        self._device = layers[0].w.device
        self._layers = layers  # may hold the only references to copies of gradients
        self._written = [x for layer in layers for x in layer[2:4] if x is not None]
        rules = {id(layer.rule): layer.rule for layer in layers}
        self._rules = list(rules.values())
        indices = {key: index for index, key in enumerate(rules)}
        of_rows = tuple(indices[id(layer.rule)] for layer in layers)
        is_double = any(torch.float64 in row.layout[:3] for row in rows)
        self._scales = len(formula.SCALES) if is_double else 1
        joint = any(map(formula.is_joint, self._rules))
        self._constants = {"JOINT": joint, "SCALES": self._scales, **_COMPILER}
        with self._on_device() as stream:
            adapts = tuple(rule.adapt for rule in self._rules)
            key = (self._device, stream, adapts, of_rows, tuple(rows))
            self._table = self._kept(_TABLES, key, lambda: self._tabulate(rows, of_rows))
            self._numbers = self._numbers_of_rules(stream)

    def without_tensors(self) -> Fused:
        """A copy without references to the tensors, for `again`."""
        new = copy(self)
        new._layers, new._written = [], []
        return new

    def again(self, rules: dict[int, Rule], written: list[Tensor]) -> Fused:
        """The same layers with new rules, which are given by the id of the old ones.

        `written` are the tensors whose version counters `write` increments.
        """
        new = self.without_tensors()
        new._written = written
        new._rules = [rules[id(rule)] for rule in self._rules]
        with self._on_device() as stream:
            new._numbers = new._numbers_of_rules(stream)
        return new

    def norms(self) -> Tensor:
        chunks, layers = self._table.chunks, self._table.layers
        sums = self._empty(len(chunks), 2, self._scales)
        norms = self._empty(len(layers), 2, 2)
        with self._on_device():
            for launch in self._table.launches:
                if launch.adapting:
                    self._kernels.sum_squares[(launch.adapting,)](
                        *(chunks, layers, self._numbers, sums, launch.first),
                        **self._constants_of(launch.layout),
                    )
            self._kernels.add_sums[(len(layers),)](
                layers, sums, norms, SCALES=self._scales, **_ONE_WARP, **_COMPILER
            )
        return norms

    def write(self, norms: Tensor, unless: Tensor | None) -> None:
        coefficients = self._coefficients(norms)
        self._apply(coefficients, unless, None)
        tensors.bump_versions(self._written)
        self._layers = []

    def nonfinite(self, norms: Tensor) -> Tensor:
        """Whether each layer would not be finite, if its rule has the option `nonfinite`."""
        chunks = self._table.chunks
        bad = torch.zeros(len(chunks), dtype=torch.int32, device=self._device)
        self._apply(self._coefficients(norms), None, bad)
        counts = torch.zeros(len(self._table.layers), dtype=torch.int32, device=self._device)
        return counts.index_add_(0, chunks[:, 0], bad) != 0

    def _coefficients(self, norms: Tensor) -> Tensor:
        layers = self._table.layers
        found = self._empty(len(layers), self._kernels.STEP_COLUMNS)
        with self._on_device():
            self._kernels.find_coefficients[(len(layers),)](
                layers, self._numbers, norms, found, **self._constants, **_ONE_WARP
            )
        return found

    def _apply(self, coefficients: Tensor, unless: Tensor | None, bad: Tensor | None) -> None:
        given = self._table.chunks, self._table.layers, coefficients, unless, bad
        with self._on_device():
            for launch in self._table.launches:
                velocity = launch.layout.velocity
                self._kernels.apply[(launch.total,)](
                    *(*given, launch.first),
                    V=velocity and self._triton_dtype(velocity),
                    STORES=bad is None,
                    **self._constants_of(launch.layout),
                )

    def _tabulate(self, rows: list[Row], rules: Sequence[int]) -> _Table:
        counts = np.array([-(-row.size // int(self._kernels.CHUNK)) for row in rows])
        adapting = [self._rules[rule].adapt for rule in rules]
        order: list[int] = []
        launches = []
        total = 0
        for layout, members in grouped(range(len(rows)), lambda i: rows[i].layout).items():
            order += sorted(members, key=lambda i: not adapting[i])
            size = int(counts[members].sum())
            adapts = int(counts[[i for i in members if adapting[i]]].sum())
            if size:
                launches.append(_Launch(layout, total, adapts, size))
            total += size
        firsts = np.empty(len(rows), np.int64)
        firsts[order] = np.cumsum(counts[order]) - counts[order]
        columns = zip(rows, firsts, counts * adapting, rules, strict=True)
        table = np.array([(*row[:-1], *more) for row, *more in columns], np.int64)
        owners = np.repeat(order, counts[order])
        chunks = np.stack([owners, np.arange(total) - firsts[owners]], 1)
        flat = np.concatenate([table.reshape(-1), chunks.reshape(-1)])
        parts = sent(torch.from_numpy(flat), self._device).split([table.size, chunks.size])
        return _Table(parts[0].view(table.shape), parts[1].view(chunks.shape), launches)

    def _constants_of(self, layout: Layout) -> dict[str, Any]:
        w, dcdw = map(self._triton_dtype, layout[:2])
        strides = {"STRIDED": layout.is_strided, "ALIGNED": layout.is_aligned}
        warps = self._kernels.WARPS
        return {"W": w, "G": dcdw, **strides, "num_warps": warps, **self._constants}

    def _triton_dtype(self, dtype: torch.dtype) -> Any:
        from triton import language

        return getattr(language, str(dtype).removeprefix("torch."))

    def _numbers_of_rules(self, stream: Hashable) -> Tensor:
        """The numbers and flags of all rules, in device memory."""
        columns = (*self._kernels.RULE_NUMBERS, *self._kernels.RULE_FLAGS)
        given = [
            [*(getattr(rule, name) for name in columns), rule.nonfinite != "propagate"]
            for rule in self._rules
        ]
        known = tuple(
            tuple(0.0 if _is_on_device(x) else float(x) for x in numbers) for numbers in given
        )
        table = self._kept(
            _NUMBERS,
            (self._device, stream, known),
            lambda: sent(torch.tensor(known, dtype=torch.float64, device="cpu"), self._device),
        )
        if any(_is_on_device(x) for numbers in given for x in numbers):
            table = table.clone()
            for row, numbers in zip(table, given, strict=True):
                for i, x in enumerate(numbers):
                    if _is_on_device(x):
                        row[i] = x.detach()
        return table

    def _kept(self, cache: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not in the cache; drops the oldest values."""
        value = cache.pop(key, None)
        if value is None:
            value = make()
            if is_capturing(self._device):  # the table is filled only when the graph is replayed
                keep(value)
                return value
        if is_capturing(self._device):
            keep(value)
        make_room(cache)
        cache[key] = value
        return value

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


# A sum of products must be rounded as written, or `formula.multiply_add` would not be exact.
_COMPILER = {"enable_fp_fusion": False}
_ONE_WARP = {"num_warps": 1}

_TABLES: dict[Hashable, _Table] = {}
_NUMBERS: dict[Hashable, Tensor] = {}


def _is_on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_cpu
