"""The laws about the arithmetic of LARS. A law is a function of a `Trial`, see `laws.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lars_tree.testing import _arrays
from lars_tree.testing.assertions import assert_close_ulp
from lars_tree.testing.exact import exact_norm
from lars_tree.testing.tree_laws import DECAYS, FORMULA_ULP, Law, same, times
from lars_tree.testing.trial import Trial, as_numbers, at, mapped

RATES = st.sampled_from([0.5, 0.125])
# Not exact in any binary format, and large enough that their rounding errors change the weights.
LONG_NUMBERS = st.integers(1, 29).filter(lambda n: n % 15).map(lambda n: n / 15)


def does_not_see_the_scale_of_the_gradient(trial: Trial) -> None:
    """Scaling the gradient by a power of two gives the same step, to the last bit.

    ratio * g does not change. Not checked with `eps`, which has a scale.
    """
    if trial.domain.rule.eps:
        return
    w, dcdw = trial.pair()
    factor = trial.power("power of two")
    same(trial(w, times(factor, dcdw), 0.5), trial(w, dcdw, 0.5))


def scales_with_the_weights(trial: Trial) -> None:
    """Scaling the weights by a power of two scales the step equally, to the last bit."""
    w, dcdw = trial.pair()
    factor = trial.power("power of two")
    new = trial(times(factor, w), dcdw, 0.5)
    same(new, times(factor, trial(w, dcdw, 0.5)))


def is_linear_in_the_rate(trial: Trial) -> None:
    """Four times the rate gives four times the step."""
    w, dcdw = trial.pair()
    rate = trial.draw(RATES, "lr")
    _assert_linear(trial, w, dcdw, rate, 4 * rate)


def does_not_round_the_rate(trial: Trial) -> None:
    """The rate has the precision of the weights: it is not rounded to a shorter format."""
    w, dcdw = trial.pair()
    _assert_linear(trial, w, dcdw, 0.5, trial.draw(LONG_NUMBERS, "lr"))


def _assert_linear(trial: Trial, w: Any, dcdw: Any, rate: float, other: float) -> None:
    """Assert that the steps of two rates are proportional to the rates."""
    first, second = trial(w, dcdw, rate), trial(w, dcdw, other)
    old, new = as_numbers(w), as_numbers(first)
    steps = mapped(lambda x, y: other / rate * (x - y), old, new)
    expected = mapped(lambda x, u: x - u, old, steps)
    scale = mapped(lambda x, u: np.maximum(abs(x), abs(u)), old, steps)
    trial.assert_close(second, w, expected, scale, 2 * FORMULA_ULP)


def does_not_round_the_decay(trial: Trial) -> None:
    """The weight decay has the precision of the weights: it is not rounded to a shorter format."""
    w, dcdw = trial.pair()
    decay = trial.draw(LONG_NUMBERS, "decay_lambda")
    new = trial(w, dcdw, 0.5, decay_lambda=decay)
    trial.assert_rule(new, w, dcdw, 0.5, decay, FORMULA_ULP)


def trains_zero_weights(trial: Trial) -> None:
    """The ratio of zero weights is 1, so that a layer that starts at zero trains."""
    w, dcdw = trial.pair()
    zeros = times(0, w)
    trial.assert_rule(trial(zeros, dcdw, 0.5), zeros, dcdw, 0.5, 0.0, FORMULA_ULP)


def stands_still_without_a_gradient(trial: Trial) -> None:
    """With a zero gradient and no decay, weights stay unchanged: 0 / 0 does not give NaN."""
    w, dcdw = trial.pair()
    assert_close_ulp(trial(w, times(0, dcdw), 0.5), w, 0)


def decays_plainly_without_a_gradient(trial: Trial) -> None:
    """The ratio of a zero gradient is 1: the step is lr * decay * w, not lr * trust * w.

    With `joint_norm` the ratio is |w| / |decay * w|.
    """
    w, dcdw = trial.pair()
    zeros = times(0, dcdw)
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
    axes = len(trial.draw(trial.domain.shapes, "a shape with as many axes"))
    count = trial.draw(st.integers(40_000, 100_000), "elements")
    value = trial.draw(st.integers(129, 255), "128 times the number") / 128
    long_side = trial.draw(st.sampled_from(["w", "dcdw"]), "long side")
    many, one = np.full(count, value, np.float32), np.zeros(count, np.float32)
    one[0] = value
    w, dcdw = (many, one) if long_side == "w" else (one, many)
    shape = (*[1] * (axes - 1), count)
    arrays = [_in_library(x.reshape(shape), dtype, trial.domain.library) for x in (w, dcdw)]
    new = at(trial({"a": arrays[0]}, {"a": arrays[1]}, 1.0), ("a",))
    norms = exact_norm(value, count), exact_norm(value)
    norms = norms if long_side == "w" else norms[::-1]
    parts = w[:2].tolist(), dcdw[:2].tolist()
    expected, scale = trial.domain.rule.step(*parts, 1.0, 0.0, norms)
    first = new.reshape(-1)[:2]
    assert_close_ulp(first, expected, trial.ulp(arrays[0]), scale, dtype=dtype)


def _in_library(x: Any, dtype: str, library: str) -> Any:
    bits = _arrays.bits_of_bfloat16(x) if _arrays.is_bfloat16(dtype) else x.astype(dtype)
    return _arrays.to_library(bits, dtype, library)


RULE_LAWS: tuple[Law, ...] = (
    does_not_see_the_scale_of_the_gradient,
    scales_with_the_weights,
    is_linear_in_the_rate,
    does_not_round_the_rate,
    does_not_round_the_decay,
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
