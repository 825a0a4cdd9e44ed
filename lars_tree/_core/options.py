"""Checks the options of the rule, and resolves them to one `Rule` for each leaf.

Every option is one value or a tree of values that is a prefix of the weights. This module checks
the values without the weights; `_core/checks.py` compares them with the arrays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import wraps
from inspect import signature
from numbers import Complex, Number, Real
from typing import Any, TypedDict, TypeVar, cast

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Kind, Values
from lars_tree._backends.wrapper import unwrap
from lars_tree._core.types import Axes, Flags, MeshAxes, NonFinites, Numbers
from lars_tree._numerics.formula import Rule
from lars_tree._tree import nodes, structure


class SharedOptions(TypedDict, total=False):
    """The keywords of `lars_update` that optimizers also have, with the same defaults."""

    adapt: Flags
    trust_clip: Flags
    joint_norm: Flags
    grad_scale: Numbers
    nonfinite: NonFinites
    layer_axis: Axes
    axis_name: MeshAxes


class Options(SharedOptions, total=False):
    """The keywords of `lars_update` that `ivy.lars_update` does not have."""

    trust_coefficient: Numbers
    eps: Numbers


class StepOptions(Options, total=False):
    """All keywords of `lars_update` except `out`."""

    decay_lambda: Numbers
    stop_gradients: Flags


# The options of `lars_update` except lr.
DEFAULTS: dict[str, Any] = {
    name: default
    for name, default in Rule._field_defaults.items()
    if name in StepOptions.__annotations__
}

# The options whose names differ from the names of their fields in `Rule`.
_FIELDS = {"weight_decay": "decay_lambda", "lr": "lr_before_momentum"}


def option_name(field: str) -> str:
    """The user's name for a field of the rule."""
    return "lr" if field in ("lr_before_momentum", "lr_after_momentum") else field


# Names in other packages or functions, with the names to suggest.
CALLED_ELSEWHERE = {
    "weight_decay": "decay_lambda",
    "decay_lambda": "weight_decay",
    "eta": "trust_coefficient",
    "trust_coeff": "trust_coefficient",
    "always_adapt": "adapt",
}


Function = TypeVar("Function", bound=Callable[..., Any])

_UNKNOWN = object()


class _Invalid(Exception):
    """An invalid value of an option; the message says what was expected."""


def resolve(tree: Any, options: dict[str, Any], count: int) -> list[Rule]:
    """Check all options, and return the rule of each of the `count` leaves, in leaf order."""
    keep_graph = any(value is not True for value in structure.leaves(options["stop_gradients"]))
    shared: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    for name, value in options.items():
        default, checked = _KNOWN.get((name, type(value)), (_UNKNOWN, None))
        if default is not _UNKNOWN and value == default:  # the usual case
            shared[_FIELDS.get(name, name)] = checked
            continue
        given = _readable(name, value)
        if structure.is_leaf(given):
            shared[_FIELDS.get(name, name)] = _checked(name, [((), given)], keep_graph)[0]
        else:
            columns[name] = _column(name, tree, given, keep_graph)
    if not columns:
        return [Rule(**shared)] * count
    if any(len(column) != count for column in columns.values()):
        raise structure.changed()
    _refuse_gaps(tree, columns)
    indices = [Rule._fields.index(_FIELDS.get(name, name)) for name in columns]
    fields = list(Rule(**{"lr_before_momentum": 0.0, **shared}))
    # Leaves that share all values share a Rule. The ids stay valid while the columns exist.
    ids = [map(id, column) for column in columns.values()]
    known: dict[Any, Rule] = {}
    rules = []
    for key, row in zip(zip(*ids, strict=True), zip(*columns.values(), strict=True), strict=True):
        rule = known.get(key)
        if rule is None:
            for index, x in zip(indices, row, strict=True):
                fields[index] = x
            rule = known[key] = Rule._make(fields)
        rules.append(rule)
    return rules


def _column(name: str, tree: Any, given: Any, keep_graph: bool) -> list[Any]:
    """The value of a prefix for each leaf of the tree; each distinct value is checked once."""
    values = structure.leaves(given)
    known: dict[int, Any] = {id(None): None}  # allowed at leaves without weights
    try:
        for value in values:
            if id(value) not in known:
                known[id(value)] = _CHECKS[name](unwrap(value), keep_graph)
        return [known[id(value)] for value in structure.broadcast(name, tree, given)]
    except (_Invalid, KeyError):  # KeyError: a node creates new values at each reading
        checked = _checked(name, list(structure.walk(given)), keep_graph)
        return structure.broadcast(name, tree, given, values=checked)


def check(options: dict[str, Any]) -> None:
    """Check the values of options when there are no weights yet."""
    for name, given in options.items():
        _checked(name, list(structure.walk(_readable(name, given))), keep_graph=False)


def check_names(
    options: Mapping[str, Any], known: Collection[str] = DEFAULTS, *, function: str
) -> None:
    """Raise a TypeError for an unknown keyword, as Python does, but with a hint."""
    for name in options.keys() - set(known):
        elsewhere = CALLED_ELSEWHERE.get(name, "")
        is_known = elsewhere in known
        hint = f" (it is {elsewhere!r} here)" if is_known else errors.did_you_mean(name, known)
        raise TypeError(f"{function} got an unexpected keyword argument {name!r}{hint}")


def with_hints(function: Function) -> Function:
    """Decorator: the TypeError for an unknown keyword suggests a known keyword."""
    known = signature(function).parameters

    @wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        if not keywords.keys() <= known.keys():
            check_names(keywords, known, function=f"{function.__qualname__}()")
        return function(*arguments, **keywords)

    return cast(Function, checked)


def _checked(name: str, values: list[tuple[errors.Path, Any]], keep_graph: bool) -> list[Any]:
    checked: list[Any] = []
    faults: list[errors.Line] = []
    for path, value in values:
        if value is None and path:
            checked.append(None)  # allowed at leaves without weights
            continue
        try:
            checked.append(_CHECKS[name](unwrap(value), keep_graph))
        except _Invalid as invalid:
            faults.append((path, f"expected {invalid}, got {_shown(value)}"))
    if faults:
        raise _error(name, faults)
    return checked


def _refuse_gaps(tree: Any, columns: dict[str, list[Any]]) -> None:
    """Refuse None at leaves with weights, except in options for which None is a valid value."""
    for name, column in columns.items():
        if DEFAULTS.get(name, 0) is None or all(value is not None for value in column):
            continue
        leaves = zip(structure.walk(tree), column, strict=True)
        faults = [
            (path, "expected a value, got None")
            for (path, leaf), value in leaves
            if value is None and leaf is not None
        ]
        if faults:
            raise _error(name, faults)


def _error(name: str, faults: list[errors.Line]) -> errors.LarsTreeError:
    name = option_name(name)
    return errors.error(errors.OptionError, name, f"{name} has an invalid value", faults)


def _shown(value: Any) -> str:
    """The value itself if it is short, otherwise a description."""
    backend = _backends.find(value)
    if backend is not None and backend.fault(value):
        return f"{backend.fault(value)}"  # the repr of a faulty array may crash
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else errors.describe(value)


def _number(value: Any, keep_graph: bool) -> Any:
    number = _rate(value, keep_graph)
    if getattr(number, "shape", ()) != ():
        raise _Invalid("a number")
    return number


def _positive(value: Any, keep_graph: bool) -> Any:
    known = _number(value, False)  # a float if the value can be read
    if isinstance(known, float) and known == 0:
        raise _Invalid("a finite number > 0")
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


def _rate(value: Any, keep_graph: bool) -> Any:
    """A float, a numpy array, or the given array if it is not in CPU memory or keeps its graph."""
    number = finite_number(value)
    if number is not None:
        return number
    wanted = "a finite number >= 0"
    backend = _backends.find(value)
    if backend is None or backend.fault(value):
        raise _Invalid(wanted)
    facts = backend.facts(value)
    if facts.kind not in (Kind.REAL, Kind.INTEGER):
        raise _Invalid(wanted)
    if backend.values(value) is not Values.CPU:
        return value
    with np.errstate(over="ignore"):  # a long double out of the range of double becomes inf
        numbers = np.ascontiguousarray(backend.to_numpy(value), np.float64).reshape(facts.shape)
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise _Invalid(wanted + " in every element" if facts.shape else wanted)
    if keep_graph and backend.is_tracked(value):
        return value
    return float(numbers) if numbers.shape == () else numbers


def _is(value: Any, *classes: type) -> bool:
    """Like isinstance, but for type(value), because `value.__class__` may be another type."""
    return issubclass(type(value), classes)


def _flag(value: Any, keep_graph: bool) -> bool:
    if not _is(value, bool, np.bool_):
        raise _Invalid("True or False")
    return bool(value)


_NONFINITE = ("propagate", "raise", "skip")


def _nonfinite(value: Any, keep_graph: bool) -> Any:
    if not _is(value, str) or value not in _NONFINITE:
        hint = errors.did_you_mean(value, _NONFINITE)
        raise _Invalid("'propagate', 'raise' or 'skip'" + hint)
    return _NONFINITE[_NONFINITE.index(value)]  # never a numpy str, which counts as an array


def _axis(value: Any, keep_graph: bool) -> int | None:
    if value is None:
        return None
    if _is(value, bool, np.bool_):
        raise _Invalid("an axis or None")
    try:
        return operator.index(value)
    except TypeError:
        raise _Invalid("an axis or None") from None


class _Tuple:
    """A tuple of mesh axis names, which is a leaf and not a node."""

    def __init__(self, items: tuple[Any, ...]) -> None:
        self.items = items

    def __repr__(self) -> str:
        return repr(self.items)


def _readable(name: str, given: Any) -> Any:
    """An option as a tree whose leaves are its values."""
    return _with_tuples_as_leaves(given) if name == "axis_name" else given


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
        raise _Invalid("the name of a mesh axis, a tuple of names, or None")
    return frozenset(names or ((),))


def _is_axis_name(x: Any) -> bool:
    """Whether x may name a mesh axis in JAX, where None is no name and integers are array axes."""
    if isinstance(x, tuple):
        return not x  # () means that no other mesh axis is summed over
    is_other = x is None or isinstance(x, int) or _backends.find(x) is not None
    return isinstance(x, Hashable) and not is_other


_NUMBERS = ("decay_lambda", "weight_decay", "trust_coefficient", "eps", "momentum", "dampening")
_FLAGS = ("adapt", "trust_clip", "joint_norm", "stop_gradients", "nesterov", "maximize")
_CHECKS: dict[str, Callable[[Any, bool], Any]] = {
    "lr": _rate,
    "grad_scale": _positive,
    "nonfinite": _nonfinite,
    "layer_axis": _axis,
    "axis_name": _mesh_axes,
    **dict.fromkeys((*_NUMBERS, "lr_after_momentum"), _number),
    **dict.fromkeys(_FLAGS, _flag),
}

# The defaults by name and type, each with its checked value. In signatures, the default decay is 0.
_KNOWN: dict[tuple[str, type], tuple[Any, Any]] = {
    (name, type(default)): (default, _CHECKS[name](default, False))
    for name, default in [*DEFAULTS.items(), ("decay_lambda", 0), ("weight_decay", 0)]
}
