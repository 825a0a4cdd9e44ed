"""Schedules: the learning rate as a function of the step.

Any function of the step number is a schedule; this module has the usual schedules. They return an
array if the step is an array that has axes or no known value (lazy, or under `jax.jit`), and a
float otherwise. Fractional steps are allowed.

The first step has number 0. A warm-up starts from rate 0, so the first step changes no weight, as
in timm (`warmup_lr_init` is 0 by default) and in optax with `init_value=0`; torch's `LinearLR`
starts at a third of the rate. To start above 0, shift a schedule:
`lambda step: schedule(step + 1)`.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, overload

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Values
from lars_tree._core.types import AnyArray
from lars_tree._core.values import finite_number

__all__ = ["Constant", "Cosine", "Polynomial"]


def __dir__() -> list[str]:
    return __all__


A = TypeVar("A", bound=AnyArray)


class _Schedule:
    """The base class of the schedules: checks the fields, and declares the types of a call."""

    warmup_steps: int

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # each subclass is a dataclass
            x = getattr(self, field.name)
            number: float | None
            if field.name.endswith("_steps"):
                number = errors.whole_number(field.name, x, least=0)
            else:
                number = finite_number(x)
            if number is None:
                text = f"{field.name}: expected a finite number >= 0, got {x!r}"
                raise errors.error(errors.OptionError, field.name, text)
            # Python numbers, unlike numpy scalars, do not change the dtype of a step. (The class is
            # frozen, so a normal assignment would raise.)
            object.__setattr__(self, field.name, x if type(x) is int else number)
        warmup_steps, total_steps = self.warmup_steps, getattr(self, "total_steps", None)
        if total_steps is not None and (total_steps < 1 or total_steps < warmup_steps):
            least = f"at least 1 and warmup_steps ({warmup_steps})"
            text = f"total_steps: expected {least}, got {total_steps}"
            raise errors.error(errors.OptionError, "total_steps", text)

    @overload
    def __call__(self, step: float | np.number[Any]) -> float: ...
    @overload
    def __call__(self, step: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]: ...
    @overload
    def __call__(self, step: A) -> A: ...

    def __call__(self, step: Any) -> Any:
        """The rate at a step; the first step has number 0."""
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
        warmup_steps: The number of steps in which the rate rises linearly from 0.

    Raises:
        OptionError: `rate` is not a finite number >= 0, or `warmup_steps` is not a whole number
            >= 0.
    """

    rate: float
    warmup_steps: int = 0

    def _rate(self, step: Any) -> Any:
        warmup, _, _ = _progress(step, self.warmup_steps, self.warmup_steps)
        return warmup * self.rate


@dataclass(frozen=True)
class Polynomial(_Schedule):
    """Linear warm-up, then polynomial decay; with power 2, the schedule of the LARS paper.

        peak * step / warmup_steps                                   up to warmup_steps
        end + (peak - end) * (1 - t)**power                          then, with
        t = (step - warmup_steps) / (total_steps - warmup_steps)

    >>> schedule = Polynomial(10.0, total_steps=100, warmup_steps=20)
    >>> [schedule(step) for step in (0, 10, 20, 60, 100, 1000)]
    [0.0, 5.0, 10.0, 2.5, 0.0, 0.0]

    Args:
        peak: The highest rate.
        total_steps: The step at which the rate reaches `end`.
        warmup_steps: The number of these steps in which the rate rises linearly from 0.
        power: The exponent of the decay; 1 is linear.
        end: The last rate.

    Raises:
        OptionError: A rate or the power is not a finite number >= 0, a number of steps is not a
            whole number >= 0, or `total_steps` is 0 or less than `warmup_steps`.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, section 5; power 2, end 0.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    power: float = 2.0
    end: float = 0.0

    def _rate(self, step: Any) -> Any:
        warmup, t, _ = _progress(step, self.warmup_steps, self.total_steps)
        return warmup * _between(self.end, self.peak, (1 - t) ** self.power)


@dataclass(frozen=True)
class Cosine(_Schedule):
    """Linear warm-up, then half a cosine wave: the usual schedule of SimCLR and BYOL.

        end + (peak - end) * (1 + cos(pi t)) / 2,    t as in `Polynomial`

    >>> schedule = Cosine(2.0, total_steps=100, warmup_steps=20)
    >>> [round(schedule(step), 3) for step in (0, 10, 20, 60, 100)]
    [0.0, 1.0, 2.0, 1.0, 0.0]

    Args:
        peak: The highest rate.
        total_steps: The step at which the rate reaches `end`.
        warmup_steps: The number of these steps in which the rate rises linearly from 0.
        end: The last rate.

    Raises:
        OptionError: As for `Polynomial`.

    Source: Loshchilov, Hutter (2017), arXiv:1608.03983, without restarts.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    end: float = 0.0

    def _rate(self, step: Any) -> Any:
        warmup, t, xp = _progress(step, self.warmup_steps, self.total_steps)
        return warmup * _between(self.end, self.peak, (1 + xp.cos(math.pi * t)) / 2)


def value(step: Any) -> Any:
    """The step as an int if its type is an integer type, otherwise as a float.

    Arrays with axes, or without a known value, are returned unchanged.
    """
    backend = _backends.find(step)
    if backend is not None and (backend.values(step) is not Values.CPU or step.shape):
        return step
    try:
        return operator.index(step)
    except TypeError:
        return float(step)


def _progress(step: Any, warmup_steps: int, total_steps: int) -> tuple[Any, Any, Any]:
    """The completed fractions of warm-up and decay, and `math` or their array namespace."""
    step = value(step)
    xp: Any = math
    clip: Callable[[Any], Any] = lambda x: min(max(x, 0.0), 1.0)  # noqa: E731
    backend = _backends.find(step)
    if backend is not None:
        xp = backend.namespace(step)
        step = _as_float(step, xp)
        clip = lambda x: xp.clip(x, 0.0, 1.0)  # noqa: E731
    warmup = clip(step / warmup_steps) if warmup_steps else 1.0
    return warmup, clip((step - warmup_steps) / max(1, total_steps - warmup_steps)), xp


def _between(end: float, peak: float, share: Any) -> Any:
    """Interpolate from `end` to `peak`; exact for shares 0 and 1."""
    return share * peak + (1 - share) * end


def _as_float(step: Any, xp: Any) -> Any:
    """The step as float32 or wider: small integers overflow, float16 is exact only up to 2048."""
    step = step / 1
    if getattr(step.dtype, "itemsize", 4) < 4:
        step = step.astype(xp.float32) if hasattr(step, "astype") else step.to(xp.float32)
    return step
