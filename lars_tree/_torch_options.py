"""The options of `torch.Lars`: what values each may have, and what they mean in a parameter group.

Raises what torch's own optimizers raise, a ValueError. The rule's own checks are in `_options.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Complex, Number, Real
from operator import index
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from lars_tree._core.types import NonFinite
from lars_tree._rule import Rule
from lars_tree.errors import did_you_mean


class GroupOptions(TypedDict, total=False):
    """The options of `torch.Lars`, which a parameter group may have; see there."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    trust_coefficient: float
    eps: float
    trust_clip: bool
    joint_norm: bool
    adapt: bool | Literal["decayed"]
    foreach: bool | None
    maximize: bool
    layer_axis: int | None
    nonfinite: NonFinite
    fused: bool | None


_REAL_DTYPES = "iuf"  # of numpy: integers and floats

# A schedule that ends at 0 may leave a negative rate of a few ulps of the first one.
_ROUNDING = 1e-12


def check(
    options: dict[str, Any], group: str = "", *, waits: bool = True, first_rate: Any = 0.0
) -> None:
    """Raise ValueError for a value that the rule is not defined for; the message names the option.

    And RuntimeError, as torch does, for `foreach` and `fused` together.

    Args:
        options: Those of the optimizer, or of a parameter group.
        group: The name of the group, for the message.
        waits: Whether to look into tensors on a device.
        first_rate: What a schedule began with: beside it, a rate may be negative by rounding.
    """
    for name, fits, expected in _CHECKS:
        x = options[name]
        if isinstance(x, Tensor) and fits is _is_number:
            if x.numel() != 1:
                raise _error(group, f"Tensor {name} must be 1-element, got shape {tuple(x.shape)}")
            if _is_real(x) and not (waits or x.is_cpu):
                continue
        if not fits(x) and not (name == "lr" and _is_rounding(x, first_rate)):
            if fits is _is_number and _is_real(x):
                raise _error(group, f"Invalid {_TITLES.get(name, name)}: {x}")
            text = f"Invalid {name}: expected {expected}, got {x!r}"
            raise _error(group, text + did_you_mean(x, ("decayed", "propagate", "skip", "raise")))
    if options["dampening"] > 1:
        raise _error(group, f"Invalid dampening: {options['dampening']}")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise _error(group, "Nesterov momentum requires a momentum and zero dampening")
    if options["foreach"] and options["fused"]:  # as in torch
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def rule(group: dict[str, Any], grad_scale: Any, is_first: bool) -> Rule:
    """The rule for parameters of a group that was checked; the first step is not dampened."""
    moves, axis = group["momentum"] != 0, group["layer_axis"]
    numbers = {name: _number(group[key]) for name, key in _NUMBERS.items()}
    lr, dampening = numbers.pop("lr"), numbers.pop("dampening")
    if not isinstance(lr, Tensor):
        lr = max(lr, 0.0)  # it may be negative by rounding
    return Rule(
        lr_before_momentum=1.0 if moves else lr,
        lr_after_momentum=lr if moves else 1.0,
        dampening=dampening if moves and not is_first else 0.0,
        grad_scale=1.0 if grad_scale is None else _number(grad_scale),
        adapt=adapts(group),
        layer_axis=None if axis is None else index(axis),
        **numbers,
        **{name: group[name] for name in _SHARED},
    )


# The numbers of a rule and what torch calls them; what else is called the same here and there.
_NUMBERS = {
    "decay_lambda": "weight_decay",
    **{name: name for name in ("lr", "momentum", "dampening", "trust_coefficient", "eps")},
}
_SHARED = ("nesterov", "trust_clip", "joint_norm", "maximize", "nonfinite")


def _number(x: Any) -> Any:
    """A float, or a tensor without axes where the value cannot be looked at without waiting."""
    if not isinstance(x, Tensor):
        return float(x)
    is_known = x.is_cpu and not torch.compiler.is_compiling()
    return float(x) if is_known else x.reshape(())


def adapts(group: dict[str, Any]) -> bool:
    """Whether the parameters of a group are adapted."""
    adapt = group["adapt"]
    return bool(group["weight_decay"] != 0) if adapt == "decayed" else bool(adapt)


def _error(group: str, text: str) -> ValueError:
    return ValueError(f"{group}: {text}" if group else text)


def _is_rounding(x: Any, first: Any) -> bool:
    return _is_real(x) and _is_number(-x) and float(-x) <= _ROUNDING * float(first)


def _is_real(x: Any) -> bool:
    """Whether x is one real number, of Python, numpy or torch; truth values are none."""
    if isinstance(x, Tensor):
        is_number = not x.is_complex() and x.dtype != torch.bool and not x.is_meta
        return x.numel() == 1 and is_number
    if isinstance(x, (np.ndarray, np.generic)):
        return x.ndim == 0 and x.dtype.kind in _REAL_DTYPES
    if isinstance(x, Real):
        return not isinstance(x, bool)
    return isinstance(x, Number) and not isinstance(x, Complex)  # decimal.Decimal


_INFINITY = float("inf")


def _is_number(x: Any) -> bool:
    if type(x) is float:  # nearly always
        return 0 <= x < _INFINITY
    if not _is_real(x):
        return False
    try:
        return 0 <= float(x) < _INFINITY
    except (OverflowError, ValueError):  # an int beyond the floats; a signalling NaN
        return False


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool)


def _is_choice(x: Any) -> bool:
    return x is None or isinstance(x, bool)


def _is_adapt(x: Any) -> bool:
    return isinstance(x, bool) or (isinstance(x, str) and x == "decayed")


def _is_nonfinite(x: Any) -> bool:
    return isinstance(x, str) and x in ("propagate", "skip", "raise")


def _is_axis(x: Any) -> bool:
    if isinstance(x, (bool, np.bool_)):
        return False
    try:
        return x is None or index(x) is not None
    except TypeError:
        return False


_TITLES = {"lr": "learning rate", "momentum": "momentum value"}

_FLAGS = ("nesterov", "trust_clip", "joint_norm", "maximize")
_CHECKS: list[tuple[str, Callable[[Any], bool], str]] = [
    *(
        (name, _is_number, "a finite number >= 0")
        for name in ("lr", "momentum", "dampening", "weight_decay", "trust_coefficient", "eps")
    ),
    *((name, _is_flag, "True or False") for name in _FLAGS),
    *((name, _is_choice, "True, False or None") for name in ("foreach", "fused")),
    ("adapt", _is_adapt, "True, False or 'decayed'"),
    ("nonfinite", _is_nonfinite, "'propagate', 'skip' or 'raise'"),
    ("layer_axis", _is_axis, "an axis or None"),
]
NAMES = tuple(name for name, *_ in _CHECKS)
