"""The foreach engine: multi-tensor updates in place, with bounded temporaries.

It updates tensors of all dtypes and memory layouts on any device, by `torch._foreach_*` operations.
Tensors are processed in chunks, and large tensors in parts. The temporaries of `write` are views of
one workspace, which is allocated before anything is written. Weights are updated in the precision
of float32 (float64 for float64 weights); norms and coefficients are float64 if the device has it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree._backends.base import grouped
from lars_tree._backends.torch import tensors
from lars_tree._backends.torch.chunks import Chunks, Part, views
from lars_tree._backends.torch.layers import Layer, alike
from lars_tree._backends.torch.vectors import (
    OPS,
    Scratch,
    joined,
    norms_of,
    one_rule,
    scaled,
    unscaled_norms,
)
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Norm

LIMIT = 2**25  # bytes of temporaries; `_foreach_norm` may convert tensors, for as many bytes again
SCRATCH = 15  # the number of arrays that `formula.multiply_add` holds at the same time


class Foreach:
    """`LayerEngine` for all devices of torch."""

    name = "foreach"

    def __init__(self, layers: list[Layer]) -> None:
        self.count = len(layers)
        self.like: dict[str, Any] = {"dtype": torch.float64}  # of the norms
        if layers:
            device = layers[0].w.device
            dtype = torch.float64 if tensors.has_float64(device) else torch.float32
            self.like = {"dtype": dtype, "device": device}
        filled = [i for i, layer in enumerate(layers) if layer.w.numel()]
        self.members = list(grouped(filled, lambda i: _key(layers[i])).values())
        self.groups = [_Group([layers[i] for i in some], self.like) for some in self.members]

    @tensors.without_autograd
    def norms(self) -> Tensor:
        # The norm of an empty layer is 0, with the scale 1.
        rows = [torch.eye(2, **self.like).select(0, 1).expand(2, 2)] * self.count
        for indices, group in zip(self.members, self.groups, strict=True):
            if group.rule.adapt:
                for i, row in zip(indices, group.norms().unbind(), strict=True):
                    rows[i] = row
        return torch.stack(rows) if rows else torch.zeros(0, 2, 2, **self.like)

    @tensors.without_autograd
    def nonfinite(self, norms: Tensor) -> Tensor:
        largest = [torch.zeros((), **self.like)] * self.count
        steps = self._steps(norms, in_place=False)
        for indices, (step, temporaries) in zip(self.members, steps, strict=True):
            for parts in step.chunks.parts:
                new = step.compute(parts, temporaries)
                found = torch.stack(torch._foreach_norm([*new.ws, *new.velocities], torch.inf))
                for part, x in zip([*parts, *parts], found.to(**self.like), strict=False):
                    i = indices[part.row]
                    if step.group.layers[part.row].rule.nonfinite != "propagate":
                        largest[i] = torch.maximum(largest[i], x)  # of NaN it is NaN
        return ~torch.isfinite(torch.stack(largest))

    def write(self, norms: Tensor, unless: Tensor | None) -> None:
        with tensors.writing_to([x for group in self.groups for x in group.targets]):
            keep = None if unless is None else unless != 0
            steps = [
                (step, parts, temporaries)
                for step, temporaries in self._steps(norms, in_place=keep is None)
                for parts in step.chunks.parts
            ]
            # The chunk that needs most memory is the first: later ones find its memory free.
            for step, parts, temporaries in sorted(steps, key=_new_bytes, reverse=True):
                step.write(parts, temporaries, keep)

    def _steps(self, norms: Tensor, in_place: bool) -> list[tuple[_Step, list[Tensor]]]:
        """The steps of all groups, with their temporaries in one workspace."""
        rows = norms.unbind()
        steps = [
            _Step(group, torch.stack([rows[i] for i in indices]), in_place)
            for indices, group in zip(self.members, self.groups, strict=True)
        ]
        size = max((step.chunks.size for step in steps), default=0)
        workspace = torch.empty(size, dtype=torch.uint8, device=norms.device)
        return [(step, step.chunks.temporaries(workspace)) for step in steps]


def _key(layer: Layer) -> Hashable:
    """Equal for layers that can be updated by the same operations."""
    return layer.w.dtype, layer.dcdw.dtype, layer.velocity is None, alike(layer.rule)


class _Group:
    """Layers that are updated by the same operations.

    Attributes:
        like: The dtype and device of norms.
        dtype: The dtype in which weights are updated.
        source: The dtype of the gradients that are divided by the scales of their norms.
        is_wide: Whether norms have a wider dtype than the arrays, which then holds joint gradients
            almost exactly.
    """

    def __init__(self, layers: list[Layer], like: dict[str, Any]) -> None:
        first = layers[0]
        self.layers, self.like = layers, like
        self.rule = one_rule([layer.rule for layer in layers], like)
        self.has_velocity = first.velocity is not None
        self.is_joint = formula.is_joint(self.rule)
        self.dtype = torch.promote_types(first.w.dtype, torch.float32)
        self.source = torch.promote_types(first.dcdw.dtype, torch.float32)
        self.is_wide = like["dtype"] not in (self.dtype, self.source)
        if self.is_joint:
            self.source = like["dtype"]
        self.joint_temporaries = (1 if self.is_wide else SCRATCH) if self.is_joint else 0

    @property
    def targets(self) -> list[Tensor]:
        targets = [x for layer in self.layers for x in (layer.out, layer.velocity)]
        return [x for x in targets if x is not None]

    def chunks(self, temporaries: int, others: int = 0) -> Chunks:
        itemsize = max(self.dtype.itemsize, self.source.itemsize)
        return Chunks(self.layers, temporaries, itemsize, LIMIT, others)

    def norms(self) -> Tensor:
        """The norms of the layers, which adapt."""
        columns = [layer.w for layer in self.layers], [layer.dcdw for layer in self.layers]
        norms = [norms_of(column, self.like["dtype"], LIMIT) for column in columns]
        if self.is_joint:
            norms[1] = self._joint_norms(*norms)
        return torch.stack([torch.stack(norm, -1) for norm in norms], 1)

    def _joint_norms(self, w_norm: Norm, dcdw_norm: Norm) -> Norm:
        # Choose numbers as in `formula.joint`, so that the sums are near 1.
        w_scale, dcdw_scale = (
            torch.where(norm.scaled == 0, 0, norm.scale) for norm in (w_norm, dcdw_norm)
        )
        decay = self.rule.decay_lambda * self.rule.grad_scale
        self.scale = OPS.power_of_two(torch.maximum(decay * w_scale, dcdw_scale))
        signed = -self.scale if self.rule.maximize else self.scale
        factor = formula.scaled_product(OPS, decay, w_scale, self.scale)
        if self.is_wide:
            numbers = [signed, factor / w_norm.scale]
        else:
            numbers = [signed, factor, w_norm.scale]
        self.terms = [number.unbind() for number in numbers]
        chunks = self.chunks(self.joint_temporaries)
        workspace = torch.empty(chunks.size, dtype=torch.uint8, device=self.like["device"])
        temporaries = chunks.temporaries(workspace)
        found = [
            unscaled_norms(self.joint(parts, temporaries), self.like["dtype"])
            for parts in chunks.parts
        ]
        return scaled(joined(found, chunks.counts), self.scale)

    def joint(self, parts: list[Part], temporaries: list[Tensor]) -> list[Tensor]:
        """The joint gradients divided by `scale`, as views of the last temporaries."""
        rows, outs, ws, dcdws, _ = map(list, zip(*parts, strict=True))
        signed, decay, *w_scale = (_each(numbers, rows) for numbers in self.terms)
        size = sum(out.numel() for out in outs)
        flat = [x.view(self.source).narrow(0, 0, size) for x in temporaries]
        if self.is_wide:
            totals = views(flat[-1], outs)
            _divide(totals, dcdws, signed)
            _add(totals, ws, decay)
            return totals
        unused = flat[-SCRATCH:]
        a, b, x = (Scratch(unused) for _ in range(3))
        _divide(views(a.x, outs), dcdws, signed)
        torch._foreach_copy_(views(b.x, outs), decay)
        _divide(views(x.x, outs), ws, *w_scale)
        return views(formula.multiply_add(OPS, a, b, x).x, outs)


class _New(NamedTuple):
    """The new weights and velocities of some parts; no velocities without momentum."""

    ws: list[Tensor]
    velocities: list[Tensor]


class _Step:
    """The second phase of a group.

    Its numbers are floats, or lists with one 0-d tensor for each layer:

        u = dcdw / divisor * factor * gradient_coefficient + decay_coefficient * w
    """

    def __init__(self, group: _Group, norms: Tensor, in_place: bool) -> None:
        self.group, self.in_place = group, in_place
        self.is_narrow = group.layers[0].w.dtype != group.dtype
        copies = int(self.is_narrow or not in_place)
        copies += not in_place and group.has_velocity
        # A division that returns new tensors needs no workspace.
        is_alike = group.layers[0].dcdw.dtype == group.dtype and not self.is_narrow
        self.allocates = is_alike and group.rule.adapt and not group.is_joint
        temporaries = copies + group.joint_temporaries + (not self.allocates)
        self.chunks = group.chunks(temporaries, others=int(self.allocates))
        rule = formula.without_decay(group.rule) if group.is_joint else group.rule
        self.divisor = self.factor = None
        if rule.adapt:
            w_norm, norm = (Norm(*x.unbind(-1)) for x in norms.unbind(1))
            factor, gradient, decay = formula.scaled_coefficients(OPS, w_norm, norm, rule)
            divisor = norm.scale
            if norms.dtype == group.dtype:
                self.factor = self._numbers(factor)
            else:  # float64 holds the product of the factors
                divisor, gradient = _in_range(factor * gradient / divisor, divisor, group.source)
            if group.is_joint:
                divisor = divisor / group.scale
            self.divisor = self._numbers(divisor, group.source)
        else:
            gradient, decay = formula.coefficients(1.0, rule)
        self.gradient_coefficient = self._numbers(-gradient if rule.maximize else gradient)
        decays = not formula.is_zero(rule.decay_lambda)
        self.decay_coefficient = self._numbers(decay) if decays else None
        self.momentum = self._numbers(rule.momentum)
        self.minus_rate = self._numbers(-rule.lr_after_momentum if group.has_velocity else -1.0)

    def _numbers(self, x: Any, dtype: torch.dtype | None = None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype or self.group.dtype).expand(len(self.group.layers)).unbind()

    def write(self, parts: list[Part], temporaries: list[Tensor], keep: Tensor | None) -> None:
        """Write the new values; the old ones, if `keep`, a bool on the device, is true."""
        new = self.compute(parts, temporaries)
        outs = [part.out for part in parts]
        if keep is None:
            _copy(outs, new.ws)
            return
        old = [part.w for part in parts], [part.velocity for part in parts]
        for x, y, out in zip(old[0], new.ws, outs, strict=True):
            torch.where(keep, x, y, out=out)
        for x, y in zip(old[1], new.velocities, strict=False):
            torch.where(keep, x, y, out=x)

    def compute(self, parts: list[Part], temporaries: list[Tensor]) -> _New:
        """The new values, computed in place or in the temporaries."""
        rows, outs, ws, _, velocities = map(list, zip(*parts, strict=True))
        has_velocity, nesterov = self.group.has_velocity, self.group.rule.nesterov
        velocities = velocities if has_velocity else []
        unused = iter([x.view(self.group.dtype) for x in temporaries])

        change = [] if self.allocates else views(next(unused), outs)
        change = self._gradients(change, parts, temporaries)
        new_ws, new_velocities = outs, velocities
        if self.is_narrow or not self.in_place:
            new_ws = views(next(unused), outs)
        _copy(new_ws, ws)
        if has_velocity and not self.in_place:
            new_velocities = views(next(unused), outs)
            _copy(new_velocities, velocities)

        momentum = _each(self.momentum, rows)
        gradient_coefficient = _each(self.gradient_coefficient, rows)
        if has_velocity and not nesterov:
            torch._foreach_mul_(new_velocities, momentum)
            _add(new_velocities, change, gradient_coefficient)
            change = new_velocities
        else:
            torch._foreach_mul_(change, gradient_coefficient)
        if self.decay_coefficient is not None:
            _add(change, new_ws, _each(self.decay_coefficient, rows))
        if has_velocity and nesterov:
            torch._foreach_mul_(new_velocities, momentum)
            _add(new_velocities, change, 1.0)
            _add(change, new_velocities, momentum)
        _add(new_ws, change, _each(self.minus_rate, rows))

        if self.is_narrow:
            rounded = outs if self.in_place else views(temporaries[0].view(outs[0].dtype), outs)
            torch._foreach_copy_(rounded, new_ws)
            new_ws = rounded
        return _New(new_ws, new_velocities)

    def _gradients(
        self, outs: list[Tensor], parts: list[Part], temporaries: list[Tensor]
    ) -> list[Tensor]:
        """The gradients, divided and multiplied by the first numbers; in `outs`, if it is given."""
        rows, dcdws = [part.row for part in parts], [part.dcdw for part in parts]
        if self.group.is_joint:
            dcdws = self.group.joint(parts, temporaries)
        if self.allocates:
            outs = list(torch._foreach_div(dcdws, _each(self.divisor, rows)))
        elif self.divisor is None:
            torch._foreach_copy_(outs, dcdws)
        else:
            _divide(outs, dcdws, _each(self.divisor, rows))
        if self.factor is not None:
            torch._foreach_mul_(outs, _each(self.factor, rows))
        return outs


def _new_bytes(chunk: tuple[_Step, list[Part], list[Tensor]]) -> int:
    step, parts, _ = chunk
    return sum(part.dcdw.nbytes for part in parts) if step.allocates else 0


def _in_range(coefficient: Tensor, scale: Tensor, source: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a float64 coefficient of gradients into a divisor and a float32 coefficient.

    The divisor is a power of two. Gradients in float64 are divided by about the scale of their
    norm, so that float32 holds the quotient. Gradients in float32 are divided by 1, unless the
    coefficient is out of range; the quotient is exact, or the product is far below float32.
    """
    smallest, largest = (OPS.power_of_two(2.0**exponent / coefficient) for exponent in (-100, 125))
    divisor = scale if source == torch.float64 else torch.ones_like(scale)
    limits = torch.finfo(source)
    divisor = divisor.clamp(smallest, largest).clamp(limits.tiny * limits.eps, 2 / limits.tiny)
    return divisor, coefficient * divisor


def _each(numbers: Any, rows: list[int]) -> Any:
    return numbers if isinstance(numbers, float) else [numbers[row] for row in rows]


def _divide(outs: list[Tensor], xs: list[Tensor], divisors: list[Tensor]) -> None:
    """Write quotients, computed in the wider dtype of outs and xs."""
    if xs[0].dtype.itemsize < outs[0].dtype.itemsize:
        torch._foreach_copy_(outs, xs)
        torch._foreach_div_(outs, divisors)
    else:
        for out, x, divisor in zip(outs, xs, divisors, strict=True):
            torch.div(x, divisor, out=out)


def _add(xs: list[Tensor], ys: list[Tensor], factor: Any) -> None:
    """Add y * factor to each x."""
    if isinstance(factor, float):
        torch._foreach_add_(xs, ys, alpha=factor)
    else:
        torch._foreach_addcmul_(xs, ys, factor)


def _copy(outs: list[Tensor], xs: list[Tensor]) -> None:
    """Copy tensors to other tensors; a tensor may be its own copy."""
    pairs = [(out, x) for out, x in zip(outs, xs, strict=True) if out is not x]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
