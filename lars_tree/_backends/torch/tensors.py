"""Multi-tensor updates on torch accelerators, by `torch._foreach_*` operations.

`Tensors` lets `formula.step` compute with many tensors as if they were one, without waiting for the
device. `traced.py` has the updates under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import filterfalse, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lars_tree._backends.arrays import NamespaceOps
from lars_tree._backends.base import Leaf, StepResult, grouped
from lars_tree._backends.memory import NumpyArray
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Measured, Rule


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


class Tensors:
    """Many tensors as one operand; the factor or divisor may be a vector, one number per tensor."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def __rmul__(self, numbers: Any) -> Tensors:
        return Tensors(torch._foreach_mul(self.tensors, _each(numbers)))

    def __truediv__(self, numbers: Any) -> Tensors:
        return Tensors(torch._foreach_div(self.tensors, _each(numbers)))

    def __add__(self, other: Tensors) -> Tensors:
        return Tensors(torch._foreach_add(self.tensors, other.tensors))

    def __sub__(self, other: Tensors) -> Tensors:
        return Tensors(torch._foreach_sub(self.tensors, other.tensors))


def _each(numbers: Any) -> Any:
    return list(numbers.unbind()) if isinstance(numbers, Tensor) and numbers.ndim else numbers


class TensorsOps(TorchOps):
    """`formula.Ops` for `Tensors`, where a norm is a vector of one number per tensor."""

    def norm(self, x: Any, layer_axis: int | None) -> Tensor:
        return torch.stack(torch._foreach_norm(x.tensors))

    def upper_half(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return super().upper_half(x)
        return Tensors([super(TensorsOps, self).upper_half(tensor) for tensor in x.tensors])

    def finite_or(self, x: Any, other: Any) -> Any:
        pairs = zip(x.tensors, other.tensors, strict=True)
        return Tensors([super(TensorsOps, self).finite_or(*pair) for pair in pairs])

    def largest(self, x: Any, layer_axis: int | None) -> Tensor:
        return torch.stack(torch._foreach_norm(x.tensors, ord=float("inf")))


_OPS = TensorsOps(torch)


class Layer(NamedTuple):
    """The detached tensors that share one ratio: a leaf, or one index of its layer axis.

    The new velocity overwrites the old one.
    """

    w: Any
    dcdw: Any
    out: Any
    velocity: Any
    rule: Rule


def layers(leaf: Leaf, new: StepResult) -> list[Layer]:
    """The layers of a leaf; results are written to `new`. Complex numbers become real pairs."""
    given = (leaf.w, leaf.dcdw.expand(leaf.w.shape), new.w, new.velocity)
    w, dcdw, out, velocity = (None if x is None else as_real(x.detach()) for x in given)
    rule, axis = leaf.rule._replace(layer_axis=None), leaf.rule.layer_axis
    if axis is None:
        return [Layer(w, dcdw, out, velocity, rule)]
    axis %= leaf.w.ndim  # counted from the front, as pairs of real numbers add an axis at the end
    rows = [repeat(None) if x is None else x.unbind(axis) for x in (w, dcdw, out, velocity)]
    return [Layer(*row, rule) for row in zip(*rows, strict=False)]  # type: ignore[call-arg]


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def wide(layer: Layer) -> torch.dtype:
    """The dtype to compute in: double in CPU memory, at least float32 elsewhere."""
    if layer.w.device.type == "cpu":
        return torch.float64
    return torch.promote_types(torch.promote_types(layer.w.dtype, layer.dcdw.dtype), torch.float32)


def step_layers(
    given: Iterable[tuple[Layer, Any]], ops: Callable[[list[Any]], TensorsOps] = lambda _: _OPS
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors to write to, and their new values, for a step of all layers.

    This does not wait for the device. Each layer is given with an extra value. `ops` returns the
    operations for layers that are updated together, given the list of their extra values.
    """
    targets: list[Tensor] = []
    values: list[Tensor] = []
    pairs = [(layer, extra) for layer, extra in given if layer.w.numel()]
    with torch.no_grad():
        for group in grouped(pairs, lambda pair: _group(pair[0])).values():
            members, extras = zip(*group, strict=True)
            outs, numbers = _step_group(list(members), ops(list(extras)))
            targets += outs
            values += numbers
    return targets, values


def measure_layers(
    given: Iterable[tuple[Layer, Any]], ops: Callable[[list[Any]], TensorsOps] = lambda _: _OPS
) -> list[Measured]:
    """The norms and ratios of layers, computed as in `step_layers`; no layer may be empty."""
    pairs = list(given)
    measured: list[Any] = [None] * len(pairs)
    with torch.no_grad():
        for indices in grouped(range(len(pairs)), lambda i: _group(pairs[i][0])).values():
            members, extras = zip(*(pairs[i] for i in indices), strict=True)
            w, dcdw, rule = _joined(list(members))
            vectors = formula.measure(ops(list(extras)), w, dcdw, rule)
            numbers = zip(*(vector.unbind() for vector in vectors), strict=True)
            for i, each in zip(indices, numbers, strict=True):
                measured[i] = Measured(*each)
    return measured


def measure_leaves(leaves: list[Leaf]) -> list[Measured]:
    by_leaf = [layers(leaf, StepResult(leaf.w)) for leaf in leaves]
    found = iter(measure_layers((layer, None) for some in by_leaf for layer in some))
    pairs = zip(leaves, by_leaf, strict=True)
    return [of_leaf(list(islice(found, len(some))), leaf.rule) for leaf, some in pairs]


def of_leaf(measured: list[Measured], rule: Rule) -> Measured:
    """Join the measurements of the layers of a leaf: vectors if the leaf has a layer axis."""
    if rule.layer_axis is None:
        return measured[0]
    return Measured(*(torch.stack(numbers) for numbers in zip(*measured, strict=True)))


def _group(layer: Layer) -> Hashable:
    """A key that is equal for layers that can be updated together."""
    rule = layer.rule
    flags = rule.adapt, rule.trust_clip, rule.joint_norm, rule.nesterov, rule.maximize
    decays = not formula.is_zero(rule.decay_lambda)  # a decay of 0 times infinity would be NaN
    return layer.w.device, wide(layer), layer.velocity is None, flags, decays


def _step_group(group: list[Layer], ops: TensorsOps) -> tuple[list[Tensor], list[Tensor]]:
    w, dcdw, rule = _joined(group)
    dtype = wide(group[0])
    targets = [layer.out for layer in group]
    velocity = None
    velocities = [layer.velocity for layer in group if layer.velocity is not None]
    if velocities:
        velocity = Tensors([x.to(dtype) for x in velocities])
        targets += velocities
    stepped = formula.step(ops, w, dcdw, rule, velocity)
    return targets, [x for many in stepped if many is not None for x in many.tensors]


def _joined(group: list[Layer]) -> tuple[Tensors, Tensors, Rule]:
    dtype = wide(group[0])
    w, dcdw = (Tensors([x.to(dtype) for x in xs]) for xs in list(zip(*group, strict=True))[:2])
    return w, dcdw, _one_rule([layer.rule for layer in group], w.tensors[0])


def _one_rule(rules: list[Rule], like: Tensor) -> Rule:
    """One rule for many layers; a number that differs between them becomes a vector."""

    def merged(name: str) -> Any:
        values = [getattr(rule, name) for rule in rules]
        if all(type(value) is float for value in values):
            if len(set(values)) == 1:
                return values[0]
            return torch.tensor(values, dtype=like.dtype, device=like.device)
        if all(value is values[0] for value in values):
            return values[0].detach().to(dtype=like.dtype, device=like.device)
        numbers = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in values)
        return torch.stack([number.detach() for number in numbers])

    names = (*formula.NUMBERS, *formula.MOMENTUM_NUMBERS)
    return rules[0]._replace(**{name: merged(name) for name in names})


def fetched(xs: list[Tensor]) -> list[NumpyArray]:
    """The values of small real tensors, with one copy and one wait for each device."""
    found: dict[int, NumpyArray] = {}
    for here in grouped(range(len(xs)), lambda i: xs[i].device).values():
        flat = torch.cat([xs[i].double().reshape(-1) for i in here]).cpu().numpy()
        parts = np.split(flat, np.cumsum([xs[i].numel() for i in here])[:-1])
        found |= {i: x.reshape(xs[i].shape) for i, x in zip(here, parts, strict=True)}
    return [found[i] for i in range(len(xs))]
