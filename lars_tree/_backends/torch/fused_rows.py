"""The layers that the kernels of the fused engine support, by the addresses of their elements."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree._backends.torch.layers import Layer
from lars_tree._backends.torch.stand_ins import TENSOR_TYPES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALIGNMENT = 16  # bytes that a thread loads at once


class Layout(NamedTuple):
    """The arguments that are compiled into the kernels."""

    w: torch.dtype
    dcdw: torch.dtype
    velocity: torch.dtype | None
    is_strided: bool
    is_aligned: bool


class Row(NamedTuple):
    """A layer that the kernels support, by its addresses.

    Elements are contiguous in runs of `inner`, which start `stride` elements apart.
    """

    w: int
    dcdw: int
    out: int
    velocity: int
    size: int
    inner: int
    stride: int
    layout: Layout


def row_of(layer: Layer) -> Row | None:
    """The row of a layer that passed all checks; None if the kernels do not support it."""
    w, dcdw, out, velocity, _ = layer
    size, strides = w.numel(), w.stride()
    dtypes: list[Any] = []
    addresses = []
    for x in (w, dcdw, velocity) if out is w else (w, dcdw, velocity, out):
        if x is None:
            dtypes.append(None)
            addresses.append(0)
            continue
        if type(x) not in TENSOR_TYPES or x.dtype not in DTYPES or x.is_neg():
            return None
        if x is not w and x.stride() != strides and not _same_order(w, x):
            return None
        dtypes.append(x.dtype)
        addresses.append(x.data_ptr())
    inner, stride = size, 0
    if not w.is_contiguous():
        runs = _runs(w.shape, strides)
        if runs is None:
            return None
        inner, stride = runs
    is_aligned = not any(address % ALIGNMENT for address in addresses)
    layout = Layout(dtypes[0], dtypes[1], dtypes[2], stride != 0, is_aligned)
    ours, gradient, moving, *other = addresses
    written = other[0] if other else ours
    return Row(ours, gradient, written, moving, size, max(inner, 1), stride, layout)


def _same_order(x: Tensor, y: Tensor) -> bool:
    """Whether elements of two tensors of one shape have the same distances in memory."""
    axes = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.numel() <= 1 or all(n == 1 or one == other for n, one, other in axes)


def _runs(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """The length of runs of contiguous elements, and their distance: 0 if there is one run.

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
