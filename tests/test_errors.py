"""Messages of errors, and errors of single calls.

`tests/reliability/faults.py` tries every kind of invalid leaf at every leaf of a tree.
"""

from __future__ import annotations

import ast
import operator
from pathlib import Path

import numpy as np
import pytest
from conftest import need

import lars_tree
from lars_tree import (
    BackendError,
    Container,
    LarsTreeError,
    LeafError,
    OptionError,
    OutError,
    ShapeError,
    StructureError,
    errors,
    lars_update,
)


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
