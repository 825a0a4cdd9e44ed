"""Plans of the native engine: leaves of several libraries, and the two passes of a step."""

from __future__ import annotations

import ast
import gc
import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import need
from hypothesis import example, given
from hypothesis import strategies as st
from native_steps import numpy_reader, stepped, taken
from test_native import OPTIONS, PAIRS, SETS, arrays, random_array
from test_native_momentum import MOTIONS, cases, velocity_for

from lars_tree import _native
from lars_tree._numerics.formula import Rule

# The arrays contain signalling NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def copied(columns):
    """The columns with copied weights and velocities, for an update in place."""
    ws, gs, _, rules, vs = columns
    ws = [x.copy("K") for x in ws]
    return ws, gs, ws, rules, None if vs is None else [x if x is None else x.copy("K") for x in vs]


def bits(columns):
    return [None if x is None else bits_of(x) for x in (*columns[0], *(columns[4] or ()))]


def bits_of(x):
    """The bits of x. All NaN get the same bits, as their signs depend on the order of operands."""
    return np.where(x == x, x, np.nan).astype(x.dtype).tobytes()


def column_of(w, g, rule, v=None):
    return [w], [g], [w], [rule], [v]


# ---- Plans with some of the leaves


def test_prepare_returns_the_indices_of_unsupported_leaves():
    rule, other = Rule(0.5), Rule(np.full(3, 0.5))
    ws = [np.ones(3) for _ in range(7)]
    gs = [np.ones(3) for _ in range(7)]
    ws[2] = np.ones(6)[::2]
    gs[5] = 1.0
    ws[6] = gs[6] = None
    rules = [rule, other, rule, other, other, rule, rule]
    plan = _native.plan()
    assert plan.prepare(numpy_reader(), ws, gs, ws, rules) == [1, 2, 3, 4, 5]
    assert plan.indices == [0]
    plan.step()
    assert [None if x is None else x.tolist() for x in ws] == [[0.5] * 3, *[[1.0] * 3] * 5, None]


def test_only_the_leaves_at_given_indices_are_added():
    ws, gs = ([np.ones(3) for _ in range(5)] for _ in range(2))
    ws[3] = gs[0] = np.ones(3, int)
    plan, reader, news = _native.plan(), numpy_reader(), [None] * 5
    rules = [Rule(0.25)] * 5
    assert plan.prepare(reader, ws, gs, None, rules, None, news, indices=[4, 3, 0, 1]) == [3, 0]
    assert plan.indices == [4, 1]
    plan.step()
    assert [x is not None and x.tolist() for x in news] == [
        False,
        [0.75] * 3,
        *[False] * 2,
        [0.75] * 3,
    ]
    assert all((x == 1).all() for x in ws)


@pytest.mark.parametrize("out", ["new", "in place"])
def test_leaves_of_several_libraries_in_one_plan_get_the_same_bits_as_alone(out):
    torch = need("torch")
    reader = need("lars_tree._backends.torch.reader").READER
    if reader is None:
        pytest.skip("torch has no C functions for DLPack")
    rng = np.random.default_rng(0)
    rule = Rule(0.1, 0.01, momentum=0.9, nesterov=True)
    sizes = [3, 131_073, 700, 400_001, 0, 16, 33]
    ws, gs, vs = ([random_array(rng, "float32", (n,)) for n in sizes] for _ in range(3))
    rows = zip(ws, gs, vs, strict=True)
    alone = [stepped(numpy_reader(), [w], [g], None, [rule], [v]) for w, g, v in rows]
    torches = {1, 2, 5}
    columns = [
        [torch.from_numpy(x) if i in torches else x for i, x in enumerate(xs)]
        for xs in (ws, gs, vs)
    ]
    in_place = out == "in place"
    plan = _native.kernel.Plan(3, SETS[-1])
    news = ([None] * 7, [None] * 7)
    given = columns[0], columns[1], columns[0] if in_place else None, [rule] * 7, columns[2]
    rest = plan.prepare(numpy_reader(), *given, *news, indices=[0, 1, 2, 3])
    assert rest == [1, 2]
    assert plan.prepare(reader, *given, *news, indices=[4, 5, 6, *rest]) == [4, 6]
    assert plan.prepare(numpy_reader(), *given, *news, indices=[4, 6]) == []
    assert sorted(plan.indices) == list(range(7))
    assert not plan.overlaps()
    plan.step()
    results = (columns[0], columns[2]) if in_place else news
    for i, ((w,), (v,)) in enumerate(alone):
        assert np.asarray(results[0][i]).tobytes() == w.tobytes()
        assert np.asarray(results[1][i]).tobytes() == v.tobytes()
        assert isinstance(results[0][i], torch.Tensor) is (i in torches)


def test_overlaps_are_found_across_calls_and_with_other_memory():
    x = np.ones(12)
    start = x.__array_interface__["data"][0]
    plan, reader, rules = _native.plan(), numpy_reader(), [Rule(0.1)]
    for part, g in ((x[:4], np.ones(4)), (x[4:8], x[:0].copy())):
        plan.prepare(reader, [part], [g[:4] if g.size else x[8:]], [part], rules)
    assert not plan.overlaps()
    assert plan.spans() == [(start, start + 32), (start + 32, start + 64)]
    for at, written, read in ((0, True, True), (63, True, True), (64, True, False)):
        span = [(start + at, start + at + 1)]
        assert (plan.overlaps(span), plan.overlaps([], span)) == (written, read)
    assert not plan.overlaps([(start + 96, start + 97)], [(start + 96, start + 97)][:0])
    w = [x[3:5]]
    plan.prepare(reader, w, [np.ones(2)], w, rules)
    assert plan.overlaps()


def test_a_plan_keeps_its_arrays_alive():
    alive = []

    def array(n):
        alive.append(weakref.ref(x := np.ones(n)))
        return x

    plan, reader = _native.plan(), numpy_reader(make=lambda w: array(w.size))
    rules = [Rule(0.1, momentum=0.5)]
    for n in range(1, 50):
        w, g, v = array(n), array(n), array(n)
        assert plan.prepare(reader, [w], [g], [w], rules, [v]) == []
        assert plan.prepare(reader, [array(n)], [g], None, rules, [v], [None], [None]) == []
    counter = array(1).astype(np.int64)
    assert plan.count(counter)
    alive.append(weakref.ref(counter))
    del w, g, v, reader, counter
    gc.collect()
    lost = [x() is None for x in alive]
    assert lost == [*[False] * 5 * 49, True, False]  # the source of the counter is freed
    plan.apply(plan.norms())
    plan.step()
    assert alive[-1]() == 3
    assert alive[0]() == pytest.approx(0.06)  # 1 - 0.6 - 0.34: w minus both velocities
    del plan
    assert all(x() is None for x in alive)


# ---- Two passes


@given(
    case=cases(),
    moves=st.booleans(),
    lr=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1e-290, 1e290]),
    options=OPTIONS,
    motion=MOTIONS,
    instruction_set=st.sampled_from(SETS),
)
def test_two_passes_give_the_bits_of_a_step(case, moves, lr, options, motion, instruction_set):
    w, g, v = case
    columns = column_of(w, g, Rule(lr, **options, **motion), v if moves else None)
    if not moves:
        columns = (*columns[:3], [Rule(lr, **options)], None)
    once, twice = copied(columns), copied(columns)
    stepped(numpy_reader(), *once)
    plan = _native.kernel.Plan(1, instruction_set)
    assert plan.prepare(numpy_reader(), *twice) == []
    norms = plan.norms(bounds=bool(lr))
    assert bits(twice) == bits(columns)
    plan.apply(norms)
    assert bits(twice) == bits(once)


SIZES = [0, 1, 127, 16_385, 131_072, 131_073, 400_001]
RULES = {
    "no decay": {},
    "decay": {"decay_lambda": 0.1},
    "joint": {"decay_lambda": 0.1, "joint_norm": True},
    "joint, far": {"decay_lambda": 1e3, "joint_norm": True},
    "no ratio": {"adapt": False, "decay_lambda": 1e-3},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_two_passes_over_layers_of_all_sizes_with_many_threads(names, name):
    rng = np.random.default_rng(0)
    ws, gs = ([random_array(rng, x, (n,)) for n in SIZES] for x in names)
    vs = [velocity_for(x, rng) if i % 3 else None for i, x in enumerate(ws)]
    moving, still = Rule(0.1, momentum=0.9, **RULES[name]), Rule(0.1, **RULES[name])
    columns = ws, gs, ws, [still if v is None else moving for v in vs], vs
    once = copied(columns)
    stepped(numpy_reader(), *once)
    tables = set()
    for threads, bounds in ((1, True), (3, True), (3, False)):
        twice = copied(columns)
        plan, _ = taken(numpy_reader(), *twice, threads=threads)
        norms = plan.norms(bounds=bounds)
        plan.apply(norms)
        assert bits(twice) == bits(once)
        tables.add((bounds, bytes(norms)))
    assert len(tables) == 2  # the bits of the norms do not depend on the number of threads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_second_pass_uses_the_norms_that_it_is_given(dtype):
    """Twice the norm of w gives twice the ratio, and so does half the norm of dcdw."""
    steps = []
    for w_factor, g_factor in ((1, 1), (2, 1), (1, 0.5), (2, 4)):
        w, g = np.array([3, 4, 0], dtype), np.array([0, 0, 10], dtype)
        plan, _ = taken(numpy_reader(), [w], [g], [w], [Rule(0.5)])
        norms = plan.norms()
        table = np.frombuffer(norms).reshape(1, 8)
        high, _, exponent = table[:, :3].T
        assert high * 2**exponent == 5
        table[:, [0, 3]] *= [w_factor, g_factor]
        plan.apply(norms)
        steps.append(-w[2])
        assert w[:2].tolist() == [3, 4]
    assert steps == [2.5, 5, 5, 1.25]


def test_the_largest_magnitudes_of_velocities_are_found_on_request():
    rng = np.random.default_rng(0)
    ws, gs = ([np.ones(n) for n in (5, 400_001, 7)] for _ in range(2))
    vs = [rng.normal(size=x.size) for x in ws]
    vs[1][300_000], vs[2][3] = -9, np.nan
    plan, _ = taken(numpy_reader(), ws, gs, ws, [Rule(0.1, momentum=0.5)] * 3, vs, threads=3)
    assert np.frombuffer(plan.norms()).reshape(3, 8)[:, 7].tolist() == [0, 0, 0]
    most = np.frombuffer(plan.norms(bounds=True)).reshape(3, 8)[:, 7]
    assert most[:2].tolist() == [abs(vs[0]).max(), 9]
    assert np.isnan(most[2])


# ---- Whether the results are finite


def finite_after(columns):
    """For each leaf, whether a step on copies gives only finite results."""
    new = copied(columns)
    stepped(numpy_reader(), *new)
    vs = new[4] or [None] * len(new[0])
    with np.errstate(all="ignore"):
        return [
            all(bool(np.isfinite(x).all()) for x in row if x is not None)
            for row in zip(new[0], vs, strict=True)
        ]


def nonfinite(columns, **options):
    before = bits(columns)
    plan, _ = taken(numpy_reader(), *columns, **options)
    assert plan.must_be_finite is any(x.nonfinite != "propagate" for x in columns[3])
    found = plan.nonfinite(plan.norms(bounds=True))
    assert bits(columns) == before
    return found


@given(
    case=cases(),
    moves=st.booleans(),
    lr=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0, 1e-290, 1e290]),
    options=OPTIONS,
    motion=MOTIONS,
)
def test_infinite_and_nan_results_are_reported(case, moves, lr, options, motion):
    w, g, v = case
    rule = Rule(lr, **options, **(motion if moves else {}), nonfinite="skip")
    columns = column_of(w, g, rule, v if moves else None)
    assert nonfinite(columns) == ([] if finite_after(columns) == [True] else [0])


@example(pair=(np.array([1e-200]), np.ones(1)), lr=1e290, decay=1e200, scale=1.0)
@example(pair=(np.zeros(1), np.ones(1)), lr=1e290, decay=1e200, scale=1.0)
@given(pair=arrays(), lr=st.floats(0, 1e308), decay=st.floats(0, 1e308), scale=st.floats(1e-308, 1))
def test_infinite_and_nan_results_are_reported_for_any_rate_and_decay(pair, lr, decay, scale):
    for adapt, joint in ((True, False), (False, False), (True, True)):
        rule = Rule(lr, decay, grad_scale=scale, adapt=adapt, joint_norm=joint, nonfinite="raise")
        columns = column_of(*pair, rule)
        assert nonfinite(columns) == ([] if finite_after(columns) == [True] else [0])


LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}
LARGEST["float64"] = np.finfo(float).max
EDGES = {
    "weights": {},
    "with decay": {"decay_lambda": 0.5},
    "momentum": {"momentum": 0.5},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "a small rate": {"momentum": 0.5, "lr_after_momentum": 0.125},
    "joint": {"adapt": True, "joint_norm": True, "decay_lambda": 0.5},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("size", [1, 128, 300, 140_000])
@pytest.mark.parametrize("name", LARGEST)
def test_results_near_the_largest_number(name, size, edge):
    """Test rates just below and just above the smallest rate that makes a result infinite."""
    rng = np.random.default_rng(0)
    w, g = (random_array(rng, name, (size,), 0.5, 2) for _ in range(2))
    w[size // 2] = -0.75 * LARGEST[name]
    g[size // 2] = 0.125 * LARGEST[name]
    moves = "momentum" in EDGES[edge]
    v = velocity_for(w, rng) if moves else None

    def columns(rate):
        options = {"adapt": False, **EDGES[edge], "nonfinite": "skip"}
        return column_of(w, g, Rule(rate, **options), v)

    low, high = 0.0, 64.0
    assert (finite_after(columns(low)), finite_after(columns(high))) == ([True], [False])
    for _ in range(80):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if finite_after(columns(middle)) == [True] else (low, middle)
    assert nonfinite(columns(low)) == []
    assert nonfinite(columns(high)) == [0]
    assert nonfinite(columns(low / 2)) == nonfinite(columns(low * 0.999)) == []
    assert nonfinite(columns(high * 1.001)) == [0]


def test_only_leaves_whose_rule_does_not_propagate_are_reported():
    choices = ["propagate", "skip", "raise", "skip", "propagate"]
    ws, gs = ([np.ones(n, "f4") for n in (3, 500, 140_000, 5, 0)] for _ in range(2))
    rules = [Rule(0.1, nonfinite=x) for x in choices]
    for bad in itertools.product([False, True], repeat=4):
        for g, is_bad in zip(gs, bad, strict=False):
            g[-1] = np.nan if is_bad else 1
        expected = [i for i in (1, 2, 3) if bad[i]]
        assert nonfinite((ws, gs, ws, rules, None), threads=3) == expected


def test_a_velocity_that_is_not_finite_is_reported_even_if_the_weights_are_finite():
    """The velocity is reported even if an `lr_after_momentum` of 0 keeps it out of the weights."""
    for momentum, rate, value in ((0.5, 0.0, np.inf), (0.5, 1.0, np.nan), (0.0, 1.0, np.inf)):
        w, g, v = np.ones(300), np.ones(300), np.zeros(300)
        v[200] = value
        rule = Rule(0.1, momentum=momentum, lr_after_momentum=rate, nonfinite="skip")
        columns = column_of(w, g, rule, v)
        assert finite_after(columns) == [False]
        assert nonfinite(columns) == [0]


def test_a_plan_that_measures_cannot_step():
    x = np.ones(3)
    plan = _native.plan()
    assert plan.prepare(numpy_reader(), [x], [x], None, [Rule(0.1)], None) == []
    for step in (plan.step, lambda: plan.apply(plan.norms())):
        with pytest.raises(ValueError, match="can only be measured"):
            step()
    assert x.tolist() == [1.0] * 3


def test_the_stub_has_the_names_of_the_kernel():
    stub = ast.parse(Path(_native.__file__).with_name("_kernel.pyi").read_text())
    classes = [x for x in stub.body if isinstance(x, ast.ClassDef) and x.name != "_Kernel"]
    bodies = {"": stub.body, **{x.name: x.body for x in classes}}
    for name, body in bodies.items():
        found = getattr(_native.kernel, name) if name else _native.kernel
        names = {x.name for x in body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
        public = {x for x in names if not x.startswith("_")}
        assert public == {x for x in vars(found) if not x.startswith("__")}, name
