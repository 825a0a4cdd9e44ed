"""Trust ratios and the table of layers agree with the update."""

from __future__ import annotations

import itertools
import re
import warnings
from functools import partial

import numpy as np
import pytest
import reference
from conftest import need, to_library, to_numpy
from hypothesis import given
from hypothesis import strategies as st

import lars_tree
from lars_tree import Array, Container, DtypeError, LeafError, StructureError, lars_update
from lars_tree.report import TrustRatioWarning, layer_table, trust_ratios

OPTIONS = [
    {},
    {"decay_lambda": 0.25},
    {"trust_coefficient": 1e-3, "eps": 1e-2},
    {"trust_clip": True, "trust_coefficient": 10.0},
    {"trust_clip": True, "trust_coefficient": 0.01, "joint_norm": True, "decay_lambda": 0.25},
    {"grad_scale": 1024.0, "decay_lambda": 1e-4, "eps": 1e-6},
    {"adapt": False, "decay_lambda": 0.01, "joint_norm": True},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(shape=(5, 3), dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(dtype) for _ in range(2))


def exact(w, g, **options):
    return reference.lars(w.ravel().tolist(), g.ravel().tolist(), 0.1, **options).ratio


def ulps(actual, ratio):
    assert actual.dtype == np.float64
    return float(abs(reference.mpf(float(actual)) - ratio) / reference.ulp(ratio, "float64"))


@each_option
def test_each_library_gives_the_ratio_of_the_rule(library, options):
    w, g = pair()
    ratio = trust_ratios(to_library(library.name, w), to_library(library.name, g), 0.1, **options)
    assert type(ratio) is not float
    assert ratio.shape == ()
    assert ulps(to_numpy(ratio), exact(w, g, **options)) <= (1 if library.exact else 8)


@each_option
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_ratio_is_exact_over_the_whole_range_of_exponents(name, options):
    rng = np.random.default_rng(0)
    dtype = need("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)
    _, smallest, largest = reference.FORMATS[name]
    for of_w, of_g in itertools.product(np.linspace(smallest, largest, 7).astype(int), repeat=2):
        w, g = (
            np.ldexp(rng.uniform(0.5, 1, 5) * rng.choice([-1, 1], 5), e).astype(dtype)
            for e in (of_w, of_g)
        )
        ratio = exact(w.astype(float), g.astype(float), **options)
        if abs(reference.mp.log(ratio, 2)) < 1000:
            assert ulps(trust_ratios(w, g, 0.1, **options), ratio) <= 3


@each_option
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_ratio_reproduces_the_update(dtype, options):
    """The new w is within 1 ulp (4 for float64) of w - lr * ratio * (g + decay * w)."""
    for seed in range(20):
        w, g = pair(dtype=dtype, seed=seed)
        new = lars_update(w, g, 0.3, **options)
        ratio = trust_ratios(w, g, 0.3, **options)
        long = w.astype(np.longdouble), g.astype(np.longdouble) / options.get("grad_scale", 1.0)
        decay = np.longdouble(options.get("decay_lambda", 0.0))
        step = np.longdouble(0.3) * ratio * (long[1] + decay * long[0])
        off = np.abs(new - (long[0] - step))
        unit = np.spacing(np.maximum(np.abs(w), np.abs(step).astype(dtype)))
        assert (off / unit).max() <= (1 + 1e-6 if dtype == "float32" else 4)


def test_special_layers_have_the_ratio_1(library):
    zeros, ones = np.zeros(3), np.ones(3)
    w = {"zero": zeros, "still": ones, "sgd": ones, "empty": np.ones((0, 2)), "clipped": 9 * ones}
    g = {"zero": ones, "still": zeros, "sgd": 9 * ones, "empty": np.ones((0, 2)), "clipped": ones}
    w, g = ({k: to_library(library.name, x) for k, x in tree.items()} for tree in (w, g))
    adapt = {name: name != "sgd" for name in w}
    ratios = trust_ratios(w, g, 0.1, adapt=adapt, trust_clip=True)
    assert {name: float(to_numpy(x)) for name, x in ratios.items()} == dict.fromkeys(w, 1.0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_layer_axis_has_one_ratio_for_each_index(library, axis):
    w, g = pair((3, 4, 2))
    make = {"layer_axis": axis, "decay_lambda": 0.1, "trust_clip": True}
    ratios = trust_ratios(to_library(library.name, w), to_library(library.name, g), 0.1, **make)
    layers = zip(np.moveaxis(w, axis, 0), np.moveaxis(g, axis, 0), strict=True)
    expected = [trust_ratios(*layer, 0.1, decay_lambda=0.1, trust_clip=True) for layer in layers]
    np.testing.assert_allclose(
        to_numpy(ratios), expected, rtol=1e-6 if library.name == "jax" else 1e-15
    )


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=str)
def test_ratios_work_under_jit(options):
    jax = need("jax")
    w = Container(a=jax.numpy.array([3.0, 4.0]), b=[jax.numpy.zeros(2), jax.numpy.ones((2, 2))])
    g = Container(a=0.5, b=[1.0, 2.0])
    call = partial(trust_ratios, layer_axis={"a": None, "b": 0}, **options)
    found = jax.jit(lambda w, lr: call(w, g, lr))
    ratios, expected = found(w, 0.1), call(w, g, 0.1)
    assert type(ratios) is Container
    assert ratios.allclose(expected, rtol=1e-6)
    assert [x.shape for x in ratios.leaves()] == [(), (2,), (2,)]
    assert {x.dtype for x in ratios.leaves()} == {np.dtype("float32")}
    with jax.enable_x64(True):
        assert found(w, 0.1).a.dtype == np.float64


def test_ratios_are_differentiable_without_stop_gradients():
    jax, torch = need("jax"), need("torch")
    w, g = np.array([3.0, 4.0], np.float32), np.array([0.0, 10.0], np.float32)
    for stops, expected in ((True, [0, 0]), (False, [0.06, 0.08])):  # slope w / |w| / |g|
        by_jax = jax.grad(lambda w, g, stops: trust_ratios(w, g, 0.1, stop_gradients=stops))
        assert by_jax(jax.numpy.asarray(w), jax.numpy.asarray(g), stops).tolist() == pytest.approx(
            expected
        )
        w_torch = torch.tensor(w, requires_grad=True)
        ratio = trust_ratios(w_torch, torch.tensor(g), 0.1, stop_gradients=stops)
        assert ratio.requires_grad != stops
        if not stops:
            assert torch.autograd.grad(ratio, w_torch)[0].tolist() == pytest.approx(expected)


def test_zero_weights_move_by_rate_times_gradient():
    jax = need("jax")
    w, g = jax.numpy.zeros(2), jax.numpy.array([1e36, 0.0])
    assert float(jax.jit(trust_ratios)(w, g, 0.1)) == 1
    assert jax.jit(lars_update)(w, g, 0.1).tolist() == pytest.approx([-1e35, 0])


def test_tiny_weights_with_zero_gradient_decay_by_the_rate():
    """The step is lr * decay_lambda * w, whatever the trust coefficient."""
    jax, torch = need("jax"), need("torch")
    from test_torch import many

    from lars_tree._numerics.formula import Rule

    options = {"decay_lambda": 1.0, "trust_coefficient": 2.0**20}
    w = np.full(3, 2.0**-1000)
    with jax.enable_x64(True):
        update = jax.jit(lambda w: lars_update(w, 0 * w, 0.5, **options))
        assert update(w).tolist() == [2.0**-1001] * 3
    w = torch.full((3,), 2.0**-100)
    (new,) = many([(w, 0 * w)], [Rule(0.5, **options)])
    assert new.tolist() == [2.0**-101] * 3


# Trees


def test_the_result_has_the_nodes_of_w(library):
    one = to_library(library.name, np.ones(2))
    w = Container(a=one, b=[one, (one,)], c={"wrapped": Array(one), "none": None, "frozen": one})
    g = {"a": 1.0, "b": 2.0, "c": {"wrapped": 1.0, "none": None, "frozen": None}}
    ratios = trust_ratios(w, g, 0.1)
    assert list(ratios) == ["a", "b", "c"]
    assert [type(x) for x in (ratios, ratios.b, ratios.b[1], ratios.c)] == [
        Container,
        list,
        tuple,
        Container,
    ]
    assert type(ratios.c.wrapped) is Array
    assert (ratios.c.none, ratios.c.frozen) == (None, None)
    assert float(to_numpy(ratios.b[1][0])) == 0.5
    assert type(trust_ratios({"a": one}, 1.0, 0.1)) is dict


def test_options_are_prefixes_matched_by_key():
    w = Container(a={"x": np.ones(4), "y": np.ones(4)}, b=np.ones(4))
    ratios = trust_ratios(w, 1.0, 0.1, trust_coefficient={"b": 3.0, "a": {"y": 1.0, "x": 2.0}})
    assert ratios.to_dict() == {"a": {"x": 2.0, "y": 1.0}, "b": 3.0}


@pytest.mark.parametrize("function", [trust_ratios, layer_table])
def test_wrong_arguments_are_refused_as_by_the_update(function):
    w = Container(a={"kernel": np.ones(2)})
    with pytest.raises(StructureError, match="did you mean 'kernel'"):
        function(w, {"a": {"kernal": np.ones(2)}}, 0.1)
    with pytest.raises(DtypeError, match="a/kernel: expected"):
        function(w.map(lambda x: x.astype(int)), 1.0, 0.1)
    with pytest.raises(lars_tree.OptionError, match="lr has an invalid value"):
        function(w, 1.0, -1.0)
    with pytest.raises(TypeError, match=r"weight_decay.*decay_lambda"):
        function(w, 1.0, 0.1, weight_decay=1)
    loop = Container()
    dict.__setitem__(loop, "self", loop)
    with pytest.raises(StructureError, match="w contains itself"):
        function(loop, 1.0, 0.1)


def test_nothing_is_modified(library):
    w, g = (to_library(library.name, x) for x in pair())
    before = [to_numpy(x).copy() for x in (w, g)]
    trust_ratios(w, g, 0.1)
    layer_table(w, g, 0.1)
    for x, old in zip((w, g), before, strict=True):
        assert (to_numpy(x) == old).all()


# The multi-tensor operations for torch accelerators, run in CPU memory


@each_option
def test_multi_tensor_ratios_agree_with_separate_ratios(options, monkeypatch):
    torch = need("torch")
    from lars_tree._backends.base import Leaf
    from lars_tree._backends.torch import multi_tensor, tensors
    from lars_tree._core.options import DEFAULTS, resolve

    monkeypatch.setattr(tensors, "has_float64", lambda device: False)
    shapes = [(3, 4), (), (5,), (2, 3, 2)]
    pairs = [
        [torch.tensor(x) for x in pair(shape, np.float32, i)] for i, shape in enumerate(shapes)
    ]
    pairs += [(torch.zeros(3), torch.full((3,), 1e36)), (torch.full((3,), 1e-38), torch.zeros(3))]
    axes = [None, None, None, 1, None, None]
    leaves = [
        Leaf(
            0,
            w,
            g,
            None,
            resolve(w, {**DEFAULTS, "lr": 0.1, "layer_axis": axis, **options}, 1)[0],
            None,
        )
        for (w, g), axis in zip(pairs, axes, strict=True)
    ]

    class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.name() not in {"aten::_local_scalar_dense", "aten::item", "aten::equal"}
            return func(*args, **(kwargs or {}))

    with NoWaiting():
        found = multi_tensor.measure(leaves)
    for measured, (w, g), axis in zip(found, pairs, axes, strict=True):
        expected = trust_ratios(w, g, 0.1, layer_axis=axis, **options)
        assert measured.ratio.dtype == torch.float32
        np.testing.assert_allclose(measured.ratio, expected, rtol=1e-6)


# The table


def table_of(w, g, lr=0.1, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrustRatioWarning)
        return layer_table(w, g, lr, **options).records


@pytest.mark.parametrize("options", OPTIONS[3:6], ids=str)
def test_a_row_has_the_norms_and_the_step_of_the_update(library, options):
    w, g = pair()
    (row,) = table_of(to_library(library.name, w), to_library(library.name, g), 0.3, **options)
    dtype = row.pop("dtype")
    assert "float64" in dtype
    step = w - lars_update(w, g, 0.3, **options)
    ratio = float(trust_ratios(w, g, 0.3, **options))
    assert row == {
        "path": "",
        "shape": (5, 3),
        "parameters": 15,
        "w_norm": pytest.approx(np.linalg.norm(w), rel=1e-6),
        "g_norm": pytest.approx(np.linalg.norm(g) / options.get("grad_scale", 1), rel=1e-6),
        "ratio": pytest.approx(ratio, rel=1e-6),
        "relative_step": pytest.approx(np.linalg.norm(step) / np.linalg.norm(w), rel=1e-6),
        "clipped": options.get("trust_coefficient") == 10,
        "adapted": True,
    }


def test_rows_are_layers_not_arrays():
    w = Container(stack=np.ones((4, 3, 2)), frozen=np.ones(2, np.int32), text="x", none=None)
    g = {"stack": np.ones((4, 3, 2)), "frozen": None, "text": None, "none": None}
    rows = table_of(w, g, layer_axis={"stack": 1, "frozen": None, "text": None, "none": None})
    assert [row["path"] for row in rows] == ["stack[0]", "stack[1]", "stack[2]", "frozen"]
    assert [row["shape"] for row in rows] == [(4, 2)] * 3 + [(2,)]
    assert rows[3] == {
        "path": "frozen",
        "shape": (2,),
        "dtype": "int32",
        "parameters": 2,
        **dict.fromkeys(("w_norm", "g_norm", "ratio", "relative_step")),
        "clipped": False,
        "adapted": True,
    }


def test_a_rate_with_a_shape_counts_in_the_step():
    w, g = np.array([3.0, 4.0]), np.array([0.0, 5.0])
    (row,) = table_of(w, g, np.array([7.0, 0.5]))
    assert row["relative_step"] == pytest.approx(0.5)  # lr * ratio * |g| / |w|


def test_the_table_as_text_and_markdown():
    w = Container(a={"kernel": np.ones((30, 40))}, b=np.zeros(2), c=np.ones(2))
    g = {"a": {"kernel": np.full((30, 40), 2.0)}, "b": 1.0, "c": None}
    table = layer_table(w, g, 0.1)
    assert repr(table).splitlines() == [
        "3 layers, 1,204 parameters",
        "  path      shape     dtype    parameters    |w|    |g|  ratio  |u| / |w|",
        "  a/kernel  (30, 40)  float64       1,200  34.64  69.28    0.5        0.1",
        "  b         (2,)      float64           2      0  1.414      1        inf",
        "  c         (2,)      float64           2      -      -      -          -",
    ]
    assert table.to_markdown().splitlines()[:3] == [
        r"| path | shape | dtype | parameters | \|w\| | \|g\| | ratio | \|u\| / \|w\| |",
        "| :--- | :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
        "| a/kernel | (30, 40) | float64 | 1,200 | 34.64 | 69.28 | 0.5 | 0.1 |",
    ]
    assert len(table) == 3
    assert [row["path"] for row in table] == ["a/kernel", "b", "c"]
    page = table._repr_html_()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page)[:4] == [
        "a/kernel",
        "(30, 40)",
        "float64",
        "1,200",
    ]
    need("rich")
    from rich.console import Console

    console = Console(width=120, record=True, file=need("io").StringIO())
    console.print(table)
    assert re.search(r"a/kernel.*34\.64.*69\.28.*0\.5", console.export_text())


def test_a_long_table_is_cut_where_it_is_shown():
    table = layer_table({f"l{i}": np.ones(1) for i in range(100)}, 1.0, 0.1)
    lines = repr(table).splitlines()
    assert (len(lines), lines[-1]) == (63, "  ... and 40 more; `records` has all")
    page = table._repr_html_()
    assert (page.count("<tr>"), "... and 40 more" in page) == (61, True)
    assert len(table.to_markdown().splitlines()) == 102
    assert repr(layer_table({}, 1.0, 0.1)).splitlines()[0] == "0 layers, 0 parameters"


def test_layers_with_unusual_ratios_are_named_in_a_warning():
    w = {"fine": np.ones(2), "nan": np.full(2, np.nan), "inf": np.ones(2), "large": np.full(2, 8.0)}
    g = {"fine": 1.0, "nan": 1.0, "inf": np.inf, "large": 1.0}
    with pytest.warns(TrustRatioWarning) as caught:
        table = layer_table(w, g, 1.0, trust_clip=True)
    (warning,) = caught
    assert str(warning.message).splitlines() == [
        "some layers have odd trust ratios",
        "  nan: ratio is nan, as |w| is nan and |g| is 1.41421",
        "  inf: ratio is 0, as |w| is 1.41421 and |g| is inf",
        "  large: ratio is clipped to 1 from 8",
    ]
    assert warning.filename == __file__
    assert [row["clipped"] for row in table] == [False, False, False, True]
    assert "1 (clipped)" in repr(table)


@pytest.mark.parametrize("compiled", [lambda fn: fn, lambda fn: need("jax").jit(fn)])
def test_trust_clip_uses_the_rate_of_each_stacked_layer(compiled):
    given = np.array([[3.0, 4.0]] * 2), np.array([[0.4, 0.3]] * 2), np.array([[0.25], [1.0]])
    measure = partial(trust_ratios, trust_clip=True, trust_coefficient=0.02, layer_axis=0)
    assert to_numpy(compiled(measure)(*given)).tolist() == pytest.approx([0.8, 0.2])


def test_usual_ratios_cause_no_warning():
    w = {"zeros": np.zeros(2), "still": np.ones(2), "sgd": np.ones(2), "below": np.ones(2)}
    g = {"zeros": 1.0, "still": 0.0, "sgd": 0.1, "below": 5.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_table(w, g, 1.0, trust_clip=True, adapt={name: name != "sgd" for name in w})


def test_a_table_of_traced_values_is_refused():
    jax = need("jax")
    with pytest.raises(LeafError, match="values of w are not known yet"):
        jax.jit(lambda w: layer_table(w, 1.0, 0.1))(jax.numpy.ones(2))


@given(st.integers(0, 2**32 - 1), st.sampled_from(OPTIONS))
def test_ratios_do_not_depend_on_the_tree_or_the_rate(seed, options):
    w, g = pair((7,), seed=seed)
    alone = trust_ratios(w, g, 0.1, **options)
    rate = 0.1 if "trust_clip" in options else 5.0  # clipping depends on the rate
    nested = trust_ratios({"a": [w, {"b": 2 * w}]}, {"a": [g, {"b": g}]}, rate, **options)
    assert nested["a"][0] == alone
