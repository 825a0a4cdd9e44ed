"""check_update_laws: hold an update function to the laws, and report all that it breaks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import hypothesis
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.errors import FailedHealthCheck, InvalidArgument, Unsatisfiable

from lars_tree import errors
from lars_tree.container import Container
from lars_tree.testing import _arrays
from lars_tree.testing.laws import LAWS, Law
from lars_tree.testing.trial import Domain, Trial, Update

# A result halfway between two neighbours may round either way: hence the last bit of slack.
ULP = {"float16": 1 + 1e-6, "bfloat16": 1 + 1e-6, "float32": 1 + 1e-6, "float64": 4.0}


class LawError(AssertionError):
    """An update function breaks laws.

    Attributes:
        laws: The error of each law that is broken, by the name of the law.
    """

    laws: Mapping[str, BaseException]


def check_update_laws(
    update: Update,
    *,
    laws: Sequence[Law] = LAWS,
    exclude: Mapping[str, str] | None = None,
    library: str = "numpy",
    dtypes: Sequence[Any] | None = None,
    node_types: Sequence[type] = (dict, list, tuple, Container),
    nested: bool = True,
    trust_coefficient: float = 1.0,
    joint_norm: bool = False,
    ulp: float | None = None,
    settings: hypothesis.settings | None = None,
) -> None:
    """Hold an update function to the laws of LARS, and report every law that it breaks.

    The function is called as `update(w, dcdw, lr)`, with `decay_lambda=` where a law is about decay
    and with `out=w` where one is about updates in place, and returns the new weights. w and dcdw
    are trees of arrays, by the arguments below, lr is a float. An optimizer with another signature
    needs a few lines around it; one with momentum is to be made without.

    Each law is tried on random weights and gradients, and what breaks it is reduced to the smallest
    example that hypothesis can find.

    >>> from hypothesis import settings
    >>> from lars_tree.testing import check_update_laws
    >>> check_update_laws(lars_update, settings=settings(max_examples=5, derandomize=True))
    >>> def sgd(w, dcdw, lr, decay_lambda=0):
    ...     return {key: x - lr * (dcdw[key] + decay_lambda * x) for key, x in w.items()}
    >>> quick = settings(max_examples=20, derandomize=True)
    >>> out = {"is_the_same_in_place": "it has no out"}
    >>> try:
    ...     check_update_laws(sgd, nested=False, exclude=out, settings=quick)
    ... except AssertionError as error:
    ...     print("scales_with_the_weights" in error.laws, "matches_by_key" in error.laws)
    True False

    Args:
        update: The function, which returns new weights.
        laws: Those that are checked: `LAWS`, `TREE_LAWS`, `RULE_LAWS`, any of them, or functions of
            your own that take a `Trial` and assert.
        exclude: Names of laws that shall not hold, each with the reason.
        library: "numpy", "torch" or "jax": whose arrays the function is tried on.
        dtypes: Any of "float16", "bfloat16", "float32" and "float64"; None is all that there are.
        node_types: Types of the nodes of w and dcdw, as in `nests`.
        nested: False: w and dcdw are flat dicts of arrays.
        trust_coefficient: The one with which the function steps.
        joint_norm: Whether its denominator is |g + decay_lambda * w|, as that of optax, and not
            |g| + decay_lambda * |w|.
        ulp: How far off the exact step an element may be where laws are about exactness, in units
            in the last place of the larger of |w| and |step|. None is 1, and 4 for float64.
        settings: Of hypothesis, such as `settings(max_examples=20, derandomize=True)`. None takes
            those in force.

    Raises:
        LawError: An AssertionError, which names the laws that are broken, each with an example.
        ValueError: There is no such law, library or dtype, or a name in `exclude` has no reason.
        ModuleNotFoundError: The library is not installed.
    """
    excluded = dict(exclude or {})
    _check_names(excluded, laws)
    _arrays.check_known("library", library, _arrays.LIBRARIES)
    import_module(library)  # if it is missing no law is broken
    names = [_arrays.name_of(x) for x in dtypes or _arrays.names_for(library)]
    for name in names:
        _arrays.check_known("dtypes", name, _arrays.names_for(library))
    bounds = ULP if ulp is None else dict.fromkeys(ULP, ulp)
    domain = Domain(library, names, node_types, nested, trust_coefficient, joint_norm, bounds)
    chosen = [law for law in laws if law.__name__ not in excluded]
    found = {law.__name__: _broken(law, update, domain, settings) for law in chosen}
    broken = {name: error for name, error in found.items() if error is not None}
    if broken:
        raise _law_error(update, broken, {law.__name__: law for law in chosen})


def _check_names(excluded: dict[str, str], laws: Sequence[Law]) -> None:
    for law in laws:
        if not callable(law):
            raise ValueError(f"laws: expected functions such as those of LAWS, got {law!r}")
    known = [law.__name__ for law in laws]
    for name, reason in excluded.items():
        if name not in known:
            hint = errors.did_you_mean(name, known)
            raise ValueError(f"exclude: there is no law {name!r}{hint}")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"exclude: {name}: expected the reason, got {reason!r}")


def _broken(
    law: Law, update: Update, domain: Domain, settings: hypothesis.settings | None
) -> Exception | None:
    """What hypothesis finds against a law."""

    def trial(data: st.DataObject) -> None:
        law(Trial(update, data, domain))

    trial.__name__ = trial.__qualname__ = law.__name__
    profile = hypothesis.settings(settings, deadline=None, report_multiple_bugs=False)
    phases = [phase for phase in profile.phases if phase is not hypothesis.Phase.explain]
    profile = hypothesis.settings(profile, phases=phases)
    try:
        profile(given(data=st.data())(trial))()
    except (FailedHealthCheck, InvalidArgument, Unsatisfiable):
        raise  # nothing was tried
    except Exception as error:  # whatever the function raises breaks the law
        return error
    return None


# What hypothesis says first of an example: only the draws below it differ.
_HEADER = re.compile(r"^[^\n]*\(\n\s*data=data\(\.\.\.\),\n\)\n?")


def _law_error(update: Update, broken: dict[str, Exception], laws: dict[str, Law]) -> LawError:
    name = getattr(update, "__name__", None) or repr(update)
    plural = "a law" if len(broken) == 1 else f"{len(broken)} laws"
    parts = [f"{name} breaks {plural}"]
    for law, error in broken.items():
        doc = (laws[law].__doc__ or "").strip().partition("\n")[0]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        notes = [_HEADER.sub("", note) for note in getattr(error, "__notes__", [])]
        body = "\n".join(filter(None, [doc, f"{kind}{error}", *notes]))
        parts.append(f"{law}\n{textwrap.indent(body, '  ')}")
    error = LawError("\n\n".join(parts))
    error.laws = broken
    return error
