"""Schedules: the learning rate as a function of the step.

Any callable of the step is one; these are those of the recipes. Given a number they return a float;
given an array with a shape, or one whose value is not known yet (under `jax.jit`, or lazy), an
array. A step may lie between two whole numbers, and so does the rate.

The first step has number 0, so with a warm-up, which starts from 0, it moves nothing: as in timm,
whose `warmup_lr_init` is 0 by default, and in optax with an `init_value` of 0 (torch's `LinearLR`
starts at a third of the rate). To move from the first step on, shift a schedule:
`lambda step: schedule(step + 1)`.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from lars_tree import _backends
from lars_tree._backends.base import Values
from lars_tree._core.types import AnyArray
from lars_tree._options import finite_number
from lars_tree.errors import OptionError, whole_number

__all__ = ["Constant", "Cosine", "Polynomial"]

A = TypeVar("A", bound=AnyArray)


class _Schedule:
    """The types of a schedule: a number gives a float, an array an array."""

    @overload
    def __call__(self, step: float | np.number[Any]) -> float: ...
    @overload
    def __call__(self, step: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]: ...
    @overload
    def __call__(self, step: A) -> A: ...

    def __call__(self, step: Any) -> Any:
        """The rate at a step; the first one has number 0."""
        return self._rate(step)

    @abstractmethod
    def _rate(self, step: Any) -> Any: ...


@dataclass(frozen=True)
class Constant(_Schedule):
    """The same rate at every step, after a linear warm-up.

    >>> schedule = Constant(0.4, warmup_steps=4)
    >>> [round(schedule(step), 3) for step in (0, 1, 2, 4, 100)]
    [0.0, 0.1, 0.2, 0.4, 0.4]

    Args:
        rate: The rate, a number >= 0.
        warmup_steps: How many steps the rate rises linearly, from 0.

    Raises:
        OptionError: a rate is negative or not finite, or a number of steps is.
    """

    rate: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_rates(self, "rate")
        _check_steps(self, "warmup_steps")

    def _rate(self, step: Any) -> Any:
        return _at(step, self.warmup_steps, self.warmup_steps, self.rate, self.rate, _flat)


@dataclass(frozen=True)
class Polynomial(_Schedule):
    """Linear warm-up, then polynomial decay: the schedule of the LARS paper, with power 2.

        peak * step / warmup_steps                                   up to warmup_steps
        end + (peak - end) * (1 - t)**power                          then, with
        t = (step - warmup_steps) / (total_steps - warmup_steps)

    >>> schedule = Polynomial(10.0, total_steps=100, warmup_steps=20)
    >>> [schedule(step) for step in (0, 10, 20, 60, 100, 1000)]
    [0.0, 5.0, 10.0, 2.5, 0.0, 0.0]

    Args:
        peak: The highest rate.
        total_steps: The step at which the rate has come down to `end`, and from which it stays.
        warmup_steps: How many of these the rate rises linearly, from 0.
        power: 1 is linear decay.
        end: The last rate.

    Raises:
        OptionError: a rate is negative or not finite, or a number of steps is, or the warm-up is
            longer than all steps.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, section 5; power 2, end 0.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    power: float = 2.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_rates(self, "peak", "end", "power")
        _check_steps(self, "warmup_steps", "total_steps")

    def _rate(self, step: Any) -> Any:
        def left(t: Any, xp: Any) -> Any:
            return (1 - t) ** self.power

        return _at(step, self.warmup_steps, self.total_steps, self.peak, self.end, left)


@dataclass(frozen=True)
class Cosine(_Schedule):
    """Linear warm-up, then half a cosine wave down: the usual schedule of SimCLR and BYOL.

        end + (peak - end) * (1 + cos(pi t)) / 2,    t as in `Polynomial`

    >>> schedule = Cosine(2.0, total_steps=100, warmup_steps=20)
    >>> [round(schedule(step), 3) for step in (0, 10, 20, 60, 100)]
    [0.0, 1.0, 2.0, 1.0, 0.0]

    Args:
        peak: The highest rate.
        total_steps: The step at which the rate has come down to `end`, and from which it stays.
        warmup_steps: How many of these the rate rises linearly, from 0.
        end: The last rate.

    Raises:
        OptionError: as for `Polynomial`.

    Source: Loshchilov, Hutter (2017), arXiv:1608.03983, without restarts.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_rates(self, "peak", "end")
        _check_steps(self, "warmup_steps", "total_steps")

    def _rate(self, step: Any) -> Any:
        def left(t: Any, xp: Any) -> Any:
            return (1 + xp.cos(math.pi * t)) / 2

        return _at(step, self.warmup_steps, self.total_steps, self.peak, self.end, left)


def _flat(t: Any, xp: Any) -> Any:
    return 1.0


def value(step: Any) -> Any:
    """A step as an int, or as a float if it is not of an integer type.

    An array stays as it is if it has a shape, or if its value is not known yet.
    """
    backend = _backends.find(step)
    if backend is not None and (backend.values(step) is not Values.CPU or step.shape):
        return step
    try:
        return operator.index(step)
    except TypeError:
        return float(step)


def _at(
    step: Any,
    warmup_steps: int,
    total_steps: int,
    peak: float,
    end: float,
    left: Callable[[Any, Any], Any],
) -> Any:
    """The rate where left(t, namespace) falls from 1 at t = 0 to 0 at t = 1."""
    step = value(step)
    xp: Any = math
    clip: Callable[[Any], Any] = _clipped
    backend = _backends.find(step)
    if backend is not None:
        xp = backend.namespace(step)
        step = _floating(step, xp)
        clip = lambda x: xp.clip(x, 0.0, 1.0)  # noqa: E731
    warm = clip(step / warmup_steps) if warmup_steps else 1.0
    share = left(clip((step - warmup_steps) / max(1, total_steps - warmup_steps)), xp)
    # While it warms up the share is 1. As a sum of two products it gives peak and end exactly.
    return warm * (share * peak + (1 - share) * end)


def _floating(step: Any, xp: Any) -> Any:
    """As a float that can count: small integers overflow, and half precision ends at 2048."""
    step = step / 1
    if getattr(step.dtype, "itemsize", 4) < 4:
        step = step.astype(xp.float32) if hasattr(step, "astype") else step.to(xp.float32)
    return step


def _clipped(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _check_rates(schedule: Any, *names: str) -> None:
    for name in names:
        rate = getattr(schedule, name)
        number = finite_number(rate)
        if number is None:
            raise OptionError(f"{name}: expected a finite number >= 0, got {rate!r}")
        if type(rate) not in (int, float):
            _put(schedule, name, number)


def _check_steps(schedule: Any, *names: str) -> None:
    for name in names:
        _put(schedule, name, whole_number(name, getattr(schedule, name), least=0))
    warmup_steps, total_steps = schedule.warmup_steps, getattr(schedule, "total_steps", None)
    if total_steps is not None and (total_steps < 1 or total_steps < warmup_steps):
        text = f"expected at least 1 and warmup_steps ({warmup_steps}), got {total_steps}"
        raise OptionError(f"total_steps: {text}")


def _put(schedule: Any, name: str, number: float) -> None:
    """Give a field of a frozen class a plain number, which takes on the precision of a step."""
    object.__setattr__(schedule, name, number)
