"""The checks of arrays: they read each array once, and messages use the words of the caller."""

from __future__ import annotations

import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from inspect import signature

import numpy as np
import pytest
from conftest import need

from lars_tree import LarsTreeError, NonFiniteError, _backends, lars_update
from lars_tree._backends.base import Leaf, Sharding, StepResult
from lars_tree._core import checks, nonfinite
from lars_tree._core.operands import with_operands
from lars_tree._core.options import DEFAULTS
from lars_tree._core.values import finite_number
from lars_tree._numerics.formula import Rule
from lars_tree.errors import WORDS, Words


def ones(*shape, dtype=np.float32):
    return np.ones(shape or (2, 3), dtype)


def read_only():
    x = ones()
    x.flags.writeable = False
    return x


def leaf(index=0, w=None, *, out=None, velocity=None, **options):
    w = ones() if w is None else w
    dcdw = options.pop("dcdw", ones())
    rule = Rule(options.pop("lr", 0.1), **options)
    return Leaf(index, w, dcdw, out, rule, _backends.find(w), velocity)


def paths():
    return [("a", i) for i in range(9)]


def test_the_defaults_of_the_signature_are_those_of_the_rule():
    parameters = signature(lars_update).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        *((2, 2.0), (0.5, 0.5), (-0.0, 0.0), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25)),
        *((np.float32(2), 2.0), (np.int8(3), 3.0), (True, None), (np.True_, None)),
        *((-1, None), (-1e-300, None), (np.inf, None), (np.nan, None), (10**400, None)),
        *((1j, None), ("1", None), (None, None), (np.ones(()), None)),
        *((np.timedelta64(1, "s"), None), (Decimal("sNaN"), None)),
    ],
    ids=repr,
)
def test_finite_numbers(x, expected):
    assert repr(finite_number(x)) == repr(expected)


def test_each_array_is_read_once(monkeypatch):
    """The arrays are weights, gradients, results, velocities, and options that leaves share."""
    backend, counts = _backends.find(ones()), Counter()
    for name in ("facts", "fault", "out_fault", "memory", "varying"):
        real = getattr(type(backend), name)

        def counting(self, x, name=name, real=real):
            counts[name, id(x)] += 1
            return real(self, x)

        monkeypatch.setattr(type(backend), name, counting)
    shared, rate = ones(), ones(3)
    leaves = [leaf(i, dcdw=shared, out=ones(), velocity=ones(), lr=rate) for i in range(3)]
    leaves += [leaf(3, w, out=w, velocity=ones()) for w in [ones(2, 6)[:, ::2]]]
    rows = checks.check(leaves, paths, same_shapes=True)
    assert [row.leaf for row in rows] == leaves
    assert counts["facts", id(shared)] == counts["facts", id(rate)] == 1
    assert set(counts.values()) == {1}


def tracked():
    torch = need("torch")
    w = torch.ones(2, 3, requires_grad=True)
    return [leaf(w=w, dcdw=torch.ones(2, 3), out=torch.zeros(2, 3), stop_gradients=False)]


big = ones(4, 6)
tied = ones()
FAULTS = {
    "no array": lambda: [leaf(dcdw="x")],
    "masked": lambda: [leaf(dcdw=np.ma.ones((2, 3)))],
    "masked weights": lambda: [leaf(w=np.ma.ones((2, 3)), dcdw=None)],
    "integers": lambda: [leaf(w=ones(dtype=int))],
    "integer gradient": lambda: [leaf(dcdw=ones(dtype=int))],
    "complex": lambda: [leaf(dcdw=ones(dtype=np.complex64))],
    "shape": lambda: [leaf(), leaf(1, dcdw=ones(4)), leaf(2, dcdw=ones(5))],
    "another shape": lambda: [leaf(dcdw=ones(1, 3))],
    "decay": lambda: [leaf(decay_lambda=ones(4))],
    "axis": lambda: [leaf(layer_axis=2)],
    "mesh axes": lambda: [leaf(axis_name=frozenset("i"))],
    "velocity": lambda: [leaf(velocity=ones(3))],
    "no velocity": lambda: [leaf(velocity=[])],
    "read-only": lambda: [leaf(out=read_only())],
    "read-only velocity": lambda: [leaf(out=ones(), velocity=read_only())],
    "shape of out": lambda: [leaf(out=ones(3))],
    "dtype of out": lambda: [leaf(out=ones(dtype=float))],
    "overlap": lambda: [leaf(out=np.lib.stride_tricks.as_strided(ones(9), (2, 3), (4, 4)))],
    "graph": tracked,
    "tied": lambda: [leaf(out=tied), leaf(1), leaf(2, out=tied)],
    "velocity in out": lambda: [leaf(out=big[:2, :3]), leaf(1, out=ones(), velocity=big[1:3, :3])],
    "tied velocities": lambda: [leaf(i, out=ones(), velocity=tied) for i in range(2)],
}
TERMS = re.compile(r"\b(dcdw|w|(?<!leave )out|state|velocity|weights|leaf|leaves|decay_lambda)\b")
# Words that do not occur in the default messages.
OTHERS = {name: f"<{name}>" for name in (*WORDS._fields[:7], "decay_lambda")}
WORDS_OF_TEST = Words(*list(OTHERS.values())[:7], options={"decay_lambda": OTHERS["decay_lambda"]})


def in_default_words(text):
    terms = re.findall(r"<\w+>", text)
    assert not TERMS.search(re.sub(r"<\w+>", "", text)), text
    for name, word in OTHERS.items():
        text = text.replace(word, getattr(WORDS, name, name))
    return terms, text


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_in_the_words_of_the_caller(fault):
    """Messages with other words differ from the default messages in these words only."""
    seen = []
    for words in (WORDS, WORDS_OF_TEST):
        with pytest.raises(LarsTreeError) as caught:
            shapes = fault != "shape"
            rows = checks.check(FAULTS[fault](), paths, same_shapes=shapes, words=words)
            checks.check_apart(rows, paths, words)
        seen.append(caught.value)
    expected, actual = seen
    terms, text = in_default_words(str(actual))
    assert terms or fault == "mesh axes"
    assert (str(expected), expected.paths) == (text, actual.paths)
    assert in_default_words(actual.argument)[1] == expected.argument


@pytest.mark.parametrize("argument", ["dcdw", "out", "state", "decay_lambda"])
@pytest.mark.parametrize(
    "facts",
    [
        {"device": "another"},
        {"sharding": Sharding("mesh", "placements")},
        {"varying": frozenset("i")},
        {"shape": (4,)},
    ],
    ids=str,
)
def test_errors_of_arrays_on_other_devices_are_in_the_words_of_the_caller(argument, facts):
    row = with_operands([leaf()])[0]
    varying = facts.get("varying", frozenset())
    row.dcdw.facts = row.dcdw.facts._replace(**{k: x for k, x in facts.items() if k != "varying"})
    row.dcdw.varying = varying
    texts = []
    for words in (WORDS, WORDS_OF_TEST):
        fault = checks._belongs(argument, row, row.dcdw, words)
        fault = fault or checks._broadcasts(argument, row.w.facts, row.dcdw.facts, words)
        texts.append("\n".join([fault.argument, fault.headline, fault.text]))
    assert texts[0] == argument + in_default_words(texts[1].removeprefix(argument))[1]


def test_the_torch_optimizer_has_its_own_words():
    need("torch")
    from lars_tree.torch.rows import TORCH_WORDS

    def message(leaves, names):
        with pytest.raises(LarsTreeError) as caught:
            paths = [(x,) for x in names]
            rows = checks.check(leaves, lambda: paths, same_shapes=True, words=TORCH_WORDS)
            checks.check_apart(rows, lambda: paths, TORCH_WORDS)
        assert caught.value.paths == ((names[-1],),)
        return [caught.value.argument, *str(caught.value).splitlines()]

    assert message([leaf(), leaf(1, dcdw=ones(4))], ["0.bias", "experts.a/b"]) == [
        "p.grad",
        "p.grad does not broadcast to p",
        "  experts.a/b: expected a shape that broadcasts to (2, 3), got (4,)",
    ]
    assert message([leaf(velocity=ones(4))], ["0.bias"]) == [
        "momentum_buffer",
        "momentum_buffer does not fit p",
        "  0.bias: expected a momentum_buffer of float32 (2, 3) for parameters of float32,"
        " got float32 (4,)",
        "  p was changed after a step of the optimizer, as by model.double() or model.to():",
        "  opt.load_state_dict(opt.state_dict()) converts the buffers,"
        " opt.state.clear() drops them",
    ]
    assert message([leaf(i, out=tied) for i in range(2)], ["a", "b"]) == [
        "p",
        "two parameters share memory (tied parameters)",
        "  b: shares memory with a",
    ]
    bad = leaf(nonfinite="raise")
    with pytest.raises(NonFiniteError, match=r"^p.grad would make parameters that .*\n  a: "):
        nonfinite.guard([bad], {0: StepResult(ones() * np.inf)}, lambda: [("a",)], TORCH_WORDS)
