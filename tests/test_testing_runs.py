"""check_optimizer_laws: our optimizers keep all laws, and each mistake breaks its law."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from conftest import need
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lars_tree.testing as testing
from lars_tree import Lars
from lars_tree._tree import structure
from lars_tree.testing import (
    MOMENTUM_LAWS,
    OPTIMIZER_LAWS,
    RULE_LAWS,
    STATE_LAWS,
    TREE_LAWS,
    LawError,
    Trial,
    check_optimizer_laws,
    for_torch,
    laws,
)

QUICK = settings(max_examples=40, derandomize=True, phases=[Phase.generate])
FEW = settings(max_examples=15, derandomize=True, phases=[Phase.generate])
PLAIN = {"trust_coefficient": 1.0, "eps": 0.0}


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("law", STATE_LAWS + MOMENTUM_LAWS, ids=lambda law: law.__name__)
def test_Lars_keeps_every_law(law, library):
    need(library)
    check_optimizer_laws(partial(Lars, **PLAIN), laws=[law], library=library, settings=FEW)


@pytest.mark.parametrize("law", STATE_LAWS + MOMENTUM_LAWS, ids=lambda law: law.__name__)
def test_the_torch_optimizer_keeps_every_law(law):
    need("torch")
    from lars_tree.torch import Lars

    check_optimizer_laws(for_torch(Lars, **PLAIN), laws=[law], settings=FEW)


@pytest.mark.parametrize("name", ["Lars", "torch.Lars"])
def test_the_first_step_of_our_optimizers_keeps_the_laws_of_an_update(name):
    optimizer = Lars
    if name == "torch.Lars":
        need("torch")
        from lars_tree.torch import Lars as TorchLars

        optimizer = for_torch(TorchLars)
    options = {"trust_coefficient": 0.001, "eps": 1e-8, "settings": FEW}  # the defaults
    check_optimizer_laws(optimizer, laws=TREE_LAWS + RULE_LAWS, **options)


@pytest.mark.parametrize("options", [{"joint_norm": True}, {"eps": 0.5, "joint_norm": True}])
def test_laws_for_the_options(options):
    chosen = [laws.follows_the_rule, laws.decays_as_in_the_paper, laws.follows_the_rule_in_a_run]
    given = {"trust_coefficient": 0.5, "eps": 0.0, **options}
    common = {"laws": chosen, "dtypes": ["float64"], "settings": FEW}
    check_optimizer_laws(partial(Lars, **given), **common, **given)
    with pytest.raises(LawError) as caught:
        check_optimizer_laws(partial(Lars, **given), **common, **{**given, "eps": 0.25})
    assert list(caught.value.laws) == [law.__name__ for law in chosen]


# ---- Deliberate mistakes: an optimizer of flat dicts that is correct except for one fault


class Correct:
    """LARS with the momentum of the paper."""

    def __init__(self, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.decay = weight_decay

    def init(self, w):
        return {key: np.zeros(x.shape) for key, x in w.items()}

    def update(self, w, dcdw, state):
        state = self.remembered(state)
        new, velocity = dict(w), dict(state)
        for key, x in w.items():
            if dcdw[key] is not None:
                velocity[key], step = self.step(x, dcdw[key], state[key])
                new[key] = np.asarray(x.astype(np.float64) - step).astype(x.dtype)
            else:
                new[key] = x.copy()
        return new, velocity

    def remembered(self, state):
        return state

    def u(self, x, g):
        x, g = x.astype(np.float64), g.astype(np.float64)
        norms = np.linalg.norm(x), np.linalg.norm(g)
        ratio = norms[0] / (norms[1] + self.decay * norms[0]) if all(norms) else 1.0
        return self.lr * ratio * (g + self.decay * x)

    def step(self, x, g, v):
        u = self.u(x, g)
        v = self.momentum * v + u
        return v, u + self.momentum * v if self.nesterov else v


class PromotedDtype(Correct):
    def update(self, w, dcdw, state):
        new, velocity = super().update(w, dcdw, state)
        moving = any(v.any() for v in state.values())
        return {key: x + velocity[key] * 0 if moving else x for key, x in new.items()}, velocity


class ModifiedGradients(Correct):
    def step(self, x, g, v):
        new, step = super().step(x, g, v)
        if v.any():
            g += v.astype(g.dtype)
        return new, step


class MatchedByOrder(Correct):
    def init(self, w):
        return [np.zeros(x.shape) for x in w.values()]

    def update(self, w, dcdw, state):
        new, velocity = super().update(w, dcdw, dict(zip(dcdw, state, strict=True)))
        return new, list(velocity.values())


class KeptArguments(Correct):
    """The velocity is computed anew from the arguments of all steps."""

    def init(self, w):
        return {key: [] for key in w}

    def step(self, x, g, past):
        v = 0.0
        for arguments in [*past, (x, g)]:
            v, step = super().step(*arguments, v)
        return [*past, (x, g)], step


class NetworkWideMomentum(Correct):
    def update(self, w, dcdw, state):
        self.share = 1 / max(sum(bool(v.any()) for v in state.values()), 1)
        return super().update(w, dcdw, state)

    def step(self, x, g, v):
        return super().step(x, g, self.share * v)


class MovesOnWithoutAGradient(Correct):
    def update(self, w, dcdw, state):
        zeros = {key: np.zeros_like(w[key]) if g is None else g for key, g in dcdw.items()}
        return super().update(w, zeros, state)


class OneStateForAllRuns(Correct):
    last: ClassVar = {}

    def update(self, w, dcdw, state):
        new, velocity = super().update(w, dcdw, state)
        self.last.update(velocity)
        return new, velocity

    def remembered(self, state):
        return {key: self.last.get(key, v) if v.any() else v for key, v in state.items()}


class StateInTheOptimizer(Correct):
    velocity = None

    def update(self, w, dcdw, state):
        new, self.velocity = super().update(w, dcdw, self.velocity or state)
        return new, {}

    def remembered(self, state):
        return state or {"a": 0.0}


class DampenedFirstStep(Correct):
    def step(self, x, g, v):
        if v.any():
            return super().step(x, g, v)
        return ((1 - self.momentum) * self.u(x, g),) * 2


class SquaredMomentum(Correct):
    def step(self, x, g, v):
        return super().step(x, g, self.momentum * v)


class RateOfTheVelocity(Correct):
    """The convention of torch."""

    def step(self, x, g, v):
        u = self.u(x, g) / self.lr if self.lr else self.u(x, g)
        v = self.momentum * v + u
        return v, self.lr * (u + self.momentum * v if self.nesterov else v)


class DecayOfTheVelocity(Correct):
    def step(self, x, g, v):
        return super().step(x, g, v * (1 - self.decay))


class NoNesterov(Correct):
    def step(self, x, g, v):
        v = self.momentum * v + self.u(x, g)
        return v, v


MISTAKES = [
    (PromotedDtype, laws.keeps_the_structure_in_a_run),
    (ModifiedGradients, laws.leaves_its_inputs_alone_in_a_run),
    (KeptArguments, laws.keeps_no_inputs),
    (MatchedByOrder, laws.matches_by_key_in_a_run),
    (NetworkWideMomentum, laws.takes_each_layer_on_its_own_in_a_run),
    (MovesOnWithoutAGradient, laws.pauses_without_a_gradient),
    (OneStateForAllRuns, laws.keeps_runs_apart),
    (StateInTheOptimizer, laws.resumes_from_a_saved_state),
    (DampenedFirstStep, laws.starts_without_momentum),
    (SquaredMomentum, laws.rolls_on_by_its_momentum),
    (RateOfTheVelocity, laws.changes_its_rate_by_the_convention),
    (DecayOfTheVelocity, laws.follows_the_rule_in_a_run),
    (NoNesterov, laws.follows_the_rule_with_nesterov),
]


@pytest.mark.parametrize(("optimizer", "law"), MISTAKES, ids=lambda x: x.__name__)
def test_a_mistake_breaks_its_law(optimizer, law):
    check_optimizer_laws(Correct, laws=[law], nested=False, dtypes=["float32"], settings=QUICK)
    with pytest.raises(LawError) as caught:
        check_optimizer_laws(
            optimizer, laws=[law], nested=False, dtypes=["float32"], settings=QUICK
        )
    assert list(caught.value.laws) == [law.__name__]
    assert "Draw 1 (w, [dcdw, ...]): ({'" in str(caught.value)


def test_there_is_a_mistake_for_every_law():
    assert [law for _, law in MISTAKES] == [*STATE_LAWS, *MOMENTUM_LAWS]
    assert OPTIMIZER_LAWS == TREE_LAWS + RULE_LAWS + STATE_LAWS + MOMENTUM_LAWS


@pytest.mark.parametrize("optimizer", [ModifiedGradients, MovesOnWithoutAGradient, NoNesterov])
def test_some_mistakes_break_no_other_law(optimizer):
    """So the mistake breaks the law, not the rest of the optimizer."""
    chosen = STATE_LAWS + MOMENTUM_LAWS
    common = {"nested": False, "dtypes": ["float32"], "settings": FEW}
    check_optimizer_laws(Correct, laws=chosen, **common)
    with pytest.raises(LawError) as caught:
        check_optimizer_laws(optimizer, laws=chosen, **common)
    assert list(caught.value.laws) == [dict(MISTAKES)[optimizer].__name__]


# ---- Adapters


class OverwrittenGradient(Correct):
    """The gradient of the step before is the working memory."""

    def init(self, w):
        return {key: (v, None) for key, v in super().init(w).items()}

    def update(self, w, dcdw, state):
        new, velocity = super().update(w, dcdw, {key: v for key, (v, _) in state.items()})
        for _, last in state.values():
            if last is not None:
                last[...] = 0
        return new, {key: (v, dcdw[key]) for key, v in velocity.items()}


class TwoBuffers(Correct):
    """The third step overwrites the weights that the first returned."""

    def init(self, w):
        return super().init(w), [{key: x.copy() for key, x in w.items()} for _ in range(2)]

    def update(self, w, dcdw, state):
        new, velocity = super().update(w, dcdw, state[0])
        first, second = state[1]
        for key, x in new.items():
            first[key][...] = x
        return dict(first), (velocity, [second, first])


@pytest.mark.parametrize("optimizer", [OverwrittenGradient, TwoBuffers])
def test_arrays_of_all_earlier_steps_stay_as_they_are(optimizer):
    law = laws.leaves_its_inputs_alone_in_a_run
    with pytest.raises(LawError, match="was modified\n") as caught:
        check_optimizer_laws(
            optimizer, laws=[law], nested=False, dtypes=["float32"], settings=QUICK
        )
    assert list(caught.value.laws) == [law.__name__]


def test_the_conventions_of_the_rate():
    common = {"nested": False, "dtypes": ["float32"], "laws": MOMENTUM_LAWS, "settings": QUICK}
    check_optimizer_laws(RateOfTheVelocity, convention="torch", **common)
    with pytest.raises(LawError) as caught:
        check_optimizer_laws(Correct, convention="torch", **common)
    assert "changes_its_rate_by_the_convention" in caught.value.laws
    with pytest.raises(ValueError, match="convention: expected one of 'paper', 'torch'"):
        check_optimizer_laws(Correct, convention="sgd", **common)


def test_a_law_of_the_user_for_runs():
    def slows_down(trial: Trial):
        """Without gradients the steps become smaller."""
        w, (dcdw, *_) = trial.steps()
        run = trial.run(w, momentum=0.5)
        first = run.step(dcdw)
        second = run.step({key: 0 * g for key, g in dcdw.items()})
        for key, x in w.items():
            assert np.linalg.norm(first[key] - second[key]) <= 0.6 * np.linalg.norm(x - first[key])

    common = {"laws": [slows_down], "nested": False, "dtypes": ["float64"], "settings": QUICK}
    check_optimizer_laws(Correct, **common)
    with pytest.raises(LawError, match="slows_down"):
        check_optimizer_laws(DoubledMomentum, **common)


class DoubledMomentum(Correct):
    def step(self, x, g, v):
        return super().step(x, g, 2 * v)


# ---- The strategy of runs


@given(testing.runs(missing=True))
def test_gradients_of_a_run_have_the_structure_of_the_weights(run):
    w, gradients = run
    assert 1 <= len(gradients) <= 3
    for dcdw in gradients:
        leaves = structure.broadcast("dcdw", w, dcdw, exact=True)
        for x, g in zip(structure.leaves(w), leaves, strict=True):
            assert g is None or (g.shape, g.dtype) == (x.shape, x.dtype)


def test_runs_of_each_kind_are_made():
    from test_testing import example, made

    leaf = lambda leaves: leaves  # noqa: E731
    runs = testing.runs(missing=True, steps=2, trees=leaf)
    gaps = lambda run: [g is None for g in run[1]]  # noqa: E731
    for wanted in ([False, True], [True, False], [True, True]):
        assert gaps(example(runs, lambda run, wanted=wanted: gaps(run) == wanted)) == wanted
    assert not made(testing.runs(trees=leaf), lambda run: any(gaps(run)))
    scalars = testing.runs(lambda n: testing.layers("float32", (), gradients=n), steps=st.just(3))
    w, gradients = example(scalars, lambda run: not isinstance(run[0], dict | list | tuple))
    assert [g.dtype for g in gradients] == [w.dtype] * 3
