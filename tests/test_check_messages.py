"""The messages of the checks of arrays, in default words and in the words of the caller."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import need
from test_checks import leaf, ones, paths, read_only

from lars_tree import LarsTreeError, NonFiniteError, _backends
from lars_tree._backends.base import Sharding, StepResult
from lars_tree._core import checks, nonfinite
from lars_tree.errors import WORDS, Words


class Elsewhere(np.ndarray):
    """An array that is said to be on other devices, or to be sharded, or to vary over mesh axes."""


def elsewhere(*shape, **facts):
    x = ones(*shape).view(Elsewhere)
    x.reported = facts
    return x


def sharded(*shape, mesh="mesh", placements="rows"):
    return elsewhere(*shape, sharding=Sharding(mesh, placements))


@pytest.fixture
def reported(monkeypatch):
    """Make the backend of numpy report the facts of `elsewhere`."""
    backend = type(_backends.find(ones()))
    real = backend.facts

    def facts(self, x):
        new = {key: y for key, y in getattr(x, "reported", {}).items() if key != "varying"}
        return real(self, x)._replace(**new)

    def varying(self, x):
        return frozenset(getattr(x, "reported", {}).get("varying", ""))

    monkeypatch.setattr(backend, "facts", facts)
    monkeypatch.setattr(backend, "varying", varying)


def tensor(*shape, **options):
    return need("torch").ones(shape or (2, 3), **options)


def tracked(**options):
    w = tensor(requires_grad=True)
    return leaf(w=w, dcdw=tensor(), out=tensor(), **options)


def lazy(**options):
    x = need("dask.array").ones((2, 3), dtype=np.float32)
    return leaf(w=x, dcdw=x, **options)


def masked():
    return np.ma.ones((2, 3))


big = ones(4, 6)
tied = ones()
FLOATS = "float16, bfloat16, float32, float64 or complex"
MASKED = "expected dense data, got a masked array: LARS has no missing elements; fill them first"
DIFFER = "are arrays of different libraries or devices"
ROWS = "a DTensor of shape (2, 3) with placements rows over mesh"
# For each fault: the leaves, and the argument, class and message of the error.
FAULTS = {
    "no array": (
        lambda: [leaf(dcdw="x")],
        "dcdw: LeafError: dcdw holds something that is not an array"
        "\n  a/0: expected an array, got a str",
    ),
    "masked": (
        lambda: [leaf(dcdw=masked())],
        f"dcdw: LeafError: dcdw holds an array that cannot be computed with\n  a/0: {MASKED}",
    ),
    "masked for sharded weights": (
        lambda: [leaf(w=sharded(), dcdw=masked())],
        f"dcdw: LeafError: dcdw holds an array that cannot be computed with\n  a/0: {MASKED}",
    ),
    "masked weights": (
        lambda: [leaf(w=masked(), dcdw=None)],
        f"w: LeafError: w holds an array that cannot be computed with\n  a/0: {MASKED}",
    ),
    "masked velocity": (
        lambda: [leaf(velocity=masked())],
        f"state: LeafError: state holds an array that cannot be computed with\n  a/0: {MASKED}",
    ),
    "integers": (
        lambda: [leaf(w=ones(dtype=np.int64), dcdw=ones(dtype=np.int64))],
        f"w: DtypeError: w is not floating point\n  a/0: expected {FLOATS}, got int64",
    ),
    "integer gradient": (
        lambda: [leaf(dcdw=ones(dtype=np.int64))],
        f"dcdw: DtypeError: dcdw is not floating point\n  a/0: expected {FLOATS}, got int64",
    ),
    "complex": (
        lambda: [leaf(dcdw=ones(dtype=np.complex64))],
        "dcdw: DtypeError: dcdw and w mix real and complex numbers"
        "\n  a/0: expected real as in w (float32), got complex64",
    ),
    "shape": (
        lambda: [
            leaf(),
            leaf(1, dcdw=ones(4)),
            leaf(2, w=ones(dtype=np.int64)),
            leaf(3, dcdw=ones(5)),
        ],
        "dcdw: ShapeError: dcdw does not broadcast to w"
        "\n  a/1: expected a shape that broadcasts to (2, 3), got (4,)"
        "\n  a/3: expected a shape that broadcasts to (2, 3), got (5,)",
    ),
    "another shape": (
        lambda: [leaf(dcdw=ones(1, 3))],
        "dcdw: ShapeError: dcdw has another shape than w"
        "\n  a/0: expected shape (2, 3) as in w, got (1, 3)",
    ),
    "decay": (
        lambda: [leaf(decay_lambda=ones(4))],
        "decay_lambda: ShapeError: decay_lambda does not broadcast to w"
        "\n  a/0: expected a shape that broadcasts to (2, 3), got (4,)",
    ),
    **{
        f"rates, {name}": (
            lambda name=name: [leaf(**{name: ones(4)})],
            "lr: ShapeError: lr does not broadcast to w"
            "\n  a/0: expected a shape that broadcasts to (2, 3), got (4,)",
        )
        for name in ("lr", "lr_after_momentum")
    },
    "axis": (
        lambda: [leaf(layer_axis=2)],
        "layer_axis: OptionError: layer_axis is no axis of the weights"
        "\n  a/0: expected an axis of an array of 2 dimensions, got 2",
    ),
    "mesh axes": (
        lambda: [leaf(axis_name=frozenset("i"))],
        "axis_name: OptionError: axis_name does not fit the weights"
        "\n  a/0: expected None for an array of numpy, got 'i'",
    ),
    "lazy": (
        lambda: [lazy(nonfinite="raise")],
        "nonfinite: OptionError: nonfinite cannot raise: the values are not known yet"
        "\n  a/0: expected 'propagate' or 'skip' for a traced or lazy array, got 'raise'",
    ),
    "velocity": (
        lambda: [leaf(velocity=ones(3))],
        "state: StateError: state does not fit w\n  a/0: expected a velocity of float32 (2, 3)"
        " for weights of float32, got float32 (3,)",
    ),
    "no velocity": (
        lambda: [leaf(velocity=[])],
        "state: LeafError: state holds something that is not an array"
        "\n  a/0: expected an array, got a list of 0 items",
    ),
    "masked out": (
        lambda: [leaf(out=masked())],
        "out: OutError: out cannot be written to\n  a/0: it is a masked array: LARS has no missing"
        " elements; fill them first",
    ),
    "read-only": (
        lambda: [leaf(out=read_only())],
        "out: OutError: out cannot be written to\n  a/0: it is read-only",
    ),
    "read-only copy": (
        lambda: [leaf(out=read_only(), dcdw=None)],
        "out: OutError: out cannot be written to\n  a/0: it is read-only",
    ),
    "read-only velocity": (
        lambda: [leaf(out=ones(), velocity=read_only())],
        "state: OutError: state cannot be written to\n  a/0: it is read-only",
    ),
    "shape of out": (
        lambda: [leaf(out=ones(3))],
        "out: OutError: out has another shape than w"
        "\n  a/0: expected shape (2, 3) as in w, got (3,)",
    ),
    "dtype of out": (
        lambda: [leaf(out=ones(dtype=float))],
        "out: OutError: out has another dtype than w\n  a/0: expected float32 as in w, got float64",
    ),
    "overlap": (
        lambda: [leaf(out=np.lib.stride_tricks.as_strided(ones(9), (2, 3), (4, 4)))],
        "out: OutError: out overlaps itself\n  a/0: expected memory of its own for every element,"
        " got a view that overlaps itself",
    ),
    "graph": (
        lambda: [tracked(stop_gradients=False)],
        "out: OutError: out cannot be written to"
        "\n  a/0: it is part of a graph: with stop_gradients=False, leave out `out`",
    ),
    "tied": (
        lambda: [leaf(out=tied), leaf(1), leaf(2, out=tied)],
        "out: OutError: two leaves of out share memory (tied weights)"
        "\n  a/2: shares memory with a/0",
    ),
    "velocity in out": (
        lambda: [leaf(out=big[:2, :3]), leaf(1, out=ones(), velocity=big[1:3, :3])],
        "state: OutError: state shares memory with out\n  a/1: shares memory with a/0 of out",
    ),
    "tied velocities": (
        lambda: [leaf(i, out=ones(), velocity=tied) for i in range(2)],
        "state: OutError: state shares memory with state\n  a/1: shares memory with a/0 of state",
    ),
    "library": (
        lambda: [leaf(dcdw=tensor())],
        f"dcdw: BackendError: dcdw and w {DIFFER}"
        "\n  a/0: expected a numpy array as in w, got one of torch",
    ),
    "library of out": (
        lambda: [leaf(w=tensor(), dcdw=tensor(), out=masked())],
        f"out: BackendError: out and w {DIFFER}"
        "\n  a/0: expected a torch array as in w, got one of numpy",
    ),
    "library of the decay": (
        lambda: [leaf(decay_lambda=tensor())],
        f"decay_lambda: BackendError: decay_lambda and w {DIFFER}"
        "\n  a/0: expected a numpy array as in w, got one of torch",
    ),
    "device": (
        lambda: [leaf(dcdw=elsewhere(device="gpu:1"))],
        f"dcdw: BackendError: dcdw and w {DIFFER}"
        "\n  a/0: expected an array on cpu as in w, got one on gpu:1",
    ),
    "devices": (
        lambda: [leaf(dcdw=elsewhere(device=frozenset(("b", "a"))))],
        f"dcdw: BackendError: dcdw and w {DIFFER}"
        "\n  a/0: expected an array on cpu as in w, got one on a, b",
    ),
    "mesh": (
        lambda: [leaf(w=sharded(), dcdw=sharded(mesh="another"))],
        "dcdw: BackendError: dcdw and w are not on the same device mesh"
        f"\n  a/0: expected {ROWS}, got {ROWS.replace('mesh', 'another')}",
    ),
    "not sharded": (
        lambda: [leaf(w=sharded(), dcdw=ones())],
        "dcdw: BackendError: dcdw and w are not on the same device mesh"
        f"\n  a/0: expected {ROWS}, got a tensor of shape (2, 3) that is not a DTensor",
    ),
    "a number on another mesh": (
        lambda: [leaf(w=sharded(), dcdw=sharded(1, mesh="another"))],
        "dcdw: BackendError: dcdw and w are not on the same device mesh"
        f"\n  a/0: expected {ROWS}, got {ROWS.replace('mesh', 'another').replace('2, 3', '1,')}",
    ),
    "placements of out": (
        lambda: [leaf(w=sharded(), dcdw=sharded(), out=sharded(placements="columns"))],
        "out: BackendError: out is not sharded like w"
        f"\n  a/0: expected {ROWS}, got {ROWS.replace('rows', 'columns')}",
    ),
    "placements of the velocity": (
        lambda: [leaf(w=sharded(), dcdw=sharded(), velocity=ones())],
        "state: BackendError: state is not sharded like w"
        f"\n  a/0: expected {ROWS}, got a tensor of shape (2, 3) that is not a DTensor",
    ),
    "rates for sharded weights": (
        lambda: [leaf(w=sharded(), dcdw=sharded(), decay_lambda=ones(3))],
        "decay_lambda: ShapeError: decay_lambda does not broadcast to w"
        "\n  a/0: expected one number for a DTensor, got an array of shape (3,)",
    ),
    "varying": (
        lambda: [leaf(w=elsewhere(varying="i"), dcdw=elsewhere(varying="ikj"))],
        "dcdw: BackendError: dcdw differs between devices that hold the same weights"
        "\n  a/0: expected the same dcdw on all devices of 'j' and 'k', over which w does not vary,"
        " got one that varies: average gradients with jax.lax.pmean first",
    ),
    "varying velocity": (
        lambda: [leaf(velocity=elsewhere(varying="i"))],
        "state: BackendError: state differs between devices that hold the same weights"
        "\n  a/0: expected the same state on all devices of 'i', over which w does not vary,"
        " got one that varies",
    ),
}
same = read_only()
VALID = {
    **{f"axis {i}": lambda i=i: leaf(layer_axis=i) for i in range(-2, 2)},
    "a row": lambda: leaf(dcdw=ones(3), decay_lambda=ones(2, 1)),
    "raise": lambda: leaf(nonfinite="raise"),
    "lazy": lambda: lazy(nonfinite="skip"),
    "no graph": lambda: leaf(out=ones(), velocity=ones(), stop_gradients=False),
    "graph is not kept": lambda: tracked(stop_gradients=True),
    "kept": lambda: leaf(w=same, dcdw=None, out=same),
    "rates of numpy": lambda: leaf(w=tensor(), dcdw=tensor(), decay_lambda=ones(3)),
    "placements": lambda: leaf(w=sharded(), dcdw=sharded(placements="columns"), out=sharded()),
    "numbers": lambda: leaf(w=sharded(), dcdw=ones(1, 1), decay_lambda=ones(1)),
    "not sharded, a number": lambda: leaf(dcdw=ones(1)),
    "unknown device": lambda: leaf(dcdw=elsewhere(device=None)),
    "varying": lambda: leaf(w=elsewhere(varying="ij"), dcdw=elsewhere(varying="i")),
}
TERMS = re.compile(r"\b(dcdw|w|(?<!leave )out|state|velocity|weights|leaf|leaves|decay_lambda)\b")
# Placeholders, which do not occur in the default messages.
OTHERS = {name: f"<{name}>" for name in (*WORDS._fields[:7], "decay_lambda")}
WORDS_OF_TEST = Words(*list(OTHERS.values())[:7], options={"decay_lambda": OTHERS["decay_lambda"]})


def in_default_words(text):
    assert not TERMS.search(re.sub(r"<\w+>", "", text)), text
    for name, word in OTHERS.items():
        text = text.replace(word, getattr(WORDS, name, name))
    return text


def check(leaves, words=WORDS, same_shapes=False, paths=paths):
    rows = checks.check(leaves, paths, same_shapes=same_shapes, words=words)
    checks.check_apart(rows, paths, words)
    return rows


@pytest.mark.usefixtures("reported")
@pytest.mark.parametrize("fault", FAULTS)
def test_messages_say_what_was_expected_and_found(fault):
    """Messages in the words of a caller differ from the default messages in these words only."""
    make, expected = FAULTS[fault]
    for words, translated in ((WORDS, str), (WORDS_OF_TEST, in_default_words)):
        with pytest.raises(LarsTreeError) as caught:
            check(make(), words, same_shapes=True)
        error = caught.value
        assert translated(f"{error.argument}: {type(error).__name__}: {error}") == expected
        assert error.paths == tuple(("a", int(i)) for i in re.findall(r"\n  a/(\d)", expected))


@pytest.mark.usefixtures("reported")
@pytest.mark.parametrize("case", VALID)
def test_valid_leaves_are_returned_with_their_operands(case):
    leaf = VALID[case]()
    (row,) = check([leaf])
    assert row.leaf is leaf
    arrays = (row.w.x, row.dcdw.x, row.out.x, row.velocity.x)
    assert all(x is y for x, y in zip(arrays, (*leaf[1:4], leaf.velocity), strict=True))


def test_the_torch_optimizer_has_its_own_words():
    need("torch")
    from lars_tree.torch.rows import TORCH_WORDS

    def message(leaves, names):
        with pytest.raises(LarsTreeError) as caught:
            check(leaves, TORCH_WORDS, same_shapes=True, paths=lambda: [(x,) for x in names])
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
