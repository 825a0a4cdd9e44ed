"""Options of `Lars` for one update; equality and hash by value; hints for wrong keywords."""

from __future__ import annotations

import copy
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars
from test_optimizer import random_tree

import lars_tree as lt
from lars_tree import Array, Container, OptionError, lars_update, report
from lars_tree.schedules import Constant, Cosine, Polynomial
from lars_tree.testing import assert_identical

W, G = np.array([3.0, 4.0]), np.array([0.4, 0.3])

# ---- Options for one update

OVERRIDES = {
    "lr": (0.1, 0.3),
    "lr, a schedule": (0.1, lambda step: 0.25 + step),
    "lr instead of a schedule": (Polynomial(1.0, 10), 0.1),
    "lr, a mapping": (0.1, {"*/bias": 0.2, "*": Constant(0.5)}),
    "momentum": (0.9, 0.5),
    "momentum, none": (0.9, {"*": 0}),
    "nesterov": (False, True),
    "weight_decay": (0, {"a": 0.1, "*": 0.0}),
    "trust_coefficient": (1.0, 0.5),
    "eps": (0.0, 1.0),
    "adapt": (True, lambda path, leaf: leaf.ndim > 1),
    "trust_clip": (False, True),
    "joint_norm": (False, True),
    "grad_scale": (1.0, 8.0),
    "nonfinite": ("propagate", "skip"),
    "layer_axis": (None, 0),
    "stop_gradients": (True, False),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", OVERRIDES)
def test_an_option_for_one_update_is_used_in_this_update_only(case, in_place):
    name = case.partition(",")[0].partition(" ")[0]
    usual, other = OVERRIDES[case]
    common = {"lr": 0.1, "weight_decay": 0.1, "nesterov": True}
    opt, changed = (lt.Lars(**{**common, name: value}) for value in (usual, other))
    w, gs = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    results = []
    for second in (lambda *x, **out: opt.update(*x, **out, **{name: other}), changed.update):
        new, state = copy.deepcopy(w), opt.init(w)
        for update, g in zip((opt.update, second, opt.update), gs, strict=True):
            new, state = update(new, g, state, out=new if in_place else None)
        results.append((new, state))
    assert_identical(*results)


def test_a_traced_loss_scale_does_not_compile_again():
    jax = need("jax")
    opt = Lars(0.1)
    w, g = (random_tree(seed).map(jax.numpy.asarray) for seed in (0, 1))
    traces = []

    @jax.jit
    def step(w, g, state, scale):
        traces.append(scale)
        return opt.update(w, g, state, grad_scale=scale)

    for scale in (1.0, 1024.0, 65536.0):
        new, _ = step(w, scale * g, opt.init(w), scale)
        expected, _ = opt.update(w, g, opt.init(w))
        for x, y in zip(new.leaves(), expected.leaves(), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
    assert len(traces) == 1


def test_an_override_keeps_the_layout_of_the_state():
    opt = Lars(0.1, momentum=0)
    state = opt.init(W)
    with pytest.raises(OptionError, match=r"expected 0, .* has no velocity, got 0\.9") as caught:
        opt.update(W, G, state, momentum=0.9)
    assert (caught.value.argument, caught.value.paths) == ("momentum", ((),))
    expected, _ = opt.update(W, G, state)
    assert_identical(opt.update(W, G, state, momentum=0.0)[0], expected)
    opt = Lars(0.1)
    state = opt.init(W)
    expected = opt.update(W, G, state, momentum={"*": 0.0})
    assert_identical([*opt.update(W, G, state, momentum=0)], [*expected])
    np.testing.assert_allclose(expected[1].velocity, W - expected[0], rtol=1e-14)


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        ({"grad_scale": 0}, OptionError, "grad_scale: expected a finite number > 0, got 0"),
        ({"lr": lambda step: -1}, OptionError, "lr: expected a finite number >= 0, got -1"),
        ({"lr": {"b": 1}}, lt.StructureError, "lr: missing 'a'\n  for all other leaves, add"),
        ({"decay_lambda": 0.1}, TypeError, r"Lars.update\(\) .* \(it is 'weight_decay' here\)"),
        ({"grad_scal": 2.0}, TypeError, r"\(did you mean 'grad_scale'\?\)"),
        ({"w": 2.0}, TypeError, "w"),
    ],
)
def test_an_invalid_override_is_refused_before_anything_is_written(overrides, kind, text):
    w, g = random_tree(0), random_tree(1)
    opt = Lars(0.1)
    state = opt.init(w)
    before = copy.deepcopy((w, state))
    with pytest.raises(kind, match=text):
        opt.update(w, g, state, out=w, **overrides)
    assert_identical((w, state), before)


# ---- Equality and hash


def named(path, leaf):
    return path[-1] != "bias"


def scheduled(step):
    return 0.1 * step


class Counting:
    def rate(self, step):
        return 0.1


COUNTING = Counting()

# Functions that make equal optimizers, each time from new objects.
EQUAL = {
    "a number": lambda: [lt.Lars(0.5), lt.Lars(np.float32(0.5)), lt.Lars(Fraction(1, 2))],
    "the defaults": lambda: [lt.Lars(1), lt.Lars(1.0, 0.9, False, eps=1e-8, nonfinite="propagate")],
    "0-d arrays": lambda: [lt.Lars(np.array(0.5)), lt.Lars(Array(np.array(0.5))), lt.Lars(0.5)],
    "arrays": lambda: [lt.Lars(np.array([0.1, 0.2])), lt.Lars(np.array([0.1, 0.2]))],
    "schedules": lambda: [lt.Lars(Cosine(1.0, 10, 2)), lt.Lars(Cosine(1.0, 10, 2))],
    "functions": lambda: [lt.Lars(scheduled, adapt=named), lt.Lars(scheduled, adapt=named)],
    "methods": lambda: [lt.Lars(COUNTING.rate), lt.Lars(COUNTING.rate)],
    "trees": lambda: [
        lt.Lars({"a": [0.1, Constant(0.2)], "b": 0.3}, adapt={"*/bias": False, "*": True}),
        lt.Lars(Container(b=0.3, a=(0.1, Constant(0.2))), adapt={"*": True, "*/bias": False}),
    ],
    "axes": lambda: [lt.Lars(1, axis_name=("x", "y")), lt.Lars(1, axis_name=("y", "x"))],
}
OTHERS = [
    lt.Lars(0.25),
    lt.Lars(0.5, 0.0),
    lt.Lars(0.5, np.float32(0)),  # has a velocity
    lt.Lars(0.5, layer_axis=0),
    lt.Lars(0.5, layer_axis=1),
    lt.Lars(0.5, axis_name="x"),
    lt.Lars(0.5, axis_name=["x", "y"]),
    lt.Lars(np.array([0.1, 0.3])),
    lt.Lars(np.array([[0.1, 0.2]])),
    lt.Lars(Cosine(1.0, 10)),
    lt.Lars(Polynomial(1.0, 10, 2)),
    lt.Lars(lambda step: 0.1 * step, adapt=named),
    lt.Lars(Counting().rate),
    lt.Lars({"a": [0.1, Constant(0.2)], "b": 0.3}),
    lt.Lars({"a": [0.1, Constant(0.1)], "b": 0.3}, adapt={"*/bias": False, "*": True}),
]


@pytest.mark.parametrize("case", EQUAL)
def test_optimizers_with_equal_options_are_equal(case):
    first, *others = EQUAL[case]()
    for other in others:
        assert first == other
        assert hash(first) == hash(other)
    assert not [x for x in OTHERS if x == first]
    assert first != "Lars" and first != None  # noqa: E711, PT018


def test_optimizers_with_other_options_differ():
    assert len(set(OTHERS)) == len(OTHERS)
    assert [(x, y) for x in OTHERS for y in OTHERS if x == y and x is not y] == []


def test_a_subclass_is_not_equal():
    class Other(lt.Lars):
        pass

    assert Other(0.1) != lt.Lars(0.1)
    assert Other(0.1) == Other(0.1)


def test_rates_that_are_tracked_or_traced_are_compared_by_identity():
    torch, jax = need("torch"), need("jax")
    rate = torch.tensor(0.1, requires_grad=True)
    assert lt.Lars(rate) == lt.Lars(rate)
    assert hash(lt.Lars(rate)) == hash(lt.Lars(rate))
    assert lt.Lars(rate) != lt.Lars(torch.tensor(0.1, requires_grad=True))
    assert lt.Lars(torch.tensor(0.1)) == lt.Lars(torch.tensor(0.1))

    def compared(x):
        assert lt.Lars(x) == lt.Lars(x)
        assert lt.Lars(x) != lt.Lars(x + 0)
        return hash(lt.Lars(x)) * 0

    jax.jit(compared)(0.1)


def test_a_callable_that_is_not_hashable_can_be_compared():
    class Rate:
        __hash__ = None

        def __call__(self, step):
            return 0.1

        def __eq__(self, other):
            return isinstance(other, Rate)

    assert lt.Lars(Rate()) == lt.Lars(Rate())
    with pytest.raises(TypeError, match="unhashable type: 'Rate'"):
        hash(lt.Lars(Rate()))


def test_a_node_that_is_a_schedule_and_not_hashable_is_compared_by_identity():
    class Rates(dict):
        def __call__(self, step):
            return self["a"]

    rates = Rates(a=0.1)
    assert lt.Lars(rates) == lt.Lars(rates)
    assert hash(lt.Lars(rates)) == hash(lt.Lars(rates))
    assert lt.Lars(rates) != lt.Lars(Rates(a=0.1))


def test_schedules_of_two_classes_with_equal_fields_differ():
    """Namedtuples of two classes are equal, but these two are schedules with other rates."""

    class Up(NamedTuple):
        rate: float

        def __call__(self, step):
            return self.rate * step

    class Down(Up):
        def __call__(self, step):
            return self.rate / (1 + step)

    assert Up(0.1) == Down(0.1)
    assert lt.Lars(Up(0.1)) != lt.Lars(Down(0.1))
    assert lt.Lars(Up(0.1)) == lt.Lars(Up(0.1))
    assert hash(lt.Lars(Up(0.1))) == hash(lt.Lars(Up(0.1)))


def test_an_exception_in_a_schedule_says_what_it_was_called_as():
    opt = lt.Lars({"a": lambda path, leaf: 0.1})
    with pytest.raises(TypeError, match="missing 1 required positional") as caught:
        opt.update({"a": W}, {"a": G}, opt.init({"a": W}))
    assert caught.value.__notes__ == ["lr was called as a schedule, a function of the step"]


@pytest.mark.parametrize(
    "case", [case for case in EQUAL if case not in ("axes", "arrays", "trees")]
)
def test_jax_does_not_trace_equal_optimizers_again(case):
    jax = need("jax")
    traces = []

    @partial(jax.jit, static_argnums=0)
    def step(opt, w, g, state):
        traces.append(opt)
        return opt.update(w, g, state)

    w, g = (random_tree(seed).map(jax.numpy.asarray) for seed in (0, 1))
    for opt in EQUAL[case]():
        step(opt, w, g, opt.init(w))
    assert len(traces) == 1
    other = lt.Lars(0.125)
    step(other, w, g, other.init(w))
    assert len(traces) == 2


# ---- Hints


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: lars_update(W, G, lr=0.1),
            r"lars_update\(\) takes 'lr' only by position: lars_update\(w, dcdw, lr\)",
        ),
        (lambda: lars_update(w=W, dcdw=G, lr=0.1), r"takes 'w' only by position"),
        (lambda: lars_update(W, G, 0.1, weight_decay=0.1), r"\(it is 'decay_lambda' here\)"),
        (lambda: lars_update(W, G, 0.1, trust_coeff=0.1), r"\(it is 'trust_coefficient' here\)"),
        (lambda: lars_update(W, G, 0.1, eta=0.1), r"\(it is 'trust_coefficient' here\)"),
        (lambda: lars_update(W, G, 0.1, always_adapt=True), r"\(it is 'adapt' here\)"),
        (lambda: lars_update(W, G, 0.1, momentum=0.9), "option of the optimizers, such as Lars"),
        (
            lambda: Container(a=W).lars_update(G, lr=0.1),
            r"Container.lars_update\(\) takes 'lr' only by position: lars_update\(dcdw, lr\)",
        ),
        (
            lambda: Array(W).lars_update(G, 0.1, trust_coeff=0.1),
            r"Array.lars_update\(\) .* \(it is 'trust_coefficient' here\)",
        ),
        (lambda: Container(a=W).lars_update(G, 0.1, trustclip=0.1), "did you mean 'trust_clip'"),
        (
            lambda: report.trust_ratios(W, G, lr=0.1),
            r"trust_ratios\(\) takes 'lr' only by position",
        ),
        (lambda: report.layer_table(W, G, 0.1, weight_decay=1), r"layer_table\(\).*decay_lambda"),
        (lambda: lt.Lars(0.1, trust_coeff=0.1), r"Lars\(\) .* \(it is 'trust_coefficient' here\)"),
        (lambda: lt.Lars(0.1, decay_lambda=0.1), r"Lars\(\) .* \(it is 'weight_decay' here\)"),
    ],
)
def test_a_wrong_keyword_gives_a_hint(call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(("shape", "where"), [((), ""), ((1,), " in every element")])
def test_each_element_of_an_array_of_rates_is_checked(shape, where):
    with pytest.raises(OptionError, match=f"lr: expected a finite number >= 0{where}, got"):
        lars_update(W, G, np.full(shape, -1.0))


@pytest.mark.parametrize("call", [lars_update, report.trust_ratios, report.layer_table])
@pytest.mark.parametrize("make", [lambda: 1.0, lambda: "w", object, lambda: print])
def test_weights_that_are_not_a_tree_are_refused_without_a_gradient_too(call, make):
    x = make()
    with pytest.raises(lt.LeafError, match="w: expected an array, got a"):
        call(x, None, 0.1)
    with pytest.raises(lt.LeafError, match="b: expected an array, got a"):
        call([{"b": x}], None, 0.1)
    kept = [W.copy(), {"b": x}]
    if call is lars_update:
        assert lars_update(kept, [G, None], 0.1)[1]["b"] is x
        assert lars_update(kept, [G, None], 0.1, out=kept)[1]["b"] is x


@pytest.mark.parametrize("where", ["root", "dict", "part"])
def test_a_torch_module_is_refused_with_a_hint(where):
    model = need("torch").nn.Linear(2, 2)
    w = {"root": model, "dict": {"net": model}, "part": {"net": model, "a": W.copy()}}[where]
    g = {"net": None, "a": G} if where == "part" else None
    for call in (
        lambda: lars_update(w, g, 0.1),
        lambda: lars_update(w, g, 0.1, out=w),
        lambda: report.trust_ratios(w, g, 0.1),
        lambda: Lars(0.1).init(w),
    ):
        text = r"(w|net): expected an array, got a Linear: give dict\(model.named_parameters\(\)\)"
        with pytest.raises(lt.LeafError, match=text) as caught:
            call()
        assert caught.value.argument == "w"
    if where == "part":
        assert w["a"].tolist() == W.tolist()
    parameters = dict(model.named_parameters())
    assert lars_update(parameters, None, 0.1).keys() == {"weight", "bias"}
