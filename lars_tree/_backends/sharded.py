"""torch DTensor, as FSDP2 and tensor parallelism make it: each process steps its own shards.

The norms are those of whole parameters. Each process takes them of its shards, and the squares of
all of them are added up by one all-reduce a step for each dimension of the mesh. Nothing else has
to be known of the other processes. Here: by multi-tensor operations; shards in CPU memory are most
often stepped by the native engine, see `shards.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lars_tree import _rule, errors
from lars_tree._backends.base import Layout, Leaf, New
from lars_tree._backends.tensors import (
    Layer,
    Tensors,
    TensorsOps,
    TorchOps,
    layers,
    measure_layers,
    of_leaf,
    step_layers,
    wide,
)
from lars_tree._rule import Measured, Norm

# Squares of float64 numbers overflow or vanish unless the numbers are scaled by one of these: by
# which, is known when they have been added up (Blue 1978, doi:10.1145/355769.355771).
SCALES = (1.0, 2.0**-600, 2.0**600)
SAFE_SUM = (2.0**-900, 2.0**1000)


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor, if there are any."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def layout(x: Any) -> Layout | None:
    """How x is spread over processes; None for a plain tensor."""
    return Layout(x.device_mesh, x.placements) if is_sharded(x) else None


def partial_fault(x: Any) -> str | None:
    """Why a DTensor cannot be computed with; None if it can."""
    if any(placement.is_partial() for placement in x.placements):
        return "a DTensor of partial sums: redistribute it first"
    return None


def shard_of(x: Any) -> Tensor:
    """What this process holds of a DTensor, in its own memory; any other tensor as it is.

    Without autograd. As torch's optimizers do, not by `to_local`, which takes longer than to step
    a small shard.
    """
    if not is_sharded(x):
        return x
    shard = x._local_tensor
    wait = getattr(shard, "wait", None)  # where it is still being sent
    return shard if wait is None else wait()


def whole(x: Any) -> Tensor:
    """A DTensor as the one tensor that it stands for; any other as it is."""
    return x.full_tensor() if is_sharded(x) else x


def step_shards(leaves: list[Leaf], news: list[New]) -> tuple[list[Tensor], list[Tensor]]:
    """Where to write, and what, for one step of leaves with DTensor weights."""
    with torch.no_grad():
        shards = [_joined(_shard(*pair)) for pair in zip(leaves, news, strict=True)]
        return step_layers(_with_norms(shards), _WholeNorms)


def measure_shards(leaves: list[Leaf]) -> list[Measured]:
    """What the steps of leaves with DTensor weights are made of, the same in all processes."""
    # Norms are wanted of all, adapted or not.
    shards = [_shard(leaf, New(leaf.w))._replace(needs_norms=True) for leaf in leaves]
    with torch.no_grad():
        measured = list(measure_layers(_with_norms(map(_joined, shards)), _WholeNorms))
        if any(_rule.is_joint(leaf.rule) for leaf in leaves):
            # The denominators are norms of sums: those of gradients alone are measured as well.
            pairs = zip(measured, measure_layers(_with_norms(shards), _WholeNorms), strict=True)
            measured = [each._replace(g_norm=plain.g_norm) for each, plain in pairs]
        found = iter(measured)
        local = [list(islice(found, len(shard.layers))) for shard in shards]
        return [_gathered(*pair) for pair in zip(leaves, local, strict=True)]


def _joined(shard: _Shard) -> _Shard:
    """With dcdw + decay * w in the place of gradients where `joint_norm` takes the norm of that."""
    return shard._replace(layers=[_total(layer) for layer in shard.layers])


def _total(layer: Layer) -> Layer:
    rule = layer.rule
    if not _rule.is_joint(rule):
        return layer
    w, dcdw = (x.to(wide(layer)) for x in (layer.w, layer.dcdw))
    decay = torch.as_tensor(rule.decay_lambda * rule.grad_scale, dtype=w.dtype, device=w.device)
    total = _rule.multiply_add(TorchOps(torch), -dcdw if rule.maximize else dcdw, decay, w)
    return layer._replace(dcdw=total, rule=_rule.without_decay(rule))


def _gathered(leaf: Leaf, measured: list[Measured]) -> Measured:
    """Of the whole leaf, where each process has some of its layers; NaN where it has no part."""
    w, axis = leaf.w, leaf.rule.layer_axis
    if w.device_mesh.get_coordinate() is None:
        shape = () if axis is None else (w.shape[axis],)
        return Measured(*[torch.full(shape, torch.nan, device=w.device)] * 4)
    if axis is None:
        return measured[0]
    tensor = sys.modules["torch.distributed.tensor"]
    empty = [torch.zeros(0, dtype=torch.float64, device=w.device)] * 4
    vectors = of_leaf(measured, leaf.rule) if measured else Measured(*empty)
    placements = [
        _along_axis_0(placement)
        if getattr(placement, "dim", None) == axis % w.ndim
        else tensor.Replicate()
        for placement in w.placements
    ]
    shape = torch.Size(w.shape[axis : axis + 1 or None])
    return Measured(
        *(
            tensor.DTensor.from_local(
                x.double(), w.device_mesh, placements, run_check=False, shape=shape, stride=(1,)
            ).full_tensor()
            for x in vectors
        )
    )


def _along_axis_0(placement: Any) -> Any:
    # Strided ones, of FSDP over tensor parallelism, also have a factor.
    factor = getattr(placement, "split_factor", None)
    return type(placement)(0) if factor is None else type(placement)(0, split_factor=factor)


class _Shard(NamedTuple):
    """The layers of one leaf in this process, and the groups that hold the others of them."""

    layers: list[Layer]
    groups: list[Any]
    needs_norms: bool


def _shard(leaf: Leaf, new: New) -> _Shard:
    w, axis = leaf.w, leaf.rule.layer_axis
    for argument, x in (("out", new.w), ("state", new.velocity)):
        if x is not None and layout(x) != layout(w):
            headline = f"{argument} is not laid out over the processes as w is"
            text = f"expected {_described(w)}, got {_described(x)}"
            raise errors.error(errors.BackendError, argument, headline, [((), text)])
    if w.device_mesh.get_coordinate() is None:  # this process has no part in it
        return _Shard([], [], False)
    options = leaf.rule._asdict()
    numbers = {name: number(x) for name, x in options.items() if hasattr(x, "shape")}
    rule = leaf.rule._replace(**numbers)
    local = leaf._replace(w=w.to_local(), dcdw=gradient_of(leaf.dcdw, w), rule=rule)
    mine = layers(local, New(*(None if x is None else x.to_local() for x in new)))
    return _Shard(mine, groups_of(w, axis), leaf.rule.adapt)


def groups_of(w: Any, layer_axis: int | None = None) -> list[Any]:
    """The groups of processes that this one shares the layers of w with."""
    mesh, axis = w.device_mesh, None if layer_axis is None else layer_axis % w.ndim
    if mesh.get_coordinate() is None:  # it has no part in them
        return []
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(w.placements)
        # Shards along the layer axis hold whole layers: nothing is to be added up there. Those of
        # FSDP over tensor parallelism answer False to is_shard().
        if not placement.is_replicate() and placement.dim != axis
    ]


def gradient_of(dcdw: Any, w: Any) -> Tensor:
    """The part of a gradient that belongs to the shard of w."""
    if not is_sharded(dcdw):
        if dcdw.numel() == 1:
            return dcdw
        headline = "dcdw and w mix plain tensors and DTensor"
        text = f"expected {_described(w)}, got {_described(dcdw)}"
        raise errors.error(errors.BackendError, "dcdw", headline, [((), text)])
    dcdw = dcdw.expand(w.shape)
    if dcdw.placements != w.placements:
        dcdw = dcdw.redistribute(w.device_mesh, w.placements)
    return dcdw.to_local()


def number(x: Any) -> Tensor:
    """An option of one element, which may be spread over processes too."""
    return whole(torch.as_tensor(x)).reshape(())


def _described(x: Any) -> str:
    kind = f"a DTensor with placements {x.placements}" if is_sharded(x) else "a plain tensor"
    return f"{kind} of shape {tuple(x.shape)}"


def _with_norms(shards: Iterable[_Shard]) -> Iterator[tuple[Layer, Tensor | None]]:
    """The layers with the norms of w and dcdw, of the whole of them, where these are needed."""
    shards = list(shards)
    # Also those without a layer here: all processes of a group must add up the same.
    adapting = [shard for shard in shards if shard.needs_norms]
    given = [layer for shard in adapting for layer in shard.layers]
    squares = _squares(given)
    add_up(squares, [(len(shard.layers), shard.groups) for shard in adapting])
    norms = iter(_roots(squares))
    for shard in shards:
        for layer in shard.layers:
            yield layer, next(norms) if shard.needs_norms else None


def add_up(rows: Tensor, parts: Iterable[tuple[int, list[Any]]]) -> None:
    """Put the sums over all processes in the place of rows, by one message for each group.

    Args:
        rows: Numbers of leaves, one after the other.
        parts: How many rows a leaf has, the same in each process of its groups, and these.
    """
    members: dict[str, list[int]] = {}
    groups: dict[str, Any] = {}
    start = 0
    for count, some in parts:
        for group in some:
            groups[group.group_name] = group
            members.setdefault(group.group_name, []).extend(range(start, start + count))
        start += count
    for name, places in members.items():
        if len(places) == len(rows):
            torch.distributed.all_reduce(rows, group=groups[name])
        elif places:
            packed = rows[places]
            torch.distributed.all_reduce(packed, group=groups[name])
            rows[places] = packed


def _squares(given: list[Layer]) -> Tensor:
    """The squared norms of what is here, by layer, w and dcdw, and scale."""
    device = given[0].w.device if given else None
    table = torch.zeros(len(given), 2, len(SCALES), dtype=torch.float64, device=device)
    ops = TensorsOps(torch)
    for dtype in {wide(layer) for layer in given}:
        here = [i for i, layer in enumerate(given) if wide(layer) == dtype and layer.w.numel()]
        for column, name in enumerate(("w", "dcdw") if here else ()):
            tensors = Tensors([getattr(given[i], name).to(dtype) for i in here])
            norm = ops.scaled_norm(tensors, None)
            for k, scale in enumerate(SCALES):
                scaled = norm.scaled.double() * (norm.scale.double() * scale)
                table[here, column, k] = scaled * scaled
    return table


def _roots(squares: Tensor) -> Tensor:
    plain, of_large, of_small = squares.unbind(-1)
    is_safe = (plain > SAFE_SUM[0]) & (plain < SAFE_SUM[1])
    large, small = of_large.sqrt() / SCALES[1], of_small.sqrt() / SCALES[2]
    return torch.where(is_safe, plain.sqrt(), torch.where(of_large > SAFE_SUM[0], large, small))


class _WholeNorms(TensorsOps):
    """Operations for layers whose norms are known: those of w and dcdw, for each of them."""

    def __init__(self, norms: list[Any]) -> None:
        super().__init__(torch)
        self.known = norms

    def norms(self, w: Any, dcdw: Any, layer_axis: int | None) -> tuple[Norm, Norm]:
        dtype = w.tensors[0].dtype
        one, other = (self._scaled(norm, dtype) for norm in torch.stack(self.known).unbind(1))
        return one, other

    def _scaled(self, norm: Tensor, dtype: torch.dtype) -> Norm:
        # By a power of two that the type has, also where the norm of all is beyond it.
        limits = torch.finfo(dtype)
        scale = self.power_of_two(norm.clamp(max=limits.max / 4))
        scale = torch.where(norm > 0, scale.clamp(min=limits.tiny), scale)
        return Norm((norm / scale).to(dtype), scale.to(dtype))
