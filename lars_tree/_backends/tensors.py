"""torch accelerators: many tensors stepped at a time, by `torch._foreach_*` operations.

`Tensors` is many tensors that take part in the arithmetic of `_rule.step` as one; nothing waits for
the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lars_tree import _rule
from lars_tree._backends.arrays import NamespaceOps
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


def step_many(
    wide: torch.dtype,
    ws: list[Tensor],
    dcdws: list[Tensor],
    news: list[Tensor],
    rules: list[Rule],
) -> tuple[list[Tensor], list[Tensor]]:
    """Where to write, and what, for one step of all leaves of a device, without waiting for it."""
    with torch.no_grad():
        layers = []
        for w, dcdw, new, rule in zip(ws, dcdws, news, rules, strict=True):
            leaf = [w.detach(), dcdw.detach().expand(w.shape), new.detach()]
            if rule.layer_axis is None:
                layers.append((*leaf, rule))
            else:
                unbound = (x.unbind(rule.layer_axis) for x in leaf)
                layers.extend((*layer, rule) for layer in zip(*unbound, strict=True))
        layers = [layer for layer in layers if layer[0].numel()]
        if not layers:
            return [], []
        w_wide = Tensors([w.to(wide) for w, _, _, _ in layers])
        dcdw_wide = Tensors([dcdw.to(wide) for _, dcdw, _, _ in layers])
        rule = _one_rule([rule for *_, rule in layers], w_wide.tensors[0])
        stepped = _rule.step(_OPS, w_wide, dcdw_wide, rule)
        return [new for _, _, new, _ in layers], stepped.tensors


def _one_rule(rules: list[Rule], like: Tensor) -> Rule:
    """One rule for many leaves: numbers that differ among them become vectors."""
    dtype = like.real.dtype if like.is_complex() else like.dtype

    def merged(name: str) -> Any:
        values = [getattr(rule, name) for rule in rules]
        if all(type(value) is float for value in values):
            if len(set(values)) == 1:
                return values[0]
            return torch.tensor(values, dtype=dtype, device=like.device)
        numbers = (torch.as_tensor(value, dtype=dtype, device=like.device) for value in values)
        return torch.stack([number.detach() for number in numbers])

    return rules[0]._replace(layer_axis=None, **{name: merged(name) for name in _rule.NUMBERS})
