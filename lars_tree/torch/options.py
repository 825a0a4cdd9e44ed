"""Checks the options of `torch.Lars`, and converts the options of a group to a `Rule`.

An OptionError is a ValueError, as torch's own optimizers raise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from numbers import Number
from operator import index
from types import NoneType
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from lars_tree import errors
from lars_tree._core.options import CALLED_ELSEWHERE, check_names
from lars_tree._core.types import NonFinite
from lars_tree._core.values import finite_number
from lars_tree._numerics.formula import Rule

Value = TypeVar("Value")
# A value for all parameters, or values by the name of the parameter, see `param_groups`.
ByName: TypeAlias = Value | Mapping[str, Any] | Callable[[str, Tensor], Value]


class GroupOptions(TypedDict, total=False):
    """The options of `param_groups`; `torch.Lars` documents them."""

    lr: ByName[float | Tensor]
    momentum: ByName[float | Tensor]
    dampening: ByName[float | Tensor]
    weight_decay: ByName[float | Tensor]
    nesterov: ByName[bool]
    trust_coefficient: ByName[float | Tensor]
    eps: ByName[float | Tensor]
    trust_clip: ByName[bool]
    joint_norm: ByName[bool]
    adapt: ByName[bool | Literal["decayed"]]
    foreach: ByName[bool | None]
    maximize: ByName[bool]
    layer_axis: ByName[int | None]
    nonfinite: ByName[NonFinite]
    fused: ByName[bool | None]


NAMES = tuple(GroupOptions.__annotations__)

# The numeric fields of a rule, and their names in torch.
_NUMBERS = {
    "decay_lambda": "weight_decay",
    **{name: name for name in ("lr", "momentum", "dampening", "trust_coefficient", "eps")},
}
_FLAGS = ("nesterov", "trust_clip", "joint_norm", "maximize")
_CHOICES: dict[str, tuple[bool | str | None, ...]] = {
    **dict.fromkeys(_FLAGS, (True, False)),
    **dict.fromkeys(("foreach", "fused"), (True, False, None)),
    "adapt": (True, False, "decayed"),
    "nonfinite": ("propagate", "skip", "raise"),
}

# Keys of groups that are no options of Lars: of torch's optimizers, its schedulers, and timm's.
_OF_OTHERS = {
    *("params", "param_names", "name", "capturable", "differentiable", "decoupled_weight_decay"),
    *("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale"),
}

# A schedule that ends at 0 can return a rate that is negative by a few ulps of the first rate.
_ROUNDING = 1e-12


def check(
    options: dict[str, Any], group: str = "", *, waits: bool = True, first_rate: Any = 0.0
) -> None:
    """Raise OptionError, naming the option and the group, if a value is invalid.

    Raise RuntimeError, as torch does, if both `foreach` and `fused` are True. Unless `waits`,
    values of tensors on a device are not checked. A rate may be negative if -rate is within the
    rounding error of `first_rate`.
    """
    for name in _NUMBERS.values():
        if finite_number(options[name]) is None:  # invalid, or a tensor or 0-d array
            _check_array(name, options[name], group, waits, first_rate)
    for name, choices in _CHOICES.items():
        x = options[name]
        if not (isinstance(x, (bool, str, NoneType)) and x in choices):
            *others, last = map(repr, choices)
            expected = f"{', '.join(others)} or {last}"
            hint = errors.did_you_mean(x, choices)
            raise _error(name, group, f"Invalid {name}: expected {expected}, got {x!r}{hint}")
    axis = options["layer_axis"]
    if axis is not None and not _is_index(axis):
        text = f"Invalid layer_axis: expected an axis or None, got {axis!r}"
        raise _error("layer_axis", group, text)
    momentum, dampening = (
        None if isinstance(x, Tensor) and not (waits or x.is_cpu) else x
        for x in (options["momentum"], options["dampening"])
    )
    if dampening is not None and dampening > 1:
        text = f"Invalid dampening: expected a number from 0 to 1, got {dampening}"
        raise _error("dampening", group, text)
    dampens = dampening is not None and dampening != 0
    if options["nesterov"] and (dampens or (momentum is not None and momentum <= 0)):
        text = "Nesterov momentum requires a momentum and zero dampening"
        raise _error("nesterov", group, text)
    if options["foreach"] and options["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_keys(group: dict[str, Any], known: Mapping[str, Any], name: str) -> None:
    """Refuse other packages' names for options of Lars, and warn of other keys without a meaning.

    Like torch, accept the keys of other optimizers and of schedulers, so that groups can be copied.
    """
    check_names(
        {key: x for key, x in group.items() if key in CALLED_ELSEWHERE}, known, function=name
    )
    for key in group.keys() - known.keys() - _OF_OTHERS:
        text = f"{name}: {key!r} is no option of Lars and has no effect"
        warnings.warn(text + errors.did_you_mean(key, known), stacklevel=3)


def _check_array(name: str, x: Any, group: str, waits: bool, first_rate: Any) -> None:
    """Raise unless x is a one-element tensor or a 0-d numpy array with a valid value.

    A negative rate is valid if -rate is within the rounding error of `first_rate`.
    """
    number = x
    if isinstance(x, Tensor):
        if x.numel() != 1:
            text = f"Tensor {name} must be 1-element, got shape {tuple(x.shape)}"
            raise _error(name, group, text)
        is_real = not (x.is_complex() or x.dtype == torch.bool or x.is_meta)
        if is_real and not (waits or x.is_cpu):
            return
        number = x.item() if is_real else None
    elif isinstance(x, np.ndarray) and x.ndim == 0:
        number = x[()]
    if finite_number(number) is not None:
        return
    if name == "lr" and isinstance(number, Number) and not isinstance(number, bool):
        try:
            size = finite_number(-number)  # type: ignore[operator]  # Number declares no operators
        except ArithmeticError:  # a signalling NaN
            size = None
        if size is not None and size <= _ROUNDING * float(first_rate):
            return
    raise _error(name, group, f"Invalid {name}: expected a finite number >= 0, got {x!r}")


def _is_index(x: Any) -> bool:
    try:
        index(x)
    except TypeError:
        return False
    return not isinstance(x, (bool, np.bool_))


def _error(argument: str, group: str, text: str) -> errors.LarsTreeError:
    """An OptionError, which is a ValueError, in the words of torch's own optimizers."""
    headline, paths = (f"{group}: {text}", [(group,)]) if group else (text, [])
    return errors.error(errors.OptionError, argument, headline, paths=paths)


def rule(group: dict[str, Any], grad_scale: Any, is_first: bool) -> Rule:
    """The rule for parameters of a checked group; the first step is not dampened."""
    moves, axis = may_be_nonzero(group["momentum"]), group["layer_axis"]
    numbers = {name: _float_or_tensor(group[key]) for name, key in _NUMBERS.items()}
    lr, dampening = numbers.pop("lr"), numbers.pop("dampening")
    if not isinstance(lr, Tensor):
        lr = max(lr, 0.0)  # negative by rounding
    return Rule(
        lr_before_momentum=1.0 if moves else lr,
        lr_after_momentum=lr if moves else 1.0,
        dampening=dampening if moves and not is_first else 0.0,
        grad_scale=1.0 if grad_scale is None else _float_or_tensor(grad_scale),
        adapt=adapts(group),
        layer_axis=None if axis is None else index(axis),
        nonfinite=group["nonfinite"],
        **numbers,
        **{name: group[name] for name in _FLAGS},
    )


def _float_or_tensor(x: Any) -> Any:
    """The number as a float; as a 0-d tensor if its value cannot be read without waiting."""
    if not isinstance(x, Tensor):
        return float(x)
    is_known = x.is_cpu and not torch.compiler.is_compiling()
    return float(x) if is_known else x.reshape(())


def may_be_nonzero(x: Any) -> bool:
    """False for the number 0. A tensor is not read: this could wait for a device."""
    return isinstance(x, Tensor) or bool(x != 0)


def can_compile(group: dict[str, Any]) -> bool:
    """Whether `torch.compile` can trace a step of the group, which reads no values of tensors.

    False also for tensors of a wrong shape, which `check` refuses.
    """
    tensors = [group[name] for name in _NUMBERS.values() if isinstance(group[name], Tensor)]
    reads = group["adapt"] == "decayed" and isinstance(group["weight_decay"], Tensor)
    return not reads and all(x.numel() == 1 for x in tensors)


def adapts(group: dict[str, Any]) -> bool:
    """Whether the trust ratio applies to the parameters of a group."""
    adapt = group["adapt"]
    return bool(group["weight_decay"] != 0) if adapt == "decayed" else bool(adapt)
