"""Laws of lars_update over random trees, prefixes, libraries and options."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple

import attrs
import numpy as np
import pytest
from conftest import LIBRARIES, need, to_library, to_numpy
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lars_tree import Array, Container, lars_update
from lars_tree.testing import (
    arrays,
    assert_identical,
    layers,
    options,
    shuffled,
    weights_and_gradients,
)
from lars_tree.testing.assertions import differences

Point = namedtuple("Point", "x y")


@attrs.define
class Pair:
    one: object
    two: object


DTYPES = st.sampled_from(["float16", "float32", "float64", ">f4", "complex64"])
LAYERS = layers(DTYPES, broadcast=True)


def trees(layers):
    return weights_and_gradients(
        layers | st.just((None, None)),
        node_types=[Container, dict, OrderedDict, defaultdict, list, tuple, Point, Pair],
    )


TREES = trees(LAYERS)


def walk(tree, path=()):
    """(path, leaf) pairs, computed without `lars_tree._tree`."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, Point):
        items = tree._asdict().items()
    elif isinstance(tree, Pair):
        items = attrs.asdict(tree, recurse=False).items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return [(path, tree)]
    return [found for key, child in items for found in walk(child, (*path, key))]


@given(TREES, options())
def test_a_tree_is_updated_like_its_leaves_one_by_one(pair, options):
    w, g = pair
    new = lars_update(w, g, 0.1, **options)
    assert list(differences(new, w, check_type=True, values=False)) == []
    for (_, x), (_, y), (path, actual) in zip(walk(w), walk(g), walk(new), strict=True):
        expected = None if x is None else lars_update(x, y, 0.1, **options)
        assert_identical({path: actual}, {path: expected})


@given(TREES, options())
def test_an_update_in_place_has_the_same_results(pair, options):
    w, g = pair
    before = [None if x is None else x.tobytes() for _, x in walk(g)]
    expected = lars_update(w, g, 0.1, **options)
    old = [(None if x is None else x.ctypes.data) for _, x in walk(w)]
    result = lars_update(w, g, 0.1, out=w, **options)
    assert result is w
    assert_identical(w, expected)
    assert [(None if x is None else x.ctypes.data) for _, x in walk(w)] == old
    assert [None if x is None else x.tobytes() for _, x in walk(g)] == before


@given(TREES)
def test_inputs_are_never_modified(pair):
    before = [[None if x is None else x.tobytes() for _, x in walk(tree)] for tree in pair]
    new = lars_update(*pair, 0.1, decay_lambda=0.1)
    after = [[None if x is None else x.tobytes() for _, x in walk(tree)] for tree in pair]
    assert after == before
    olds = [x for _, x in walk(pair[0]) if x is not None]
    news = [x for _, x in walk(new) if x is not None]
    assert not any(np.shares_memory(x, y) for x, y in zip(olds, news, strict=True))


@given(
    w=arrays("float32", (3, 2)),
    g=hnp.arrays(np.float32, (3, 2), elements=st.floats(-1024, 1024, width=16)),
    power=st.integers(-20, 20),
)
def test_scaling_the_loss_by_a_power_of_two_does_not_change_the_result(w, g, power):
    """A factor c of g cancels in ratio * c * g, to the last bit if c is a power of two."""
    assume(w.any())  # zero weights have ratio 1, whatever the scale
    expected = lars_update(w, g, 0.1)
    assert_identical(lars_update(w, g * np.float32(2.0**power), 0.1), expected)
    if g.any():
        assert_identical(lars_update(w, g, 0.1, grad_scale=2.0**power), expected)


@given(pair=TREES, lr=st.sampled_from([0.0, 0.1, 0.5]), tc=st.sampled_from([1e-3, 1.0]))
def test_the_norm_of_a_step_is_at_most_the_rate_times_that_of_the_weights(pair, lr, tc):
    w, g = pair
    new = lars_update(w, g, lr, trust_coefficient=tc, decay_lambda=0.01)
    for (_, x), (_, dx), (_, y) in zip(walk(w), walk(g), walk(new), strict=True):
        if x is None or not x.size or not np.abs(x).max() or x.dtype.itemsize < 4:
            continue
        if np.abs(x).max() > np.finfo(x.dtype).max / 2:  # the result may be out of range
            continue
        x, y = (z.astype(complex if z.dtype.kind == "c" else float) for z in (x, y))
        scale = np.abs(x).max()
        rounding = 1e-6 * np.sqrt(x.size) + np.finfo(np.float32).tiny / scale
        length = np.linalg.norm(((x - y) / scale).ravel())
        most = tc if dx.any() else 0.01  # with a zero gradient, ratio is 1 and only decay acts
        assert length <= lr * most * np.linalg.norm((x / scale).ravel()) + rounding


TREE = {"encoder": {"kernel": (2, 3), "bias": (3,)}, "head": [(4,), (2, 2)]}


def build(make):
    """A Container of arrays with the shapes of TREE."""
    return Container(
        encoder={key: make(shape) for key, shape in TREE["encoder"].items()},
        head=[make(shape) for shape in TREE["head"]],
    )


def rng_tree(seed):
    rng = np.random.default_rng(seed)
    return build(lambda shape: rng.normal(size=shape).astype(np.float32))


PREFIXED = {
    "lr": (0.1, 0.7),
    "decay_lambda": (0.0, 0.2),
    "trust_coefficient": (1.0, 0.01),
    "eps": (0.0, 0.5),
    "adapt": (True, False),
    "trust_clip": (False, True),
    "joint_norm": (False, True),
    "grad_scale": (1.0, 8.0),
    "layer_axis": (0, -1),
    "nonfinite": ("raise", "skip"),
    "stop_gradients": (True, False),
}


@pytest.mark.parametrize("name", PREFIXED)
def test_a_prefix_gives_its_value_to_each_leaf_below(name):
    first, second = PREFIXED[name]
    w, g = rng_tree(1), rng_tree(2) * 0.1
    prefix = {"head": second, "encoder": first}  # in another key order
    full = Container(head=[second, second], encoder={"bias": first, "kernel": first})

    def update(w, g, value):
        options = {"decay_lambda": 0.1, name: value}
        lr = options.pop("lr", 0.1)
        return lars_update(w, g, lr, **options)

    expected = update(w, g, full)
    assert_identical(update(w, g, prefix), expected)
    alone = {"encoder": update(w.encoder, g.encoder, first), "head": update(w.head, g.head, second)}
    assert_identical(Container(alone), expected)
    if name not in ("nonfinite", "stop_gradients"):  # the two values give different results
        assert expected != update(w, g, first)


def test_a_gradient_may_be_a_prefix():
    w = Container(a={"x": np.ones(3), "y": np.full((2, 3), 2.0)}, b=np.ones(2))
    row = np.array([1.0, 2.0, 3.0])
    expected = lars_update(w, {"a": {"x": row, "y": np.stack([row, row])}, "b": np.ones(2)}, 0.1)
    assert_identical(lars_update(w, {"a": row, "b": 1.0}, 0.1), expected)
    assert_identical(lars_update(w, {"a": row, "b": np.float64(1)}, 0.1), expected)


@given(TREES, st.data())
def test_key_order_does_not_matter(pair, data):
    w, g = pair
    assert_identical(lars_update(w, data.draw(shuffled(g)), 0.1), lars_update(w, g, 0.1))


def test_weights_whose_gradient_is_none_stay_unchanged_and_do_not_decay():
    w = {"a": np.ones(2), "b": np.ones(2), "step": np.arange(3), "name": "resnet"}
    g = {"a": np.ones(2), "b": None, "step": None, "name": None}
    new = lars_update(w, g, 0.1, decay_lambda=0.5)
    assert new["a"].tolist() == [0.9, 0.9]
    assert new["b"].tolist() == [1, 1]
    assert new["b"] is not w["b"]
    assert new["step"].tolist() == [0, 1, 2]
    assert new["name"] == "resnet"
    assert lars_update(w, g, 0.1, decay_lambda=0.5, out=w)["a"].tolist() == [0.9, 0.9]
    assert lars_update({"a": np.ones(2)}, None, 0.1)["a"].tolist() == [1, 1]


@pytest.mark.parametrize(("axis", "decay"), [(0, 0.0), (1, 0.1), (2, 0.0), (-1, 0.1)])
def test_stacked_layers_are_updated_like_layers_one_by_one(library, axis, decay):
    rng = np.random.default_rng(0)
    w = np.moveaxis(rng.normal(size=(2, 3, 4, 5)).astype(np.float32)[:, :, :, :3], 0, 1)
    g = rng.normal(size=w.shape).astype(np.float32)
    options = {"decay_lambda": decay, "trust_clip": True}
    layers = [
        lars_update(np.take(w, i, axis), np.take(g, i, axis), 0.1, **options)
        for i in range(w.shape[axis])
    ]
    stacks = (to_library(library.name, x) for x in (w, g))
    new = to_numpy(lars_update(*stacks, 0.1, layer_axis=axis, **options))
    # Not bitwise: sums run in memory order, which differs between a stack and its slices.
    np.testing.assert_allclose(new, np.stack(layers, axis), rtol=2e-7)


def test_layers_of_one_element_each():
    w, g = np.array([1.0, 2.0, 0.0]), np.array([0.5, -4.0, 3.0])
    assert lars_update(w, g, 0.1, layer_axis=0).tolist() == [0.9, 2.2, -0.30000000000000004]


@given(layers(DTYPES.filter(lambda x: x != ">f4"), broadcast=True, layouts=["C"]), options())
def test_all_libraries_agree(pair, options):
    w, g = pair
    expected = lars_update(w, g, 0.1, **options)
    for library in LIBRARIES:
        if library.exact:
            need(library.module)
            converted = [to_library(library.name, x) for x in (w, g)]
            new = lars_update(*converted, 0.1, **options)
            assert_identical({library.name: new}, {library.name: expected}, check_type=False)


def test_the_memory_order_is_kept_and_alignment_does_not_change_the_result():
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=(40, 500)) for _ in range(2))
    expected = lars_update(w, g, 0.1)
    raw = np.zeros(w.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float64).reshape(w.shape)
    unaligned[...] = w
    assert not unaligned.flags.aligned
    assert_identical(lars_update(unaligned, g, 0.1), expected)
    fortran = lars_update(np.asfortranarray(w), np.asfortranarray(g), 0.1)
    assert fortran.flags.f_contiguous
    np.testing.assert_allclose(fortran, expected, rtol=0, atol=2 * np.spacing(np.abs(w).max()))


def test_an_Array_is_updated_to_an_Array():
    w = Container(a=Array(np.ones(2)), b=np.ones(2))
    new = w.lars_update({"a": np.ones(2), "b": Array(np.ones(2))}, Array(np.array(0.1)))
    assert type(new.a) is Array
    assert type(new.b) is np.ndarray
    assert new.a.data.tolist() == new.b.tolist() == [0.9, 0.9]
    assert w.lars_update(1.0, 0.1, out=w) is w
    assert w.a.data.tolist() == [0.9, 0.9]
