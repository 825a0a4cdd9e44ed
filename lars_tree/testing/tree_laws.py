"""The laws about trees and memory, with and without `out=`. See `laws.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lars_tree import _backends, errors
from lars_tree._backends.wrapper import unwrap
from lars_tree._tree import structure
from lars_tree.testing import _arrays
from lars_tree.testing.assertions import assert_close_ulp, assert_identical, differences
from lars_tree.testing.trees import shuffled
from lars_tree.testing.trial import Trial, as_numbers, at, mapped, matched

Law = Callable[[Trial], None]

DECAYS = st.sampled_from([0.0, 0.5])
# The error of the correct formula is smaller than this in the arithmetic of every format.
FORMULA_ULP = 16


def same(actual: Any, expected: Any) -> None:
    """Assert that two results have identical leaves at the same paths.

    Node types and the order of keys may differ. Numpy scalars equal 0-d arrays.
    """
    by_key = structure.rebuild(expected, matched(expected, actual))
    assert_identical(by_key, expected, check_type=False)


def same_alone(trial: Trial, w: Any, actual: Any, expected: Any) -> None:
    """Assert that weights that moved together are those that moved alone.

    XLA may round a leaf in another way if other leaves are compiled with it, so results of JAX need
    only be close.
    """
    if trial.domain.library == "jax":
        scale = mapped(lambda x, y: abs(x) + abs(y), as_numbers(w), as_numbers(expected))
        trial.assert_close(actual, w, as_numbers(expected), scale, FORMULA_ULP)
    else:
        same(actual, expected)


def times(factor: float, tree: Any) -> Any:
    """The tree with its arrays multiplied by a number, in their own dtypes."""
    return mapped(lambda x: _arrays.times(x, factor), tree)


def keeps_the_structure(trial: Trial) -> None:
    """The result has the node types, key order, libraries, dtypes and shapes of the weights.

    With key_order=False, the order of the keys does not matter.
    """
    w, dcdw = trial.pair()
    is_like(trial(w, dcdw, 0.5), w, trial.domain.key_order)


def is_like(new: Any, w: Any, key_order: bool) -> None:
    """Assert that a result has the structure of the weights."""
    lines = list(differences(new, w, check_type=False, values=False, order=key_order))
    if not lines:
        for (path, x), y in zip(structure.walk(w), matched(w, new), strict=True):
            names = [getattr(_backends.find(unwrap(z)), "name", None) for z in (x, y)]
            if names[0] != names[1]:
                lines.append((path, f"expected an array of {names[0]}, got {errors.describe(y)}"))
    assert not lines, errors.message("actual", "the result is not like w", lines)


def leaves_its_inputs_alone(trial: Trial) -> None:
    """Neither weights nor gradients are modified."""
    w, dcdw = trial.pair()
    with unmodified(w=w, dcdw=dcdw):
        trial.update(w, dcdw, 0.5)


def leaves_its_inputs_alone_with_decay(trial: Trial) -> None:
    """Neither weights nor gradients are modified if there is weight decay."""
    w, dcdw = trial.pair()
    with unmodified(w=w, dcdw=dcdw):
        trial.update(w, dcdw, 0.5, decay_lambda=0.5)


@contextmanager
def unmodified(**trees: Any) -> Iterator[None]:
    """Assert that the arrays of these trees are the same afterwards."""
    before = _arrays.copied(trees)
    yield
    for name, tree in trees.items():
        lines = list(differences(tree, before[name], check_type=True))
        assert not lines, errors.message(name, f"{name} was modified", lines)


def returns_new_arrays(trial: Trial) -> None:
    """The result shares no memory with weights or gradients, even if no weight changes.

    Not checked for JAX, whose arrays are immutable.
    """
    w, dcdw = trial.pair()
    rate = trial.draw(st.sampled_from([0.5, 0.0]), "lr")
    if trial.draw(st.booleans(), "zero gradient"):
        dcdw = times(0, dcdw)
    _assert_apart(trial.update(w, dcdw, rate), w=w, dcdw=dcdw)


def returns_new_arrays_without_a_gradient(trial: Trial) -> None:
    """If all gradients are None, the result shares no memory with the weights.

    Not checked for JAX, whose arrays are immutable.
    """
    w, dcdw = trial.pair()
    _assert_apart(trial.update(w, mapped(lambda _: None, dcdw), 0.5), w=w)


def _assert_apart(new: Any, **trees: Any) -> None:
    for name, tree in trees.items():
        rows = zip(structure.walk(tree), matched(tree, new), strict=True)
        shared = [
            (path, f"the result shares memory with {name}")
            for (path, x), y in rows
            if _arrays.share_memory(x, y)
        ]
        assert not shared, errors.message("actual", "the result is not a new array", shared)


def matches_by_key(trial: Trial) -> None:
    """Gradients are matched to weights by key, whatever the order of the keys."""
    w, dcdw = trial.pair()
    other = trial.draw(shuffled(dcdw), "dcdw in another order")
    same(trial(w, other, 0.5), trial(w, dcdw, 0.5))


def takes_each_layer_on_its_own(trial: Trial) -> None:
    """Every layer is updated as if it were alone: its step does not depend on other layers."""
    w, dcdw = trial.pair()
    alone = mapped(lambda x, g: trial({"layer": x}, {"layer": g}, 0.5)["layer"], w, dcdw)
    same_alone(trial, w, trial(w, dcdw, 0.5), alone)


def depends_on_its_arguments_alone(trial: Trial) -> None:
    """The same arguments give the same result, whatever was updated in between."""
    w, dcdw = trial.pair()
    first = trial(w, dcdw, 0.5)
    trial(times(4, w), dcdw, 0.5)
    same(trial(w, dcdw, 0.5), first)


def leaves_weights_without_a_gradient(trial: Trial) -> None:
    """Weights whose gradient is None stay unchanged, and do not decay."""
    w, dcdw = trial.pair()
    partial = _with_gaps(trial, dcdw)
    new, full = (trial(w, g, 0.5, decay_lambda=0.5) for g in (partial, dcdw))
    # None may be an empty node in the trees of the optimizer, but it is a leaf in ours.
    kept = mapped(lambda g: g is None, partial)
    same(new, mapped(lambda x, y, keep: x if keep else y, w, full, kept))


def _with_gaps(trial: Trial, dcdw: Any) -> Any:
    """The gradients with some replaced by None."""
    count = len(structure.leaves(dcdw))
    missing = trial.draw(st.lists(st.booleans(), min_size=count, max_size=count), "missing")
    kept = zip(structure.leaves(dcdw), missing, strict=True)
    return structure.rebuild(dcdw, [None if gap else g for g, gap in kept])


def stands_still_at_rate_zero(trial: Trial) -> None:
    """A rate of 0 changes no weight."""
    w, dcdw = trial.pair()
    assert_close_ulp(trial(w, dcdw, 0.0), w, 0)


def shows_nonfinite_gradients(trial: Trial) -> None:
    """A NaN or infinite gradient gives NaN or infinite weights, or an error: it is not hidden.

    An optimizer that skips such steps breaks this law.
    """
    w, dcdw = trial.pair()
    value = trial.draw(st.sampled_from([math.nan, math.inf, -math.inf]), "first element of dcdw")
    bad = mapped(lambda g: _arrays.with_first(g, value), dcdw)
    try:
        new = trial(w, bad, 0.5)
    except Exception:
        return
    rows = zip(structure.walk(w), matched(w, new), strict=True)
    hidden = [
        (path, f"a gradient of {value} gave finite weights")
        for (path, _), y in rows
        if _all_finite(y)
    ]
    assert not hidden, errors.message("actual", "the gradient was replaced", hidden)


def _all_finite(x: Any) -> bool:
    values = _arrays.to_numpy(x).astype(float)
    return bool(values.size and np.isfinite(values).all())


# ---- Updates in place, for optimizers that have `out=`


def is_the_same_in_place(trial: Trial) -> None:
    """With out=w the same results are written into the arrays of w, and w is returned.

    Like all laws about updates in place, not checked for JAX, whose arrays are immutable.
    """
    w, dcdw = trial.pair()
    _assert_same_in_place(trial, w, dcdw)


def decays_in_place(trial: Trial) -> None:
    """Weight decay gives the same results with out=w as without."""
    w, dcdw = trial.pair()
    _assert_same_in_place(trial, w, dcdw, decay_lambda=0.5)


def leaves_weights_without_a_gradient_in_place(trial: Trial) -> None:
    """With out=w, weights whose gradient is None stay unchanged."""
    w, dcdw = trial.pair()
    _assert_same_in_place(trial, w, _with_gaps(trial, dcdw))


def leaves_the_gradients_alone_in_place(trial: Trial) -> None:
    """With out=w, no gradient is modified, with and without weight decay."""
    if trial.domain.library == "jax":
        return
    w, dcdw = trial.pair()
    decay = trial.draw(DECAYS, "decay_lambda")
    with unmodified(dcdw=dcdw):
        trial.update(w, dcdw, 0.5, out=w, **({"decay_lambda": decay} if decay else {}))


def _assert_same_in_place(trial: Trial, w: Any, dcdw: Any, **options: Any) -> None:
    if trial.domain.library == "jax":
        return
    expected = trial(w, dcdw, 0.5, **options)
    target = _arrays.copied(w)
    arrays = list(structure.walk(target))
    result = trial.update(target, _arrays.copied(dcdw), 0.5, out=target, **options)
    assert result is target, f"expected w itself, got {errors.describe(result)}"
    same(structure.rebuild(w, [x for _, x in arrays]), expected)
    assert all(at(target, path) is x for path, x in arrays), "w holds other arrays than before"


TREE_LAWS: tuple[Law, ...] = (
    keeps_the_structure,
    leaves_its_inputs_alone,
    leaves_its_inputs_alone_with_decay,
    returns_new_arrays,
    returns_new_arrays_without_a_gradient,
    matches_by_key,
    takes_each_layer_on_its_own,
    depends_on_its_arguments_alone,
    leaves_weights_without_a_gradient,
    stands_still_at_rate_zero,
    shows_nonfinite_gradients,
)
"""The laws about trees and memory, which apply to every optimizer."""

IN_PLACE_LAWS: tuple[Law, ...] = (
    is_the_same_in_place,
    decays_in_place,
    leaves_weights_without_a_gradient_in_place,
    leaves_the_gradients_alone_in_place,
)
"""The laws about updates with `out=`."""
