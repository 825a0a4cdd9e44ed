"""torch: CPU tensors use the native engine, accelerator tensors use multi-tensor operations.

Dense CPU tensors that need no autograd graph are updated by the kernel, or through numpy views of
their memory if the kernel does not support them. Tensors on an accelerator are updated many at a
time, as `Tensors`, by `torch._foreach_*` operations, without waiting for the device. In all other
cases (autograd, torch.func, subclasses of Tensor, rates that are tensors with a shape), leaves are
updated one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends import base
from lars_tree._backends.arrays import ArraysBackend
from lars_tree._backends.base import Columns, Leaf, StepResult, StepResults, Writes
from lars_tree._backends.cpu import twin
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.torch import differentiable, multi_tensor, sharded, stand_ins, tensors
from lars_tree._backends.torch.addresses import NUMPY_TYPES, Address, bits, bytes_needed, view
from lars_tree._backends.torch.reader import READER, may_read
from lars_tree._backends.torch.shards import Shards
from lars_tree._backends.torch.transfers import is_capturing
from lars_tree._numerics.formula import Measured, Rule

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan

P = ParamSpec("P")
T = TypeVar("T")


class TorchBackend(ArraysBackend):
    """torch tensors and parameters on any device."""

    name = "torch"
    ops = tensors.TorchOps(torch)

    def facts(self, x: Tensor) -> base.Facts:
        dtype, kind = x.dtype, base.Kind.INTEGER
        if dtype in NUMPY_TYPES:
            kind = base.Kind.COMPLEX if dtype.is_complex else base.Kind.REAL
        elif dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or x.is_quantized:
            kind = base.Kind.OTHER
        return base.Facts(tuple(x.shape), kind, dtype, x.device, sharded.sharding_of(x))

    def values(self, x: Tensor) -> base.Values:
        if stand_ins.is_functorch(x):
            return base.Values.TRACED
        return base.Values.CPU if x.device.type == "cpu" else base.Values.DEVICE

    def to_numpy(self, x: Tensor) -> NumpyArray:
        x = sharded.whole(x.detach()).resolve_conj().resolve_neg().cpu()
        # A copy, because after x.numpy() the storage could never be resized: see `addresses.view`.
        return np.asarray((x.double() if x.dtype == torch.bfloat16 else x.clone()).numpy())

    def full(self, number: complex, like: Tensor) -> Tensor:
        is_complex = isinstance(number, complex) or like.is_complex()
        dtype = torch.complex128 if is_complex else torch.float64
        return torch.tensor(number, dtype=dtype, device=like.device)

    def copy(self, x: Tensor, stop_gradients: bool) -> Tensor:
        if not stop_gradients:
            return x.clone()
        return tensors.leaf_like(x.detach().clone(), x)

    def fault(self, x: Tensor) -> str | None:
        if torch.nn.parameter.is_lazy(x):
            return "a parameter without data: run the model once to initialise it"
        if x.layout != torch.strided or x.is_nested:
            return f"a sparse or nested tensor ({x.layout}): make it dense first"
        if x.device.type == "meta":
            return "a tensor on the meta device, which holds no data"
        if x.ndim > base.MAX_AXES:
            return f"a tensor of {x.ndim} axes, where numpy has {base.MAX_AXES} at most"
        stand_in = stand_ins.stand_in_fault(x)
        if stand_in:
            return stand_in
        if sharded.is_sharded(x):
            fault = sharded.partial_fault(x)
            if fault:
                return fault
            x = sharded.shard_of(x)
        if _has_memory(x) and x.untyped_storage().nbytes() < bytes_needed(x):
            return "a tensor whose storage was freed"
        return None

    def out_fault(self, x: Tensor) -> str | None:
        if x.is_conj() or x.is_neg():
            return "a lazily conjugated or negated view: resolve it first"
        return stand_ins.mapped_fault(sharded.shard_of(x))

    def sizes(self, xs: list[Tensor]) -> tuple[list[int], list[int]]:
        if torch.nn.parameter.is_lazy(xs[0]):
            return [0] * len(xs), [0] * len(xs)
        counts = [x.numel() for x in xs]
        return counts, [count * x.itemsize for count, x in zip(counts, xs, strict=True)]

    def memory(self, x: Tensor) -> NumpyArray | None:
        local = sharded.shard_of(x)
        return None if stand_ins.address(local) is None else np.asarray(Address(local))

    def is_tracked(self, x: Tensor) -> bool:
        return (torch.is_grad_enabled() and x.requires_grad) or _has_tangent(x)

    def widen(self, x: Any, w: Tensor) -> Tensor:
        double = w.device.type == "cpu" or w.dtype in (torch.float64, torch.complex128)
        dtype = torch.float64 if double else torch.float32
        if isinstance(x, Tensor) and x.is_complex():
            dtype = torch.complex128 if double else torch.complex64
        return torch.as_tensor(x, device=w.device).to(dtype)

    def narrow(self, x: Tensor, w: Tensor) -> Tensor:
        return x.to(w.dtype)

    def zeros(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(w.detach(), dtype=dtype)

    def counter(self, w: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=w.device)

    def velocity_dtype(self, w: Tensor) -> torch.dtype:
        return torch.float32 if w.dtype.itemsize == 2 else w.dtype

    @tensors.without_autograd
    def prepare(
        self, plan: Plan, columns: Columns, results: StepResults | None, indices: list[int] | None
    ) -> list[int]:
        if not may_read():
            return super().prepare(plan, columns, results, indices)
        new_ws, new_velocities = results or (None, None)
        return plan.prepare(READER, *columns[:5], new_ws, new_velocities, indices)

    def shards(self, plan: Plan) -> Shards | None:
        return Shards(plan, self._steps_in_memory) if may_read() else None

    def finish(self, columns: Columns, results: StepResults, indices: Iterable[int]) -> None:
        for index in indices:
            if results.ws[index] is not None:
                results.ws[index] = tensors.leaf_like(results.ws[index], columns.ws[index])

    def count(self, plan: Plan, counter: Tensor) -> bool:
        return _is_readable_counter(counter) and plan.count(np.asarray(Address(counter, "i8")))

    def update(self, leaves: list[Leaf], writes: Writes) -> list[StepResult]:
        results: list[Any] = [None] * len(leaves)
        elsewhere: list[tuple[Leaf, StepResult]] = []
        for i, leaf in enumerate(leaves):
            if not self._steps_in_memory(leaf):
                results[i] = writes.result(leaf, self._tracked(leaf))
                continue
            results[i] = tensors.targets(leaf)
            if leaf.w.device.type == "cpu" and not sharded.is_sharded(leaf.w):
                self._step_in_cpu_memory(leaf, results[i], writes)
            else:
                elsewhere.append((leaf, results[i]))
        if elsewhere:
            step = multi_tensor.prepare(elsewhere)
            if all(leaf.out is None for leaf, _ in elsewhere):
                step.write()
            else:
                add_step(step, writes)
        return [_returned(leaf, new) for leaf, new in zip(leaves, results, strict=True)]

    def _step_in_cpu_memory(self, leaf: Leaf, new: StepResult, writes: Writes) -> None:
        moving = None if new.velocity is None else view(new.velocity)
        arrays = view(leaf.w), view(leaf.dcdw), view(new.w), leaf.rule, moving
        if leaf.out is None:
            twin.update(*arrays)
        else:
            twin.prepare(*arrays, writes)
            writes.announce(self, (x for x in new if x is not None))

    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        found: dict[int, Measured] = {}
        elsewhere: list[int] = []
        for i, leaf in enumerate(leaves):
            if not self._steps_in_memory(leaf):
                measure = _in_graph(self.measure_leaf, leaf.rule)
                found[i] = measure(leaf.w, leaf.dcdw, leaf.rule)
            elif (leaf.w.is_cpu or not leaf.w.numel()) and not sharded.is_sharded(leaf.w):
                measured = twin.measure(view(leaf.w), view(leaf.dcdw), leaf.rule)
                found[i] = Measured(*(torch.as_tensor(x, device=leaf.w.device) for x in measured))
            else:
                elsewhere.append(i)
        if elsewhere:
            others = multi_tensor.measure([leaves[i] for i in elsewhere])
            found |= zip(elsewhere, others, strict=True)
        return [Measured(*map(sharded.whole, found[i])) for i in range(len(leaves))]

    def numbers(self, rows: NumpyArray, ws: list[Tensor]) -> list[Measured]:
        return [Measured(*row.unbind()) for row in torch.from_numpy(rows)]

    def fetch(self, xs: list[Tensor]) -> list[NumpyArray]:
        return tensors.fetched([sharded.whole(x.detach()) for x in xs])

    def _steps_in_memory(self, leaf: Leaf) -> bool:
        """Whether a leaf can be updated directly in memory, without autograd."""
        w, rule = leaf.w, leaf.rule
        given = (w, leaf.dcdw, leaf.out, leaf.velocity, *rule)
        xs = [x for x in given if isinstance(x, Tensor)]
        has_memory = all(_has_memory(x) or sharded.is_sharded(x) for x in xs)
        if stand_ins.is_intercepted() or not has_memory:
            return False
        if not rule.stop_gradients and any(map(self.is_tracked, xs)):
            return False
        options = [x for x in rule if isinstance(x, (Tensor, np.ndarray))]
        if w.device.type == "cpu" and not sharded.is_sharded(w):
            return not any(isinstance(x, Tensor) for x in options)
        return sharded.is_sharded(w) or all(x.ndim == 0 for x in options)

    def _tracked(self, leaf: Leaf) -> StepResult:
        """The step by operations that autograd, torch.func and modes can follow."""
        stops = leaf.rule.stop_gradients
        xs = [x for x in (leaf.w, leaf.dcdw, *leaf.rule) if isinstance(x, Tensor)]
        is_dense = all(map(_has_memory, xs)) and not any(map(_has_tangent, xs))
        if is_dense and not stops and differentiable.supports(leaf):
            step = lambda *given: self.step(*given).w  # noqa: E731
            return StepResult(differentiable.step(leaf.w, leaf.dcdw, leaf.rule, step))
        new = _in_graph(self.step, leaf.rule)(leaf.w, leaf.dcdw, leaf.rule, leaf.velocity)
        return StepResult(*(x if x is None or not stops else x.detach() for x in new))

    def all_finite(self, xs: list[Tensor]) -> Any:
        flags = [sharded.whole(torch.isfinite(x.detach()).all()) for x in xs]
        return torch.stack(flags).all() if len({x.device for x in xs}) == 1 else all(flags)

    def choose(self, flag: Any, a: Tensor, b: Tensor) -> Tensor:
        if isinstance(flag, bool):
            return a if flag else b
        chosen = torch.where(flag, a.detach(), b.detach())
        return tensors.leaf_like(chosen, a) if a.is_leaf else torch.where(flag, a, b)

    def write(self, out: Tensor, x: Tensor) -> None:
        x = x.detach()
        with tensors.writing_to([out]):
            out.copy_(x)

    def writers(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Callable[[], Any]]:
        together = [pair for pair in pairs if all(map(_has_memory, pair))]
        others = [pair for pair in pairs if not all(map(_has_memory, pair))]
        outs, xs = ([pair[i].detach() for pair in together] for i in (0, 1))
        calls = [partial(tensors.copy_all, outs, xs)] if together else []
        return calls + super().writers(others)

    def copied_memory(self, out: Tensor, x: Tensor) -> tuple[NumpyArray, NumpyArray] | None:
        if not all(_has_memory(tensor) and tensor.is_cpu for tensor in (out, x)):
            return None
        return bits(out), bits(x.detach().to(out.dtype))

    def announce(self, outs: Iterable[Tensor]) -> None:
        tensors.bump_versions(outs)


def add_step(step: multi_tensor.Step, writes: Writes, unless: Tensor | None = None) -> None:
    """Add a step in place, which keeps the old values if `unless` is not 0."""
    if stand_ins.is_intercepted() or any(map(is_capturing, step.devices)):
        writes.step(partial(step.write, unless))  # modes and captures of graphs belong to a thread
    else:
        streams = [tensors.current_stream(device) for device in step.devices]
        writes.step_in_chunks(partial(step.write, unless, streams))


def _in_graph(function: Callable[P, T], rule: Rule) -> Callable[P, T]:
    """The function, without autograd if the rule stops gradients."""
    return tensors.without_autograd(function) if rule.stop_gradients else function


def _returned(leaf: Leaf, new: StepResult) -> StepResult:
    if leaf.out is not None:
        return StepResult(leaf.out, leaf.velocity)
    if not leaf.rule.stop_gradients or stand_ins.is_functorch(new.w):
        return new
    return new._replace(w=tensors.leaf_like(new.w, leaf.w))


def _has_memory(x: Tensor) -> bool:
    """Whether x has memory of its own that may be read and written without torch's operations."""
    if type(x) not in stand_ins.TENSOR_TYPES or stand_ins.is_functorch(x):
        return False
    return not stand_ins.is_intercepted()


def is_in_cpu_memory(x: Tensor) -> bool:
    """Whether x is a CPU tensor with its own memory."""
    return type(x) in stand_ins.TENSOR_TYPES and x.is_cpu


def is_shard(x: Tensor) -> bool:
    """Whether x is a DTensor with shards in CPU memory."""
    return sharded.is_sharded(x) and x.is_cpu


def _is_readable_counter(x: Any) -> bool:
    is_number = type(x) is Tensor and x.dtype == torch.int64 and x.numel() == 1
    return is_number and x.is_cpu and BACKEND.fault(x) is None


def _has_tangent(x: Tensor) -> bool:
    in_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return in_forward_mode and torch.autograd.forward_ad.unpack_dual(x).tangent is not None


BACKEND = TorchBackend()
