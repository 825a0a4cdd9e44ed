"""The reports of check_update_laws and check_optimizer_laws, and the arguments that they refuse."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import settings
from test_testing_laws import QUICK, broken, forgotten_decay, layer_by_layer, plain_sgd

from lars_tree import Container, Lars, OptionError, lars_update
from lars_tree._tree.structure import leaves
from lars_tree.testing import (
    LAWS,
    RULE_LAWS,
    TREE_LAWS,
    LawError,
    check_optimizer_laws,
    check_update_laws,
    laws,
)


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


def fails(w, dcdw, lr, **options):
    raise ValueError("no such layer")


HERE = __file__
LINE = fails.__code__.co_firstlineno


def test_the_report_shows_the_line_of_the_user():
    """The line that raised the error, or that of the definition if the result is wrong."""
    text = str(broken(fails, laws=[laws.keeps_the_structure]))
    assert f'\n  File "{HERE}", line {LINE + 1}, in fails\n' in text
    text = str(broken(partial(fails, x=1), laws=[laws.keeps_the_structure]))
    assert f'\n  File "{HERE}", line {LINE + 1}, in fails\n' in text

    def unchanged(w, dcdw, lr):
        return w

    def calls_numpy(w, dcdw, lr):
        return np.stack([])

    line = unchanged.__code__.co_firstlineno
    text = str(broken(unchanged, laws=[laws.returns_new_arrays]))
    assert f'File "{HERE}", line {line}, in unchanged\n' in text
    text = str(broken(calls_numpy, laws=[laws.keeps_the_structure]))
    assert f'File "{HERE}", line {line + 4}, in calls_numpy\n' in text

    class Callable:
        def __call__(self, w, dcdw, lr):
            return w

    text = str(broken(Callable(), laws=[laws.returns_new_arrays]))
    line = Callable.__call__.__code__.co_firstlineno - 1
    assert f'File "{HERE}", line {line}, in Callable\n' in text

    def modifies(w, dcdw, lr):
        for x in w.values():
            x += 1
        return w

    text = str(broken(modifies, laws=[laws.leaves_its_inputs_alone]))
    assert f'File "{HERE}", line {modifies.__code__.co_firstlineno}, in modifies\n' in text

    def own_law(trial):
        assert trial.pair() is None

    text = str(broken(lars_update, laws=[own_law]))
    assert f'File "{HERE}", line {own_law.__code__.co_firstlineno + 1}, in own_law\n' in text


def test_pytest_shows_no_lines_of_this_package(tmp_path):
    """The traceback ends at the user's call."""
    file = tmp_path / "test_user.py"
    file.write_text("""if 1:
        import numpy as np
        from lars_tree.testing import assert_close_ulp, assert_identical, check_update_laws, laws

        def test_update():
            check_update_laws(lambda w, g, lr: 0, laws=[laws.keeps_the_structure])

        def test_identical():
            assert_identical(1, 2)

        def test_close():
            assert_close_ulp(np.ones(1), np.zeros(1))
    """)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(file)]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "3 failed" in shown, shown
    assert "lars_tree/testing" not in shown
    for line in (6, 9, 12):
        assert f"test_user.py:{line}: " in shown


@pytest.mark.parametrize("values", [dict, Container])
def test_the_example_shows_values_in_every_node(values):
    def fails_for_arrays(w, dcdw, lr):
        assert not leaves(w)
        return w

    with pytest.raises(LawError) as caught:
        check_update_laws(
            fails_for_arrays,
            laws=[laws.stands_still_at_rate_zero],
            node_types=[values],
            dtypes=["float64"],
            settings=settings(derandomize=True, max_examples=40, print_blob=False),
        )
    shown = "{'a': array(0.125)}" if values is dict else "Container({'a': array(0.125)})"
    assert f"({shown}, {shown})" in " ".join(str(caught.value).split())


def make(bad):
    def law(trial):
        assert not bad

    return law


def test_laws_with_the_same_name_are_all_checked():
    for chosen in ([make(False), make(True)], [make(True), make(False)], [make(True)] * 2):
        error = broken(lars_update, laws=chosen)
        assert len(error.laws) == sum(law.__closure__[0].cell_contents for law in chosen)
    assert list(error.laws) == ["law", "law (2)"]
    check_update_laws(
        lars_update, laws=[make(True), laws.matches_by_key], exclude={"law": "no"}, settings=QUICK
    )


class OwnLaw:
    """A callable object."""

    def __init__(self, bad):
        self.bad = bad

    def __call__(self, trial):
        trial.pair()
        assert not self.bad


def test_any_callable_is_a_law():
    def good(trial, bad):
        """A law with an argument."""
        trial.pair()
        assert not bad

    for bad in (False, True):
        chosen = [
            lambda trial, bad=bad: OwnLaw(bad)(trial),
            partial(good, bad=bad),
            partial(partial(good), bad=bad),
            OwnLaw(bad),
            OwnLaw(bad).__call__,
        ]
        if bad:
            error = broken(lars_update, laws=chosen)
            assert list(error.laws) == ["<lambda>", "good", "good (2)", "OwnLaw", "__call__"]
            assert "good\n  A law with an argument.\n" in str(error)
            assert "OwnLaw\n  A callable object.\n" in str(error)
            assert {type(x) for x in error.laws.values()} == {AssertionError}
        else:
            check_update_laws(lars_update, laws=chosen, settings=QUICK)


def test_the_report_shows_the_class_of_an_optimizer():
    class Inherits(Lars):
        def update(self, w, dcdw, state):
            return w, state

    line = Inherits.update.__code__.co_firstlineno - 1
    for optimizer in (Inherits, partial(Inherits, trust_coefficient=1.0)):
        with pytest.raises(LawError) as caught:
            check_optimizer_laws(optimizer, laws=[laws.returns_new_arrays], settings=QUICK)
        assert f'File "{HERE}", line {line}, in Inherits\n' in str(caught.value)


def test_flat_dicts_are_suggested_if_every_law_is_broken():
    def flat(w, dcdw, lr, decay_lambda=0.0):
        return {key: lars_update(x, dcdw[key], lr) for key, x in w.items() if x.shape}

    few = [laws.keeps_the_structure, laws.matches_by_key]
    hint = "\n\nEvery law is broken. If the function takes only flat dicts, check it with nested="
    with pytest.raises(LawError) as caught:
        check_update_laws(flat, laws=few, settings=QUICK)
    assert hint in str(caught.value)
    assert hint not in str(broken(fails, laws=few))  # nested=False
    with pytest.raises(LawError) as caught:
        check_update_laws(flat, laws=[*few, make(False)], settings=QUICK)
    assert hint not in str(caught.value)


def test_laws_that_are_not_checked_may_be_excluded():
    """So that one `exclude` serves for several checks."""
    exclude = {"is_exact": "float32 sums", "pauses_without_a_gradient": "no None"}
    check_update_laws(lars_update, laws=TREE_LAWS[:1], exclude=exclude, settings=QUICK)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"library": "tensorflow"}, "library: expected one of 'numpy', 'torch', 'jax', got 'tens"),
        ({"dtypes": [np.int32]}, "dtypes: expected one of 'float64', .*, got 'int32'"),
        ({"dtypes": "float32"}, r"dtypes: expected a list of dtypes .*, got 'float32'"),
        ({"dtypes": []}, "dtypes: expected a list of dtypes"),
        ({"dtypes": ["float23"]}, r"got 'float23' \(did you mean 'float32'"),
        ({"laws": ["is_exact"]}, "laws: expected functions .*, got 'is_exact'"),
        ({"laws": "is_exact"}, "laws: expected a list of laws such as LAWS, got 'is_exact'"),
        ({"laws": laws.is_exact}, "laws: expected a list of laws"),
        ({"laws": []}, r"laws: expected a list of laws such as LAWS, got \[\]"),
        ({"laws": LAWS[:1], "exclude": {LAWS[0].__name__: "no"}}, "all laws are excluded"),
        ({"exclude": ["x"]}, r"exclude: expected the reasons by the names .*, got \['x'\]"),
        ({"exclude": "is_exact"}, "exclude: expected the reasons by the names"),
        ({"node_types": dict}, "node_types: expected a list of types such as"),
        ({"node_types": ["dict"]}, "node_types: expected types such as .*, got 'dict'"),
        ({"shapes": (2, 3)}, r"shapes: expected tuples such as \(2, 3\), got 2"),
        ({"shapes": []}, "shapes: expected a list of shapes"),
        ({"shapes": [(2, -1)]}, r"shapes: expected tuples such as \(2, 3\), got \(2, -1\)"),
    ],
)
def test_invalid_arguments_are_refused(arguments, text):
    for check in (check_update_laws, check_optimizer_laws):
        with pytest.raises(OptionError, match=text) as caught:
            check(lars_update, **arguments)
        assert caught.value.argument in arguments
        assert caught.value.paths == ()


def test_unknown_arguments_and_missing_libraries_are_refused(monkeypatch):
    for check in (check_update_laws, check_optimizer_laws):
        with pytest.raises(TypeError, match=r"unexpected .*argument 'dtype'"):
            check(lars_update, dtype="float32")
    for check, name in ((check_update_laws, "update"), (check_optimizer_laws, "optimizer")):
        with pytest.raises(OptionError, match=rf"^{name}: expected a function .*, got 3") as caught:
            check(3)
        assert caught.value.argument == name
    monkeypatch.setitem(sys.modules, "torch", None)  # as if torch were not installed
    with pytest.raises(ModuleNotFoundError, match="torch"):
        check_update_laws(lars_update, library="torch")


def test_shapes_can_be_chosen():
    seen = set()

    def update(w, dcdw, lr):
        seen.update(x.shape for x in w.values())
        return lars_update(w, dcdw, lr)

    chosen = [laws.matches_by_key, laws.is_exact_in_long_layers]
    check_update_laws(update, laws=chosen, shapes=[(2, 3), (1, 2)], nested=False, settings=QUICK)
    assert {shape for shape in seen if shape[1] < 4} == {(2, 3), (1, 2)}
    assert {shape[0] for shape in seen if shape[1] > 4} == {1}
