"""Differentiable steps of CPU tensors that are shorter than double.

The step is that of the native engine, with the same bits, and autograd saves only its arguments.
The derivative is computed in double with few temporaries. Where it has to be differentiable itself,
autograd computes it from `formula.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from lars_tree._backends.base import Leaf
from lars_tree._backends.cpu import twin
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.torch.addresses import view
from lars_tree._backends.torch.layers import as_real
from lars_tree._backends.torch.stand_ins import address, is_intercepted
from lars_tree._numerics import formula
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._numerics.formula import Rule

_STEP = 2.0**-300  # see `_coefficients`
_STEPS = _STEP * 1j * np.eye(2 + len(formula.NUMBERS))

ArraysStep = Callable[[Tensor, Tensor, Rule], Tensor]  # a step that autograd can differentiate


def supports(leaf: Leaf) -> bool:
    """Whether `step` supports a leaf whose tensors have memory of their own, and no tangents.

    The step must have one layer and no momentum, and its norms must be in the range of double.
    """
    w, dcdw, rule = leaf.w, leaf.dcdw, leaf.rule
    if formula.is_joint(rule) or rule.layer_axis is not None or leaf.velocity is not None:
        return False
    if w.shape != dcdw.shape or not w.numel() or not w.is_cpu or max(map(_bits, (w, dcdw))) > 32:
        return False
    options = [getattr(rule, name) for name in formula.NUMBERS]
    return all(getattr(x, "ndim", 0) == 0 and formula.is_moderate(_number(x)) for x in options)


def _bits(x: Tensor) -> int:
    bits: int = torch.finfo(x.dtype).bits
    return bits


def _number(x: Any) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def step(w: Tensor, dcdw: Tensor, rule: Rule, by_autograd: ArraysStep) -> Tensor:
    """The weights after a step; see `supports`."""
    numbers = [getattr(rule, name) for name in formula.NUMBERS]
    new: Tensor = LarsStep.apply(w, dcdw, rule, by_autograd, *numbers)
    return new


class LarsStep(Function):  # type: ignore[misc]
    """The step of one leaf. The class names the node in graphs of autograd."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, dcdw: Tensor, rule: Rule, by_autograd: ArraysStep, *numbers: Any
    ) -> Tensor:
        ctx.save_for_backward(w, dcdw, *(x if isinstance(x, Tensor) else None for x in numbers))
        ctx.rule = _with(rule, map(_number, numbers))
        ctx.by_autograd = by_autograd
        new = torch.empty_like(w)
        twin.update(view(w), view(dcdw), view(new), ctx.rule)
        return new

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        w, dcdw, *numbers = ctx.saved_tensors
        is_direct = not is_intercepted() and address(slope) is not None
        if torch.is_grad_enabled() or not is_direct:
            found = _by_autograd(slope, w, dcdw, numbers, ctx.rule, ctx.by_autograd)
        else:
            found = _derivatives(slope, w, dcdw, numbers, ctx.rule, ctx.needs_input_grad)
        return (*found[:2], None, None, *found[2:])


def _derivatives(
    slope: Tensor,
    w: Tensor,
    dcdw: Tensor,
    numbers: list[Tensor | None],
    rule: Rule,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The derivatives by w, dcdw and the numbers that are tensors."""
    slope, wide_w, wide_dcdw = map(_flat, (slope, w, dcdw))
    norms = [math.sqrt(torch.dot(x, x)) for x in (wide_w, wide_dcdw)]
    (gradient_coefficient, decay_coefficient), slopes = _coefficients(norms, rule)
    totals = -float(torch.dot(slope, wide_dcdw)) * slopes[0]
    totals -= float(torch.dot(slope, wide_w)) * slopes[1]
    found: list[Tensor | None] = []
    cases = (w, wide_w, 1 - decay_coefficient), (dcdw, wide_dcdw, -gradient_coefficient)
    for i, (x, wide, factor) in enumerate(cases):
        # The derivative of the norm of x is x / norm, or 0 if the norm is 0.
        of_norm = totals[i] / norms[i] if norms[i] else 0.0
        total = wide.mul_(of_norm).add_(slope, alpha=factor) if needed[i] else None
        found.append(None if total is None else _like(x, total))
    pairs = zip(numbers, totals[2:], strict=True)
    return found + [None if x is None else x.new_tensor(total) for x, total in pairs]


@without_warnings
def _coefficients(norms: list[float], rule: Rule) -> tuple[list[float], NumpyArray]:
    """The coefficients of dcdw and w in u, and their derivatives by the norms and the numbers.

    The imaginary part of f(x + ih) is h f'(x) to the last digits, for any tiny h (Squire and Trapp
    1998, doi:10.1137/S003614459631241X).
    """
    values = [*norms, *(getattr(rule, name) for name in formula.NUMBERS)]
    points = np.array(values)[:, None] + _STEPS
    rule = _with(rule, points[2:])
    ratio = formula.trust_ratio(points[0], points[1], rule, np.where)
    found = np.array(formula.coefficients(ratio, rule))
    # The last column has the norms themselves: a norm of 0 would be no longer 0 in the others.
    return found[:, -1].real.tolist(), found.imag / _STEP


def _with(rule: Rule, numbers: Iterable[Any]) -> Rule:
    """The rule with these values of `formula.NUMBERS`."""
    named: dict[str, Any] = dict(zip(formula.NUMBERS, numbers, strict=True))
    return rule._replace(**named)


def _flat(x: Tensor) -> Tensor:
    """A copy in double as a vector; complex numbers become pairs."""
    return as_real(x).to(torch.float64, copy=True).reshape(-1)


def _like(x: Tensor, flat: Tensor) -> Tensor:
    if x.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    return flat.view(x.shape).to(x.dtype)


def _by_autograd(
    slope: Tensor,
    w: Tensor,
    dcdw: Tensor,
    numbers: list[Tensor | None],
    rule: Rule,
    step: ArraysStep,
) -> list[Tensor | None]:
    """Like `_derivatives`, as functions that can be differentiated and vectorised."""
    with torch.enable_grad():
        # The derivatives are partial: w may depend on dcdw, but their views do not.
        views = [None if x is None else x.view_as(x) for x in (w, dcdw, *numbers)]
        values = [getattr(rule, name) for name in formula.NUMBERS]
        given = [old if x is None else x for x, old in zip(views[2:], values, strict=True)]
        new = step(views[0], views[1], _with(rule, given))
        wanted = [x for x in views if x is not None and x.requires_grad]
    create_graph = torch.is_grad_enabled()
    found = torch.autograd.grad(new, wanted, slope, create_graph=create_graph, allow_unused=True)
    slopes = dict(zip(map(id, wanted), found, strict=True))
    return [slopes.get(id(x)) for x in views]
