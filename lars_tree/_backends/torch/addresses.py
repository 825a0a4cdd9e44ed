"""Numpy views of the CPU memory of torch tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.memory import NumpyArray

NUMPY_TYPES = {
    torch.float16: "f2",
    torch.bfloat16: "u2",
    torch.float32: "f4",
    torch.float64: "f8",
    torch.complex64: "c8",
    torch.complex128: "c16",
}


def bytes_needed(x: Tensor) -> int:
    """The size in bytes that a storage needs to hold this tensor."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return int((x.storage_offset() + last + 1) * x.element_size())


def view(x: Tensor, typestr: str | None = None) -> NumpyArray:
    """A numpy view for `twin.update`, with bfloat16 as bits.

    This avoids `x.numpy()`, after which the storage could never be resized or freed.
    """
    x = x.detach().resolve_conj().resolve_neg()
    typestr = typestr or NUMPY_TYPES[x.dtype]
    return np.asarray(Address(x, typestr)) if x.numel() else np.empty(x.shape, typestr)


def bits(x: Tensor) -> NumpyArray:
    """A numpy view of the bits of a tensor of any dtype, to copy from or to."""
    size = x.element_size()
    return view(x, f"u{size}" if size <= 8 else f"c{size}")


_ALIGNED = 64  # an address with the alignment of every dtype


class Address:
    """The memory of a tensor for numpy's array interface. Without a typestr it must not be read."""

    def __init__(self, x: Tensor, typestr: str | None = None) -> None:
        size = x.element_size()
        self._keep = x  # numpy's view keeps this object alive, and with it the memory
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(x.shape),
            "strides": tuple(stride * size for stride in x.stride()),
            "typestr": typestr or f"|V{size}",
            # An empty tensor may have no address, which numpy before 2.4 does not accept.
            "data": (x.data_ptr() or _ALIGNED, typestr is None),
        }
