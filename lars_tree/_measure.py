"""What the steps of a tree are made of, measured by the code that takes them; nothing is written.

Also what reports need of such numbers: the paths of the layers, and one wait for all values.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Backend, Leaf, Values, grouped
from lars_tree._core.advance import matched
from lars_tree._core.execute import checked
from lars_tree._core.native import Native
from lars_tree._core.wrapper import unwrap
from lars_tree._rule import Measured, Rule
from lars_tree._writes import Writes


class Step(NamedTuple):
    """The step of one leaf, before it is taken; its norm, where that was asked for."""

    rule: Rule
    measured: Measured
    norm: Any = None


def measure(
    w: Any, dcdw: Any, options: dict[str, Any], with_steps: bool = False
) -> list[Step | None]:
    """For each leaf what `lars_update` makes its step of; None where the weights stay as they are.

    Nothing waits for a device, and all works under `jax.jit`. `with_steps` computes the steps too,
    one leaf at a time.
    """
    columns, caller = matched(w, dcdw, options)
    native = Native(columns, measures=True)
    leaves = [row.leaf for row in checked(columns, caller, native.rest)[0]]
    moving = [leaf for leaf in leaves if leaf.dcdw is not None]
    found = native.measured()
    for backend, group in grouped(moving, lambda leaf: leaf.backend).items():
        places = (leaf.leaf_index for leaf in group)
        found |= zip(places, backend.measure(group), strict=True)
    steps: list[Step | None] = [None] * len(columns.ws)
    for place, measured in found.items():
        norm = _norm(checked(columns, caller, [place])[0][0].leaf) if with_steps else None
        steps[place] = Step(columns.rules[place], measured, norm)
    return steps


def _norm(leaf: Leaf) -> Any:
    """Of the step itself: what a velocity at rest takes in."""
    backend, rule = leaf.backend, leaf.rule._replace(momentum=0.0, stop_gradients=True)
    rest = backend.zeros(leaf.w, backend.velocity_dtype(leaf.w))
    step = backend.update([leaf._replace(rule=rule, velocity=rest)], Writes())[0].velocity
    return backend.measure([leaf._replace(rule=rule, w=step, dcdw=step)])[0].w_norm


def layer_paths(path: errors.Path, shape: tuple[int, ...]) -> list[errors.Path]:
    """The path of each layer of a leaf with ratios of this shape: with an index if it has axes."""
    if not shape:
        return [path]
    last = path[-1] if path else ""
    return [(*path[:-1], f"{last}[{i}]") for i in range(shape[0])]


def fetch(argument: str, numbers: list[Any]) -> list[np.ndarray[Any, Any]]:
    """The values of numbers of any library, waiting for each of these once.

    Raises:
        LeafError: some are traced, and have no values yet.
    """
    places: dict[Backend | None, list[int]] = {}
    numbers = [unwrap(x) for x in numbers]
    for i, x in enumerate(numbers):
        places.setdefault(_backends.find(x), []).append(i)
    found: dict[int, np.ndarray[Any, Any]] = {}
    for backend, here in places.items():
        some = [numbers[i] for i in here]
        if backend is None:
            arrays = [np.asarray(x) for x in some]
        elif any(is_traced(x) for x in some):
            raise traced_error(argument)
        else:
            arrays = backend.fetch(some)
        found |= {i: np.asarray(x, np.float64) for i, x in zip(here, arrays, strict=True)}
    return [found[i] for i in range(len(numbers))]


def unreadable(x: Any) -> str | None:
    """What was expected of ratios, where x is not such, or can never be read; None where it can."""
    backend = _backends.find(x)
    if backend is None:
        is_number = issubclass(type(x), Real)
        return None if is_number else f"expected a number or an array, got {errors.describe(x)}"
    fault = backend.fault(x)
    if fault:
        return f"expected dense data, got {fault}"
    shape = tuple(backend.facts(x).shape)
    return f"expected a number or a vector, got shape {shape}" if len(shape) > 1 else None


def is_traced(x: Any) -> bool:
    """Whether x stands for a value that this call will never see."""
    backend = _backends.find(x)
    return backend is not None and backend.values(x) is Values.TRACED and backend.is_tracked(x)


def traced_error(argument: str) -> errors.LarsTreeError:
    """What to say of such."""
    text = "expected values, got what stands for them while they are traced: return it from there"
    headline = f"{argument} is not known yet"
    return errors.error(errors.LeafError, argument, headline, [((), text)])
