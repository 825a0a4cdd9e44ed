"""All that can be wrong with the arrays of an update, found before the first byte is written.

One function a question; each looks at one leaf and reports what it finds. Structure is checked in
`_tree.py`, the values of options in `_options.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _backends, _memory, _options, errors
from lars_tree._backends.base import FLOATING, Backend, Facts, Leaf, Values, named


class Fault(NamedTuple):
    """One thing wrong at one leaf."""

    kind: type[errors.LarsTreeError]
    argument: str
    headline: str
    text: str


def check(
    leaves: list[Leaf], paths: Callable[[], list[errors.Path]], broadcasts: bool = True
) -> None:
    """Raise what is wrong with the arrays of these leaves: one kind of error, all its paths.

    `broadcasts` says whether gradients may have other shapes than their weights.

    Raises:
        LarsTreeError: of the kind found first.
    """
    found = [(leaf.place, fault) for leaf in leaves for fault in _faults(leaf, broadcasts)]
    if not found:
        found = [(leaf.place, fault) for leaf, fault in _shared_memory(leaves, paths)]
    _raise(found, paths)


def check_weights(leaves: list[Any], paths: Callable[[], list[errors.Path]]) -> None:
    """Raise what is wrong with weights alone: what no step takes, whatever the gradients.

    None, and arrays of numbers or words that are not floating point, may stand among weights: they
    never move.

    Raises:
        LarsTreeError: of the kind found first.
    """
    places = enumerate(leaves)
    _raise([(place, fault) for place, x in places for fault in islice(_unfit(x), 1)], paths)


def _raise(found: list[tuple[int, Fault]], paths: Callable[[], list[errors.Path]]) -> None:
    if found:
        first = found[0][1]
        same = [(paths()[place], fault.text) for place, fault in found if fault[:3] == first[:3]]
        raise errors.error(*first[:3], same)


def _unfit(x: Any) -> Iterator[Fault]:
    if x is None:
        return
    backend = _backends.find(x)
    if backend is None:
        yield _not_an_array("w", x)
        return
    yield from _faulty("w", backend, x)
    if getattr(backend.facts(x).dtype, "hasobject", False):
        yield from _unusable("w", backend, x)


def _faults(leaf: Leaf, broadcasts: bool) -> Iterator[Fault]:
    """The first fault of a leaf."""
    shape = () if broadcasts else (_same_shape,)
    step = (_weights, _gradient, *shape, _rates, _layer_axis, _mesh_axes, _looking)
    for question in (*(step if leaf.dcdw is not None else (_data,)), _velocity, _out):
        fault = next(question(leaf), None)
        if fault is not None:
            yield fault
            return


def _weights(leaf: Leaf) -> Iterator[Fault]:
    yield from _unusable("w", leaf.backend, leaf.w)


def _data(leaf: Leaf) -> Iterator[Fault]:
    """Weights without a gradient may be of any dtype, but must be there to be copied."""
    yield from _faulty("w", leaf.backend, leaf.w)


def _not_an_array(argument: str, x: Any) -> Fault:
    headline = f"{argument} holds something that is no array"
    text = f"expected an array, got {errors.describe(x)}"
    return Fault(errors.LeafError, argument, headline, text)


def _faulty(argument: str, backend: Backend, x: Any) -> Iterator[Fault]:
    fault = backend.fault(x)
    if fault:
        headline = f"{argument} holds an array that cannot be computed with"
        yield Fault(errors.LeafError, argument, headline, f"expected dense data, got {fault}")


def _unusable(argument: str, backend: Backend, x: Any) -> Iterator[Fault]:
    yield from _faulty(argument, backend, x)
    facts = backend.facts(x)
    if facts.kind not in FLOATING:
        headline = f"{argument} is not floating point"
        text = f"expected float16, bfloat16, float32, float64 or complex, got {facts.dtype}"
        yield Fault(errors.DtypeError, argument, headline, text)


def _gradient(leaf: Leaf) -> Iterator[Fault]:
    yield from _belongs("dcdw", leaf, leaf.dcdw)
    yield from _unusable("dcdw", leaf.backend, leaf.dcdw)
    ours, theirs = leaf.backend.facts(leaf.w), leaf.backend.facts(leaf.dcdw)
    if theirs.kind is not ours.kind:
        headline = "dcdw and w mix real and complex numbers"
        text = f"expected {ours.kind.value} as in w ({ours.dtype}), got {theirs.dtype}"
        yield Fault(errors.DtypeError, "dcdw", headline, text)
    yield from _broadcasts("dcdw", ours, theirs)


def _same_shape(leaf: Leaf) -> Iterator[Fault]:
    ours, theirs = (leaf.backend.facts(x).shape for x in (leaf.w, leaf.dcdw))
    if ours != theirs:
        headline = "dcdw has another shape than w"
        text = f"expected shape {ours} as in w, got {theirs}"
        yield Fault(errors.ShapeError, "dcdw", headline, text)


def _belongs(argument: str, leaf: Leaf, x: Any) -> Iterator[Fault]:
    """Whether x is of the library of the weights, and on their device."""
    backend = _backends.find(x)
    headline = f"{argument} and w are arrays of different libraries or devices"
    if backend is None:
        yield _not_an_array(argument, x)
    elif backend is not leaf.backend:
        text = f"expected a {leaf.backend.name} array as in w, got one of {backend.name}"
        yield Fault(errors.BackendError, argument, headline, text)
    elif not leaf.backend.fault(x):
        ours, theirs = leaf.backend.facts(leaf.w).device, leaf.backend.facts(x).device
        if None not in (ours, theirs) and ours != theirs:
            text = f"expected an array on {_device(ours)} as in w, got one on {_device(theirs)}"
            yield Fault(errors.BackendError, argument, headline, text)
        yield from _spread(argument, leaf, x)
        yield from _varies(argument, leaf, x)


def _spread(argument: str, leaf: Leaf, x: Any) -> Iterator[Fault]:
    """Whether x is spread over the same processes as the weights, and what is written as they."""
    ours, theirs = leaf.backend.facts(leaf.w), leaf.backend.facts(x)
    headline = f"{argument} is not laid out over the processes as w is"
    fits = ours.layout == theirs.layout
    if argument not in ("out", "state"):
        # A number is the same in all processes, for weights that are spread over them too.
        is_number = theirs.layout is None and math.prod(theirs.shape) == 1
        meshes = [facts.layout and facts.layout.mesh for facts in (ours, theirs)]
        headline = f"{argument} and w are not spread over the same processes"
        fits = is_number or meshes[0] == meshes[1]
    if not fits:
        text = f"expected {_layout(ours)}, got {_layout(theirs)}"
        yield Fault(errors.BackendError, argument, headline, text)


def _varies(argument: str, leaf: Leaf, x: Any) -> Iterator[Fault]:
    """Whether x differs between devices of a `jax.shard_map` that hold the same weights."""
    axes = leaf.backend.varying(x) - leaf.backend.varying(leaf.w)
    if axes:
        headline = f"{argument} differs between devices that hold the same weights"
        text = f"expected the same {argument} on all devices of {named(axes)}, over which w does"
        text += " not vary, got one that varies"
        if argument == "dcdw":
            text += ": average gradients with jax.lax.pmean first"
        yield Fault(errors.BackendError, argument, headline, text)


def _layout(facts: Facts) -> str:
    if facts.layout is None:
        return f"a plain tensor of shape {facts.shape}"
    mesh, placements = facts.layout
    return f"a DTensor of shape {facts.shape} with placements {placements} over {mesh}"


def _device(device: Any) -> str:
    return ", ".join(sorted(map(str, device))) if isinstance(device, frozenset) else str(device)


def _broadcasts(argument: str, ours: Facts, theirs: Facts) -> Iterator[Fault]:
    # Not by numpy.broadcast_shapes, which knows no more than 32 axes. Each is 1 or as in w.
    extra = len(ours.shape) - len(theirs.shape)
    pairs = zip(ours.shape[max(extra, 0) :], theirs.shape, strict=False)
    if extra < 0 or not all(theirs in (1, ours) for ours, theirs in pairs):
        headline = f"{argument} does not broadcast to w"
        text = f"expected a shape that broadcasts to {ours.shape}, got {theirs.shape}"
        yield Fault(errors.ShapeError, argument, headline, text)


def _velocity(leaf: Leaf) -> Iterator[Fault]:
    if leaf.velocity is None:
        return
    yield from _belongs("state", leaf, leaf.velocity)
    yield from _faulty("state", leaf.backend, leaf.velocity)
    ours, theirs = leaf.backend.facts(leaf.w), leaf.backend.facts(leaf.velocity)
    expected = (ours.shape, leaf.backend.velocity_dtype(leaf.w))
    if expected != (theirs.shape, theirs.dtype):
        text = f"expected a velocity of {expected[1]} {expected[0]}"
        text += f" for weights of {ours.dtype}, got {theirs.dtype} {theirs.shape}"
        yield Fault(errors.StateError, "state", "state does not fit w", text)


def _rates(leaf: Leaf) -> Iterator[Fault]:
    """Options that are still arrays: rates with a shape, tracers, numbers on an accelerator."""
    for field, value in leaf.rule._asdict().items():
        backend = _backends.find(value)
        if backend is None:
            continue
        name = _options.called(field)
        if not isinstance(value, np.ndarray):  # one in CPU memory serves every library
            yield from _belongs(name, leaf, value)
        ours, theirs = leaf.backend.facts(leaf.w), backend.facts(value)
        if ours.layout is not None and math.prod(theirs.shape) != 1:
            text = f"expected one number for a DTensor, got an array of shape {theirs.shape}"
            yield Fault(errors.ShapeError, name, f"{name} does not broadcast to w", text)
        yield from _broadcasts(name, ours, theirs)


def _layer_axis(leaf: Leaf) -> Iterator[Fault]:
    axis, ndim = leaf.rule.layer_axis, len(leaf.backend.facts(leaf.w).shape)
    if axis is not None and not -ndim <= axis < ndim:
        headline = "layer_axis is no axis of the weights"
        text = f"expected an axis of an array of {ndim} dimensions, got {axis}"
        yield Fault(errors.OptionError, "layer_axis", headline, text)


def _mesh_axes(leaf: Leaf) -> Iterator[Fault]:
    fault = leaf.backend.axis_fault(leaf.w, leaf.rule)
    if fault:
        headline = "axis_name does not fit the weights"
        yield Fault(errors.OptionError, "axis_name", headline, fault)


def _looking(leaf: Leaf) -> Iterator[Fault]:
    """Whether nonfinite="raise" can look at the values."""
    if leaf.rule.nonfinite != "raise":
        return
    arrays = [(_backends.find(x), x) for x in (leaf.w, leaf.dcdw, *leaf.rule)]
    if any(backend and backend.values(x) is Values.LATER for backend, x in arrays):
        headline = "nonfinite cannot raise: the values are not known yet"
        text = "expected 'propagate' or 'skip' for a traced or lazy array, got 'raise'"
        yield Fault(errors.OptionError, "nonfinite", headline, text)


def _out(leaf: Leaf) -> Iterator[Fault]:
    if leaf.out is None or (leaf.out is leaf.w and leaf.dcdw is None):
        return
    yield from _belongs("out", leaf, leaf.out)
    yield from _unwritable("out", leaf, leaf.out)
    if leaf.velocity is not None:
        yield from _unwritable("state", leaf, leaf.velocity)
    backend, out = leaf.backend, leaf.out
    ours, theirs = backend.facts(leaf.w), backend.facts(out)
    if ours.shape != theirs.shape:
        text = f"expected shape {ours.shape} as in w, got {theirs.shape}"
        yield Fault(errors.OutError, "out", "out has another shape than w", text)
    if ours.dtype != theirs.dtype:
        text = f"expected {ours.dtype} as in w, got {theirs.dtype}"
        yield Fault(errors.OutError, "out", "out has another dtype than w", text)


def _unwritable(argument: str, leaf: Leaf, x: Any) -> Iterator[Fault]:
    backend = leaf.backend
    fault = backend.fault(x) or backend.out_fault(x)
    inputs = (leaf.w, leaf.dcdw, x, *leaf.rule)
    if not leaf.rule.stop_gradients and any(map(_records, inputs)):
        fault = fault or "part of a graph: with stop_gradients=False, leave out `out`"
    if fault:
        headline = f"{argument} cannot be written to"
        yield Fault(errors.OutError, argument, headline, f"it is {fault}")
        return
    memory = backend.memory(x)
    if memory is not None and _memory.overlaps_itself(memory):
        text = "expected memory of its own for every element, got a view that overlaps itself"
        yield Fault(errors.OutError, argument, f"{argument} overlaps itself", text)


def _records(x: Any) -> bool:
    backend = _backends.find(x)
    return backend is not None and backend.records(x)


class _Target(NamedTuple):
    """An array that is to be written to."""

    leaf: Leaf
    argument: str
    array: Any


def _targets(group: list[Leaf]) -> list[_Target]:
    outs = [_Target(leaf, "out", leaf.out) for leaf in group]
    moving = (leaf for leaf in group if leaf.velocity is not None)
    return outs + [_Target(leaf, "state", leaf.velocity) for leaf in moving]


def _shared_memory(
    leaves: list[Leaf], paths: Callable[[], list[errors.Path]]
) -> Iterator[tuple[Leaf, Fault]]:
    """Arrays to be written to that share memory, as tied weights do."""
    for group in _by_device([leaf for leaf in leaves if leaf.out is not None]):
        targets = _targets(group)
        memories = [target.leaf.backend.memory(target.array) for target in targets]
        known = [(i, memory) for i, memory in enumerate(memories) if memory is not None]
        found = _memory.overlapping([memory for _, memory in known])
        pairs = [(known[i][0], known[j][0]) for i, j in found]
        # Where the library does not tell addresses, the very same array is seen all the same.
        first = {id(target.array): i for i, target in reversed(list(enumerate(targets)))}
        same = [(first[id(x.array)], i) for i, x in enumerate(targets) if memories[i] is None]
        for i, j in pairs + [(i, j) for i, j in same if i != j]:
            one, other = targets[i], targets[j]
            path = errors.path_string(paths()[one.leaf.place])
            if one.argument == other.argument == "out":
                headline, text = "two leaves of out share memory (tied weights)", path
            else:
                headline = f"{other.argument} shares memory with {one.argument}"
                text = f"{path} of {one.argument}"
            fault = Fault(errors.OutError, other.argument, headline, f"shares memory with {text}")
            yield other.leaf, fault


def _by_device(leaves: list[Leaf]) -> list[list[Leaf]]:
    """The leaves grouped by the address space that they live in: all CPU memory is one."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        device = str(leaf.backend.facts(leaf.w).device)
        groups.setdefault(device, []).append(leaf)
    return list(groups.values())


def detach_inputs(leaves: list[Leaf]) -> list[Leaf]:
    """The leaves with copies of those inputs that `out` would overwrite before they are read.

    An input may be the very same memory as the `out` of its own leaf: it is read first.
    """
    new = {leaf.place: leaf for leaf in leaves}
    for group in _by_device([leaf for leaf in leaves if leaf.out is not None]):
        for leaf, role in _overwritten(group):
            new[leaf.place] = _COPIES[role](new[leaf.place])
    return [new[leaf.place] for leaf in leaves]


def _overwritten(group: list[Leaf]) -> Iterator[tuple[Leaf, str]]:
    known: list[tuple[Leaf, str, np.ndarray[Any, Any]]] = []
    for leaf, argument, array in _targets(group):
        memory = leaf.backend.memory(array)
        if memory is not None:
            known.append((leaf, argument, memory))
    # An array may serve many leaves: it is one input with many readers.
    readers: dict[int, list[tuple[Leaf, str]]] = {}
    inputs: dict[int, np.ndarray[Any, Any]] = {}
    for leaf in group:
        for role, x in (("w", leaf.w), ("dcdw", leaf.dcdw), ("lr", leaf.rule.lr)):
            if x is None or x is leaf.out or isinstance(x, float):
                continue
            memory = x if role == "lr" else leaf.backend.memory(x)
            if isinstance(memory, np.ndarray):
                readers.setdefault(id(x), []).append((leaf, role))
                inputs[id(x)] = memory
    memories = [memory for *_, memory in known]
    for i, j in _memory.overlapping(memories, list(inputs.values())):
        writer, argument, target = known[i]
        key = list(inputs)[j]
        for reader, role in readers[key]:
            own = reader is writer and role != "lr" and argument == "out"
            if not (own and _memory.same(target, inputs[key])):
                yield reader, role


_COPIES: dict[str, Callable[[Leaf], Leaf]] = {
    "w": lambda leaf: leaf._replace(w=leaf.backend.copy(leaf.w, stop_gradients=True)),
    "dcdw": lambda leaf: leaf._replace(dcdw=leaf.backend.copy(leaf.dcdw, stop_gradients=True)),
    "lr": lambda leaf: leaf._replace(rule=leaf.rule._replace(lr=leaf.rule.lr.copy())),
}
