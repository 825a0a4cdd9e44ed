"""check_update_laws: lars_update keeps all laws, and each deliberate mistake breaks its law."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
from conftest import need
from hypothesis import Phase, settings

from lars_tree import Container, lars_update
from lars_tree.testing import LAWS, RULE_LAWS, TREE_LAWS, LawError, Trial, check_update_laws, laws

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


def layer_by_layer(step):
    """The update function that applies `step` to each layer."""

    def update(w, dcdw, lr, decay_lambda=0.0, out=None):
        new = {key: step(w[key], dcdw[key], lr, decay_lambda) for key in w}
        if out is None:
            return new
        for key, x in new.items():
            out[key][...] = x
        return out

    update.__name__ = step.__name__
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


def sorted_keys(w, dcdw, lr, decay_lambda=0.0):
    return {key: step(w[key], dcdw[key], lr, decay_lambda) for key in sorted(w)}


def decay_without_a_gradient(w, g, lr, decay):
    return step(w, np.zeros_like(w) if g is None else g, lr, decay)


MISTAKES = [
    (layer_by_layer(forgotten_decay), laws.decays_as_in_the_paper),
    (layer_by_layer(decay_in_the_step_alone), laws.decays_as_in_the_paper),
    (layer_by_layer(norm_of_the_sum), laws.decays_as_in_the_paper),
    (network_wide_norm, laws.takes_each_layer_on_its_own),
    (layer_by_layer(single_precision_sums), laws.is_exact_in_long_layers),
    (layer_by_layer(modified_gradient), laws.leaves_its_inputs_alone),
    (layer_by_layer(modified_weights), laws.leaves_its_inputs_alone),
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
    assert isinstance(caught.value.laws[law.__name__], AssertionError)
    message = str(caught.value)
    assert message.startswith(f"{update.__name__} breaks a law\n\n{law.__name__}\n  ")
    assert inspect.getdoc(law).partition("\n")[0] in message
    assert "Draw 1 " in message


def test_there_is_a_mistake_for_every_law():
    assert {law.__name__ for _, law in MISTAKES} == {law.__name__ for law in LAWS}
    assert LAWS == TREE_LAWS + RULE_LAWS


NONE = {"leaves_weights_without_a_gradient": "it does not support None"}
IN_PLACE = {"is_the_same_in_place": "it has no out"}


def test_the_correct_update_breaks_no_law_and_some_mistakes_only_one():
    """So the mistake breaks the law, not the rest of the function."""
    quick = settings(QUICK, max_examples=15)
    common = {"nested": False, "dtypes": ["float32"], "settings": quick}
    with np.errstate(all="ignore"):
        check_update_laws(layer_by_layer(step), exclude=NONE, **common)
        for update, name in [
            (layer_by_layer(modified_gradient), "leaves_its_inputs_alone"),
            (layer_by_layer(promoted_dtype), "keeps_the_structure"),
            (matched_by_order, "matches_by_key"),
        ]:
            chosen = [law for law in LAWS if not law.__name__.startswith("is_exact")]
            with pytest.raises(LawError) as caught:
                check_update_laws(update, laws=chosen, exclude=NONE | IN_PLACE, **common)
            assert list(caught.value.laws) == [name]


# ---- Reports and arguments


def broken(update, **options):
    with pytest.raises(LawError) as caught:
        check_update_laws(update, nested=False, settings=QUICK, dtypes=["float32"], **options)
    return caught.value


def test_all_broken_laws_are_reported():
    error = broken(layer_by_layer(plain_sgd), laws=RULE_LAWS)
    assert {"scales_with_the_weights", "follows_the_rule"} < set(error.laws)
    assert {"is_linear_in_the_rate", "trains_zero_weights"} & set(error.laws) == set()
    assert str(error).startswith(f"plain_sgd breaks {len(error.laws)} laws\n\n")
    assert all(f"\n\n{name}\n  " in str(error) for name in error.laws)


def test_the_reported_example_is_the_simplest():
    once = settings(derandomize=True, max_examples=40)
    with pytest.raises(LawError) as caught:
        check_update_laws(
            layer_by_layer(forgotten_decay),
            laws=[laws.decays_as_in_the_paper],
            nested=False,
            dtypes=["float64"],
            settings=once,
        )
    assert "({'a': array(0.125)}" in str(caught.value)
    assert "a: 1 of 1 element is too far off: 0.1875, expected 0.14583333333333334" in str(
        caught.value
    )


def test_any_error_of_the_update_breaks_the_law():
    def fails(w, dcdw, lr):
        raise KeyError("no such layer")

    error = broken(fails, laws=[laws.keeps_the_structure])
    assert "KeyError: 'no such layer'" in str(error)
    assert isinstance(error.laws["keeps_the_structure"], KeyError)


def test_excluded_laws_need_a_name_and_a_reason():
    check_update_laws(
        layer_by_layer(plain_sgd),
        laws=[laws.follows_the_rule, laws.trains_zero_weights],
        exclude={"follows_the_rule": "it does not adapt"},
        nested=False,
        settings=QUICK,
    )
    with pytest.raises(ValueError, match=r"'follow_the_rule' \(did you mean 'follows_the_rule'\?"):
        check_update_laws(lars_update, exclude={"follow_the_rule": "typing error"})
    with pytest.raises(ValueError, match="follows_the_rule: expected the reason, got ''"):
        check_update_laws(lars_update, exclude={"follows_the_rule": ""})


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"library": "tensorflow"}, ValueError, "library: expected one of 'numpy', 'torch', 'jax'"),
        ({"dtypes": [np.int32]}, ValueError, "dtypes: expected one of 'float64', .*, got 'int32'"),
        ({"laws": ["is_exact"]}, ValueError, "laws: expected functions .*, got 'is_exact'"),
        ({"library": "torch"}, ModuleNotFoundError, "torch"),
    ],
)
def test_invalid_arguments_are_refused(arguments, kind, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if torch were not installed
    with pytest.raises(kind, match=text):
        check_update_laws(lars_update, **arguments)


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
