"""Which arrays and counters the native kernel supports in steps with momentum."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import unit_lars as Lars
from native_steps import numpy_reader, options_of, stepped, taken
from test_native import dtype_of
from test_native_momentum import assert_same_step, by_kernel, by_twin, step
from test_native_plain import Subclass, shown

from lars_tree import LarsTreeError, OutError
from lars_tree._core.advance import advance
from lars_tree._numerics.formula import Rule
from lars_tree._tree import structure


def ones(dtype=float):
    return np.arange(1.0, 7.0).astype(dtype)


def square():
    return np.arange(1.0, 10.0).reshape(3, 3)


def frozen(x):
    x.flags.writeable = False
    return x


def misaligned():
    return np.frombuffer(bytearray(49), np.float64, offset=1)


def sliced(*slices):
    """Views of one buffer of 20 numbers."""
    buffer = np.arange(1.0, 21.0)
    return [buffer[x] for x in slices]


def self_overlapping():
    return np.lib.stride_tricks.as_strided(np.arange(1.0, 7.0), (3, 3), (8, 8))


def by_plan(*columns_and_counter):
    *columns, counter = columns_and_counter
    return stepped(numpy_reader(), *columns, counter=counter)


def leaves(w, g, v, out="w"):
    return w, g, out, v


A, B, C = slice(0, 6), slice(6, 12), slice(12, 18)

# Functions that return new w, dcdw, out ("w" means in place) and velocity for each test.
# fmt: off
CASES = {
    "another dtype": lambda: leaves(ones(), ones(), ones("f4")),
    "another dtype, new": lambda: leaves(ones(), ones(), ones("f4"), None),
    "too long": lambda: leaves(ones("f4"), ones("f4"), ones()),
    "float16": lambda: leaves(ones("f2"), ones("f2"), ones("f2")),
    "bfloat16": lambda: leaves(*(ones(dtype_of("bfloat16")) for _ in range(3))),
    "bits of bfloat16": lambda: leaves(*[ones(dtype_of("bfloat16"))] * 2, ones("u2"), None),
    "integers": lambda: leaves(ones(), ones(), ones(int)),
    "complex for real": lambda: leaves(ones(), ones(), ones(complex)),
    "real for complex": lambda: leaves(ones(complex), ones(complex), ones()),
    "another shape": lambda: leaves(ones(), ones(), ones()[:5]),
    "another shape, new": lambda: leaves(ones(), ones(), ones()[:5], None),
    "one number": lambda: leaves(ones(), ones(), np.ones(())),
    "more dimensions": lambda: leaves(ones(), ones(), ones().reshape(1, 6)),
    "strided": lambda: leaves(ones(), ones(), np.arange(12.0)[::2]),
    "strided, new": lambda: leaves(ones(), ones(), np.arange(12.0)[::2], None),
    "reversed": lambda: leaves(ones(), ones(), ones()[::-1]),
    "another order": lambda: leaves(square(), square(), square().T),
    "another order, new": lambda: leaves(square(), square(), square().T, None),
    "it overlaps itself": lambda: leaves(square(), square(), self_overlapping()),
    "byte-swapped": lambda: leaves(ones(), ones(), ones(">f8")),
    "misaligned": lambda: leaves(ones(), ones(), misaligned()),
    "read-only": lambda: leaves(ones(), ones(), frozen(ones())),
    "a subclass": lambda: leaves(ones(), ones(), ones().view(Subclass)),
    "a subclass, new": lambda: leaves(ones(), ones(), ones().view(Subclass), None),
    "masked": lambda: leaves(ones(), ones(), np.ma.array(ones())),
    "masked, new": lambda: leaves(ones(), ones(), np.ma.array(ones()), None),
    "a number": lambda: leaves(np.array(1.0), np.array(1.0), 0.0, None),
    "a numpy number": lambda: leaves(np.array(1.0), np.array(1.0), np.float64(0.0)),
    "none": lambda: leaves([ones(), ones()], [ones(), ones()], [ones(), None]),
    "none, new": lambda: leaves([ones(), ones()], [ones(), ones()], [ones(), None], None),
    "one for no weights": lambda: leaves([ones(), None], [ones(), None], [ones(), ones()]),
    "the second is unsupported": lambda: leaves(
        [ones(), ones()], [ones(), ones()], [ones(), ones("f4")]),
    "w itself": lambda: leaves(w := ones(), ones(), w),
    "w itself, out": lambda: leaves(w := ones(), ones(), w, ones()),
    "dcdw itself": lambda: leaves(ones(), g := ones(), g),
    "out itself": lambda: leaves(ones(), ones(), v := ones(), v),
    "out and dcdw": lambda: leaves(ones(), v := ones(), v, v),
    "over a part of w": lambda: leaves((x := sliced(A, slice(3, 9)))[0], ones(), x[1]),
    "over a part of dcdw": lambda: leaves(ones(), (x := sliced(A, slice(5, 11)))[0], x[1]),
    "over a part of out": lambda: leaves(ones(), ones(), *sliced(slice(5, 11), A)),
    "another's": lambda: leaves([ones(), ones()], [ones(), ones()], [(v := ones()), v]),
    "over a part of another": lambda: leaves(
        [ones(), ones()], [ones(), ones()], sliced(A, slice(5, 11))),
    "another's w": lambda: leaves((x := sliced(A, B, C))[:2], [ones(), ones()], [x[1], x[2]]),
    "another's dcdw": lambda: leaves([ones(), ones()], (x := sliced(A, B, C))[:2], [x[1], x[2]]),
    "another's out": lambda: leaves(
        [ones(), ones()], [ones(), ones()], (x := sliced(A, B, C))[:2], [x[2], x[0]]),
    "another dtype, no gradient": lambda: leaves(
        [ones(), ones()], [ones(), None], [ones(), ones("f4")]),
    "another shape, no gradient": lambda: leaves(
        [ones(), ones()], [ones(), None], [ones(), ones()[:5]]),
    "a w without a gradient": lambda: leaves([ones(), w := ones()], [ones(), None], [w, ones()]),
    "of weights without a gradient, and w": lambda: leaves(
        [w := ones(), ones()], [ones(), None], [ones(), w]),
    "of weights without a gradient, and another's": lambda: leaves(
        [ones(), ones()], [ones(), None], [v := ones(), v]),
    "no gradient, new": lambda: leaves([ones(), ones()], [ones(), None], [ones(), ones()], None),
}
# fmt: on


def build(case):
    w, g, out, v = CASES[case]()
    out = w if isinstance(out, str) else out
    return w, g, out, v, [x for tree in (w, g, out, v) for x in structure.leaves(tree)]


def outcome(call, case):
    """The result or the error, and what all arrays that were passed contain after the call."""
    w, g, out, v, given = build(case)
    try:
        *new, count = call(w, g, out, v, momentum=0.5, decay_lambda=0.1)
        new = [*shown(x for tree in new for x in structure.leaves(tree)), int(count)]
    except LarsTreeError as error:
        new = f"{type(error).__name__}: {error}"
    return new, shown(given)


@pytest.mark.parametrize("case", CASES)
def test_unsupported_leaves_take_the_general_path(case):
    assert outcome(step, case) == outcome(by_twin, case)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_does_not_touch_unsupported_leaves(case):
    w, g, out, v, given = build(case)
    before, counter = shown(given), np.zeros((), np.int64)
    outs = None if out is None else structure.leaves(out)
    ws, dcdws, velocities = map(structure.leaves, (w, g, v))
    rules = [Rule(0.1, momentum=0.5)] * len(ws)
    assert by_plan(ws, dcdws, outs, rules, velocities, counter) is None
    assert shown(given) == before
    assert counter == 0


@pytest.mark.parametrize("out", ["new", "w"])
def test_arrays_that_may_share_memory_are_supported(out):
    """Leaves may share a gradient. Velocities may share memory if the update copies them."""
    w, g = [ones(), ones()], [(x := ones()), x]
    v = [ones(), ones()] if out == "w" else [w[0], w[0]]
    expected = by_twin(w, g, None, v, momentum=0.5)
    assert_same_step(by_kernel(w, g, w if out == "w" else None, v, momentum=0.5), expected)


# ---- The counter


def test_each_supported_call_is_counted():
    w, g, v, counter = ones(), ones(), ones(), np.array(2**40)
    rule = [Rule(0.1, momentum=0.5)]
    for i in range(1, 4):
        assert by_plan([w], [g], [w], rule, [v], counter) == ([w], [v])
        assert counter == 2**40 + i
        assert by_plan([w], [g], [w], rule, [w], counter) is None
        assert by_plan([w], [g], [w], [Rule(0.1, layer_axis=0)], [v], counter) is None
        assert counter == 2**40 + i
    assert by_plan([w], [g], [w], rule, None, counter) == ([w], None)
    assert by_plan([w], [None], [w], rule, [v], counter) == ([w], [v])
    assert counter == 2**40 + 5


COUNTERS = {
    "int32": lambda: np.zeros((), np.int32),
    "uint64": lambda: np.zeros((), np.uint64),
    "byte-swapped": lambda: np.zeros((), ">i8"),
    "misaligned": lambda: np.frombuffer(bytearray(9), np.int64, offset=1).reshape(()),
}


@pytest.mark.parametrize("case", COUNTERS)
def test_other_counters_are_counted_on_the_general_path(case):
    w, g, v, counter = ones(), ones(), ones(), COUNTERS[case]()
    assert by_plan([w], [g], [w], [Rule(0.1)], [v], counter) is None
    assert w.tolist() == v.tolist() == ones().tolist()
    state = {"velocity": v, "step": counter}
    for i in range(3):
        assert counter == i
        advance(w, g, w, options_of(momentum=0.5), state)
    assert state["step"] is counter


def test_nothing_is_written_with_a_read_only_counter():
    w, g, v, counter = ones(), ones(), ones(), frozen(np.array(7))
    assert by_plan([w], [g], [w], [Rule(0.1)], [v], counter) is None
    state = {"velocity": v, "step": counter, "skipped": np.array(0)}
    with pytest.raises(OutError, match="step: it is read-only"):
        Lars(0.1, 0.5).update(w, g, state, out=w)
    assert w.tolist() == v.tolist() == ones().tolist()
    assert counter == 7


def test_a_plan_lists_the_arrays_that_it_writes():
    ws, vs = ([ones(), ones(), ones(), None] for _ in range(2))
    outs, g = [ws[0], ones(), ws[2], None], [ones(), ones(), None, None]
    plan, news = taken(numpy_reader(), ws, g, outs, [Rule(0.1, momentum=0.5)] * 4, vs)
    written = plan.written
    assert all(x.tolist() == ones().tolist() for x in written)
    plan.step()
    assert [list(map(id, x)) for x in news] == [list(map(id, x)) for x in (outs, vs)]
    assert list(map(id, written)) == list(map(id, [outs[0], vs[0], outs[1], vs[1]]))
    assert [x is None or x.tolist() == ones().tolist() for x in vs] == [False, False, True, True]
    starts = [x.__array_interface__["data"][0] for x in (*written, ws[2], vs[2])]
    assert plan.spans() == sorted((start, start + 48) for start in starts)
