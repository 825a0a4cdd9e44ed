"""check_update_laws: check an update function against the laws, and report every broken law."""

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

# The 1e-6 is for results halfway between two neighbours, which may be rounded either way.
ULP = {"float16": 1 + 1e-6, "bfloat16": 1 + 1e-6, "float32": 1 + 1e-6, "float64": 4.0}


class LawError(AssertionError):
    """An update function breaks one or more laws.

    Attributes:
        laws: The errors of the broken laws, by the name of the law.
    """

    laws: Mapping[str, BaseException]


def check_update_laws(
    update: Update,
    *,
    laws: Sequence[Law] = LAWS,
    exclude: Mapping[str, str] | None = None,
    library: _arrays.Library = "numpy",
    dtypes: Sequence[Any] | None = None,
    node_types: Sequence[type] = (dict, list, tuple, Container),
    nested: bool = True,
    trust_coefficient: float = 1.0,
    joint_norm: bool = False,
    ulp: float | None = None,
    settings: hypothesis.settings | None = None,
) -> None:
    """Check an update function against the laws of LARS, and report every law that it breaks.

    The function is called as `update(w, dcdw, lr)` and returns the new weights. Laws about decay
    add `decay_lambda=`; the law about updates in place adds `out=w`. w and dcdw are trees of
    arrays, lr is a float. Wrap an optimizer that has another signature in a small function, and
    turn its momentum off.

    Each law is tried on random weights and gradients. If a law is broken, hypothesis reduces the
    input to the smallest example that it can find.

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
        laws: The laws to check: `LAWS`, `TREE_LAWS`, `RULE_LAWS`, some of them, or your own
            functions that take a `Trial` and assert.
        exclude: Names of laws to leave out, each with the reason.
        library: The library of the arrays: "numpy", "torch" or "jax".
        dtypes: Any of "float16", "bfloat16", "float32" and "float64"; None means all available.
        node_types: The node types of w and dcdw, as in `nests`.
        nested: If False, w and dcdw are flat dicts of arrays.
        trust_coefficient: The trust coefficient that the function uses.
        joint_norm: Whether the denominator of the ratio is |g + decay_lambda * w|, as in optax,
            instead of |g| + decay_lambda * |w|.
        ulp: The largest distance from the exact step in the laws about exactness, in units in the
            last place of the larger of |w| and |step|. None means 1, and 4 for float64.
        settings: Settings of hypothesis, such as `settings(max_examples=20, derandomize=True)`.
            None means the current settings.

    Raises:
        LawError: An AssertionError that names the broken laws, each with an example.
        ValueError: A law, library or dtype is unknown, or a name in `exclude` has no reason.
        ModuleNotFoundError: The library is not installed.
    """
    excluded = dict(exclude or {})
    _check_names(excluded, laws)
    _arrays.check_known("library", library, _arrays.LIBRARIES)
    import_module(library)  # raises an error, and breaks no law, if it is missing
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
    """The error of an example that breaks the law; None if hypothesis finds no example."""

    def trial(data: st.DataObject) -> None:
        law(Trial(update, data, domain))

    trial.__name__ = trial.__qualname__ = law.__name__
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


# Every example of hypothesis starts with these lines.
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
