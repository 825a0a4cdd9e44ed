"""Layers of torch tensors, and the interface of the engines that update them in two phases.

A layer is a leaf, or one index of its layer axis. The norms of layers are a table with the shape
(layers, 2, 2): for each layer the norms of w and of the gradient, each as the `scaled` and `scale`
of `formula.Norm`. Between the phases, `sharded.py` replaces the norms of shards by norms of whole
layers.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lars_tree._backends.base import Leaf, StepResult
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Measured, Rule


class Layer(NamedTuple):
    """The tensors that share one ratio. They may require gradients: use them without autograd.

    All have one shape and device, and are real. `out` may be w. The velocity, if there is one, is
    overwritten. `rule.layer_axis` is ignored.
    """

    w: Any
    dcdw: Any
    out: Any
    velocity: Any
    rule: Rule


class LayerEngine(Protocol):
    """Updates layers on one device. No method waits for the device."""

    def norms(self) -> Tensor:
        """The table of norms; of the joint gradient, where `formula.is_joint`.

        Norms of layers that do not adapt are not computed; their rows are undefined.
        """

    def nonfinite(self, norms: Tensor) -> Tensor:
        """Whether each layer with the option `nonfinite` would not be finite; a vector of bools.

        False for layers whose rule says "propagate".
        """

    def write(self, norms: Tensor, unless: Tensor | None) -> None:
        """Compute and write the new weights and velocities, from the norms of whole layers.

        If `unless`, a 0-d tensor on the device, is not 0, the old values are written instead.
        """


def layers(leaf: Leaf, new: StepResult) -> list[Layer]:
    """The layers of a leaf; results are written to `new`. Complex numbers become real pairs."""
    given: tuple[Any, ...] = (leaf.w, leaf.dcdw, new.w, new.velocity)
    rule, axis = leaf.rule, leaf.rule.layer_axis
    if leaf.dcdw.shape != leaf.w.shape:
        given = (leaf.w, leaf.dcdw.expand(leaf.w.shape), new.w, new.velocity)
    if leaf.w.is_complex():
        given = tuple(None if x is None else as_real(x.detach()) for x in given)
    if axis is None:
        return [Layer._make((*given, rule))]
    axis %= leaf.w.ndim  # counted from the front, as pairs of real numbers add an axis at the end
    by_id = {id(x): x.detach().unbind(axis) for x in given if x is not None}
    rows = [by_id.get(id(x), repeat(None)) for x in given]
    return [Layer(*row, rule) for row in zip(*rows, strict=False)]  # type: ignore[call-arg]


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def of_leaf(measured: list[Measured], rule: Rule) -> Measured:
    """Join the measurements of the layers of a leaf: vectors if the leaf has a layer axis."""
    if rule.layer_axis is None:
        return measured[0]
    return Measured(*(torch.stack(numbers) for numbers in zip(*measured, strict=True)))


def alike(rule: Rule) -> Hashable:
    """A key that is equal for rules that `one_rule` can join."""
    flags = rule.adapt, rule.trust_clip, rule.joint_norm, rule.nesterov, rule.maximize
    return flags, not formula.is_zero(rule.decay_lambda)  # a decay of 0 times infinity is NaN
