"""Updates of dask arrays are lazy, exact, and take few tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from conftest import need
from conftest import unit_lars as Lars
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Container, lars_update
from lars_tree.report import layer_table

da = need("dask.array")


def lazy(log, x, chunks=5):
    """A dask array that logs when a chunk is computed."""

    def note(block):
        log.append(block.shape)
        return block

    array = da.from_array(x, chunks=chunks)
    return array.map_blocks(note, dtype=x.dtype, meta=np.empty((0,) * x.ndim, x.dtype))


def arrays(shape, dtype, count=2, seed=0):
    rng = np.random.default_rng(seed)
    found = [rng.normal(size=shape) for _ in range(count)]
    if np.dtype(dtype).kind == "c":
        found = [x + 1j * rng.normal(size=shape) for x in found]
    return [x.astype(dtype) for x in found]


def assert_close(actual, expected):
    """Equal but for the order of the sums of squares, in double or better."""
    actual = np.asarray(actual.compute())
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if expected.dtype.name == "bfloat16":
        actual, expected, eps = actual.astype(float), expected.astype(float), 2.0**-7
    else:
        eps = max(np.finfo(expected.dtype).eps, 2.0**-53)  # the options are doubles
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * eps * np.max(np.abs(expected)))


def test_nothing_is_computed_until_asked():
    log = []
    w, g = arrays(17, np.float32)
    trees = [Container(a=lazy(log, x)) for x in (w, g)]
    new = trees[0].lars_update(trees[1], 0.1, decay_lambda=0.1, nonfinite="skip", trust_clip=True)
    assert log == []
    assert new.a.chunks == trees[0].a.chunks
    assert new.a.dtype == np.float32
    expected = lars_update(w, g, 0.1, decay_lambda=0.1, trust_clip=True)
    np.testing.assert_allclose(new.a.compute(), expected, rtol=1e-7)
    assert log


def test_gradients_broadcast_and_empty_arrays_pass():
    w = {"a": da.ones((3, 4), chunks=2), "b": da.ones((0, 3)), "c": da.ones(())}
    new = lars_update(w, {"a": da.ones(4), "b": da.ones(3), "c": 1.0}, 0.1)
    assert {key: x.shape for key, x in new.items()} == {"a": (3, 4), "b": (0, 3), "c": ()}
    assert float(new["c"].compute()) == pytest.approx(0.9)


OPTIONS = {
    "decay": {"decay_lambda": 0.1},
    "clip": {"trust_clip": True, "trust_coefficient": 0.02, "eps": 1e-8},
    "joint": {"joint_norm": True, "decay_lambda": 3.0, "grad_scale": 0.5},
    "fixed": {"adapt": False, "decay_lambda": 0.1},
    "stacked": {"layer_axis": -2, "decay_lambda": 0.1, "trust_clip": True},
    "stacked joint": {"layer_axis": 0, "decay_lambda": 0.1, "joint_norm": True},
}
DTYPES = ["float16", "float32", "float64", "longdouble", "complex64", "complex128"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunked_step_is_that_of_the_whole_array(dtype, options):
    w, g = arrays((7, 6, 5), dtype)
    expected = lars_update(w, g, 0.1, **options)
    for w_chunks, g_chunks in ((3, 3), (3, (2, 4, 5)), ((7, 2, 1), -1), ((0, 7), -1)):
        w_chunks = ((0, 7), 6, 5) if w_chunks == (0, 7) else w_chunks
        ours = da.from_array(w, chunks=w_chunks), da.from_array(g, chunks=g_chunks)
        new = lars_update(*ours, 0.1, **options)
        assert new.chunks == ours[0].chunks
        assert_close(new, expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_momentum_is_that_of_the_whole_array(dtype, nesterov):
    dtype = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    w, *gs = arrays((7, 5), dtype, count=3)
    opt = Lars(0.1, momentum=0.9, nesterov=nesterov, decay_lambda=0.1)
    ours, expected = da.from_array(w, chunks=3), w
    states = [opt.init(x) for x in (ours, w)]
    for g in gs:
        ours, states[0] = opt.update(ours, da.from_array(g, chunks=2), states[0])
        expected, states[1] = opt.update(expected, g, states[1])
    assert ours.chunks == states[0].velocity.chunks == ((3, 3, 1), (3, 2))
    assert_close(ours, expected)
    assert_close(states[0].velocity, states[1].velocity)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("chunks", [1, 2, 4, -1])
def test_the_results_have_the_chunks_of_the_weights(chunks, nonfinite):
    """Also the velocity, if that of a saved state has other chunks, and with other operands."""
    xs = arrays((7, 5), np.float32, count=3)
    w, g, v = (da.from_array(x, chunks=n) for x, n in zip(xs, (3, chunks, chunks), strict=True))
    options = {"nonfinite": nonfinite, "decay_lambda": 0.1}
    opt, opt_of_numpy = Lars(da.full((7, 5), 0.1, chunks=chunks), **options), Lars(0.1, **options)
    new, state = opt.update(w, g, {**opt.init(w), "velocity": v})
    assert new.chunks == state.velocity.chunks == w.chunks
    expected = opt_of_numpy.update(*xs[:2], {**opt_of_numpy.init(xs[0]), "velocity": xs[2]})
    assert_close(new, expected[0])
    assert_close(state.velocity, expected[1].velocity)


def test_options_may_be_lazy_and_rates_may_have_a_shape():
    w, g = arrays((6, 5), np.float32)
    rates = np.linspace(0, 1, 5)
    numbers = {"decay_lambda": 0.1, "eps": 1e-3, "grad_scale": 8.0}
    log = []
    for extra in ({}, {"joint_norm": True}, {"trust_clip": True}, {"layer_axis": 1}):
        expected = lars_update(w, g, rates, **numbers, **extra)
        given = {key: lazy(log, np.array(x), ()) for key, x in numbers.items()}
        ours = [da.from_array(x, chunks=2) for x in (w, g)]
        for lr in (rates, da.from_array(rates, chunks=3), da.from_array(rates[None], chunks=1)):
            assert_close(lars_update(*ours, lr, **given, **extra), expected)
    assert set(log) == {()}


def test_a_broadcast_gradient_has_the_norm_of_the_whole():
    w = np.ones((4, 6))
    for g in (np.arange(6.0), np.arange(4.0)[:, None], np.array(2.0), np.arange(6.0)[None]):
        new = lars_update(da.from_array(w, chunks=(3, 2)), da.from_array(g, chunks=5), 0.1)
        assert_close(new, lars_update(w, g, 0.1))


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1 + 1e-6), ("float64", 4)])
@given(data=st.data(), decay=st.sampled_from([0.0, 1e-4, 3.0]))
def test_chunks_of_all_magnitudes_make_one_norm(dtype, bound, joint, data, decay):
    """Some chunks are scaled, others not, and some are zero."""
    lowest, highest = np.finfo(dtype).minexp, np.finfo(dtype).maxexp - 5
    middle = data.draw(st.integers(lowest, highest))
    near = st.integers(max(lowest, middle - 200), min(highest, middle + 200))

    def drawn(size):
        numbers = st.floats(1, 2, width=32) | st.just(0.0)
        pairs = [(data.draw(numbers), data.draw(near)) for _ in range(size)]
        return np.array([math.ldexp(x, exponent) for x, exponent in pairs], dtype)

    size = data.draw(st.integers(1, 6))
    w, g = drawn(size), drawn(size)
    options = {"decay_lambda": decay, "joint_norm": joint}
    new = lars_update(da.from_array(w, chunks=1), da.from_array(g, chunks=1), 0.1, **options)
    step = reference.lars(w.tolist(), g.tolist(), 0.1, **options)
    new = new.compute(scheduler="synchronous")
    assert reference.worst_error(new.tolist(), w.tolist(), step, dtype) <= bound


def test_an_infinite_chunk_makes_the_norm_infinite():
    """Not NaN, next to chunks of any scale: a ratio of 0 leaves finite elements unchanged."""
    for other in (1e-300, 1.0, 1e300):
        w, g = np.array([2.0, 1.0]), np.array([other, np.inf])
        new = lars_update(da.from_array(w, chunks=1), da.from_array(g, chunks=1), 0.1)
        np.testing.assert_array_equal(new.compute(), lars_update(w, g, 0.1))


def tasks_added(new, *inputs):
    keys = set().union(*(x.__dask_graph__() for x in new))
    return len(keys - set().union(*(x.__dask_graph__() for x in inputs)))


@pytest.mark.parametrize(
    ("options", "per_chunk"),
    [({}, 3), ({"decay_lambda": 0.1, "trust_clip": True}, 3), ({"adapt": False}, 1)],
)
def test_there_are_few_tasks_per_chunk(options, per_chunk):
    """The sums of squares, the first level of the tree, the step; and a tree over 16 chunks."""
    for dtype, more in (("float32", 0), ("float64", 2)):
        for blocks in (1, 4, 16):
            w, g = (da.ones((blocks, blocks), chunks=1, dtype=dtype) for _ in range(2))
            chunks = blocks**2
            tree = sum(max(1, chunks // 16**level) for level in range(1, 4)) if per_chunk > 1 else 0
            assert (
                tasks_added([lars_update(w, g, 0.1, **options)], w, g) <= per_chunk * chunks + tree
            )
            joint = {**options, "joint_norm": True, "decay_lambda": 0.1}
            if options.get("adapt", True):
                count = tasks_added([lars_update(w, g, 0.1, **joint)], w, g)
                assert count <= (per_chunk + more) * chunks + (1 + more // 2) * tree
            opt = Lars(0.1, **options, momentum=0.9)
            state = opt.init(w)
            new, state = opt.update(w, g, state)
            count = tasks_added([new, state.velocity], w, g, opt.init(w).velocity)
            assert count <= (per_chunk + 2) * chunks + tree


def test_each_chunk_of_the_inputs_is_computed_once():
    """Dask's optimization does not repeat the work before an update in each phase."""
    w, g = arrays((20, 20), np.float64)
    log = []
    ours = [lazy(log, x) + 1 for x in (w, g)]
    lars_update(*ours, 0.1, decay_lambda=0.1, joint_norm=True, nonfinite="skip").compute()
    assert len(log) == 2 * math.prod(ours[0].numblocks)


def test_equal_updates_have_equal_names():
    w, g = (da.from_array(x, chunks=2) for x in arrays(5, np.float32))
    assert lars_update(w, g, 0.1).name == lars_update(w, g, 0.1).name
    assert lars_update(w, g, 0.1).name != lars_update(w, g, 0.2).name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore::lars_tree.report.TrustRatioWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_ratios_are_those_of_the_whole_array(dtype, options):
    w, g = arrays((7, 6, 5), dtype)
    for lr in (0.1, np.linspace(0.1, 1, 5)):
        expected = layer_table({"a": w}, {"a": g}, lr, **options).records
        ours = [{"a": da.from_array(x, chunks=(3, 2, 4))} for x in (w, g)]
        actual = layer_table(*ours, lr, **options).records
        for row, other in zip(actual, expected, strict=True):
            assert row.keys() == other.keys()
            assert all(
                x == other[name]
                if isinstance(x, (str, tuple))
                else x == pytest.approx(other[name], rel=1e-13)
                for name, x in row.items()
            )
