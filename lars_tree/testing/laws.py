"""The laws of an update function. A law is a function of a `Trial`, which draws the arguments.

A law is broken if it raises an AssertionError, or if the update raises any error.
`TREE_LAWS` are about trees and memory, and hold for every optimizer without a state. `RULE_LAWS`
are about the arithmetic of LARS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lars_tree import _backends, errors
from lars_tree._backends.wrapper import unwrap
from lars_tree._tree import structure
from lars_tree.testing import _arrays
from lars_tree.testing.assertions import assert_close_ulp, assert_identical, differences
from lars_tree.testing.strategies import shuffled
from lars_tree.testing.trial import Trial, at, exact_norm, exact_step, mapped

Law = Callable[[Trial], None]

RATES = st.sampled_from([0.5, 0.125])
DECAYS = st.sampled_from([0.0, 0.5])
# The error of the correct formula is smaller than this in the arithmetic of every format.
FORMULA_ULP = 16


def same(actual: Any, expected: Any) -> None:
    """Assert that two results are identical; numpy scalars equal 0-d arrays."""
    assert_identical(actual, expected, check_type=False)


def _times(factor: float, tree: Any) -> Any:
    return mapped(lambda x: _arrays.times(x, factor), tree)


# ---- Trees and memory


def keeps_the_structure(trial: Trial) -> None:
    """The result has the node types, key order, libraries, dtypes and shapes of the weights."""
    w, dcdw = trial.pair()
    new = trial(w, dcdw, 0.5)
    lines = list(differences(new, w, check_type=False, values=False))
    for (path, x), y in zip(structure.walk(w), structure.leaves(new), strict=not lines):
        libraries = [getattr(_backends.find(unwrap(z)), "name", None) for z in (x, y)]
        if libraries[0] != libraries[1]:
            lines.append((path, f"expected an array of {libraries[0]}, got {errors.describe(y)}"))
    assert not lines, errors.message("actual", "the result is not like w", lines)


def leaves_its_inputs_alone(trial: Trial) -> None:
    """Neither weights nor gradients are modified."""
    w, dcdw = trial.pair()
    before = _arrays.copied([w, dcdw])
    trial.update(w, dcdw, 0.5)
    for name, now, then in (("w", w, before[0]), ("dcdw", dcdw, before[1])):
        lines = list(differences(now, then, check_type=True))
        assert not lines, errors.message(name, f"{name} was modified", lines)


def matches_by_key(trial: Trial) -> None:
    """Gradients are matched to weights by key, whatever the order of the keys."""
    w, dcdw = trial.pair()
    other = trial.draw(shuffled(dcdw), "dcdw in another order")
    same(trial(w, other, 0.5), trial(w, dcdw, 0.5))


def takes_each_layer_on_its_own(trial: Trial) -> None:
    """Every layer is updated as if it were alone: its step does not depend on other layers."""
    w, dcdw = trial.pair()
    alone = mapped(lambda x, g: trial({"layer": x}, {"layer": g}, 0.5)["layer"], w, dcdw)
    same(trial(w, dcdw, 0.5), alone)


def depends_on_its_arguments_alone(trial: Trial) -> None:
    """The same arguments give the same result, whatever was updated in between."""
    w, dcdw = trial.pair()
    first = trial(w, dcdw, 0.5)
    trial(_times(4, w), dcdw, 0.5)
    same(trial(w, dcdw, 0.5), first)


def leaves_weights_without_a_gradient(trial: Trial) -> None:
    """Weights whose gradient is None stay unchanged, and do not decay."""
    w, dcdw = trial.pair()
    count = len(structure.leaves(dcdw))
    missing = trial.draw(st.lists(st.booleans(), min_size=count, max_size=count), "missing")
    partial = mapped(lambda g, no: None if no else g, dcdw, missing)
    new, full = (trial(w, g, 0.5, decay_lambda=0.5) for g in (partial, dcdw))
    same(new, mapped(lambda x, y, no: x if no else y, w, full, missing))


def is_the_same_in_place(trial: Trial) -> None:
    """With out=w the same results are written into the arrays of w, and w is returned.

    Not checked for JAX, whose arrays are immutable.
    """
    if trial.domain.library == "jax":
        return
    w, dcdw = trial.pair()
    expected = trial(w, dcdw, 0.5)
    target = _arrays.copied(w)
    arrays = structure.leaves(target)
    result = trial.update(target, _arrays.copied(dcdw), 0.5, out=target)
    assert result is target, f"expected w itself, got {errors.describe(result)}"
    same(structure.rebuild(w, arrays), expected)
    kept = all(x is y for x, y in zip(structure.leaves(target), arrays, strict=True))
    assert kept, "w holds other arrays than before"


def stands_still_at_rate_zero(trial: Trial) -> None:
    """A rate of 0 changes no weight."""
    w, dcdw = trial.pair()
    assert_close_ulp(trial(w, dcdw, 0.0), w, 0)


# ---- The arithmetic of LARS


def does_not_see_the_scale_of_the_gradient(trial: Trial) -> None:
    """Scaling the gradient by a power of two gives the same step, to the last bit.

    ratio * g does not change, unless an eps is added to the denominator.
    """
    w, dcdw = trial.pair()
    factor = trial.power("power of two")
    same(trial(w, _times(factor, dcdw), 0.5), trial(w, dcdw, 0.5))


def scales_with_the_weights(trial: Trial) -> None:
    """Scaling the weights by a power of two scales the step equally, to the last bit."""
    w, dcdw = trial.pair()
    factor = trial.power("power of two")
    new = trial(_times(factor, w), dcdw, 0.5)
    same(new, _times(factor, trial(w, dcdw, 0.5)))


def is_linear_in_the_rate(trial: Trial) -> None:
    """Four times the rate gives four times the step."""
    w, dcdw = trial.pair()
    rate = trial.draw(RATES, "lr")
    one, four = trial(w, dcdw, rate), trial(w, dcdw, 4 * rate)
    old, new = (mapped(lambda x: _arrays.to_numpy(x).astype(float), tree) for tree in (w, one))
    steps = mapped(lambda x, y: 4 * (x - y), old, new)
    expected = mapped(lambda x, u: x - u, old, steps)
    scale = mapped(lambda x, u: np.maximum(abs(x), abs(u)), old, steps)
    trial.assert_close(four, w, expected, scale, 2 * FORMULA_ULP)


def trains_zero_weights(trial: Trial) -> None:
    """The ratio of zero weights is 1, so that a layer that starts at zero trains."""
    w, dcdw = trial.pair()
    zeros = _times(0, w)
    trial.assert_rule(trial(zeros, dcdw, 0.5), zeros, dcdw, 0.5, 0.0, FORMULA_ULP)


def stands_still_without_a_gradient(trial: Trial) -> None:
    """With a zero gradient and no decay, weights stay unchanged: 0 / 0 does not give NaN."""
    w, dcdw = trial.pair()
    assert_close_ulp(trial(w, _times(0, dcdw), 0.5), w, 0)


def decays_plainly_without_a_gradient(trial: Trial) -> None:
    """The ratio of a zero gradient is 1: the step is lr * decay * w, not lr * trust * w.

    With `joint_norm` the ratio is |w| / |decay * w|.
    """
    w, dcdw = trial.pair()
    zeros = _times(0, dcdw)
    new = trial(w, zeros, 0.5, decay_lambda=0.125)
    trial.assert_rule(new, w, zeros, 0.5, 0.125, FORMULA_ULP)


def follows_the_rule(trial: Trial) -> None:
    """Without decay, the step is lr * trust_coefficient * |w| / |g| * g."""
    w, dcdw = trial.pair()
    rate = trial.draw(RATES, "lr")
    trial.assert_rule(trial(w, dcdw, rate), w, dcdw, rate, 0.0, FORMULA_ULP)


def decays_as_in_the_paper(trial: Trial) -> None:
    """The step is lr * ratio * (g + decay * w), with ratio |w| / (|g| + decay * |w|).

    With `joint_norm` the ratio is |w| / |g + decay * w|.
    """
    _assert_rule(trial, st.sampled_from([0.5, 2.0, 0.125]))


def _assert_rule(
    trial: Trial,
    decays: st.SearchStrategy[float],
    kind: str = "plain",
    ulp: float | None = FORMULA_ULP,
) -> None:
    w, dcdw = trial.pair(kind)
    rate, decay = trial.draw(RATES, "lr"), trial.draw(decays, "decay_lambda")
    trial.assert_rule(trial(w, dcdw, rate, decay_lambda=decay), w, dcdw, rate, decay, ulp)


def is_exact(trial: Trial) -> None:
    """Results for numbers of moderate size are within `ulp` of the exact step."""
    _assert_rule(trial, DECAYS, "moderate", ulp=None)


def is_exact_over_the_whole_range(trial: Trial) -> None:
    """Results for numbers of all sizes, even subnormal, are within `ulp` of the exact step."""
    _assert_rule(trial, DECAYS, "extreme", ulp=None)


def is_exact_in_long_layers(trial: Trial) -> None:
    """Results for long layers, whose float32 sums are inexact, are within `ulp` of the exact step.

    All elements of w or of dcdw are equal. This is the worst case, because the rounding errors add
    up. The other array has one nonzero element, so that its norm is known.
    """
    dtype = trial.draw(st.sampled_from(list(trial.domain.dtypes)), "dtype")
    count = trial.draw(st.integers(40_000, 100_000), "elements")
    value = trial.draw(st.integers(129, 255), "128 times the number") / 128
    long_side = trial.draw(st.sampled_from(["w", "dcdw"]), "long side")
    many, one = np.full(count, value, np.float32), np.zeros(count, np.float32)
    one[0] = value
    w, dcdw = (many, one) if long_side == "w" else (one, many)
    arrays = [_in_library(x, dtype, trial.domain.library) for x in (w, dcdw)]
    new = at(trial({"a": arrays[0]}, {"a": arrays[1]}, 1.0), ("a",))
    norms = exact_norm(value, count), exact_norm(value)
    norms = norms if long_side == "w" else norms[::-1]
    parts = w[:2].tolist(), dcdw[:2].tolist()
    expected, scale = exact_step(*parts, 1.0, 0.0, trial.domain.trust_coefficient, norms)
    assert_close_ulp(new[:2], expected, trial.ulp(arrays[0]), scale, dtype=dtype)


def _in_library(x: Any, dtype: str, library: str) -> Any:
    bits = _arrays.bits_of_bfloat16(x) if _arrays.is_bfloat16(dtype) else x.astype(dtype)
    return _arrays.to_library(bits, dtype, library)


TREE_LAWS: tuple[Law, ...] = (
    keeps_the_structure,
    leaves_its_inputs_alone,
    matches_by_key,
    takes_each_layer_on_its_own,
    depends_on_its_arguments_alone,
    leaves_weights_without_a_gradient,
    is_the_same_in_place,
    stands_still_at_rate_zero,
)
"""The laws about trees and memory, which hold for every optimizer without a state."""

RULE_LAWS: tuple[Law, ...] = (
    does_not_see_the_scale_of_the_gradient,
    scales_with_the_weights,
    is_linear_in_the_rate,
    trains_zero_weights,
    stands_still_without_a_gradient,
    decays_plainly_without_a_gradient,
    follows_the_rule,
    decays_as_in_the_paper,
    is_exact,
    is_exact_over_the_whole_range,
    is_exact_in_long_layers,
)
"""The laws about the arithmetic of LARS."""

LAWS = TREE_LAWS + RULE_LAWS
"""All laws, in the order in which they are checked."""
