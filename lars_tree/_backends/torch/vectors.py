"""Norms and numbers of many layers as vectors, for the foreach engine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lars_tree._backends.torch.chunks import chunked, split
from lars_tree._backends.torch.tensors import TorchOps
from lars_tree._backends.torch.transfers import sent
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Norm, Rule


def norms_of(xs: list[Tensor], dtype: torch.dtype, limit: int) -> Norm:
    """The norms of tensors of one dtype, with temporaries of about `limit` bytes."""
    limit //= 8  # elements, as `_foreach_norm` may convert tensors to float64
    parts = [[x for (x,) in split((x,), limit)] for x in xs]
    flat, counts = list(chain(*parts)), [len(some) for some in parts]
    largest = torch.finfo(xs[0].dtype).max
    if largest * largest < torch.finfo(dtype).max:  # the squares are in range
        return scaled(joined([unscaled_norms(flat, dtype)], counts))
    norms = [_scaled_norms(chunk, dtype) for chunk in chunked(flat, limit, Tensor.numel)]
    return joined(norms, counts)


def unscaled_norms(xs: list[Tensor], dtype: torch.dtype) -> Norm:
    norm = torch.stack(torch._foreach_norm(xs, 2, dtype=dtype))
    return Norm(norm, torch.ones_like(norm))


def _scaled_norms(xs: list[Tensor], dtype: torch.dtype) -> Norm:
    """The norms of tensors, computed from copies scaled to a largest magnitude of about 1."""
    scale = OPS.power_of_two(torch.stack(torch._foreach_norm(xs, torch.inf, dtype=dtype)))
    scale = scale.clamp(max=2.0**-20 / torch.finfo(dtype).tiny)  # in range if multiplied by a decay
    copies = torch._foreach_div(xs, scale.unbind())
    return Norm(unscaled_norms(copies, dtype).scaled, scale)


def joined(norms: list[Norm], counts: list[int]) -> Norm:
    """The norms of layers, given the norms of their parts, `counts` parts for each."""
    numbers, scales = (torch.cat(vectors) for vectors in zip(*norms, strict=True))
    if len(numbers) == len(counts):
        return Norm(numbers, scales)
    rows = []
    for number, scale in zip(numbers.split(counts), scales.split(counts), strict=True):
        largest = OPS.power_of_two(torch.where(number > 0, scale, 0).max())
        whole = torch.linalg.vector_norm(number * (scale / largest))
        rows.append(torch.stack([whole, largest]))
    return Norm(*torch.stack(rows, 1))


def scaled(norm: Norm, by: Any = 1.0) -> Norm:
    """The norms, whose scales are 1, multiplied by powers of two; with scales near the norms."""
    scale = OPS.power_of_two(norm.scaled)
    tiny = torch.finfo(scale.dtype).tiny
    product = (scale * by).clamp(tiny, 0.25 / tiny)  # in range even if the norm is not
    product = torch.where(norm.scaled == 0, 1, product)
    return Norm(norm.scaled / scale * (scale / (product / by)), product)


def one_rule(rules: list[Rule], like: dict[str, Any]) -> Rule:
    """One rule for many layers; a number that differs between them becomes a vector."""

    def merged(name: str) -> Any:
        values = [getattr(rule, name) for rule in rules]
        first, device = values[0], like["device"]
        if all(type(value) is float for value in values):
            if len(set(values)) == 1:
                return first
            return sent(torch.tensor(values, dtype=like["dtype"], device="cpu"), device)
        if all(value is first for value in values):
            return torch.as_tensor(first, **like).detach()
        return torch.stack([torch.as_tensor(value, **like).detach() for value in values])

    return rules[0]._replace(**{name: merged(name) for name in formula.ALL_NUMBERS})


class _Ops(TorchOps):
    """`formula.Ops` for vectors, and the operations that `multiply_add` needs for `Scratch`."""

    def round_to_power_of_two(self, x: Tensor) -> Tensor:
        """Clear all bits but those of the exponent, as some devices lack frexp."""
        is_double = x.dtype == torch.float64
        exponent = 0x7FF << 52 if is_double else 0xFF << 23
        bits = x.clamp(min=torch.finfo(x.dtype).tiny).view(
            torch.int64 if is_double else torch.int32
        )
        return (bits & exponent).view(x.dtype)

    def finite_or(self, x: Any, other: Any) -> Any:
        return x.finite_or(other)


OPS = _Ops(torch)


class Scratch:
    """A flat tensor in memory from a list, to which the memory returns with the last reference.

    With it, `formula.multiply_add` does not allocate memory.
    """

    def __init__(self, unused: list[Tensor]) -> None:
        self.unused, self.x = unused, unused.pop()
        self.dtype = self.x.dtype

    def __del__(self) -> None:
        self.unused.append(self.x)

    def _result(self, operation: Callable[..., Any], other: Any) -> Scratch:
        result = Scratch(self.unused)
        operation(self.x, getattr(other, "x", other), out=result.x)
        return result

    def __add__(self, other: Scratch) -> Scratch:
        return self._result(torch.add, other)

    def __sub__(self, other: Scratch) -> Scratch:
        return self._result(torch.sub, other)

    def __mul__(self, other: Scratch | float) -> Scratch:
        return self._result(torch.mul, other)

    def finite_or(self, other: Scratch) -> Scratch:
        result, memory = self - self, Scratch(self.unused)
        is_finite = memory.x.view(torch.bool).narrow(0, 0, len(self.x))
        torch.eq(result.x, result.x, out=is_finite)  # False for NaN
        torch.where(is_finite, self.x, other.x, out=result.x)
        return result
