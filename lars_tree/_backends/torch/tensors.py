"""Functions for torch tensors that several engines use: copies, versions, results, operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import filterfalse
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.arrays import NamespaceOps
from lars_tree._backends.base import Leaf, StepResult, grouped
from lars_tree._backends.memory import NumpyArray

P = ParamSpec("P")
T = TypeVar("T")


def without_autograd(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator like `torch.no_grad()`, which restores the grad mode after any exception.

    `torch.no_grad` runs Python code after it has changed the mode, and before it restores the mode.
    If a signal handler raises there, the caller's thread stays without autograd.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return function(*args, **kwargs)
        was_enabled = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # C code, as in `finally`: no handler runs before it
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(was_enabled)

    return call


def writing_to(tensors: list[Tensor]) -> AbstractContextManager[None]:
    """A context manager that disables autograd: inference mode if there are inference tensors."""
    infers = not torch.compiler.is_compiling() and any(map(Tensor.is_inference, tensors))
    context: AbstractContextManager[None] = torch.inference_mode() if infers else torch.no_grad()
    return context


def copy_all(outs: list[Tensor], xs: list[Tensor]) -> None:
    if outs:
        with writing_to(outs):
            torch._foreach_copy_(outs, xs)


def bump_versions(tensors: Iterable[Tensor]) -> None:
    """Increment the version counters, so that autograd detects stale saved tensors."""
    tensors = list(tensors)
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version counter
        tracked = list(filterfalse(Tensor.is_inference, tensors))
        torch.autograd.graph.increment_version(tracked)


def targets(leaf: Leaf) -> StepResult:
    """The tensors to write the results to; a new velocity starts as a copy of the old one."""
    if leaf.out is not None:
        return StepResult(leaf.out, leaf.velocity)
    velocity = None if leaf.velocity is None else leaf.velocity.detach().clone()
    return StepResult(torch.empty_like(leaf.w, requires_grad=False), velocity)


def leaf_like(new: Tensor, w: Tensor) -> Tensor:
    """A leaf tensor that requires a gradient if w does, and is a parameter if w is one."""
    if isinstance(w, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=w.requires_grad)
    return new.requires_grad_() if w.requires_grad else new


class TorchOps(NamespaceOps):
    """The functions of torch that differ from the array API standard."""

    def is_complex(self, x: Tensor) -> bool:
        return bool(x.is_complex())

    def constant(self, x: Tensor) -> Tensor:
        return x.detach()

    def one(self, x: Tensor) -> Tensor:
        return torch.ones((), dtype=x.dtype, device=x.device)

    def max(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return torch.amax(x, dim=axes, keepdim=True) if axes else x


@contextmanager
def may_wait(device: torch.device) -> Iterator[None]:
    """Allow operations that wait for the device, even if torch was told to report them."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def current_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A context manager that makes the current stream of this thread current in another thread."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "stream"):
        return nullcontext()
    stream: AbstractContextManager[Any] = module.stream(module.current_stream(device))
    return stream


def has_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return bool(device.type != "mps")


def fetched(xs: list[Tensor]) -> list[NumpyArray]:
    """The values of small real tensors, with one copy and one wait for each device."""
    found: dict[int, NumpyArray] = {}
    for here in grouped(range(len(xs)), lambda i: xs[i].device).values():
        flat = torch.cat([xs[i].double().reshape(-1) for i in here]).cpu().numpy()
        parts = np.split(flat, np.cumsum([xs[i].numel() for i in here])[:-1])
        found |= {i: x.reshape(xs[i].shape) for i, x in zip(here, parts, strict=True)}
    return [found[i] for i in range(len(xs))]
