"""Measures the norms and ratios of reports with the code of the update.

Also makes the paths of layers, and fetches the values of many numbers at once.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Columns, Leaf, Values, grouped
from lars_tree._backends.wrapper import unwrap
from lars_tree._core.advance import matched
from lars_tree._core.execute import Caller, checked
from lars_tree._core.native import Native
from lars_tree._core.writes import Writes
from lars_tree._numerics.formula import Measured, Rule


class LeafReport(NamedTuple):
    """The weights of a leaf and its rule; if the leaf is updated, also its norms and ratio."""

    w: Any
    rule: Rule
    measured: Measured | None = None
    step_norm: Any = None  # only if requested


def measure(
    w: Any, dcdw: Any, options: dict[str, Any], with_steps: bool = False
) -> list[LeafReport]:
    """A report for each leaf, measured by the code of `lars_update`. Writes nothing.

    Does not wait for a device, and works under `jax.jit`. With `with_steps`, also computes the
    norms of the steps, one leaf at a time.
    """
    return measure_columns(*matched(w, dcdw, options), with_steps)


def measure_columns(columns: Columns, caller: Caller, with_steps: bool = False) -> list[LeafReport]:
    """As `measure`, for arguments of `execute`."""
    native = Native(columns, measures=True)
    leaves = [row.leaf for row in checked(columns, caller, native.rest)[0]]
    found = native.measured()
    to_measure = [leaf for leaf in leaves if leaf.dcdw is not None]
    for backend, group in grouped(to_measure, lambda leaf: leaf.backend).items():
        indices = (leaf.leaf_index for leaf in group)
        found |= zip(indices, backend.measure(group), strict=True)
    reports = list(map(LeafReport, columns.ws, columns.rules))
    for i, measured in found.items():
        norm = _step_norm(checked(columns, caller, [i])[0][0].leaf) if with_steps else None
        reports[i] = reports[i]._replace(measured=measured, step_norm=norm)
    return reports


def _step_norm(leaf: Leaf) -> Any:
    """The norm of the step, which is the velocity after a step from velocity 0."""
    backend, rule = leaf.backend, leaf.rule._replace(momentum=0.0, stop_gradients=True)
    rest = backend.zeros(leaf.w, backend.velocity_dtype(leaf.w))
    step = backend.update([leaf._replace(rule=rule, velocity=rest)], Writes())[0].velocity
    return backend.measure([leaf._replace(rule=rule, w=step, dcdw=step)])[0].w_norm


def layer_paths(path: errors.Path, shape: tuple[int, ...]) -> list[errors.Path]:
    """The path of each layer of a leaf; `shape` is the shape of its ratios: () or one axis."""
    if not shape:
        return [path]
    last = path[-1] if path else ""
    return [(*path[:-1], f"{last}[{i}]") for i in range(shape[0])]


def fetch(argument: str, numbers: list[Any]) -> list[np.ndarray[Any, Any]]:
    """The values of numbers and arrays of any library as float64; waits once for each library.

    Raises:
        LeafError: Some arrays are traced and have no values.
    """
    numbers = [unwrap(x) for x in numbers]
    by_backend = grouped(range(len(numbers)), lambda i: _backends.find(numbers[i]))
    found: dict[int, np.ndarray[Any, Any]] = {}
    for backend, of_backend in by_backend.items():
        xs = [numbers[i] for i in of_backend]
        if any(is_traced(x) for x in xs):
            raise traced_error(argument)
        values = xs if backend is None else backend.fetch(xs)
        found |= {i: np.asarray(x, np.float64) for i, x in zip(of_backend, values, strict=True)}
    return [found[i] for i in range(len(numbers))]


def unreadable(x: Any) -> str | None:
    """Why x cannot be read as a ratio or a vector of ratios; None if it can."""
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
    """Whether x is a tracer, which never has a value."""
    backend = _backends.find(x)
    return backend is not None and backend.values(x) is Values.TRACED and backend.is_tracked(x)


def traced_error(argument: str) -> errors.LarsTreeError:
    text = (
        "expected concrete values, got tracers: return the ratios from the jitted function and"
        " record them outside"
    )
    headline = f"the values of {argument} are not known yet"
    return errors.error(errors.LeafError, argument, headline, [((), text)])
