"""Differentiable steps of CPU tensors shorter than double: operations with few temporaries.

The norms and the step are computed in double from the elements of w and dcdw, which are all that
autograd saves. Between them, `formula.py` computes the coefficients as 0-d tensors. The derivatives
consist of differentiable operations, so they have derivatives of any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lars_tree._backends.torch.layers import as_real
from lars_tree._backends.torch.tensors import TorchOps
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Rule


class _Ops(TorchOps):
    """Operations on w and dcdw themselves, and on coefficients that are 0-d tensors in double."""

    def unscaled_norms(
        self, w: Tensor, dcdw: Tensor, layer_axis: int | None
    ) -> tuple[Tensor, Tensor]:
        return _Norm.apply(w), _Norm.apply(dcdw)

    def where(self, condition: Tensor, a: Any, b: Any) -> Tensor:
        return torch.where(condition, a, b)


_OPS = _Ops(torch)


def step(w: Tensor, dcdw: Tensor, rule: Rule) -> Tensor:
    """The weights after a step without momentum that is in range, as in `formula.step`.

    The options are numbers, or 0-d tensors in double.
    """
    gradient_coefficient, decay_coefficient = formula.unscaled_coefficients(_OPS, w, dcdw, rule)
    keep = None if formula.is_zero(rule.decay_lambda) else 1 - decay_coefficient
    return _Step.apply(w, dcdw, keep, -gradient_coefficient)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products of two arrays, where complex numbers are pairs of real numbers."""
    a, b = (as_real(x).double().reshape(-1) for x in (a, b))
    return torch.dot(a, b)


class _Norm(Function):
    """The 2-norm; its derivative at 0 is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = _dot(x, x).sqrt()
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        is_zero = norm == 0
        factor = torch.where(is_zero, 0.0, slope / torch.where(is_zero, 1.0, norm))
        return (_wide(x) * factor).to(x.dtype)


class _Step(Function):
    """keep * w + move * dcdw, rounded once."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, dcdw: Tensor, keep: Any, move: Any) -> Tensor:
        ctx.save_for_backward(w, dcdw, keep, move)
        new = _wide(w)
        if keep is not None:
            new.mul_(keep)
        return new.add_(_wide(dcdw).mul_(move)).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        w, dcdw, keep, move = ctx.saved_tensors
        needs_w, needs_dcdw, needs_keep, needs_move = ctx.needs_input_grad
        slope = _wide(slope)
        return (
            (slope if keep is None else slope * keep).to(w.dtype) if needs_w else None,
            (slope * move).to(dcdw.dtype) if needs_dcdw else None,
            _dot(slope, w) if needs_keep else None,
            _dot(slope, dcdw) if needs_move else None,
        )
