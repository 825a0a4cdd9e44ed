"""Every option by path gives the same bits as a full tree; functions of (path, leaf)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
from conftest import need, to_library, to_numpy, unit_lars
from test_by_path import ONE, model
from test_laws import PREFIXED, build, rng_tree

from lars_tree import Array, Container, Lars, OptionError, _native, lars_update, report
from lars_tree._core.options import DEFAULTS, resolve
from lars_tree.schedules import Constant, Polynomial
from lars_tree.testing import assert_identical

# ---- The same bits as a full tree


def given_as(form, first, second):
    """An option that is `first` below "encoder" and `second` elsewhere, and the full tree."""
    full = Container(head=[second, second], encoder={"bias": first, "kernel": first})
    forms = {
        "patterns": {"enc*": first, "head/[01]": second},
        "node and default": {"*": second, "encoder": first},
        "inner patterns": {"encoder": {"k*": first, "*": first}, "head": second},
        "function": lambda path, leaf: first if path[0] == "encoder" else second,
    }
    return forms[form], full


FORMS = ["patterns", "node and default", "inner patterns", "function"]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PREFIXED)
def test_every_option_by_path_equals_the_full_tree(name, form, native, monkeypatch):
    if not native:
        monkeypatch.setattr(_native, "kernel", None)
    given, full = given_as(form, *PREFIXED[name])
    w, g = rng_tree(1), rng_tree(2) * 0.1
    for update in (lars_update, report.trust_ratios):

        def result(value, update=update):
            options = {"decay_lambda": 0.1, name: value}
            return update(w, g, options.pop("lr", 0.1), **options)

        assert_identical(result(given), result(full))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    sorted({*PREFIXED, "momentum", "nesterov"} - {"lr"}),
)
def test_every_option_of_Lars_by_path_equals_the_full_tree(name, form):
    values = PREFIXED | {"momentum": (0.5, 0.0), "nesterov": (True, False)}
    given, full = given_as(form, *values[name])
    w, g = rng_tree(1), rng_tree(2) * 0.1
    results = []
    for value in (given, full):
        opt = unit_lars(0.1, **({"decay_lambda": 0.1} | {name: value}))
        new, state = opt.update(w, g, opt.init(w))
        results.append([*opt.update(new, g, state)])
    assert_identical(*results)


@pytest.mark.parametrize("form", FORMS)
def test_every_library(form, library):
    given, full = given_as(form, True, False)
    w, g = (rng_tree(seed).map(lambda x: to_library(library.name, x)) for seed in (1, 2))
    new, expected = (lars_update(w, g, 0.1, adapt=value).map(to_numpy) for value in (given, full))
    assert_identical(new, expected)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_by_jax(form):
    jax = need("jax")
    given, full = given_as(form, True, False)
    w, g = (rng_tree(seed).map(jax.numpy.asarray) for seed in (1, 2))
    new, expected = (
        jax.jit(lambda w, g, v=value: lars_update(w, g, 0.1, adapt=v))(w, g)
        for value in (given, full)
    )
    assert_identical(new, expected)


@pytest.mark.parametrize("form", FORMS[:3])
def test_a_schedule_may_be_a_value_of_a_mapping(form):
    w, g = rng_tree(1), rng_tree(2)
    results = []
    for lr in given_as(form, Polynomial(1.0, 10), 0.5):
        opt = Lars(lr)
        new, state = opt.update(w, g, opt.init(w))
        results.append([*opt.update(new, g, state)])
    assert_identical(*results)


def test_axis_names_and_layer_axes_by_path():
    """None is a value of these options. The values of `axis_name` may be tuples."""
    w, g = rng_tree(1), rng_tree(2)
    expected = lars_update(w, g, 0.1, layer_axis={"encoder": 0, "head": None})
    for axis in ({"encoder": 0, "*": None}, lambda path, x: 0 if path[0] == "encoder" else None):
        assert_identical(lars_update(w, g, 0.1, layer_axis=axis), expected)
    with pytest.raises(OptionError) as refused:
        lars_update(w, g, 0.1, axis_name={"encoder": ("x", "y"), "head": None})
    for names in (
        {"encoder": ("x", "y"), "*": None},
        lambda path, leaf: ("x", "y") if path[0] == "encoder" else None,
    ):
        with pytest.raises(OptionError) as caught:
            lars_update(w, g, 0.1, axis_name=names)
        assert str(caught.value) == str(refused.value)


def test_rates_that_autograd_tracks_keep_their_graph_by_path():
    torch = need("torch")
    w = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([3.0, 4.0])}
    lr = torch.tensor(0.1, requires_grad=True)
    for stop in ({"a": False, "*": True}, lambda path, leaf: path != ("a",), {"*": False}):
        new = lars_update(w, w, {"*": lr}, stop_gradients=stop)
        assert new["a"].requires_grad
    assert not lars_update(w, w, {"*": lr}, stop_gradients={"*": True})["a"].requires_grad


class Computed(Mapping):
    """A mapping that computes floats at each reading, in memory that was freed just before."""

    last = 1.0

    def __getitem__(self, key):
        return self.last if key == "c" else 0.25 * (1 + "ab".index(key))

    def __iter__(self):
        spare = 0.5 * len(self)
        yield "a"
        del spare  # "b" is where "a" was at the last reading, and "a" where "b" was
        yield "b"
        yield "c"

    def __len__(self):
        return 3


class Small(Computed):
    def __getitem__(self, key):
        return np.float32(super().__getitem__(key))


@pytest.mark.parametrize("rates", [Computed(), Small()])
@pytest.mark.parametrize("native", [True, False])
def test_values_that_are_computed_at_each_reading(native, rates, monkeypatch):
    if not native:
        monkeypatch.setattr(_native, "kernel", None)
    w = {key: np.ones(1) for key in "abc"}
    new = lars_update(w, 1.0, rates, adapt=False)
    assert [x[0] for x in new.values()] == [0.75, 0.5, 0]
    rules = resolve(w, {**DEFAULTS, "lr": rates}, 3)
    assert repr([rule.lr_before_momentum for rule in rules]) == "[0.25, 0.5, 1.0]"


# ---- Functions


@pytest.mark.parametrize("name", ["lr", *DEFAULTS])
def test_a_function_gets_the_path_and_the_leaf_of_all_weights_once(name):
    w = model()
    w["wrapped"] = Array(ONE)
    seen, options = [], {"lr": 0.1, **DEFAULTS}
    options[name] = lambda path, leaf, value=options[name]: seen.append((path, leaf)) or value
    lars_update(w, 1.0, options.pop("lr"), **options)
    rows = [(p, x) for p, x in zip(w.paths(), w.leaves(), strict=True) if x is not None]
    assert [path for path, _ in seen] == [path for path, _ in rows]
    assert all(x is y for (_, x), (_, y) in zip(seen, rows, strict=True))


def test_leaves_with_equal_results_of_a_function_share_a_rule():
    """Rules are made once for all leaves with the same values, as with a tree of values."""
    w = rng_tree(1)
    rules = resolve(w, {**DEFAULTS, "lr": lambda path, leaf: 0.1 * len(path)}, 4)
    assert len({id(rule) for rule in rules}) == 1


def test_a_function_of_one_array_gets_an_empty_path():
    new = lars_update(ONE, 1.0, lambda path, leaf: 0.1 + len(path), adapt=False)
    assert new[0] == 2.9


@pytest.mark.parametrize("value", [-1, "fast", {"a": 1}, None])
def test_an_invalid_result_of_a_function_is_refused_with_its_path(value):
    w = model()
    before = w.leaves()[0].tobytes()
    with pytest.raises(OptionError) as caught:
        lars_update(w, 1.0, lambda path, leaf: 0.1 if path[-1] != "bias" else value, out=w)
    assert caught.value.argument == "lr"
    assert caught.value.paths == tuple(path for path in w.paths() if path[-1] == "bias")
    assert w.leaves()[0].tobytes() == before


def test_an_exception_in_a_function_gets_the_path_as_a_note():
    def fails(path, leaf):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        lars_update(model(), 1.0, 0.1, adapt=fails)
    assert caught.value.__notes__ == ["adapt at encoder/l0/kernel"]
    for adapt in (lambda path, leaf: path + 1, getattr):  # inspect knows no signature of getattr
        with pytest.raises(TypeError) as wrong:
            lars_update(ONE, 1.0, 0.1, adapt=adapt)
        assert wrong.value.__notes__ == ["adapt at w"]


def test_a_function_with_other_parameters_is_refused():
    with pytest.raises(
        OptionError, match=r"adapt: expected a function of \(path, leaf\), got a function"
    ):
        lars_update(model(), 1.0, 0.1, adapt=lambda path: True)
    with pytest.raises(OptionError, match="a schedule needs the number of the step") as caught:
        lars_update(model(), 1.0, Constant(0.1))
    assert caught.value.argument == "lr"


class HasAxes(NamedTuple):
    """A function that is a node too, as modules and `jax.tree_util.Partial` are."""

    ndim: int

    def __call__(self, path, leaf):
        return leaf.ndim >= self.ndim


class Rates(HasAxes):
    pass


class Warmup(NamedTuple):
    rate: float

    def __call__(self, step):
        return self.rate * step


def test_a_node_that_is_a_function():
    """It is a tree of values if it is a prefix of the weights."""
    w = {"kernel": np.full((1, 2), 3.0), "bias": np.full(2, 3.0)}
    expected = lars_update(w, 1.0, 0.1, adapt={"kernel": True, "bias": False})
    assert_identical(lars_update(w, 1.0, 0.1, adapt=HasAxes(2)), expected)
    opt, third = (Lars(0.1, adapt=HasAxes(ndim)) for ndim in (2, 3))
    expected, _ = Lars(0.1, adapt={"*/bias": False, "*": True}).update(w, w, opt.init(w))
    assert_identical(opt.update(w, w, opt.init(w))[0], expected)
    assert opt != third
    by_axis = [Lars(0.1, axis_name=HasAxes(ndim)) for ndim in (2, 3)]
    assert by_axis[0] != by_axis[1]
    tree = HasAxes(np.full(2, 3.0))
    new = lars_update(tree, 1.0, 0.1, decay_lambda=Rates(0.5))
    assert_identical(new, lars_update(tree, 1.0, 0.1, decay_lambda=0.5))
    with pytest.raises(OptionError, match="a schedule needs the number of the step"):
        lars_update(w, 1.0, Warmup(0.1))


def test_shapes_decide():
    """The usual recipe: vectors are neither adapted nor decayed."""
    w, g = build(np.ones), build(lambda shape: np.full(shape, 0.5))
    is_kernel = lambda path, x: x.ndim > 1  # noqa: E731
    full = w.map(lambda x: x.ndim > 1)
    expected = lars_update(w, g, 0.1, adapt=full, decay_lambda=0.1 * full)
    new = lars_update(w, g, 0.1, adapt=is_kernel, decay_lambda=lambda p, x: 0.1 * (x.ndim > 1))
    assert_identical(new, expected)
