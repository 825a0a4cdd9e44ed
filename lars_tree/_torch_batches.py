"""What a torch optimizer steps: parameters in batches, in CPU memory or elsewhere.

`torch.py` makes the batches, in the terms of torch; here they become the terms of the rule.
"""

from __future__ import annotations

from operator import index
from typing import Any

from torch import Tensor

from lars_tree import _checks, _options
from lars_tree._backends.addresses import NUMPY_TYPES
from lars_tree._backends.base import Leaf
from lars_tree._backends.sharded import is_sharded, layout, partial_fault, shard_of
from lars_tree._backends.stand_ins import PLAIN_TYPES
from lars_tree._backends.tensors import copy_all
from lars_tree._backends.torch import BACKEND, is_in_cpu_memory, results_in_place
from lars_tree._rule import MOTION_NUMBERS, NUMBERS, Rule
from lars_tree._torch_options import adapts, number, rate
from lars_tree._writes import Writes
from lars_tree.errors import Path
from lars_tree.update import advance


class Batch:
    """Parameters of one group that are stepped alike, with their gradients and buffers."""

    def __init__(self, group: dict[str, Any], number: int, is_here: bool, is_first: bool) -> None:
        self.group = group
        self.number = number
        # Of no other batch.
        self.name = f"param_groups[{number}]" + (" elsewhere" if not is_here else "")
        self.name += " at its first step" if is_first else ""
        self.is_first = is_first
        self.moves: bool = group["momentum"] != 0
        self.is_undamped: bool = is_first and group["dampening"] != 0
        # Of each parameter: its place in the group, itself, its gradient and buffer.
        self.rows: list[tuple[int, Tensor, Tensor, Tensor | None]] = []

    def options(self, grad_scale: Any) -> dict[str, Any]:
        """The options of the rule, by their names there."""
        group, lr, axis = self.group, rate(self.group), self.group["layer_axis"]
        moving = {"lr": 1.0, "rate": lr} if self.moves else {"lr": lr, "rate": 1.0}
        is_damped = self.moves and not self.is_first
        return {
            **_options.DEFAULTS,
            **{name: group[name] for name in _SHARED},
            **{name: number(group[name]) for name in _SHARED_NUMBERS},
            **moving,
            "dampening": number(group["dampening"]) if is_damped else 0.0,
            "adapt": adapts(group),
            "decay_lambda": number(group["weight_decay"]),
            "grad_scale": grad_scale,
            "layer_axis": None if axis is None else index(axis),
        }

    def leaves(self, grad_scale: Any) -> list[Leaf]:
        """The parameters as what a backend steps."""
        options = self.options(1.0 if grad_scale is None else grad_scale)
        for name in (*NUMBERS, *MOTION_NUMBERS):
            if not isinstance(options[name], Tensor):  # numpy has some, too
                options[name] = float(options[name])
        rule = Rule(**options)
        return [Leaf(0, p, grad, p, rule, BACKEND, buffer) for _, p, grad, buffer in self.rows]


# What is called the same here and in the rule.
_SHARED = ("nesterov", "trust_clip", "joint_norm", "maximize", "nonfinite")
_SHARED_NUMBERS = ("momentum", "trust_coefficient", "eps")


def step_in_cpu_memory(
    batches: list[Batch],
    grad_scale: Any,
    writes: Writes | None = None,
    counts: dict[str, Any] | None = None,
) -> None:
    """All at once, so that all is checked before the first is written.

    Args:
        batches: Those in CPU memory; with `nonfinite`, on any device.
        grad_scale: The scale of the loss, or None.
        writes: As in `advance`.
        counts: What counts the steps that `nonfinite` lets pass, and those that it skips.
    """
    scale = 1.0 if grad_scale is None else float(grad_scale)
    by_batch = {batch.name: batch.options(scale) for batch in batches}
    options: dict[str, Any] = {}
    for name, value in next(iter(by_batch.values())).items():
        values = {batch: given[name] for batch, given in by_batch.items()}
        same = all(other is value or other == value for other in values.values())
        options[name] = value if same else values
    params, grads, buffers = (
        {batch.name: [row[i] for row in batch.rows] for batch in batches} for i in (1, 2, 3)
    )
    advance(params, grads, params, options, {"velocity": buffers, **(counts or {})}, writes)


def check_elsewhere(leaves: list[Leaf], batches: list[Batch]) -> None:
    """Check what is in CPU memory after all, or looks wrong: on a device the checks take longer
    than the step.
    """
    suspects = leaves if not _look_right(leaves) else [x for x in leaves if is_in_cpu_memory(x.w)]
    paths: list[Path] = [(batch.name, i) for batch in batches for i in range(len(batch.rows))]
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    _checks.check(
        [x._replace(place=places[id(x)]) for x in suspects], lambda: paths, same_shapes=True
    )


def _look_right(leaves: list[Leaf]) -> bool:
    """Whether tensors fit together, as far as can be told at once and without an error.

    What is wrong is for the checks to say; that two of them overlap, but do not start at one
    address, is not seen.
    """
    starts = []
    for leaf in leaves:
        w, velocity, axis = leaf.w, leaf.velocity, leaf.rule.layer_axis
        place = _place(w)
        for x in (leaf.dcdw, w if velocity is None else velocity):
            if not isinstance(x, Tensor) or _place(x) != place:
                return False
        expected = (BACKEND.velocity_dtype(w), layout(w))
        if velocity is not None and (velocity.dtype, layout(velocity)) != expected:
            return False
        if w.is_meta or (is_sharded(w) and partial_fault(w)):
            return False
        if w.dtype not in NUMPY_TYPES or not (axis is None or -w.ndim <= axis < w.ndim):
            return False
        local = shard_of(w)
        if type(local) not in PLAIN_TYPES:
            return False  # it may stand for another one
        if local.numel():
            starts.append(local.data_ptr())
    return len(starts) == len(set(starts))


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.device, x.is_complex(), is_sharded(x) and x.device_mesh


def results_elsewhere(
    leaves: list[Leaf], batches: list[Batch], found_inf: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Where to write, and what; nothing is written yet."""
    if not all(batch.group["foreach"] is False for batch in batches):
        return results_in_place(leaves, found_inf)
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for leaf in leaves:  # results are kept, in no more memory than they need
        outs, news = results_in_place([leaf], found_inf)
        targets += outs
        values += [new.to(out.dtype) for out, new in zip(outs, news, strict=True)]
    return targets, values


def write(targets: list[Tensor], values: list[Tensor], writes: Writes | None = None) -> None:
    """Write all values in one operation, or as a part of these writes."""
    if writes is None:
        copy_all(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        writes.add(BACKEND, target, value)
