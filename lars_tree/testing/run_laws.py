"""The laws of an optimizer over several steps. See `laws.py`.

`STATE_LAWS` are about trees, memory and the state, and apply to every optimizer. `MOMENTUM_LAWS`
are about the momentum of LARS.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lars_tree._tree import structure
from lars_tree.testing import _arrays
from lars_tree.testing.exact import ExactRun
from lars_tree.testing.rule_laws import RATES
from lars_tree.testing.tree_laws import (
    DECAYS,
    FORMULA_ULP,
    Law,
    is_like,
    same,
    same_alone,
    times,
    unmodified,
)
from lars_tree.testing.trees import shuffled
from lars_tree.testing.trial import Trial, as_numbers, mapped, matched, numbers


def keeps_the_structure_in_a_run(trial: Trial) -> None:
    """After every step, weights have the node types, key order, dtypes and shapes of the first."""
    w, gradients = trial.steps()
    run = trial.run(w)
    for dcdw in gradients:
        is_like(run.step(dcdw), w, trial.domain.key_order)


def leaves_its_inputs_alone_in_a_run(trial: Trial) -> None:
    """A step modifies neither weights nor gradients, also not those of earlier steps."""
    w, gradients = trial.steps()
    run = trial.run(w)
    weights = [run.w]
    for dcdw in gradients:
        with unmodified(w=weights, dcdw=gradients):
            new = run.step(dcdw, copy=False)
        weights.append(new)


def keeps_no_inputs(trial: Trial) -> None:
    """Arrays that a step got may be overwritten afterwards: the state does not refer to them.

    Not checked for JAX, whose arrays are immutable.
    """
    if trial.domain.library == "jax":
        return
    w, gradients = trial.steps()
    undisturbed, run = trial.run(w), trial.run(w)
    for dcdw in gradients:
        old, g = run.w, _arrays.copied(dcdw)
        new = run.step(g, copy=False)
        same(new, undisturbed.step(dcdw))
        run.w = _arrays.copied(new)  # `new` may share memory with `old`: that breaks other laws
        for x in structure.leaves([old, g]):
            _arrays.overwrite(x)


def matches_by_key_in_a_run(trial: Trial) -> None:
    """Gradients and state are matched to weights by key, whatever the order of the keys."""
    w, gradients = trial.steps()
    others = [trial.draw(shuffled(dcdw), "dcdw in another order") for dcdw in gradients]
    one, other = trial.run(w), trial.run(w)
    for dcdw, reordered in zip(gradients, others, strict=True):
        same(other.step(reordered), one.step(dcdw))


def takes_each_layer_on_its_own_in_a_run(trial: Trial) -> None:
    """Every layer moves as if it were alone: its state does not depend on other layers."""
    w, gradients = trial.steps()
    _assert_same_alone(trial, w, gradients)


def pauses_without_a_gradient(trial: Trial) -> None:
    """A step with a gradient of None changes neither these weights nor their momentum.

    The later steps are those of a run without this step.
    """
    w, gradients = trial.steps(missing=True)
    _assert_same_alone(trial, w, gradients)


def _assert_same_alone(trial: Trial, w: Any, gradients: list[Any]) -> None:
    """Assert that a run ends as one run for each leaf, without the steps in which it has None."""
    whole = trial.run(w)
    for dcdw in gradients:
        whole.step(dcdw)

    def alone(x: Any, *steps: Any) -> Any:
        run = trial.run({"layer": x})
        for g in steps:
            if g is not None:
                run.step({"layer": g})
        return run.w["layer"]

    same_alone(trial, w, whole.w, mapped(alone, w, *gradients))


def keeps_runs_apart(trial: Trial) -> None:
    """A run does not depend on the steps of other runs in between."""
    w, gradients = trial.steps()
    alone, one, other = trial.run(w), trial.run(w), trial.run(times(4, w))
    expected = [alone.step(dcdw) for dcdw in gradients]
    for dcdw, new in zip(gradients, expected, strict=True):
        other.step(times(2, dcdw))
        same(one.step(dcdw), new)


def resumes_from_a_saved_state(trial: Trial) -> None:
    """A run that is saved, and resumed with a new optimizer, gives the same bits as without.

    Uses the methods `save(state)` and `load(w, saved)` of the optimizer if it has them, and pickle
    if not.
    """
    w, gradients = trial.steps()
    stop = trial.draw(st.integers(1, len(gradients) - 1), "steps before the restart")
    whole, parts = trial.run(w), trial.run(w)
    for i, dcdw in enumerate(gradients):
        if i == stop:
            parts.resume()
        same(parts.step(dcdw), whole.step(dcdw))


def starts_without_momentum(trial: Trial) -> None:
    """The velocity starts at zero: the first step does not depend on the momentum."""
    w, (dcdw, *_) = trial.steps()
    same(trial.run(w, momentum=0.75).step(dcdw), trial.run(w, momentum=0.0).step(dcdw))


def rolls_on_by_its_momentum(trial: Trial) -> None:
    """With zero gradients and no decay, each step is the one before, times the momentum."""
    w, (dcdw, *_) = trial.steps()
    _assert_rolls_on(trial, w, dcdw, 0.5, 1.0)


def changes_its_rate_by_the_convention(trial: Trial) -> None:
    """A new rate scales the steps as the convention says.

    Of the paper, where v = momentum * v + lr * d: the velocity keeps the rates of its steps. Of
    torch, where v = momentum * v + d and the step is lr * v: the new rate scales all of v.
    """
    w, (dcdw, *_) = trial.steps()
    rate = trial.draw(st.sampled_from([0.25, 1.0]), "second rate")
    torch = trial.domain.convention == "torch"
    _assert_rolls_on(trial, w, dcdw, rate, rate / 0.5 if torch else 1.0)


def _assert_rolls_on(trial: Trial, w: Any, dcdw: Any, rate: float, factor: float) -> None:
    """Assert that a step with a zero gradient is the first step, times momentum * factor."""
    run = trial.run(w, momentum=0.75)
    first, second = run.step(dcdw), run.step(times(0, dcdw), rate)
    old, new = as_numbers(w), as_numbers(first)
    steps = mapped(lambda x, y: 0.75 * factor * (x - y), old, new)
    expected = mapped(lambda x, u: x - u, new, steps)
    scale = mapped(lambda x, y, u: np.maximum(abs(x), abs(y) + abs(u)), old, new, steps)
    trial.assert_close(second, w, expected, scale, 2 * FORMULA_ULP)


def follows_the_rule_in_a_run(trial: Trial) -> None:
    """With v = momentum * v + lr * d, each step is v; d is the step of the rule for a rate of 1.

    By the convention of torch, v = momentum * v + d, and each step is lr * v.
    """
    _assert_run(trial)


def follows_the_rule_with_nesterov(trial: Trial) -> None:
    """With Nesterov momentum, each step is lr * d + momentum * v, or lr * (d + momentum * v)."""
    _assert_run(trial, nesterov=True)


def _assert_run(trial: Trial, **options: bool) -> None:
    domain = trial.domain
    w, gradients = trial.steps()
    rates = [trial.draw(RATES, f"lr of step {i}") for i in range(len(gradients))]
    decay = trial.draw(DECAYS, "weight_decay")
    run = trial.run(w, momentum=0.75, weight_decay=decay, **options)
    exact = mapped(lambda _: ExactRun(domain.rule, 0.75, domain.convention, **options), w)
    for dcdw, lr in zip(gradients, rates, strict=True):
        old, new = run.w, run.step(dcdw, lr)
        columns = (matched(w, tree) for tree in (old, dcdw, exact, new))
        for (path, x), before, g, layer, after in zip(structure.walk(w), *columns, strict=True):
            expected, scale = layer.step(numbers(before), numbers(g), lr, decay)
            trial.assert_leaf_close(path, x, after, expected, scale, 2 * FORMULA_ULP)


STATE_LAWS: tuple[Law, ...] = (
    keeps_the_structure_in_a_run,
    leaves_its_inputs_alone_in_a_run,
    keeps_no_inputs,
    matches_by_key_in_a_run,
    takes_each_layer_on_its_own_in_a_run,
    pauses_without_a_gradient,
    keeps_runs_apart,
    resumes_from_a_saved_state,
)
"""The laws about the state, which apply to every optimizer."""

MOMENTUM_LAWS: tuple[Law, ...] = (
    starts_without_momentum,
    rolls_on_by_its_momentum,
    changes_its_rate_by_the_convention,
    follows_the_rule_in_a_run,
    follows_the_rule_with_nesterov,
)
"""The laws about the momentum of LARS."""
