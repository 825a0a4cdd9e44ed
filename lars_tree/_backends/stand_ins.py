"""torch tensors that are not what they seem: they stand for others, or in memory of others.

Only looked at here, to be refused. `torch.py` has what is done with tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from lars_tree._backends.addresses import bytes_needed
from lars_tree._memory import is_mapped_read_only

TENSOR_TYPES = (Tensor, torch.nn.Parameter)  # of plain tensors


def is_intercepted() -> bool:
    """Whether someone traces or intercepts torch's operations, and so must see them."""
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return bool(seen or torch._C._len_torch_dispatch_stack())


def is_functorch(x: Tensor) -> bool:
    """Whether x is a wrapper tensor of torch.func. Under torch.compile these are not seen."""
    return not torch.compiler.is_compiling() and bool(
        torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def stand_in_fault(x: Tensor) -> str | None:
    """What x is, if it stands for another tensor where nobody knows of that; None otherwise.

    Inside of its mode, its transform or its trace, a stand-in is computed with like any tensor.
    """
    if torch.compiler.is_compiling():
        return None
    if isinstance(x, torch.masked.MaskedTensor):
        return "a masked tensor: the rule knows no missing elements; fill them first"
    if x._is_zerotensor():
        return "a ZeroTensor, which has no memory: use torch.zeros"
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if isinstance(x, FakeTensor):
        return (
            None if fake_mode or is_intercepted() else "a FakeTensor outside of its FakeTensorMode"
        )
    if isinstance(x, FunctionalTensor) or torch._is_functional_tensor(x):
        return (
            None if transformed or is_intercepted() else "a functional tensor, which has no memory"
        )
    if is_functorch(x) and not transformed and not torch._C._functorch.is_dead_tensor_wrapper(x):
        return "a tensor of a torch.func transform that is over"
    if type(x) in TENSOR_TYPES and fake_mode and not fake_mode.allow_non_fake_inputs:
        return "a tensor that is not a FakeTensor, which this FakeTensorMode does not allow"
    return None


def address(x: Tensor) -> int | None:
    """The address of the memory of x; None if x is a wrapper without memory of its own."""
    if isinstance(x, FakeTensor):  # which warns of being asked
        return None
    try:
        start = int(x.data_ptr())
    except RuntimeError:
        return None
    return start if start or not x.numel() else None


def mapped_fault(x: Tensor) -> str | None:
    """What x is, if its memory is mapped for reading alone; None otherwise.

    torch does not keep the flag of a read-only numpy array. Most of them can be written to all the
    same, but a write into such pages ends the process.
    """
    if torch.compiler.is_compiling():
        return None
    start = address(x) if x.is_cpu else None
    if start is None or x.untyped_storage().resizable():  # memory of torch's own
        return None
    length = bytes_needed(x) - x.storage_offset() * x.element_size()
    if is_mapped_read_only(start, max(length, 0)):
        return "read-only: it shares memory that is mapped for reading alone"
    return None
