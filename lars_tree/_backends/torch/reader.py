"""The `Reader` of the native engine for torch tensors, and whether it may be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lars_tree import _native
from lars_tree._backends.torch.stand_ins import TENSOR_TYPES, is_intercepted
from lars_tree._numerics.formula import Rule

if TYPE_CHECKING:
    from lars_tree._native._kernel import Reader


def _exchange() -> tuple[Any, ...] | None:
    """The C functions by which `_native` reads tensors; None before torch 2.10."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    storage = torch.UntypedStorage
    methods = (Tensor.untyped_storage, storage.nbytes, storage.resizable)
    return capsule and (capsule, *methods, Tensor.storage_offset, Tensor.is_neg)


_EXCHANGE: Any = _exchange()
READER: Reader = _EXCHANGE and _native.reader(
    TENSOR_TYPES, Rule._fields, make=torch.empty_like, copy=torch.clone, tensors=_EXCHANGE
)


def may_read() -> bool:
    """Whether the kernel may read and write the memory of tensors without torch's operations."""
    if READER is None or is_intercepted() or torch._C._functorch.peek_interpreter_stack():
        return False
    return _native.in_use() is not None
