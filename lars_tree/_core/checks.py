"""All checks of the arrays of an update, made before the first byte is written.

Each private function checks one property of one leaf and returns the first fault. The structure
is checked in `_tree/structure.py`, the values of options in `_core/values.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._backends import memory
from lars_tree._backends.base import FLOATING, Facts, Leaf, Values, named
from lars_tree._core import overlaps
from lars_tree._core.operands import Operand, Row, with_operands
from lars_tree.errors import WORDS, Words

Paths = Callable[[], list[errors.Path]]


class Fault(NamedTuple):
    kind: type[errors.LarsTreeError]
    argument: str
    headline: str
    text: str


def check(
    leaves: list[Leaf], paths: Paths, *, same_shapes: bool = False, words: Words = WORDS
) -> list[Row]:
    """Check the arrays of these leaves, and return the leaves with their operands.

    The error has the class of the first fault, and names all leaves that have the same fault.
    """
    rows = with_operands(leaves)
    faults = ((row, _fault(row, same_shapes, words)) for row in rows)
    found = [(row.leaf.leaf_index, fault) for row, fault in faults if fault]
    _raise(found, paths, words)
    return rows


def check_apart(rows: list[Row], paths: Paths, words: Words = WORDS) -> None:
    """Check that no two arrays that are written share memory."""
    pairs = overlaps.shared(rows)
    found = [(other.leaf.leaf_index, _shared(one, other, paths, words)) for one, other in pairs]
    _raise(found, paths, words)


def check_weights(leaves: list[Any], paths: Paths) -> None:
    """Check weights without gradients.

    None and arrays that are not floating point are allowed, because they are never updated.
    """
    faults = ((index, _unfit(Operand(x))) for index, x in enumerate(leaves) if x is not None)
    _raise([(index, fault) for index, fault in faults if fault], paths, WORDS)


def _raise(found: list[tuple[int, Fault]], paths: Paths, words: Words) -> None:
    if found:
        first = found[0][1]
        same = [(paths()[index], fault.text) for index, fault in found if fault[:3] == first[:3]]
        raise words.error(*first[:3], same)


def _unfit(w: Operand) -> Fault | None:
    if w.backend is None:
        return _not_an_array("w", w, WORDS)
    fault = _faulty("w", w, WORDS)
    if not fault and getattr(w.facts.dtype, "hasobject", False):
        return _unusable("w", w, WORDS)
    return fault


def _fault(row: Row, same_shapes: bool, words: Words) -> Fault | None:
    if row.leaf.dcdw is None:  # the weights are at most copied, so their dtype does not matter
        fault = _faulty("w", row.w, words)
    else:
        fault = (
            _unusable("w", row.w, words)
            or _gradient(row, same_shapes, words)
            or _options(row, words)
            or _layer_axis(row, words)
            or _mesh_axes(row, words)
            or _readable(row, words)
        )
    return fault or _velocity(row, words) or _out(row, words)


def _not_an_array(argument: str, x: Operand, words: Words) -> Fault:
    headline = f"{words.name(argument)} holds something that is not an array"
    return Fault(errors.LeafError, argument, headline, errors.not_an_array(x.x))


def is_module(x: Any) -> bool:
    """Whether x is a torch module. Its parameters are not leaves, so they would not be updated."""
    return callable(getattr(type(x), "named_parameters", None))


def _faulty(argument: str, x: Operand, words: Words) -> Fault | None:
    if not x.fault:
        return None
    headline = f"{words.name(argument)} holds an array that cannot be computed with"
    return Fault(errors.LeafError, argument, headline, f"expected dense data, got {x.fault}")


def _unusable(argument: str, x: Operand, words: Words) -> Fault | None:
    if x.fault or x.facts.kind in FLOATING:
        return _faulty(argument, x, words)
    headline = f"{words.name(argument)} is not floating point"
    text = f"expected float16, bfloat16, float32, float64 or complex, got {x.facts.dtype}"
    return Fault(errors.DtypeError, argument, headline, text)


def _gradient(row: Row, same_shapes: bool, words: Words) -> Fault | None:
    fault = _belongs("dcdw", row, row.dcdw, words) or _unusable("dcdw", row.dcdw, words)
    if fault:
        return fault
    ours, theirs = row.w.facts, row.dcdw.facts
    if theirs.kind is not ours.kind:
        headline = f"{words.dcdw} and {words.w} mix real and complex numbers"
        text = f"expected {ours.kind.value} as in {words.w} ({ours.dtype}), got {theirs.dtype}"
        return Fault(errors.DtypeError, "dcdw", headline, text)
    fault = _broadcasts("dcdw", ours, theirs, words)
    if fault or not same_shapes or ours.shape == theirs.shape:
        return fault
    headline = f"{words.dcdw} has another shape than {words.w}"
    text = f"expected shape {ours.shape} as in {words.w}, got {theirs.shape}"
    return Fault(errors.ShapeError, "dcdw", headline, text)


def _belongs(argument: str, row: Row, x: Operand, words: Words) -> Fault | None:
    """Check that x is of the same library, and on the same devices, as the weights."""
    backend = row.leaf.backend
    if x.backend is backend and x.fault:
        return None
    if x.backend is None:
        return _not_an_array(argument, x, words)
    if x.backend is not backend:
        text = f"expected a {backend.name} array as in {words.w}, got one of {x.backend.name}"
        return _misplaced(argument, text, words)
    ours, theirs = row.w.facts, x.facts
    if ours.device != theirs.device and None not in (ours.device, theirs.device):
        text = f"expected an array on {_device(ours)} as in {words.w}, got one on {_device(theirs)}"
        return _misplaced(argument, text, words)
    if ours.sharding != theirs.sharding:
        fault = _sharded(argument, ours, theirs, words)
        if fault:
            return fault
    return _varies(argument, row.w, x, words) if x.varying else None


def _misplaced(argument: str, text: str, words: Words) -> Fault:
    headline = f"{words.name(argument)} and {words.w} are arrays of different libraries or devices"
    return Fault(errors.BackendError, argument, headline, text)


def _sharded(argument: str, ours: Facts, theirs: Facts, words: Words) -> Fault | None:
    """Check that x is on the device mesh of w and, if it is written, has the placements of w."""
    headline = f"{words.name(argument)} is not sharded like {words.w}"
    if argument not in ("out", "state"):
        is_number = theirs.sharding is None and math.prod(theirs.shape) == 1
        meshes = [facts.sharding and facts.sharding.mesh for facts in (ours, theirs)]
        if is_number or meshes[0] == meshes[1]:
            return None
        headline = f"{words.name(argument)} and {words.w} are not on the same device mesh"
    text = f"expected {_tensor(ours)}, got {_tensor(theirs)}"
    return Fault(errors.BackendError, argument, headline, text)


def _varies(argument: str, w: Operand, x: Operand, words: Words) -> Fault | None:
    """Check that x is equal on all devices of a `jax.shard_map` that have equal weights."""
    axes = x.varying - w.varying
    if not axes:
        return None
    name = words.name(argument)
    headline = f"{name} differs between devices that hold the same {words.weights}"
    text = f"expected the same {name} on all devices of {named(axes)}, over which {words.w} does"
    text += " not vary, got one that varies"
    if argument == "dcdw":
        text += ": average gradients with jax.lax.pmean first"
    return Fault(errors.BackendError, argument, headline, text)


def _tensor(facts: Facts) -> str:
    if facts.sharding is None:
        return f"a tensor of shape {facts.shape} that is not a DTensor"
    mesh, placements = facts.sharding
    return f"a DTensor of shape {facts.shape} with placements {placements} over {mesh}"


def _device(facts: Facts) -> str:
    device = facts.device
    return ", ".join(sorted(map(str, device))) if isinstance(device, frozenset) else str(device)


def _broadcasts(argument: str, ours: Facts, theirs: Facts, words: Words) -> Fault | None:
    if ours.shape == theirs.shape:
        return None
    # numpy.broadcast_shapes supports at most 32 axes.
    pairs = zip(reversed(ours.shape), reversed(theirs.shape), strict=False)
    if len(theirs.shape) <= len(ours.shape) and all(n in (1, most) for most, n in pairs):
        return None
    headline = f"{words.name(argument)} does not broadcast to {words.w}"
    text = f"expected a shape that broadcasts to {ours.shape}, got {theirs.shape}"
    return Fault(errors.ShapeError, argument, headline, text)


def _velocity(row: Row, words: Words) -> Fault | None:
    if row.leaf.velocity is None:
        return None
    fault = _belongs("state", row, row.velocity, words) or _faulty("state", row.velocity, words)
    if fault:
        return fault
    ours, theirs = row.w.facts, row.velocity.facts
    expected = (ours.shape, row.leaf.backend.velocity_dtype(row.leaf.w))
    if expected == (theirs.shape, theirs.dtype):
        return None
    text = f"expected a {words.velocity} of {expected[1]} {expected[0]}"
    text += f" for {words.weights} of {ours.dtype}, got {theirs.dtype} {theirs.shape}"
    return Fault(errors.StateError, "state", f"{words.state} does not fit {words.w}", text)


def _options(row: Row, words: Words) -> Fault | None:
    """Check options that are arrays: rates with a shape, tracers, numbers on an accelerator."""
    for name, value in row.options:
        # Every library can compute with a numpy array.
        fault = None if isinstance(value.x, np.ndarray) else _belongs(name, row, value, words)
        ours, theirs = row.w.facts, value.facts
        if not fault and ours.sharding is not None and math.prod(theirs.shape) != 1:
            text = f"expected one number for a DTensor, got an array of shape {theirs.shape}"
            return Fault(
                errors.ShapeError, name, f"{words.name(name)} does not broadcast to {words.w}", text
            )
        fault = fault or _broadcasts(name, ours, theirs, words)
        if fault:
            return fault
    return None


def _layer_axis(row: Row, words: Words) -> Fault | None:
    axis, ndim = row.leaf.rule.layer_axis, len(row.w.facts.shape)
    if axis is None or -ndim <= axis < ndim:
        return None
    headline = f"layer_axis is no axis of the {words.weights}"
    text = f"expected an axis of an array of {ndim} dimensions, got {axis}"
    return Fault(errors.OptionError, "layer_axis", headline, text)


def _mesh_axes(row: Row, words: Words) -> Fault | None:
    fault = row.leaf.backend.axis_fault(row.leaf.w, row.leaf.rule)
    headline = f"axis_name does not fit the {words.weights}"
    return Fault(errors.OptionError, "axis_name", headline, fault) if fault else None


def _readable(row: Row, words: Words) -> Fault | None:
    """With nonfinite="raise", check that the values are known, not traced or lazy."""
    if row.leaf.rule.nonfinite != "raise":
        return None
    arrays = (row.w, row.dcdw, *(x for _, x in row.options))
    if not any(x.backend and x.backend.values(x.x) is Values.TRACED for x in arrays):
        return None
    headline = "nonfinite cannot raise: the values are not known yet"
    text = "expected 'propagate' or 'skip' for a traced or lazy array, got 'raise'"
    return Fault(errors.OptionError, "nonfinite", headline, text)


def _out(row: Row, words: Words) -> Fault | None:
    leaf = row.leaf
    if leaf.out is None or (leaf.out is leaf.w and leaf.dcdw is None):
        return None
    fault = _belongs("out", row, row.out, words) or _unwritable("out", row, row.out, words)
    if not fault and leaf.velocity is not None:
        fault = _unwritable("state", row, row.velocity, words)
    if fault:
        return fault
    ours, theirs = row.w.facts, row.out.facts
    if ours.shape != theirs.shape:
        text = f"expected shape {ours.shape} as in {words.w}, got {theirs.shape}"
        return Fault(errors.OutError, "out", f"{words.out} has another shape than {words.w}", text)
    if ours.dtype != theirs.dtype:
        text = f"expected {ours.dtype} as in {words.w}, got {theirs.dtype}"
        return Fault(errors.OutError, "out", f"{words.out} has another dtype than {words.w}", text)
    return None


def _unwritable(argument: str, row: Row, x: Operand, words: Words) -> Fault | None:
    fault = x.fault or row.leaf.backend.out_fault(x.x)
    if not (fault or row.leaf.rule.stop_gradients):
        arrays = (row.w, row.dcdw, x, *(option for _, option in row.options))
        if any(array.backend and array.backend.is_tracked(array.x) for array in arrays):
            fault = f"part of a graph: with stop_gradients=False, leave out `{words.out}`"
    if fault:
        headline = f"{words.name(argument)} cannot be written to"
        return Fault(errors.OutError, argument, headline, f"it is {fault}")
    if x.memory is None or not memory.overlaps_itself(x.memory):
        return None
    text = "expected memory of its own for every element, got a view that overlaps itself"
    return Fault(errors.OutError, argument, f"{words.name(argument)} overlaps itself", text)


def _shared(one: overlaps.Target, other: overlaps.Target, paths: Paths, words: Words) -> Fault:
    path = words.path(paths()[one.leaf.leaf_index])
    if one.argument == other.argument == "out":
        headline, text = f"two {words.outs} share memory (tied {words.weights})", path
    else:
        name = words.name(one.argument)
        headline = f"{words.name(other.argument)} shares memory with {name}"
        text = f"{path} of {name}"
    return Fault(errors.OutError, other.argument, headline, f"shares memory with {text}")
