"""Check an update function or an optimizer against the laws; `failures.py` writes the report."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypedDict, Unpack

import hypothesis
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.errors import FailedHealthCheck, InvalidArgument, Unsatisfiable
from hypothesis.extra import numpy as hnp

from lars_tree import errors
from lars_tree._core.options import check_names
from lars_tree.container import Container
from lars_tree.testing import _arrays, trees
from lars_tree.testing._arrays import items, refused
from lars_tree.testing.adapters import Adapter
from lars_tree.testing.exact import Convention, ExactRule
from lars_tree.testing.failures import function_of, report
from lars_tree.testing.laws import LAWS, OPTIMIZER_LAWS, Law
from lars_tree.testing.trial import Domain, Optimizer, Trial, Update, first_step

SHAPES = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
# The 1e-6 is for results halfway between two neighbours, which may be rounded either way.
ULP = {"float16": 1 + 1e-6, "bfloat16": 1 + 1e-6, "float32": 1 + 1e-6, "float64": 4.0}

Make = Callable[[st.DataObject], Trial]
Shapes = Sequence[tuple[int, ...]] | st.SearchStrategy[tuple[int, ...]]


class LawError(AssertionError):
    """An update function or an optimizer breaks one or more laws.

    Attributes:
        laws: The errors of the broken laws, by the name of the law. The second of two laws with
            the same name is called "name (2)".
    """

    laws: Mapping[str, BaseException]


class Arguments(TypedDict, total=False):
    """The arguments of `check_update_laws` that `check_optimizer_laws` has too."""

    exclude: Mapping[str, str] | None
    library: _arrays.Library | None
    dtypes: Sequence[Any] | None
    node_types: Sequence[type]
    nested: bool
    key_order: bool
    shapes: Shapes | None
    trust_coefficient: float
    eps: float
    joint_norm: bool
    ulp: float | None
    settings: hypothesis.settings | None


def check_update_laws(
    update: Update,
    *,
    laws: Sequence[Law] = LAWS,
    exclude: Mapping[str, str] | None = None,
    library: _arrays.Library | None = None,
    dtypes: Sequence[Any] | None = None,
    node_types: Sequence[type] = (dict, list, tuple, Container),
    nested: bool = True,
    key_order: bool = True,
    shapes: Shapes | None = None,
    trust_coefficient: float = 1.0,
    eps: float = 0.0,
    joint_norm: bool = False,
    ulp: float | None = None,
    settings: hypothesis.settings | None = None,
) -> None:
    """Check an update function against the laws of LARS, and report every law that it breaks.

    The function is called as `update(w, dcdw, lr)` and returns the new weights. Laws about decay
    add `decay_lambda=`; laws about updates in place add `out=w`. w and dcdw are trees of arrays, lr
    is a float. For optimizers with a state or another interface, use `check_optimizer_laws`.

    Each law is tried on random weights and gradients. If a law is broken, hypothesis reduces the
    input to the smallest example that it can find. Warnings of numpy are off.

    >>> from hypothesis import settings
    >>> from lars_tree.testing import RULE_LAWS, TREE_LAWS, check_update_laws
    >>> check_update_laws(lars_update, settings=settings(max_examples=5, derandomize=True))
    >>> def sgd(w, dcdw, lr, decay_lambda=0):
    ...     return {key: x - lr * (dcdw[key] + decay_lambda * x) for key, x in w.items()}
    >>> quick = settings(max_examples=20, derandomize=True)
    >>> try:
    ...     check_update_laws(sgd, laws=TREE_LAWS + RULE_LAWS, nested=False, settings=quick)
    ... except AssertionError as error:
    ...     print("scales_with_the_weights" in error.laws, "matches_by_key" in error.laws)
    True False

    Args:
        update: The function, which returns new weights.
        laws: The laws to check: `LAWS`, `TREE_LAWS`, `IN_PLACE_LAWS`, `RULE_LAWS`, some of them, or
            your own functions that take a `Trial` and assert.
        exclude: Names of laws to leave out, each with the reason.
        library: The library of the arrays: "numpy", "torch" or "jax". None means numpy.
        dtypes: Any of "float16", "bfloat16", "float32" and "float64"; None means all available.
        node_types: The node types of w and dcdw, as in `nests`. Laws about single layers use dicts
            in any case.
        nested: If False, w and dcdw are flat dicts of arrays.
        key_order: If False, the result may have another order of keys than w, as in JAX.
        shapes: The shapes of the arrays, or a strategy for them. None means up to two axes.
        trust_coefficient: The trust coefficient that the function uses.
        eps: The number that the function adds to the denominator of the ratio.
        joint_norm: Whether the denominator of the ratio is |g + decay_lambda * w|, as in optax,
            instead of |g| + decay_lambda * |w|.
        ulp: The largest distance from the exact step in the laws about exactness, in units in the
            last place of the larger of |w| and |step|. None means 1, and 4 for float64.
        settings: Settings of hypothesis, such as `settings(max_examples=20, derandomize=True)`.
            None means the current settings.

    Raises:
        LawError: An AssertionError that names the broken laws, each with an example.
        OptionError: A ValueError: a law, library or dtype is unknown, there are no laws, or a name
            in `exclude` has no reason.
        ModuleNotFoundError: The library is not installed.
    """
    __tracebackhide__ = True
    given = locals()
    arguments = {name: given[name] for name in Arguments.__annotations__}
    if not callable(update):
        raise refused("update", f"expected a function of (w, dcdw, lr), got {update!r}")
    if isinstance(update, Adapter):
        raise refused(
            "update",
            "expected a function of (w, dcdw, lr), got an optimizer: use check_optimizer_laws",
        )
    _check(update, laws, lambda domain: lambda data: Trial(update, data, domain), {}, arguments)


def check_optimizer_laws(
    optimizer: Callable[..., Optimizer],
    *,
    laws: Sequence[Law] = OPTIMIZER_LAWS,
    momentum: float | None = 0.5,
    convention: Convention | None = None,
    **arguments: Unpack[Arguments],
) -> None:
    """Check an optimizer with a state against the laws of LARS, over runs of several steps.

    `optimizer(lr, momentum=..., weight_decay=...)` returns an object like `lars_tree.Lars`, which
    has the methods `init(w)`, for the state before the first step, and `update(w, dcdw, state)`,
    for the new weights and the new state. `for_torch` and `for_optax` adapt other optimizers. The
    laws of a single update are checked too, for the first step. A law about Nesterov momentum adds
    `nesterov=True`. To change the rate in mid-run, the laws make a second optimizer, which gets
    the state of the first. In-place updates are not checked.

    >>> import torch
    >>> from hypothesis import settings
    >>> from lars_tree.testing import MOMENTUM_LAWS, STATE_LAWS, check_optimizer_laws, for_torch
    >>> quick = settings(max_examples=5, derandomize=True)
    >>> rule = {"trust_coefficient": 0.001, "eps": 1e-8}
    >>> check_optimizer_laws(Lars, laws=STATE_LAWS + MOMENTUM_LAWS, settings=quick, **rule)
    >>> check_optimizer_laws(for_torch(torch.optim.SGD), laws=STATE_LAWS, settings=quick)
    >>> try:
    ...     check_optimizer_laws(
    ...         for_torch(torch.optim.SGD), laws=MOMENTUM_LAWS, convention="paper", settings=quick
    ...     )
    ... except AssertionError as error:
    ...     print(*error.laws)
    changes_its_rate_by_the_convention follows_the_rule_in_a_run follows_the_rule_with_nesterov

    Args:
        optimizer: The function that makes an optimizer; often its class.
        laws: The laws to check: `OPTIMIZER_LAWS`, `TREE_LAWS`, `RULE_LAWS`, `STATE_LAWS`,
            `MOMENTUM_LAWS`, some of them, or your own functions that take a `Trial` and assert.
        momentum: The momentum of all runs, unless a law is about the momentum. None means that the
            optimizer has no such argument; `MOMENTUM_LAWS` then do not apply.
        convention: How a rate enters the momentum. "paper" (also optax): v = momentum * v + lr * d,
            and the step is v. "torch": v = momentum * v + d, and the step is lr * v. None means
            that of the adapter, or "paper".
        **arguments: `exclude`, `library`, `dtypes`, `node_types`, `nested`, `key_order`, `shapes`,
            `trust_coefficient`, `eps`, `joint_norm`, `ulp` and `settings`, as in
            `check_update_laws`. The default library is that of the adapter, or numpy.

    Raises:
        LawError: An AssertionError that names the broken laws, each with an example.
        OptionError: As in `check_update_laws`.
        ModuleNotFoundError: The library is not installed.
    """
    __tracebackhide__ = True
    if not callable(optimizer):
        text = "expected a function that makes an optimizer, such as lars_tree.Lars"
        raise refused("optimizer", f"{text}, got {optimizer!r}")
    adapted = optimizer if isinstance(optimizer, Adapter) else None
    chosen = convention or (adapted.convention if adapted else "paper")
    _arrays.check_known("convention", chosen, ["paper", "torch"])
    if adapted and arguments.get("library") is None:
        arguments["library"] = adapted.library

    def trials(domain: Domain) -> Make:
        update = first_step(optimizer, momentum)
        return lambda data: Trial(update, data, domain, optimizer)

    further = {"convention": chosen, "momentum": momentum}
    check_names(arguments, _DEFAULTS, function="check_optimizer_laws()")
    _check(optimizer, laws, trials, further, {**_DEFAULTS, **arguments})


_DEFAULTS = {
    name: inspect.signature(check_update_laws).parameters[name].default
    for name in Arguments.__annotations__
}


def _check(
    subject: Any,
    laws: Sequence[Law],
    trials: Callable[[Domain], Make],
    further: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    """Check the laws on trials of an update function or optimizer, the `subject`."""
    __tracebackhide__ = True
    settings = arguments.pop("settings")
    chosen = _chosen(laws, arguments.pop("exclude"))
    domain = _domain(further, **arguments)
    make = trials(domain)
    found = {name: _error(name, law, make, settings) for name, law in chosen.items()}
    broken = {name: error for name, error in found.items() if error is not None}
    if broken:
        error = LawError(report(subject, broken, chosen, nested=domain.nested))
        error.laws = broken
        raise error


def _domain(
    further: dict[str, Any],
    *,
    library: _arrays.Library | None,
    dtypes: Sequence[Any] | None,
    node_types: Sequence[type],
    nested: bool,
    key_order: bool,
    shapes: Shapes | None,
    trust_coefficient: float,
    eps: float,
    joint_norm: bool,
    ulp: float | None,
) -> Domain:
    library = library or "numpy"
    _arrays.check_known("library", library, _arrays.LIBRARIES)
    import_module(library)  # raises an error, and breaks no law, if it is missing
    names = _dtype_names(dtypes, library)
    trees.check_node_types(node_types)
    if shapes is None:
        shapes = SHAPES
    elif not isinstance(shapes, st.SearchStrategy):
        for x in items("shapes", shapes, "shapes such as [(2, 3), ()]"):
            if not isinstance(x, tuple) or not all(isinstance(n, int) and n >= 0 for n in x):
                raise refused("shapes", f"expected tuples such as (2, 3), got {x!r}")
        shapes = st.sampled_from(list(shapes))
    rule = ExactRule(trust_coefficient, eps, joint_norm)
    bounds = ULP if ulp is None else dict.fromkeys(ULP, ulp)
    return Domain(library, names, node_types, nested, key_order, shapes, rule, bounds, **further)


def _dtype_names(dtypes: Sequence[Any] | None, library: str) -> list[str]:
    known = _arrays.names_for(library)
    if dtypes is None:
        return known
    given = items("dtypes", dtypes, 'dtypes such as ["float32"]')
    return [_arrays.check_dtype("dtypes", x, known) for x in given]


def _chosen(laws: Any, exclude: Any) -> dict[str, Law]:
    """The laws that are not excluded, by name; the second of a name is called 'name (2)'."""
    example = "laws such as LAWS"
    for law in items("laws", laws, example):
        if not callable(law):
            raise refused("laws", f"expected functions such as those of LAWS, got {law!r}")
    if not isinstance(exclude, (Mapping, type(None))):
        text = 'expected the reasons by the names of laws, such as {"is_exact": "float32 sums"}'
        raise refused("exclude", f"{text}, got {exclude!r}")
    excluded = dict(exclude or {})
    names = [function_of(law).__name__ for law in laws]
    # The laws of the package too, so that one `exclude` serves for several checks.
    known = {*names, *(law.__name__ for law in (*LAWS, *OPTIMIZER_LAWS))}
    for name, reason in excluded.items():
        if name not in known:
            raise refused("exclude", f"there is no law {name!r}{errors.did_you_mean(name, known)}")
        if not isinstance(reason, str) or not reason.strip():
            raise refused("exclude", f"{name}: expected the reason, got {reason!r}")
    counts: Counter[str] = Counter()
    chosen = {}
    for name, law in zip(names, laws, strict=True):
        counts[name] += 1
        if name not in excluded:
            chosen[name if counts[name] == 1 else f"{name} ({counts[name]})"] = law
    if not chosen:
        raise refused("exclude", "all laws are excluded")
    return chosen


def _error(
    name: str, law: Law, make: Make, settings: hypothesis.settings | None
) -> Exception | None:
    """The error of an example that breaks the law; None if hypothesis finds no example."""

    def trial(data: st.DataObject) -> None:
        with np.errstate(all="ignore"):
            law(make(data))

    # hypothesis derives the seed and the key of its database from the name.
    trial.__name__ = trial.__qualname__ = "law_" + re.sub(r"\W+", "_", name)
    profile = hypothesis.settings(settings, deadline=None, report_multiple_bugs=False)
    phases = [phase for phase in profile.phases if phase is not hypothesis.Phase.explain]
    profile = hypothesis.settings(profile, phases=phases)
    try:
        profile(given(data=st.data())(trial))()
    except (FailedHealthCheck, InvalidArgument, Unsatisfiable):
        raise  # hypothesis could not try the law
    except Exception as error:  # an exception of any type breaks the law
        return error
    return None
