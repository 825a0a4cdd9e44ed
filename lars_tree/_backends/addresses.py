"""The CPU memory of torch tensors, as numpy sees it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lars_tree._memory import NumpyArray

NUMPY_TYPES = {
    torch.float16: "f2",
    torch.bfloat16: "u2",
    torch.float32: "f4",
    torch.float64: "f8",
    torch.complex64: "c8",
    torch.complex128: "c16",
}


def bytes_needed(x: Tensor) -> int:
    """How long its storage must be, from the start, to hold a tensor."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return int((x.storage_offset() + last + 1) * x.element_size())


def view(x: Tensor) -> NumpyArray:
    """A numpy view for `cpu.update`: bfloat16 as the bits it is.

    Not by `x.numpy()`: that makes the storage one that can never be resized or freed again.
    """
    x = x.detach().resolve_conj().resolve_neg()
    if not x.numel():
        return np.empty(x.shape, NUMPY_TYPES[x.dtype])
    return np.asarray(Address(x, NUMPY_TYPES[x.dtype]))


def bits(x: Tensor) -> NumpyArray:
    """A numpy view to copy to or from, of a tensor of any dtype: of its bits."""
    x = x.detach().resolve_conj().resolve_neg()
    size = x.element_size()
    typestr = f"u{size}" if size <= 8 else f"c{size}"
    return np.asarray(Address(x, typestr)) if x.numel() else np.empty(x.shape, typestr)


class Address:
    """The memory of a tensor as numpy describes it; without a type, not to be read."""

    def __init__(self, x: Tensor, typestr: str | None = None) -> None:
        size = x.element_size()
        self._keep = x  # the view that numpy makes keeps this object, and so the memory
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(x.shape),
            "strides": tuple(stride * size for stride in x.stride()),
            "typestr": typestr or f"|V{size}",
            "data": (x.data_ptr(), typestr is None),
        }
