"""Recognises and refuses torch tensors without ordinary memory of their own.

Such tensors are stand-ins for other tensors (functorch wrappers, FakeTensor), or have read-only
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from lars_tree._backends.memory import READ_ONLY_MAP, is_mapped_read_only
from lars_tree._backends.torch.addresses import bytes_needed

TENSOR_TYPES = (Tensor, torch.nn.Parameter)  # subclasses may wrap other tensors


def is_intercepted() -> bool:
    """Whether operations are traced or intercepted, so memory must not be accessed directly."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return bool(traced or torch._C._len_torch_dispatch_stack())


def is_functorch(x: Tensor) -> bool:
    """Whether x is a wrapper tensor of torch.func; always False under torch.compile."""
    return not torch.compiler.is_compiling() and bool(
        torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def stand_in_fault(x: Tensor) -> str | None:
    """Why x cannot be used: for example, it is a stand-in outside of its mode or transform.

    None if x can be used. Inside its mode, transform or trace, a stand-in is used like any tensor.
    """
    if torch.compiler.is_compiling():
        return None
    if isinstance(x, torch.masked.MaskedTensor):
        return "a masked tensor: LARS has no missing elements; fill them first"
    if x._is_zerotensor():
        return "a ZeroTensor, which has no memory: use torch.zeros"
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    intercepted = is_intercepted()
    if isinstance(x, FakeTensor):
        return None if fake_mode or intercepted else "a FakeTensor outside of its FakeTensorMode"
    if isinstance(x, FunctionalTensor) or torch._is_functional_tensor(x):
        return None if transformed or intercepted else "a functional tensor, which has no memory"
    if is_functorch(x) and not transformed and not torch._C._functorch.is_dead_tensor_wrapper(x):
        return "a tensor of a torch.func transform that is over"
    if type(x) in TENSOR_TYPES and fake_mode and not fake_mode.allow_non_fake_inputs:
        return "a tensor that is not a FakeTensor, which this FakeTensorMode does not allow"
    return None


def address(x: Tensor) -> int | None:
    """The address of the memory of x; None if x is a wrapper without memory of its own."""
    if isinstance(x, FakeTensor):  # its data_ptr() warns
        return None
    try:
        start = int(x.data_ptr())
    except RuntimeError:
        return None
    return start if start or not x.numel() else None


def mapped_fault(x: Tensor) -> str | None:
    """A description of x if its memory is mapped read-only; otherwise None.

    torch drops the read-only flag of numpy arrays. Writing to most of these arrays is harmless, but
    a write to a read-only page kills the process.
    """
    if torch.compiler.is_compiling():
        return None
    start = address(x) if x.is_cpu else None
    if start is None or x.untyped_storage().resizable():  # torch's own memory
        return None
    length = bytes_needed(x) - x.storage_offset() * x.element_size()
    if is_mapped_read_only(start, max(length, 0)):
        return READ_ONLY_MAP
    return None
