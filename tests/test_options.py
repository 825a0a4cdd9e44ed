"""How the values of options are converted, and the errors for invalid values and unknown names.

`tests/reliability/options.py` tries many more values, in every place where an option is accepted.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need

from lars_tree import Array, OptionError, StructureError
from lars_tree._core.options import DEFAULTS, check_names, resolve, with_hints

W = {"a": np.array([3.0, 4.0]), "b": None}
NUMBER = "a finite number >= 0"
MASKED = "a masked array: LARS has no missing elements; fill them first"
AXIS_NAME = "the name of a mesh axis, a tuple of names, or None"
# Each way to give a value, with its path in the option.
WAYS = [
    (lambda x: x, ""),
    (lambda x: {"a": x, "b": None}, "a"),
    (lambda x: {"a*": x}, "a*"),
    (lambda x: lambda path, leaf: x, "a"),
]


def resolved(name, given, **options):
    """The value of a field of the rule of the first leaf."""
    rules = resolve(W, {**DEFAULTS, "lr": 0.5, **options, name: given}, 2)
    return getattr(rules[0], "lr_before_momentum" if name == "lr" else name)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("lr", x, 0.25) for x in (0.25, np.float32(0.25), np.array(0.25), Array(np.array(0.25)))),
        *(("lr", x, 0.0) for x in (0, -0.0, np.array(0))),
        ("lr", np.array([0, 1]), np.array([0.0, 1.0])),
        *((name, 1, 1.0) for name in ("decay_lambda", "trust_coefficient", "eps", "grad_scale")),
        ("grad_scale", np.array(5e-324), 5e-324),
        *(("adapt", x, False) for x in (False, np.False_)),
        ("stop_gradients", False, False),
        ("nonfinite", np.str_("skip"), "skip"),
        ("layer_axis", np.int8(-1), -1),
        ("layer_axis", None, None),
        ("axis_name", None, None),
        ("axis_name", "x", frozenset({"x"})),
        ("axis_name", ("x", ()), frozenset(("x", ()))),
        ("axis_name", (), frozenset({()})),
    ],
)
def test_values_are_converted(name, value, expected):
    for given, _ in WAYS:
        assert repr(resolved(name, given(value))) == repr(expected)


@pytest.mark.parametrize(
    ("name", "value", "expected", "found"),
    [
        *(("lr", x, NUMBER, repr(x)) for x in (-1, "fast", True, np.nan, np.array(-1.0))),
        ("lr", np.array([1.0, -1.0]), f"{NUMBER} in every element", "array([ 1., -1.])"),
        ("lr", np.array([True, False]), NUMBER, "array([ True, False])"),
        ("lr", np.ma.ones(2), NUMBER, MASKED),
        *((name, np.ones(2), "a number", "array([1., 1.])") for name in ("decay_lambda", "eps")),
        *(("grad_scale", x, "a finite number > 0", repr(x)) for x in (0, np.array(0.0))),
        ("nonfinite", "skipp", "'propagate', 'raise' or 'skip' (did you mean 'skip'?)", "'skipp'"),
        ("nonfinite", 1, "'propagate', 'raise' or 'skip'", "1"),
        *(("layer_axis", x, "an axis or None", repr(x)) for x in (True, np.True_, 0.5, "0")),
        *(("axis_name", x, AXIS_NAME, repr(x)) for x in (0, {"x"}, ("x", None), ("x", ("y",)))),
        ("adapt", 1, "True or False", "1"),
        ("adapt", "x" * 58, "True or False", repr("x" * 58)),
        ("adapt", "x" * 59, "True or False", "a str"),
        ("adapt", np.ones((2, 2)), "True or False", "an array of shape (2, 2)"),
    ],
)
def test_invalid_values_are_refused_with_their_path(name, value, expected, found):
    for given, path in WAYS:
        with pytest.raises(OptionError) as caught:
            resolved(name, given(value))
        line = f"  {path or name}: expected {expected}, got {found}"
        assert str(caught.value) == f"{name} has an invalid value\n{line}"
        assert caught.value.argument == name


@pytest.mark.parametrize("name", ["lr", *DEFAULTS])
def test_none_is_a_value_for_arrays_only_if_it_is_the_default(name):
    for given, _ in WAYS[1:]:
        if DEFAULTS.get(name, 0.5) is None:
            assert resolved(name, given(None)) is None
            continue
        with pytest.raises(OptionError) as caught:
            resolved(name, given(None))
        line = "  a: expected a value, got None"
        assert str(caught.value) == f"{name} has an invalid value\n{line}"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["x"], "a list of 1 item"),
        ([("x", "y")] * 3, "a list of 3 items"),
        ({0: "x"}, "a dict with keys 0"),
    ],
)
def test_trees_of_axis_names_are_shown_as_they_were_given(given, found):
    with pytest.raises(StructureError) as caught:
        resolve([W["a"], W["a"]], {**DEFAULTS, "lr": 0.5, "axis_name": given}, 2)
    line = f"expected a list of 2 items, got {found}"
    assert str(caught.value) == f"axis_name does not match w\n  axis_name: {line}"


@pytest.mark.parametrize("name", ["lr", "grad_scale"])
def test_rates_keep_their_graph_where_gradients_are_not_stopped(name):
    rate = need("torch").tensor(0.5, requires_grad=True)
    for given, _ in WAYS:
        for stop, _ in WAYS:
            assert resolved(name, given(rate), stop_gradients=stop(False)) is rate
            assert type(resolved(name, given(rate), stop_gradients=stop(True))) is float


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -0.1), ("lr", np.nan), ("eps", -1.0), ("grad_scale", 0.0)]
)
def test_rates_that_keep_their_graph_are_checked(name, value):
    rate = need("torch").tensor(value, requires_grad=True)
    for given, _ in WAYS:
        for stop in (True, False):
            with pytest.raises(OptionError, match=f"^{name} has an invalid value\n"):
                resolved(name, given(rate), stop_gradients=stop)


def decorated():
    """A function and a method that give hints; made in the test, not when it is imported."""

    @with_hints
    def step(w, lr, /, dcdw=None, *, eps=0.0, **options):
        return w, lr, dcdw, eps, options

    class Model:
        @with_hints
        def step(self, w, /, eps=0.0):
            return type(self).__name__, w, eps

    return step, Model().step


def test_functions_with_hints_take_their_arguments():
    function, method = decorated()
    assert function(1, 2) == (1, 2, None, 0.0, {})
    every = {**DEFAULTS, "dcdw": 3, "eps": 4}
    assert function(1, 2, **every) == (1, 2, 3, 4, {k: DEFAULTS[k] for k in DEFAULTS if k != "eps"})
    assert method(1, eps=2) == ("Model", 1, 2)
    assert function.__name__ == "step"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, m: f(1, lr=2), "step() takes 'lr' only by position: step(w, lr)"),
        (lambda f, m: f(1, lr=2, x=3), "step() takes 'lr' only by position: step(w, lr)"),
        (lambda f, m: m(w=1), "Model.step() takes 'w' only by position: step(w)"),
        (lambda f, m: f(1, 2, z=3), "step() got an unexpected keyword argument 'z'"),
        (
            lambda f, m: m(1, epss=3),
            "Model.step() got an unexpected keyword argument 'epss' (did you mean 'eps'?)",
        ),
        (
            lambda f, m: m(1, adapt=True),
            "Model.step() got an unexpected keyword argument 'adapt'"
            " (it is an option of the optimizers, such as Lars)",
        ),
    ],
)
def test_functions_with_hints_name_a_wrong_keyword(call, message):
    with pytest.raises(TypeError) as caught:
        call(*decorated())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("weight_decay", {"decay_lambda"}, " (it is 'decay_lambda' here)"),
        ("decay_lambda", {"weight_decay"}, " (it is 'weight_decay' here)"),
        ("eta", {"trust_coefficient"}, " (it is 'trust_coefficient' here)"),
        ("trust_coeff", {"trust_coefficient"}, " (it is 'trust_coefficient' here)"),
        ("always_adapt", {"adapt"}, " (it is 'adapt' here)"),
        ("eta", {"lr"}, ""),
        ("nesterov", {"adapt"}, " (it is an option of the optimizers, such as Lars)"),
        ("nesterov", {"momentum"}, ""),
        ("nesterow", {"nesterov", "momentum"}, " (did you mean 'nesterov'?)"),
        ("momenta", {"nesterov"}, ""),
    ],
)
def test_hints_for_unknown_names(name, known, hint):
    with pytest.raises(TypeError) as caught:
        check_names({name: 1}, known, function="f()")
    assert str(caught.value) == f"f() got an unexpected keyword argument {name!r}{hint}"
    check_names(dict.fromkeys(known), known, function="f()")
