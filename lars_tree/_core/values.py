"""The values of one option: how they are read from trees, checked and compared.

`_core/options.py` finds the values for the leaves; `_core/checks.py` compares them with the arrays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from numbers import Complex, Number, Real
from typing import Any

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Kind, Values
from lars_tree._backends.wrapper import unwrap
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._tree import nodes, structure


class Invalid(Exception):
    """An invalid value of an option; the message says what was expected."""


def _number(value: Any, keep_graph: bool) -> Any:
    number = _rate(value, keep_graph)
    if getattr(number, "shape", ()) != ():
        raise Invalid("a number")
    return number


def _positive(value: Any, keep_graph: bool) -> Any:
    known = _number(value, False)  # a float if the value can be read
    if isinstance(known, float) and known == 0:
        raise Invalid("a finite number > 0")
    return _number(value, keep_graph)


def finite_number(x: Any) -> float | None:
    """The number as a float, or None if it is not a finite real number >= 0.

    Python and numpy numbers, decimals and fractions are numbers; bools and arrays are not.
    """
    if type(x) is not float:  # usually x is a float
        kind = type(x)  # x.__class__ may claim another type
        # decimal.Decimal is a Number, but neither Real nor Complex.
        is_real = issubclass(kind, Real) or (
            issubclass(kind, Number) and not issubclass(kind, Complex)
        )
        if not is_real or issubclass(kind, (bool, np.timedelta64)):
            return None
        try:
            x = float(x)
        except (OverflowError, ValueError):  # out of the range of double; a signalling NaN
            return None
    return abs(x) if 0 <= x < math.inf else None  # never -0.0


_as_float64 = without_warnings(np.ascontiguousarray)


def _rate(value: Any, keep_graph: bool) -> Any:
    """A float, a numpy array, or the given array if it is not in CPU memory or keeps its graph."""
    number = finite_number(value)
    if number is not None:
        return number
    wanted = "a finite number >= 0"
    backend = _backends.find(value)
    if backend is None or backend.fault(value):
        raise Invalid(wanted)
    facts = backend.facts(value)
    if facts.kind not in (Kind.REAL, Kind.INTEGER):
        raise Invalid(wanted)
    if backend.values(value) is not Values.CPU:
        return value
    # A long double out of the range of double becomes inf.
    numbers = _as_float64(backend.to_numpy(value), np.float64).reshape(facts.shape)
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise Invalid(wanted + " in every element" if facts.shape else wanted)
    if keep_graph and backend.is_tracked(value):
        return value
    return float(numbers) if numbers.shape == () else numbers


def _is(value: Any, *classes: type) -> bool:
    """Like isinstance, but for type(value), because `value.__class__` may be another type."""
    return issubclass(type(value), classes)


def _flag(value: Any, keep_graph: bool) -> bool:
    if not _is(value, bool, np.bool_):
        raise Invalid("True or False")
    return bool(value)


_NONFINITE = ("propagate", "raise", "skip")


def _nonfinite(value: Any, keep_graph: bool) -> Any:
    if not _is(value, str) or value not in _NONFINITE:
        hint = errors.did_you_mean(value, _NONFINITE)
        raise Invalid("'propagate', 'raise' or 'skip'" + hint)
    return _NONFINITE[_NONFINITE.index(value)]  # never a numpy str, which counts as an array


def _axis(value: Any, keep_graph: bool) -> int | None:
    if value is None:
        return None
    if _is(value, bool, np.bool_):
        raise Invalid("an axis or None")
    try:
        return operator.index(value)
    except TypeError:
        raise Invalid("an axis or None") from None


class _Tuple:
    """A tuple of mesh axis names, which is a leaf and not a node."""

    def __init__(self, items: tuple[Any, ...]) -> None:
        self.items = items

    def __repr__(self) -> str:
        return repr(self.items)


def readable(name: str, given: Any) -> Any:
    """An option as a tree whose leaves are its values, or a function."""
    return _with_tuples_as_leaves(given) if name == "axis_name" and not callable(given) else given


def _with_tuples_as_leaves(node: Any) -> Any:
    """Copy an option tree; its tuples become leaves."""
    if type(node) is tuple:
        return _Tuple(node)
    if structure.is_leaf(node):
        return node
    new = {key: _with_tuples_as_leaves(child) for key, child in nodes.children(node)}
    return list(new.values()) if isinstance(node, list) else new


def _mesh_axes(value: Any, keep_graph: bool) -> frozenset[Any] | None:
    if value is None:
        return None
    names = value.items if isinstance(value, _Tuple) else (value,)
    if not all(map(_is_axis_name, names)):
        raise Invalid("the name of a mesh axis, a tuple of names, or None")
    return frozenset(names or ((),))


def _is_axis_name(x: Any) -> bool:
    """Whether x can name a mesh axis. None cannot, and JAX takes integers for axes of arrays."""
    if isinstance(x, tuple):
        return not x  # () means that no other mesh axis is summed over
    is_other = x is None or isinstance(x, int) or _backends.find(x) is not None
    return isinstance(x, Hashable) and not is_other


_NUMBERS = ("decay_lambda", "weight_decay", "trust_coefficient", "eps", "momentum")
_FLAGS = ("adapt", "trust_clip", "joint_norm", "stop_gradients", "nesterov", "maximize")
CHECKS: dict[str, Callable[[Any, bool], Any]] = {
    "lr": _rate,
    "grad_scale": _positive,
    "nonfinite": _nonfinite,
    "layer_axis": _axis,
    "axis_name": _mesh_axes,
    **dict.fromkeys((*_NUMBERS, "lr_after_momentum"), _number),
    **dict.fromkeys(_FLAGS, _flag),
}


def comparable(name: str, given: Any) -> Any:
    """An option as nested dicts, which are equal if the options have the same effect.

    Numbers and arrays in CPU memory are compared by value; arrays on accelerators, traced arrays
    and arrays that autograd tracks by identity. Functions are compared by their own `==`; nodes
    that may be functions by their own `==` and class, or by identity if they are not hashable.
    """
    return _comparable(name, readable(name, given))


def _comparable(name: str, node: Any) -> Any:
    is_leaf = structure.is_leaf(node)
    if node is None or (is_leaf and callable(node)):
        return node
    if callable(node):
        return type(node), node if _is_hashable(node) else id(node)
    if not is_leaf:
        return {key: _comparable(name, child) for key, child in nodes.children(node)}
    value = CHECKS[name](unwrap(node), True)
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return value if _backends.find(value) is None else (type(value), id(value))


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def hashed(options: Any) -> int:
    """The hash of a result of `comparable`, independent of the order of keys."""
    if isinstance(options, dict):
        return hash(frozenset((key, hashed(child)) for key, child in options.items()))
    return hash(options)
