"""torch accelerators: many tensors stepped at a time, by `torch._foreach_*` operations.

`Tensors` is many tensors that take part in the arithmetic of `_rule.step` as one; nothing waits for
the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lars_tree import _rule
from lars_tree._backends.arrays import NamespaceOps
from lars_tree._backends.base import Leaf, New
from lars_tree._rule import Rule


class TorchOps(NamespaceOps):
    """torch as an array namespace, where it is not yet one."""

    def is_complex(self, x: Tensor) -> bool:
        return bool(x.is_complex())

    def constant(self, x: Tensor) -> Tensor:
        return x.detach()

    def one(self, x: Tensor) -> Tensor:
        return torch.ones((), dtype=x.dtype, device=x.device)

    def max(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return torch.amax(x, dim=axes, keepdim=True) if axes else x


class Tensors:
    """Many tensors that take part in arithmetic as one; a vector has a number for each."""

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
    """`_rule.Ops` over `Tensors`: norms are vectors."""

    def norm(self, x: Any, layer_axis: int | None) -> Tensor:
        return torch.stack(torch._foreach_norm(x.tensors))

    def largest(self, x: Any, layer_axis: int | None) -> Tensor:
        return torch.stack(torch._foreach_norm(x.tensors, ord=float("inf")))


_OPS = TensorsOps(torch)


def group_key(leaf: Leaf) -> Hashable:
    """Equal for leaves that `step_many` may take together."""
    rule = leaf.rule
    flags = rule.adapt, rule.trust_clip, rule.nesterov, rule.maximize
    return leaf.w.device, _wide(leaf), leaf.velocity is None, flags


def _wide(leaf: Leaf) -> torch.dtype:
    """What to compute a leaf in: float32 or double, of real or complex numbers."""
    short = torch.complex64 if leaf.w.is_complex() else torch.float32
    return torch.promote_types(torch.promote_types(leaf.w.dtype, leaf.dcdw.dtype), short)


def step_many(leaves: list[Leaf], news: list[New]) -> tuple[list[Tensor], list[Tensor]]:
    """Where to write, and what, for one step of leaves of one group, without waiting for the device.

    The velocities of `news` hold those before the step.
    """
    with torch.no_grad():
        layers = [layer for pair in zip(leaves, news, strict=True) for layer in _layers(*pair)]
        layers = [layer for layer in layers if layer[0].numel()]
        if not layers:
            return [], []
        ws, dcdws, outs, velocities, rules = zip(*layers, strict=True)
        wide = _wide(leaves[0])
        w, dcdw = (Tensors([x.to(wide) for x in xs]) for xs in (ws, dcdws))
        moves = velocities[0] is not None
        velocity = Tensors([x.to(wide) for x in velocities]) if moves else None
        stepped = _rule.step(_OPS, w, dcdw, _one_rule(rules, w.tensors[0]), velocity)
        targets = [*outs, *velocities] if moves else [*outs]
        return targets, [x for many in stepped if many is not None for x in many.tensors]


def _layers(leaf: Leaf, new: New) -> Iterator[tuple[Any, ...]]:
    """The w, dcdw, out, velocity and rule of each layer of a leaf."""
    arrays = leaf.w, leaf.dcdw.expand(leaf.w.shape), new.w, new.velocity
    arrays = tuple(None if x is None else x.detach() for x in arrays)
    axis = leaf.rule.layer_axis
    if axis is None:
        yield (*arrays, leaf.rule)
        return
    unbound = (repeat(None) if x is None else x.unbind(axis) for x in arrays)
    for layer in zip(*unbound, strict=False):
        yield (*layer, leaf.rule)


def _one_rule(rules: Sequence[Rule], like: Tensor) -> Rule:
    """One rule for many leaves: numbers that differ among them become vectors."""
    dtype = like.real.dtype if like.is_complex() else like.dtype

    def merged(name: str) -> Any:
        values = [getattr(rule, name) for rule in rules]
        if all(type(value) is float for value in values):
            if len(set(values)) == 1:
                return values[0]
            return torch.tensor(values, dtype=dtype, device=like.device)
        if all(value is values[0] for value in values):
            return values[0].detach().to(dtype=dtype, device=like.device)
        numbers = (torch.as_tensor(value, dtype=dtype, device=like.device) for value in values)
        return torch.stack([number.detach() for number in numbers])

    names = (*_rule.NUMBERS, *_rule.MOTION_NUMBERS)
    return rules[0]._replace(layer_axis=None, **{name: merged(name) for name in names})
