"""The foreach engine: multi-tensor updates in place, with bounded temporaries.

It updates tensors of all dtypes and memory layouts on any device, by `torch._foreach_*` operations.
Tensors are processed in chunks, and large tensors in parts. The temporaries of `write` are views of
one workspace, which is allocated before anything is written. Weights are updated in the precision
of float32 (float64 for float64 weights); norms and coefficients are float64 if the device has it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree._backends.base import Item, grouped
from lars_tree._backends.torch.layers import Layer
from lars_tree._backends.torch.tensors import TorchOps, writing_to
from lars_tree._numerics import formula
from lars_tree._numerics.formula import Norm, Rule

LIMIT = 2**25  # bytes of temporaries; `_foreach_norm` may convert tensors, for as many bytes again
SCRATCH = 14  # the number of arrays that `formula.multiply_add` holds at the same time


def has_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


class Foreach:
    """`LayerEngine` for all devices of torch."""

    def __init__(self, layers: list[Layer]) -> None:
        self.count = len(layers)
        self.like: dict[str, Any] = {"dtype": torch.float64}  # of the norms
        if layers:
            device = layers[0].w.device
            dtype = torch.float64 if has_float64(device) else torch.float32
            self.like = {"dtype": dtype, "device": device}
        filled = [i for i, layer in enumerate(layers) if layer.w.numel()]
        self.members = list(grouped(filled, lambda i: _key(layers[i])).values())
        self.groups = [_Group([layers[i] for i in some], self.like) for some in self.members]

    @torch.no_grad()
    def norms(self) -> Tensor:
        # The norm of an empty layer is 0, with the scale 1.
        rows = [torch.eye(2, **self.like).select(0, 1).expand(2, 2)] * self.count
        for indices, group in zip(self.members, self.groups, strict=True):
            if group.rule.adapt:
                for i, row in zip(indices, group.norms().unbind(), strict=True):
                    rows[i] = row
        return torch.stack(rows) if rows else torch.zeros(0, 2, 2, **self.like)

    def write(self, norms: Tensor, unless: Tensor | None) -> None:
        rows = norms.unbind()
        with writing_to([x for group in self.groups for x in group.targets]):
            keep = None if unless is None else unless != 0
            steps = [
                _Step(group, torch.stack([rows[i] for i in indices]), keep)
                for indices, group in zip(self.members, self.groups, strict=True)
            ]
            size = max((step.chunks.size for step in steps), default=0)
            memory = torch.empty(size, dtype=torch.uint8, device=norms.device)
            for step in steps:
                step.write(memory)


def _key(layer: Layer) -> Hashable:
    """Equal for layers that can be updated by the same operations."""
    rule = layer.rule
    flags = rule.adapt, rule.trust_clip, rule.joint_norm, rule.nesterov, rule.maximize
    decays = not formula.is_zero(rule.decay_lambda)  # a decay of 0 times infinity would be NaN
    return layer.w.dtype, layer.dcdw.dtype, layer.velocity is None, flags, decays


class _Group:
    """Layers that are updated by the same operations.

    Attributes:
        like: The dtype and device of norms.
        dtype: The dtype in which weights are updated.
        source: The dtype of the gradients that are divided by the scales of their norms.
    """

    def __init__(self, layers: list[Layer], like: dict[str, Any]) -> None:
        first = layers[0]
        self.layers, self.like = layers, like
        self.rule = _one_rule([layer.rule for layer in layers], like)
        self.is_joint = formula.is_joint(self.rule)
        self.dtype = torch.promote_types(first.w.dtype, torch.float32)
        self.source = torch.promote_types(first.dcdw.dtype, torch.float32)
        # The joint gradient of float32 arrays is almost exact in float64, and never out of range.
        self.is_wide = like["dtype"] not in (self.dtype, self.source)
        if self.is_joint:
            self.source = like["dtype"]
        self.itemsize = max(self.dtype.itemsize, self.source.itemsize)
        self.joint_arrays = (1 if self.is_wide else SCRATCH) if self.is_joint else 0

    @property
    def targets(self) -> list[Tensor]:
        targets = [x for layer in self.layers for x in (layer.out, layer.velocity)]
        return [x for x in targets if x is not None]

    def norms(self) -> Tensor:
        """The norms of the layers, which adapt."""
        dtype = self.like["dtype"]
        w_norm = _norms([layer.w for layer in self.layers], dtype)
        norm = _norms([layer.dcdw for layer in self.layers], dtype)
        if self.is_joint:
            norm = self._joint_norms(w_norm, norm)
        return torch.stack([torch.stack(w_norm, -1), torch.stack(norm, -1)], 1)

    def _joint_norms(self, w_norm: Norm, dcdw_norm: Norm) -> Norm:
        decay, one = self.rule.decay_lambda * self.rule.grad_scale, torch.ones_like(w_norm.scale)
        w_scale, self.scale = one, one
        if not self.is_wide:  # the terms are scaled as in `formula.joint`
            w_scale = w_norm.scale
            decay = decay * torch.where(w_norm.scaled > 0, w_scale, 0)
            largest = torch.maximum(decay, torch.where(dcdw_norm.scaled > 0, dcdw_norm.scale, 0))
            self.scale = _OPS.power_of_two(largest)
        signed = -self.scale if self.rule.maximize else self.scale
        self.terms = [x.unbind() for x in (signed, decay / self.scale, w_scale)]
        chunks = _Chunks(self, self.joint_arrays)
        arrays = chunks.arrays(torch.empty(chunks.size, **(self.like | {"dtype": torch.uint8})))
        found = [_scaled_norms(self.joint(parts, arrays), one.dtype) for parts in chunks.parts]
        norm = _joined(found, chunks.counts)
        # The scale must be in range.
        tiny = torch.finfo(one.dtype).tiny
        scale = (norm.scale * self.scale).clamp(tiny, 0.25 / tiny)
        scale = torch.where(norm.scaled == 0, one, scale)
        return Norm(norm.scaled * (norm.scale / (scale / self.scale)), scale)

    def joint(self, parts: list[_Part], arrays: list[Tensor]) -> list[Tensor]:
        """The joint gradients divided by `scale`, as views of the last arrays."""
        rows, outs, ws, dcdws, _ = map(list, zip(*parts, strict=True))
        signed, decay, w_scale = (_each(numbers, rows) for numbers in self.terms)
        arrays = arrays[-self.joint_arrays :]
        if self.is_wide:
            totals = _views(arrays[0].view(self.source), outs)
            _divide(totals, dcdws, signed)
            _add(totals, ws, decay)
            return totals
        size = sum(out.numel() for out in outs)
        buffers = [array.view(self.source).narrow(0, 0, size) for array in arrays]
        a, b, x = (_Scratch(buffers) for _ in range(3))
        _divide(_views(a.x, outs), dcdws, signed)
        torch._foreach_copy_(_views(b.x, outs), decay)
        _divide(_views(x.x, outs), ws, w_scale)
        return _views(formula.multiply_add(_OPS, a, b, x).x, outs)


class _Step:
    """The writing phase of a group; its numbers are floats, or one 0-d tensor for each layer."""

    def __init__(self, group: _Group, norms: Tensor, keep: Tensor | None) -> None:
        self.group, self.keep = group, keep
        first = group.layers[0]
        self.has_velocity = first.velocity is not None
        self.is_narrow = first.w.dtype != group.dtype
        copies = 0 if keep is None and not self.is_narrow else 1
        copies += keep is not None and self.has_velocity
        self.chunks = _Chunks(group, 1 + copies + group.joint_arrays)
        self._choose_coefficients(norms)
        self.momentum = self._numbers(group.rule.momentum)
        rate = group.rule.lr_after_momentum if self.has_velocity else 1.0
        self.minus_rate = self._numbers(-rate)

    def _choose_coefficients(self, norms: Tensor) -> None:
        """Choose numbers so that u = dcdw / divisor * factor * gradient + decay * w."""
        group = self.group
        rule = formula.without_decay(group.rule) if group.is_joint else group.rule
        divisor = factor = None
        if rule.adapt:
            w_norm, norm = (Norm(*x.unbind(-1)) for x in norms.unbind(1))
            factor, gradient, decay = formula.scaled_coefficients(_OPS, w_norm, norm, rule)
            divisor = norm.scale
            if norms.dtype != group.dtype:  # float64 holds the product of the coefficients
                total = factor * gradient / divisor
                # Choose the divisor so that the gradient coefficient has all digits in float32.
                bounds = (_OPS.power_of_two(2.0**k / total) for k in (-100, 125))
                limits = torch.finfo(group.source)
                divisor = divisor.clamp(*bounds).clamp(limits.tiny * limits.eps, 2 / limits.tiny)
                factor, gradient = None, total * divisor
            if group.is_joint:
                divisor = divisor / group.scale
        else:
            gradient, decay = formula.coefficients(1.0, rule)
        self.divisor = self._numbers(divisor, group.source)
        self.factor = self._numbers(factor)
        self.gradient = self._numbers(-gradient if rule.maximize else gradient)
        self.decay = None if formula.is_zero(rule.decay_lambda) else self._numbers(decay)

    def _numbers(self, x: Any, dtype: torch.dtype | None = None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype or self.group.dtype).expand(len(self.group.layers)).unbind()

    def write(self, memory: Tensor) -> None:
        arrays = self.chunks.arrays(memory)
        for parts in self.chunks.parts:
            self._write(parts, arrays)

    def _write(self, parts: list[_Part], arrays: list[Tensor]) -> None:
        group = self.group
        rows, outs, ws, dcdws, velocities = map(list, zip(*parts, strict=True))

        def temporaries(index: int, dtype: torch.dtype = group.dtype) -> list[Tensor]:
            return _views(arrays[index].view(dtype), outs)

        def each(numbers: Any) -> Any:
            return _each(numbers, rows)

        if group.is_joint:
            dcdws = group.joint(parts, arrays)
        change = temporaries(0)
        if self.divisor is None:
            torch._foreach_copy_(change, dcdws)
        else:
            _divide(change, dcdws, each(self.divisor))
        if self.factor is not None:
            torch._foreach_mul_(change, each(self.factor))
        new_ws, new_velocities = outs, velocities
        if self.keep is not None or self.is_narrow:
            new_ws = temporaries(1)
        _copy(new_ws, ws)
        if self.keep is not None and self.has_velocity:
            new_velocities = temporaries(2)
            _copy(new_velocities, velocities)

        if self.has_velocity and not group.rule.nesterov:
            torch._foreach_mul_(new_velocities, each(self.momentum))
            _add(new_velocities, change, each(self.gradient))
            change = new_velocities
        else:
            torch._foreach_mul_(change, each(self.gradient))
        if self.decay is not None:
            _add(change, new_ws, each(self.decay))
        if self.has_velocity and group.rule.nesterov:
            torch._foreach_mul_(new_velocities, each(self.momentum))
            _add(new_velocities, change, 1.0)
            _add(change, new_velocities, each(self.momentum))
        _add(new_ws, change, each(self.minus_rate))

        if self.is_narrow:
            rounded = outs if self.keep is None else temporaries(0, outs[0].dtype)
            torch._foreach_copy_(rounded, new_ws)
            new_ws = rounded
        if self.keep is not None:
            _select(self.keep, ws, new_ws, outs)
            if self.has_velocity:
                _select(self.keep, velocities, new_velocities, velocities)


class _Part(NamedTuple):
    """A part of a layer, and the index of the layer in its group."""

    row: int
    out: Tensor
    w: Tensor
    dcdw: Tensor
    velocity: Any


class _Chunks:
    """The parts of layers, in chunks, with temporaries of at most LIMIT bytes for a chunk."""

    def __init__(self, group: _Group, arrays: int) -> None:
        limit = LIMIT // (arrays * group.itemsize)
        split = [
            [_Part(row, *part) for part in _split(_columns(layer), limit)]
            for row, layer in enumerate(group.layers)
        ]
        self.counts = [len(parts) for parts in split]
        self.parts = list(_chunked(chain(*split), limit, lambda part: part.out.numel()))
        longest = max(sum(part.out.numel() for part in parts) for parts in self.parts)
        self.bytes_per_array = -(-longest * group.itemsize // 16) * 16
        self.size = self.bytes_per_array * arrays

    def arrays(self, memory: Tensor) -> list[Tensor]:
        return list(memory.narrow(0, 0, self.size).split(self.bytes_per_array))


def _columns(layer: Layer) -> tuple[Any, ...]:
    return layer.out, layer.w, layer.dcdw, layer.velocity


def _split(xs: tuple[Any, ...], limit: int) -> Iterator[tuple[Any, ...]]:
    """Split tensors of one shape into parts of at most `limit` elements; None stays None."""
    x = xs[0]
    if x.numel() <= limit:
        yield xs
        return
    # Along the axis with the longest stride, parts of dense tensors are dense.
    *_, axis = max(
        (size > 1, stride, i) for i, (size, stride) in enumerate(zip(x.shape, x.stride()))
    )
    size = x.shape[axis]
    step = max(1, limit * size // x.numel())
    for start in range(0, size, step):
        given = {id(x): x for x in xs if x is not None}
        parts = {key: x.narrow(axis, start, min(step, size - start)) for key, x in given.items()}
        yield from _split(tuple(parts.get(id(x)) for x in xs), limit)


def _chunked(
    items: Iterable[Item], limit: int, size_of: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Lists of consecutive items whose sizes add up to at most `limit`."""
    chunk: list[Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if chunk and total + size > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += size
    if chunk:
        yield chunk


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat tensor, with these shapes, and also these strides if they are dense."""
    views, start = [], 0
    offset = flat.storage_offset()
    for x in like:
        if x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x):
            views.append(flat.as_strided(x.shape, x.stride(), offset + start))
        else:
            views.append(flat.narrow(0, start, x.numel()).view(x.shape))
        start += x.numel()
    return views


def _norms(xs: list[Tensor], dtype: torch.dtype) -> Norm:
    """The norms of tensors of one dtype."""
    limit = LIMIT // 8
    split = [[x for (x,) in _split((x,), limit)] for x in xs]
    parts, largest = list(chain(*split)), torch.finfo(xs[0].dtype).max
    if largest * largest < torch.finfo(dtype).max:  # squares are in range
        scaled = torch.stack(torch._foreach_norm(parts, 2, dtype=dtype))
        found = [Norm(scaled, torch.ones_like(scaled))]
    else:
        chunks = _chunked(parts, limit, Tensor.numel)
        found = [_scaled_norms(chunk, dtype) for chunk in chunks]
    scaled, scale = _joined(found, [len(some) for some in split])
    missing = torch.where(scale == 1, _OPS.power_of_two(scaled), 1)
    return Norm(scaled / missing, scale * missing)


def _scaled_norms(xs: list[Tensor], dtype: torch.dtype) -> Norm:
    """The norms of tensors, computed from copies scaled to a largest magnitude of about 1."""
    scale = _OPS.power_of_two(torch.stack(torch._foreach_norm(xs, torch.inf, dtype=dtype)))
    scale = scale.clamp(max=2.0**-20 / torch.finfo(dtype).tiny)  # times a decay, it is in range
    copies = torch._foreach_div(xs, scale.unbind())
    return Norm(torch.stack(torch._foreach_norm(copies, 2, dtype=dtype)), scale)


def _joined(norms: list[Norm], counts: list[int]) -> Norm:
    """The norms of layers, given the norms of their parts."""
    scaled, scale = (torch.cat(numbers) for numbers in zip(*norms, strict=True))
    if len(scaled) == len(counts):
        return Norm(scaled, scale)
    rows = []
    for a, b in zip(scaled.split(counts), scale.split(counts), strict=True):
        largest = _OPS.power_of_two(torch.where(a > 0, b, 0).max())
        rows.append(torch.stack([torch.linalg.vector_norm(a * (b / largest)), largest]))
    return Norm(*torch.stack(rows, 1))


def _each(numbers: Any, rows: list[int]) -> Any:
    return numbers if isinstance(numbers, float) else [numbers[row] for row in rows]


def _divide(outs: list[Tensor], xs: list[Tensor], divisors: list[Tensor]) -> None:
    """Write quotients, which are rounded in the wider dtype of outs and xs."""
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


def _copy(xs: list[Tensor], ys: list[Tensor]) -> None:
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not y]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def _select(flag: Tensor, xs: list[Tensor], ys: list[Tensor], outs: list[Tensor]) -> None:
    for x, y, out in zip(xs, ys, outs, strict=True):
        torch.where(flag, x, y, out=out)


def _one_rule(rules: list[Rule], like: dict[str, Any]) -> Rule:
    """One rule for many layers; a number that differs between them becomes a vector."""

    def merged(name: str) -> Any:
        values = [getattr(rule, name) for rule in rules]
        first, device = values[0], like["device"]
        if all(type(value) is float for value in values):
            if len(set(values)) == 1:
                return first
            vector = torch.tensor(values, dtype=like["dtype"])
            return vector.to(device, non_blocking=device.type == "cuda")
        if all(value is first for value in values):
            return first.detach().to(**like)
        return torch.stack([torch.as_tensor(value, **like).detach() for value in values])

    names = (*formula.NUMBERS, *formula.MOMENTUM_NUMBERS)
    return rules[0]._replace(**{name: merged(name) for name in names})


class _Ops(TorchOps):
    """Operations on vectors with one number for each layer, and on `_Scratch`."""

    def round_to_power_of_two(self, x: Tensor) -> Tensor:
        """Keep only the bits of the exponent: not all devices have frexp."""
        limits = torch.finfo(x.dtype)
        integer = torch.int64 if limits.bits == 64 else torch.int32
        infinity = 0x7FF << 52 if limits.bits == 64 else 0xFF << 23
        return (x.clamp(min=limits.tiny).view(integer) & infinity).view(x.dtype)

    def finite_or(self, x: Any, other: Any) -> Any:
        return x.finite_or(other)


_OPS = _Ops(torch)


class _Scratch:
    """A flat tensor in memory from a list, to which the memory returns with the last reference.

    With it, `formula.multiply_add` allocates nothing.
    """

    def __init__(self, unused: list[Tensor]) -> None:
        self.unused, self.x = unused, unused.pop()
        self.dtype = self.x.dtype

    def __del__(self) -> None:
        self.unused.append(self.x)

    def _result(self, operation: Callable[..., Any], other: Any) -> _Scratch:
        result = _Scratch(self.unused)
        operation(self.x, getattr(other, "x", other), out=result.x)
        return result

    def __add__(self, other: _Scratch) -> _Scratch:
        return self._result(torch.add, other)

    def __sub__(self, other: _Scratch) -> _Scratch:
        return self._result(torch.sub, other)

    def __mul__(self, other: _Scratch | float) -> _Scratch:
        return self._result(torch.mul, other)

    def finite_or(self, other: _Scratch) -> _Scratch:
        difference, result = self - self, _Scratch(self.unused)
        flag = result.x.view(torch.bool).narrow(0, 0, len(self.x))
        torch.eq(difference.x, difference.x, out=flag)  # False for NaN
        torch.where(flag, self.x, other.x, out=difference.x)
        return difference
