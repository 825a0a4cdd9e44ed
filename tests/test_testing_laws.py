"""check_update_laws: lars_update keeps all laws, and each deliberate mistake breaks its law."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from conftest import need
from hypothesis import Phase, settings

from lars_tree import Container, lars_update
from lars_tree.testing import (
    IN_PLACE_LAWS,
    LAWS,
    RULE_LAWS,
    TREE_LAWS,
    LawError,
    Trial,
    check_update_laws,
    laws,
)

QUICK = settings(max_examples=40, derandomize=True, phases=[Phase.generate])


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_lars_update_keeps_every_law(law, library):
    need(library)
    if library != "numpy":
        need("ml_dtypes")
    check_update_laws(lars_update, laws=[law], library=library)


# ---- Deliberate mistakes: updates of a flat dict in double that are correct except for one fault


def norm(x):
    return float(np.linalg.norm(x.astype(np.float64)))


def step(w, g, lr, decay, w_norm=None, g_norm=None):
    w_norm = norm(w) if w_norm is None else w_norm
    g_norm = norm(g) if g_norm is None else g_norm
    ratio = w_norm / (g_norm + decay * w_norm) if w_norm and g_norm else 1.0
    new = w.astype(np.float64) - lr * ratio * (g.astype(np.float64) + decay * w)
    return np.asarray(new).astype(w.dtype)


def layer_by_layer(step, in_place=None):
    """The update function that applies `step` to each layer; with `out`, it applies `in_place`."""

    def update(w, dcdw, lr, decay_lambda=0.0, out=None):
        fn = step if out is None or in_place is None else in_place
        given = {key: g for key, g in dcdw.items() if g is not None or fn in TAKE_NONE}
        new = {key: x.copy() for key, x in w.items()}
        new |= {key: fn(w[key], g, lr, decay_lambda) for key, g in given.items()}
        if out is None:
            return new
        for key, x in new.items():
            out[key][...] = x
        return out

    update.__name__ = (in_place or step).__name__
    return update


def forgotten_decay(w, g, lr, decay):
    return step(w, g, lr, 0.0)


def decay_in_the_step_alone(w, g, lr, decay):
    return step(w, g, lr, decay, g_norm=norm(g) - decay * norm(w))


def norm_of_the_sum(w, g, lr, decay):
    return step(w, g + w * w.dtype.type(decay), lr, 0.0)


def single_precision_sums(w, g, lr, decay):
    norms = [np.sqrt(np.cumsum(np.square(x, dtype=np.float32))[-1:].sum()) for x in (w, g)]
    return step(w, g, lr, decay, *map(float, norms))


def modified_gradient(w, g, lr, decay):
    new = step(w, g, lr, decay)
    g *= g.dtype.type(lr)
    return new


def modified_weights(w, g, lr, decay):
    w[...] = step(w, g, lr, decay)
    return w


def silent_eps(w, g, lr, decay):
    return step(w, g, lr, decay, g_norm=norm(g) + 1e-7)


def promoted_dtype(w, g, lr, decay):
    return step(w, g, lr, decay).astype(np.float64)


def frozen_zeros(w, g, lr, decay):
    return step(w, g, lr, decay) if norm(w) else w.copy()


def ratio_of_decay_alone(w, g, lr, decay):
    return step(w, g, lr, decay, g_norm=max(norm(g), 1e-300))


def plain_sgd(w, g, lr, decay):
    return np.asarray(w - lr * (g + decay * w)).astype(w.dtype)


def squared_rate(w, g, lr, decay):
    return step(w, g, 2 * lr * lr, decay)


def nan_of_no_gradient(w, g, lr, decay):
    with np.errstate(all="ignore"):
        ratio = np.float64(norm(w)) / (norm(g) + decay * norm(w)) if norm(w) else 1.0
        return np.asarray(w - lr * ratio * (g + decay * w)).astype(w.dtype)


def least_rate(w, g, lr, decay):
    return step(w, g, max(lr, 1e-3), decay)


def network_wide_norm(w, dcdw, lr, decay_lambda=0.0):
    norms = [np.sqrt(sum(norm(x) ** 2 for x in tree.values())) for tree in (w, dcdw)]
    return {key: step(w[key], dcdw[key], lr, decay_lambda, *norms) for key in w}


def matched_by_order(w, dcdw, lr, decay_lambda=0.0):
    rows = zip(w.items(), dcdw.values(), strict=True)
    return {key: step(x, g, lr, decay_lambda) for (key, x), g in rows}


def ratio_of_the_weights_before():
    last = {}

    def update(w, dcdw, lr, decay_lambda=0.0):
        norms = {key: (last.get(key), norm(x)) for key, x in w.items()}
        last.update({key: now for key, (_, now) in norms.items()})
        return {k: step(w[k], dcdw[k], lr, decay_lambda, norms[k][0]) for k in w}

    return update


def other_arrays_in_place(w, dcdw, lr, decay_lambda=0.0, out=None):
    new = {key: step(w[key], dcdw[key], lr, decay_lambda) for key in w}
    if out is None:
        return new
    out.update(new)
    return out


def sorted_keys(w, dcdw, lr, decay_lambda=0.0, out=None):
    new = layer_by_layer(step)(w, dcdw, lr, decay_lambda, out)
    return {key: new[key] for key in sorted(w)} if out is None else new


def gradient_modified_by_decay(w, g, lr, decay):
    new = step(w, g, lr, decay)
    if decay:
        g += g.dtype.type(decay) * w
    return new


def zeroed_gradient(w, g, lr, decay):
    new = step(w, g, lr, decay)
    g[...] = 0
    return new


def weights_themselves(w, g, lr, decay):
    return step(w, g, lr, decay) if lr and (decay or g.any()) else w


def weights_themselves_without_a_gradient(w, g, lr, decay):
    return w if g is None else step(w, g, lr, decay)


def fails_on_none(w, g, lr, decay):
    return step(w, g + 0, lr, decay)


def numbers_for_nan(w, g, lr, decay):
    return step(w, np.nan_to_num(g), lr, decay)


def float16_rate(w, g, lr, decay):
    return step(w, g, float(np.float16(lr)), decay)


def float16_decay(w, g, lr, decay):
    return step(w, g, lr, float(np.float16(decay)))


def decay_without_a_gradient(w, g, lr, decay):
    return step(w, np.zeros_like(w) if g is None else g, lr, decay)


TAKE_NONE = {decay_without_a_gradient, weights_themselves_without_a_gradient, fails_on_none}
MISTAKES = [
    (layer_by_layer(forgotten_decay), laws.decays_as_in_the_paper),
    (layer_by_layer(decay_in_the_step_alone), laws.decays_as_in_the_paper),
    (layer_by_layer(norm_of_the_sum), laws.decays_as_in_the_paper),
    (network_wide_norm, laws.takes_each_layer_on_its_own),
    (layer_by_layer(single_precision_sums), laws.is_exact_in_long_layers),
    (layer_by_layer(modified_gradient), laws.leaves_its_inputs_alone),
    (layer_by_layer(modified_weights), laws.leaves_its_inputs_alone),
    (layer_by_layer(gradient_modified_by_decay), laws.leaves_its_inputs_alone_with_decay),
    (layer_by_layer(weights_themselves), laws.returns_new_arrays),
    (
        layer_by_layer(weights_themselves_without_a_gradient),
        laws.returns_new_arrays_without_a_gradient,
    ),
    (layer_by_layer(numbers_for_nan), laws.shows_nonfinite_gradients),
    (layer_by_layer(float16_rate), laws.does_not_round_the_rate),
    (layer_by_layer(float16_decay), laws.does_not_round_the_decay),
    (layer_by_layer(step, forgotten_decay), laws.decays_in_place),
    (layer_by_layer(step, zeroed_gradient), laws.leaves_the_gradients_alone_in_place),
    (layer_by_layer(step, fails_on_none), laws.leaves_weights_without_a_gradient_in_place),
    (matched_by_order, laws.matches_by_key),
    (layer_by_layer(silent_eps), laws.does_not_see_the_scale_of_the_gradient),
    (layer_by_layer(promoted_dtype), laws.keeps_the_structure),
    (sorted_keys, laws.keeps_the_structure),
    (layer_by_layer(frozen_zeros), laws.trains_zero_weights),
    (ratio_of_the_weights_before(), laws.depends_on_its_arguments_alone),
    (layer_by_layer(plain_sgd), laws.scales_with_the_weights),
    (layer_by_layer(plain_sgd), laws.does_not_see_the_scale_of_the_gradient),
    (layer_by_layer(plain_sgd), laws.follows_the_rule),
    (layer_by_layer(squared_rate), laws.is_linear_in_the_rate),
    (layer_by_layer(nan_of_no_gradient), laws.stands_still_without_a_gradient),
    (layer_by_layer(ratio_of_decay_alone), laws.decays_plainly_without_a_gradient),
    (layer_by_layer(least_rate), laws.stands_still_at_rate_zero),
    (other_arrays_in_place, laws.is_the_same_in_place),
    (layer_by_layer(decay_without_a_gradient), laws.leaves_weights_without_a_gradient),
    (layer_by_layer(forgotten_decay), laws.is_exact),
    (layer_by_layer(single_precision_sums), laws.is_exact_over_the_whole_range),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("update", "law"), MISTAKES, ids=lambda x: getattr(x, "__name__", "update")
)
def test_a_mistake_breaks_its_law(update, law):
    with pytest.raises(LawError) as caught:
        check_update_laws(
            update, laws=[law], nested=False, dtypes=["float32", "float16"], settings=QUICK
        )
    assert list(caught.value.laws) == [law.__name__]
    assert isinstance(caught.value.laws[law.__name__], (AssertionError, TypeError))
    message = str(caught.value)
    assert message.startswith(f"{update.__name__} breaks a law\n\n{law.__name__}\n  ")
    assert inspect.getdoc(law).partition("\n")[0] in message
    assert "Draw 1 " in message


def test_there_is_a_mistake_for_every_law():
    assert {law.__name__ for _, law in MISTAKES} == {law.__name__ for law in LAWS}
    assert LAWS == TREE_LAWS + IN_PLACE_LAWS + RULE_LAWS


COMMON = {"nested": False, "dtypes": ["float32"], "settings": settings(QUICK, max_examples=15)}


def test_the_correct_update_breaks_no_law():
    check_update_laws(layer_by_layer(step), **COMMON)


ALONE = [
    (layer_by_layer(gradient_modified_by_decay, step), "leaves_its_inputs_alone_with_decay"),
    (layer_by_layer(weights_themselves), "returns_new_arrays"),
    (layer_by_layer(numbers_for_nan), "shows_nonfinite_gradients"),
    (layer_by_layer(float16_rate), "does_not_round_the_rate"),
    (layer_by_layer(float16_decay), "does_not_round_the_decay"),
    (layer_by_layer(step, forgotten_decay), "decays_in_place"),
    (layer_by_layer(step, zeroed_gradient), "leaves_the_gradients_alone_in_place"),
    (layer_by_layer(step, fails_on_none), "leaves_weights_without_a_gradient_in_place"),
    (
        layer_by_layer(weights_themselves_without_a_gradient),
        "returns_new_arrays_without_a_gradient",
    ),
    (layer_by_layer(promoted_dtype), "keeps_the_structure"),
    (sorted_keys, "keeps_the_structure"),
]


@pytest.mark.parametrize(("update", "name"), ALONE, ids=[name for _, name in ALONE])
def test_some_mistakes_break_only_one_law(update, name):
    """So the mistake breaks the law, not the rest of the function."""
    others = IN_PLACE_LAWS if name.endswith("in_place") else RULE_LAWS[:-3]
    with pytest.raises(LawError) as caught:
        check_update_laws(update, laws=TREE_LAWS + others, **COMMON)
    assert list(caught.value.laws) == [name]


def test_only_one_law_looks_at_the_order_of_keys_and_it_can_be_told_not_to():
    """As in JAX, whose dicts have sorted keys."""

    def update(w, dcdw, lr, decay_lambda=0.0):
        new = lars_update(w, dcdw, lr, decay_lambda=decay_lambda)
        return {key: new[key] for key in sorted(new)}

    chosen = TREE_LAWS + RULE_LAWS[:-3]
    check_update_laws(update, laws=chosen, key_order=False, **COMMON)
    with pytest.raises(LawError, match="expected the keys in the order") as caught:
        check_update_laws(update, laws=chosen, **COMMON)
    assert list(caught.value.laws) == ["keeps_the_structure"]


def test_no_law_but_one_looks_at_the_types_of_nodes():
    def update(w, dcdw, lr, **options):
        return Container(lars_update(w, dcdw, lr, **options)).to_dict()

    common = {"node_types": [Container, dict], "dtypes": ["float64"], "settings": QUICK}
    with pytest.raises(LawError) as caught:
        check_update_laws(update, laws=TREE_LAWS, **common)
    assert list(caught.value.laws) == ["keeps_the_structure"]


# ---- Arguments


def broken(update, **options):
    with pytest.raises(LawError) as caught:
        check_update_laws(update, nested=False, settings=QUICK, dtypes=["float32"], **options)
    return caught.value


def test_the_trust_coefficient_and_the_bound_can_be_chosen():
    def small(w, dcdw, lr, decay_lambda=0.0):
        return lars_update(w, dcdw, lr, decay_lambda=decay_lambda, trust_coefficient=0.25)

    chosen = [laws.follows_the_rule, laws.decays_as_in_the_paper, laws.is_exact]
    check_update_laws(small, laws=chosen, trust_coefficient=0.25, settings=QUICK)
    assert len(broken(small, laws=chosen).laws) == 3
    rough = layer_by_layer(single_precision_sums)
    long = [laws.is_exact_in_long_layers]
    check_update_laws(rough, laws=long, nested=False, dtypes=["float32"], ulp=1e5, settings=QUICK)
    assert broken(rough, laws=long, ulp=4)


def test_laws_for_the_joint_norm():
    def joint_update(w, dcdw, lr, **options):
        return lars_update(w, dcdw, lr, joint_norm=True, **options)

    check_update_laws(joint_update, laws=RULE_LAWS, joint_norm=True, settings=QUICK)
    chosen = [laws.decays_as_in_the_paper, laws.follows_the_rule]
    # Without decay both rules are the same.
    assert list(broken(joint_update, laws=chosen).laws) == ["decays_as_in_the_paper"]
    joint = layer_by_layer(norm_of_the_sum)
    check_update_laws(joint, laws=CLOSE, joint_norm=True, nested=False, settings=QUICK)
    assert list(broken(layer_by_layer(step), laws=CLOSE, joint_norm=True).laws)


CLOSE = [laws.decays_as_in_the_paper, laws.decays_plainly_without_a_gradient]


def test_a_users_own_law():
    def goes_downhill(trial: Trial):
        """No element moves in the direction of its gradient."""
        w, dcdw = trial.pair()
        new = trial(w, dcdw, 0.5)
        assert all(((x - new[key]) * dcdw[key] >= 0).all() for key, x in w.items())

    check_update_laws(lars_update, laws=[goes_downhill], nested=False, settings=QUICK)
    error = broken(lambda w, g, lr: {k: w[k] + g[k] for k in w}, laws=[goes_downhill])
    assert list(error.laws) == ["goes_downhill"]


def test_node_types_can_be_chosen():
    seen = set()

    def update(w, dcdw, lr):
        seen.add(type(w))
        return lars_update(w, dcdw, lr)

    check_update_laws(
        update, laws=[laws.matches_by_key], node_types=[Container, tuple], settings=QUICK
    )
    assert seen == {Container, tuple}
