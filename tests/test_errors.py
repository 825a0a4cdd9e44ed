"""Invalid input is refused at the first, a middle and the last leaf, in each mode of update.

After each refused call, the bytes of w, dcdw and out are unchanged.
"""

from __future__ import annotations

import ast
import operator
from pathlib import Path

import numpy as np
import pytest
from conftest import need
from faults import check, drop, numpy_call, ones, option, other_w_and_out, put, rename, tie
from numpy.lib.stride_tricks import as_strided

import lars_tree
from lars_tree import (
    BackendError,
    Container,
    DtypeError,
    LarsTreeError,
    LeafError,
    NonFiniteError,
    OptionError,
    OutError,
    ShapeError,
    StructureError,
    errors,
    lars_update,
)

INPUTS = {
    "dcdw lacks a key": (drop("g"), StructureError, "dcdw"),
    "dcdw has a misspelt key": (rename("g"), StructureError, "dcdw"),
    "dcdw has a node for a leaf": (put("g", {"u": 1.0}), StructureError, "dcdw"),
    "dcdw is a list": (put("g", [1.0, 2.0]), StructureError, "dcdw"),
    "dcdw is an object": (put("g", object), LeafError, "dcdw"),
    "dcdw is a string": (put("g", "1.0"), LeafError, "dcdw"),
    "dcdw is a bool": (put("g", True), LeafError, "dcdw"),
    "dcdw has another shape": (put("g", ones(np.float32, (3, 2))), ShapeError, "dcdw"),
    "dcdw has more axes": (put("g", ones(np.float32, (1, 2, 3))), ShapeError, "dcdw"),
    "dcdw is integer": (put("g", ones(int)), DtypeError, "dcdw"),
    "dcdw is an array of bool": (put("g", ones(bool)), DtypeError, "dcdw"),
    "dcdw is an array of objects": (put("g", ones(object)), DtypeError, "dcdw"),
    "dcdw is an array of strings": (put("g", ones("U3")), DtypeError, "dcdw"),
    "dcdw is an array of dates": (put("g", ones("M8[s]")), DtypeError, "dcdw"),
    "dcdw is complex, w real": (put("g", ones(complex)), DtypeError, "dcdw"),
    "dcdw is a complex number": (put("g", 1j), DtypeError, "dcdw"),
    "dcdw is masked": (put("g", lambda: np.ma.ones((2, 3))), LeafError, "dcdw"),
    "dcdw is of another library": (
        put("g", lambda: need("torch").ones(2, 3)),
        BackendError,
        "dcdw",
    ),
    "w is integer": (other_w_and_out(ones(int)), DtypeError, "w"),
    "w is an array of bool": (other_w_and_out(ones(bool)), DtypeError, "w"),
    "w is an array of objects": (other_w_and_out(ones(object)), DtypeError, "w"),
    "w is an array of strings": (other_w_and_out(ones("U3")), DtypeError, "w"),
    "w is an array of dates": (other_w_and_out(ones("M8[s]")), DtypeError, "w"),
    "w is complex, dcdw real": (other_w_and_out(ones(complex)), DtypeError, "dcdw"),
    "w is an object": (other_w_and_out(object), LeafError, "w"),
    "w is a number": (other_w_and_out(lambda: 1.0), LeafError, "w"),
    "w is a list": (other_w_and_out(lambda: [1.0, 2.0]), LeafError, "w"),
    "lr has a bad shape": (option("lr", np.ones(2)), ShapeError, "lr"),
    "eps has a shape": (option("eps", np.ones(3)), OptionError, "eps"),
    "layer_axis is out of range": (option("layer_axis", 2), OptionError, "layer_axis"),
    "layer_axis is not an integer": (option("layer_axis", 0.5), OptionError, "layer_axis"),
    "axis_name is not a name": (option("axis_name", 0), OptionError, "axis_name"),
    "axis_name outside of shard_map": (option("axis_name", "x"), OptionError, "axis_name"),
    "nonfinite is misspelt": (option("nonfinite", "rais"), OptionError, "nonfinite"),
    "adapt is not a bool": (option("adapt", 1), OptionError, "adapt"),
    "trust_clip is not a bool": (option("trust_clip", "yes"), OptionError, "trust_clip"),
    "stop_gradients is not a bool": (option("stop_gradients", None), OptionError, "stop_gradients"),
    "the new weights are not finite": (
        put("g", lambda: np.full((2, 3), np.nan), nonfinite="raise"),
        NonFiniteError,
        "dcdw",
    ),
}
BAD_NUMBERS = [np.nan, np.inf, -0.5, True, np.True_, 1j, "0.1", None, 10**400, np.array([-1.0] * 3)]
for _name in ("lr", "decay_lambda", "eps", "trust_coefficient", "grad_scale"):
    for _bad in BAD_NUMBERS:
        INPUTS[f"{_name} is {_bad!r:.20}"] = (option(_name, _bad), OptionError, _name)
INPUTS["grad_scale is 0"] = (option("grad_scale", 0.0), OptionError, "grad_scale")


def read_only():
    x = np.zeros((2, 3), np.float32)
    x.flags.writeable = False
    return x


OUTS = {
    "out lacks a key": (drop("out"), StructureError, "out"),
    "out has a node for a leaf": (put("out", {"u": 1.0}), StructureError, "out"),
    "out is None": (put("out", None), LeafError, "out"),
    "out is a number": (put("out", 1.0), LeafError, "out"),
    "out has another shape": (put("out", ones(np.float32, (1, 2, 3))), OutError, "out"),
    "out has another dtype": (put("out", ones(np.float64)), OutError, "out"),
    "out is of another library": (
        put("out", lambda: need("torch").zeros(2, 3)),
        BackendError,
        "out",
    ),
    "out is read-only": (put("out", read_only), OutError, "out"),
    "out overlaps itself": (
        put("out", lambda: as_strided(np.zeros(4, np.float32), (2, 3), (4, 4))),
        OutError,
        "out",
    ),
    "two leaves of out are one": (tie, OutError, "out"),
}


@pytest.mark.parametrize(
    ("mode", "key"), [("new", "a"), ("in place", "c"), ("in place", "e"), ("into out", "e")]
)
@pytest.mark.parametrize("case", INPUTS)
def test_invalid_input_is_refused_before_anything_is_written(case, mode, key):
    check(numpy_call(mode), key, *INPUTS[case])


@pytest.mark.parametrize("key", ["a", "c", "e"])
@pytest.mark.parametrize("case", OUTS)
def test_an_invalid_out_is_refused_before_anything_is_written(case, key):
    check(numpy_call("into out"), key, *OUTS[case])


@pytest.mark.parametrize("name", ["jax", "dask"])
def test_the_error_for_immutable_arrays_points_to_the_returned_value(name):
    from conftest import to_library

    need("dask.array" if name == "dask" else name)
    w = {"a": to_library(name, np.ones(3))}
    with pytest.raises(OutError, match="use the returned value"):
        lars_update(w, w, 0.1, out=w)


def test_numpy_scalars_are_immutable():
    with pytest.raises(OutError, match="immutable"):
        lars_update(np.float32(1), np.float32(1), 0.1, out=np.float32(0))


def test_jax_arrays_on_different_devices_are_refused():
    jax = need("jax")
    w, dcdw = (jax.device_put(np.ones(3), device) for device in jax.devices()[:2])
    with pytest.raises(BackendError, match=r"(?s)head.*cpu:0.*cpu:1"):
        lars_update({"head": w}, {"head": dcdw}, 0.1)


def test_a_deleted_jax_array_is_refused():
    jnp = need("jax.numpy")
    w = jnp.ones(3)
    w.delete()
    with pytest.raises(LeafError, match="deleted or donated"):
        lars_update(w, jnp.ones(3), 0.1)


def test_nonfinite_raise_is_refused_for_traced_and_lazy_arrays():
    jax, da = need("jax"), need("dask.array")
    update = jax.jit(lambda w: lars_update(w, w, 0.1, nonfinite="raise"))
    with pytest.raises(OptionError, match="traced or lazy"):
        update(jax.numpy.ones(3))
    with pytest.raises(OptionError, match="traced or lazy"):
        lars_update(da.ones(3), da.ones(3), 0.1, nonfinite="raise")


def test_a_dask_array_of_unknown_shape_is_refused():
    x = need("dask.array").ones(4)
    with pytest.raises(LeafError, match="unknown shape"):
        lars_update(x[x > 0], x[x > 0], 0.1)


def test_a_structure_error_lists_all_paths_and_near_misses():
    w = Container(
        encoder={"l0": {"kernel": np.ones(2), "bias": np.ones(2)}}, head={"w": np.ones(3)}
    )
    g = {"encoder": {"l0": {"kernel": np.ones(2), "bais": np.ones(2)}}, "head": {"w": {"u": 1}}}
    with pytest.raises(StructureError) as caught:
        lars_update(w, g, 0.1)
    assert str(caught.value).splitlines() == [
        "dcdw does not match w",
        "  encoder/l0: missing 'bias'; unexpected 'bais' (did you mean 'bias'?)",
        "  head/w: expected an array of shape (3,), got a dict with keys 'u'",
    ]


def test_a_long_list_of_paths_ends_in_a_count():
    w = {f"layer{i:02}": np.ones(2) for i in range(30)}
    g = {key: np.ones(3) for key in w}
    with pytest.raises(ShapeError) as caught:
        lars_update(w, g, 0.1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[1].startswith("  layer00: expected a shape that broadcasts to (2,), got (3,)")
    assert lines[-1] == "  and 20 more"
    assert len(caught.value.paths) == 30


def test_a_gradient_for_weights_that_are_none_is_refused():
    w = {"a": np.ones(2), "b": None}
    with pytest.raises(StructureError, match="b: expected None"):
        lars_update(w, {"a": np.ones(2), "b": np.ones(2)}, 0.1)
    assert lars_update(w, 1.0, 0.1)["b"] is None


@pytest.mark.parametrize("depth", [50, 100_000])
def test_a_deep_tree_works_or_is_a_recursion_error(depth):
    w = np.ones(1)
    for _ in range(depth):
        w = [w]
    if depth < 100:
        new = lars_update(w, 1.0, 0.1)
        for _ in range(depth):
            (new,) = new
        assert new.tolist() == [0.9]
    else:
        with pytest.raises(RecursionError, match="recursion limit"):
            lars_update(w, 1.0, 0.1)


def test_w_dcdw_and_lr_are_positional_only_and_options_keyword_only():
    with pytest.raises(TypeError):
        lars_update(w=np.ones(2), dcdw=np.ones(2), lr=0.1)
    with pytest.raises(TypeError):
        lars_update(np.ones(2), np.ones(2), 0.1, 0.5)


def directly_made(source):
    """The calls that make an error of the package without its argument and paths."""
    names = {*errors.__all__, "kind"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in names:
            yield node.func.attr
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
            yield node.func.id


def test_all_errors_are_made_with_their_argument_and_paths():
    package = Path(errors.__file__).parent
    found = {
        str(path.relative_to(package)): list(directly_made(path.read_text()))
        for path in package.rglob("*.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {"errors.py": ["kind"]}


W = Container({"a": {"b": 1, "c/d": 2, 0: 3, "0": 4}})
X = np.ones(2)


@pytest.mark.parametrize(
    ("call", "argument", "paths"),
    [
        (lambda: W["a", "x"], "key", [("a", "x")]),
        (lambda: W[()], "key", [()]),
        (lambda: W.a.x, "key", [("x",)]),
        (lambda: W.__missing_method__, "name", [("__missing_method__",)]),
        (lambda: setattr(W, "items", 1), "name", [("items",)]),
        (lambda: operator.setitem(W, ("a", "b", "x"), 1), "key", [("a", "b", "x")]),
        (lambda: W.unflatten([]), "leaves", [()]),
        (lambda: W.merge([1]), "other", [()]),
        (lambda: W.to_flat(), "sep", [("a", "c/d")]),
        (lambda: W.to_flat("."), "sep", [("a", 0), ("a", "0")]),
        (lambda: lars_update(X, X, 0.1, layer_axis=1), "layer_axis", [()]),
        (lambda: lars_tree.schedules.Constant(-1), "rate", []),
        (lambda: lars_tree.schedules.Cosine(1, 2, 3), "total_steps", []),
        (lambda: lars_tree.set_num_threads(0), "n", []),
    ],
)
def test_errors_have_their_argument_and_paths(call, argument, paths):
    with pytest.raises(LarsTreeError) as caught:
        call()
    assert (caught.value.argument, caught.value.paths) == (argument, tuple(paths))
