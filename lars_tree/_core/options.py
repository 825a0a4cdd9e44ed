"""Checks the options of the rule, and resolves them to one `Rule` for each leaf.

Every option is one value; or a tree of values that is a prefix of the weights; or gives its values
by path: a function of (path, leaf), or a mapping with patterns (`_tree/by_path.py`). This module
checks the values without the weights; `_core/checks.py` compares them with the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from inspect import signature
from typing import Any, TypedDict, TypeVar, cast

from lars_tree import _backends, errors
from lars_tree._backends.wrapper import unwrap
from lars_tree._core.types import Axes, Flags, MeshAxes, NonFinites, Numbers, Rates
from lars_tree._core.values import CHECKS, Invalid, readable
from lars_tree._numerics.formula import Rule
from lars_tree._tree import by_path, structure


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


class OptimizerOptions(SharedOptions, total=False):
    """The options of `Lars`."""

    lr: Rates
    momentum: Numbers
    nesterov: Flags
    weight_decay: Numbers
    trust_coefficient: Numbers
    eps: Numbers
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


def resolve(tree: Any, options: dict[str, Any], count: int) -> list[Rule]:
    """Check all options, and return the rule of each of the `count` leaves, in leaf order."""
    shared: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    stop = options["stop_gradients"]
    if stop is not True:
        _add("stop_gradients", tree, stop, False, shared, columns)
    keep_graph = False in columns.get("stop_gradients", [shared.get("stop_gradients")])
    for name, value in options.items():
        default = _KNOWN.get((name, type(value)))
        if default and value == default[0]:  # the usual case
            shared[_FIELDS.get(name, name)] = default[0]
        elif name != "stop_gradients":
            _add(name, tree, value, keep_graph, shared, columns)
    if not columns:
        return [Rule(**shared)] * count
    if any(len(column) != count for column in columns.values()):
        raise structure.changed()
    _refuse_gaps(tree, columns)
    indexed = [(Rule._fields.index(_FIELDS.get(x, x)), column) for x, column in columns.items()]
    fields = list(Rule(**{"lr_before_momentum": 0.0, **shared}))
    # Leaves that share all values share a Rule. The ids stay valid while the columns exist.
    ids = [map(id, column) for column in columns.values()]
    known: dict[Any, Rule] = {}
    rules = []
    for i, key in enumerate(zip(*ids, strict=True)):
        rule = known.get(key)
        if rule is None:
            for index, column in indexed:
                fields[index] = column[i]
            rule = known[key] = Rule._make(fields)
        rules.append(rule)
    return rules


def _add(
    name: str,
    tree: Any,
    value: Any,
    keep_graph: bool,
    shared: dict[str, Any],
    columns: dict[str, list[Any]],
) -> None:
    """Check an option, and add it to the values for all leaves or to the columns."""
    if is_function(value, tree):
        columns[name] = _called(name, tree, value, keep_graph)
    elif not structure.is_leaf(given := readable(name, value)):
        columns[name] = _column(name, tree, given, keep_graph)
    else:
        shared[_FIELDS.get(name, name)] = _checked(name, [((), given)], keep_graph)[0]


def _column(name: str, tree: Any, given: Any, keep_graph: bool) -> list[Any]:
    """The value for each leaf of the tree; each distinct value is checked once."""
    known: dict[int, Any] = {id(None): None}  # allowed at leaves without weights
    found: list[Any] = []
    try:
        values = structure.leaves(given)  # the ids are valid while the values exist
        for value in values:
            if id(value) not in known:
                known[id(value)] = CHECKS[name](unwrap(value), keep_graph)
        if structure.match(tree, given, found, exact=False):
            return [known[id(value)] for value in found]
    except (Invalid, KeyError, RuntimeError):  # all explained below
        pass  # KeyError: a node creates new values at each reading
    checked = _checked(name, list(structure.walk(given)), keep_graph)
    if by_path.has_patterns(given):
        return by_path.resolve(name, structure.for_reading(given, checked, name), _rows(tree))
    try:
        return structure.broadcast(name, tree, given, values=checked)
    except errors.StructureError as error:
        if by_path.only_lacks_keys(tree, given):
            error.args = (f"{error}\n  for all other leaves, add the key '*'",)
        raise


def _rows(tree: Any) -> list[tuple[errors.Path, Any]]:
    """(path, leaf) for each leaf; None in place of leaves that are not arrays, and so not updated.

    A model of Equinox, for example, has its activation functions as leaves.
    """
    rows = structure.walk(tree)
    return [(path, None if _backends.find(unwrap(x)) is None else x) for path, x in rows]


def is_function(given: Any, tree: Any) -> bool:
    """Whether an option is a function; a callable node, unless it is a prefix of the tree."""
    if not callable(given):
        return False
    return structure.is_leaf(given) or not structure.match(tree, given, [], exact=False)


def _called(name: str, tree: Any, function: Callable[..., Any], keep_graph: bool) -> list[Any]:
    """The values that a function of (path, leaf) returns; None for leaves that are not arrays."""
    rows = _rows(tree)
    values = []
    for path, leaf in rows:
        if leaf is None:
            continue
        try:
            values.append((path, readable(name, function(path, leaf))))
        except Exception as error:
            if isinstance(error, TypeError) and not _takes_path_and_leaf(function):
                text = f"expected a function of (path, leaf), got {_shown(function)}"
                if name == "lr":
                    text += ": a schedule needs the number of the step, as in lr=schedule(step)"
                raise _error(name, [((), text)]) from error
            error.add_note(f"{name} at {errors.path_string(path) or 'w'}")
            raise
    # Equal numbers become one object, because leaves with the same objects share a Rule.
    floats: dict[float, float] = {}
    checked = (
        floats.setdefault(x, x) if type(x) is float else x
        for x in _checked(name, values, keep_graph)
    )
    return [None if leaf is None else next(checked) for _, leaf in rows]


def _takes_path_and_leaf(function: Callable[..., Any]) -> bool:
    try:
        signature(function).bind((), None)
    except TypeError:
        return False
    except ValueError:  # the signature is unknown, as for some builtins
        pass
    return True


def check(options: dict[str, Any]) -> None:
    """Check the values of options when there are no weights yet."""
    for name, given in options.items():
        if not is_function(given, None):
            _checked(name, list(structure.walk(readable(name, given))), keep_graph=False)


def check_names(
    options: Mapping[str, Any], known: Collection[str] = DEFAULTS, *, function: str
) -> None:
    """Raise a TypeError for an unknown keyword, as Python does, but with a hint."""
    for name in options.keys() - set(known):
        elsewhere = CALLED_ELSEWHERE.get(name)
        hint = f" (it is {elsewhere!r} here)" if elsewhere in known else ""
        if not hint and name in OptimizerOptions.__annotations__ and "momentum" not in known:
            hint = " (it is an option of the optimizers, such as Lars)"
        hint = hint or errors.did_you_mean(name, known)
        raise TypeError(f"{function} got an unexpected keyword argument {name!r}{hint}")


def with_hints(function: Function) -> Function:
    """Decorator: the TypeError for an unknown keyword suggests what to write instead."""
    parameters = signature(function).parameters
    positional: list[str] = []
    known: set[str] = set()
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            known |= DEFAULTS.keys()
        else:
            known.add(name)
    is_method = next(iter(parameters)) == "self"

    @wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        if keywords.keys() - known:
            owner = f"{type(arguments[0]).__name__}." if is_method else ""
            called = f"{owner}{function.__name__}"
            for name in positional:
                if name in keywords:
                    example = f"{function.__name__}({', '.join(positional[is_method:])})"
                    raise TypeError(f"{called}() takes {name!r} only by position: {example}")
            check_names(keywords, known, function=f"{called}()")
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
            checked.append(CHECKS[name](unwrap(value), keep_graph))
        except Invalid as invalid:
            faults.append((path, f"expected {invalid}, got {_shown(value)}"))
    if faults:
        raise _error(name, faults)
    return checked


def _refuse_gaps(tree: Any, columns: dict[str, list[Any]]) -> None:
    """Refuse None for arrays, except in options for which None is a valid value."""
    for name, column in columns.items():
        if DEFAULTS.get(name, 0) is None or all(value is not None for value in column):
            continue
        faults = [
            (path, "expected a value, got None")
            for (path, leaf), value in zip(_rows(tree), column, strict=True)
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


# The checked defaults by name and type, in tuples, because one is None. In signatures, the default
# decay is 0.
_KNOWN: dict[tuple[str, type], tuple[Any]] = {
    (name, type(default)): (CHECKS[name](default, False),)
    for name, default in [*DEFAULTS.items(), ("decay_lambda", 0), ("weight_decay", 0)]
}
