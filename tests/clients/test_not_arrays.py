"""Objects that hold numbers but are not arrays: the message names their type and a conversion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from conftest import need

from lars_tree import (
    Array,
    Container,
    Lars,
    LeafError,
    OutError,
    StructureError,
    io,
    lars_update,
    report,
)


@dataclass
class Params:
    kernel: object


class Lazy:
    """Like a dataset in a file: numpy can read it."""

    shape = (2, 3)

    def __array__(self, dtype=None, copy=None):
        return np.ones(self.shape)


def data_frame():
    return need("pandas").DataFrame(np.ones((2, 3)))


# How to make an object; how the message names it; and what to do instead.
OBJECTS = {
    "data frame": (data_frame, "a pandas.DataFrame of shape (2, 3)", ".to_numpy()"),
    "series": (lambda: data_frame()[0], "a pandas.Series of shape (2,)", ".to_numpy()"),
    "sparse": (
        lambda: need("scipy.sparse").csr_matrix(np.eye(2)),
        "a scipy.sparse.csr_matrix of shape (2, 2)",
        ".toarray()",
    ),
    "sparse array": (
        lambda: need("scipy.sparse").coo_array(np.eye(2)),
        "a scipy.sparse.coo_array of shape (2, 2)",
        ".toarray()",
    ),
    "shape of jax": (
        lambda: need("jax").ShapeDtypeStruct((2, 3), np.float32),
        "a jax.ShapeDtypeStruct of shape (2, 3)",
        "",
    ),
    "lazy": (Lazy, "a test_not_arrays.Lazy of shape (2, 3)", "numpy.asarray"),
    "memoryview": (lambda: memoryview(b"ab"), "a memoryview of shape (2,)", ""),
    "module of torch": (
        lambda: need("torch").nn.Linear(2, 3),
        "a Linear",
        "or use lars_tree.torch.Lars",
    ),
}


@pytest.fixture(params=OBJECTS)
def example(request):
    make, *texts = OBJECTS[request.param]
    return make(), *texts


def test_the_message_names_the_type_and_what_to_do(example):
    x, name, hint = example
    w, g = {"a": {"b": np.ones((2, 3))}}, {"a": {"b": np.ones((2, 3))}}
    calls = {
        "w": lambda: lars_update({"a": {"b": x}}, g, 0.1),
        "dcdw": lambda: lars_update(w, {"a": {"b": x}}, 0.1),
        "out": lambda: lars_update(w, g, 0.1, out={"a": {"b": x}}),
    }
    for argument, call in calls.items():
        with pytest.raises(LeafError) as caught:
            call()
        assert f"a/b: expected an array, got {name}" in str(caught.value)
        assert str(caught.value).endswith(hint)
        assert (caught.value.argument, caught.value.paths) == (argument, (("a", "b"),))
    with pytest.raises(LeafError, match="a/b: expected an array, got"):
        Lars(0.1).init({"a": {"b": x}})
    with pytest.raises(LeafError, match="w: expected an array, got"):
        report.trust_ratios(x, g["a"]["b"], 0.1)


def test_a_structure_error_names_the_type(example):
    x, name, _ = example
    w = {"a": {"b": np.ones((2, 3))}}
    with pytest.raises(StructureError) as caught:
        lars_update(w, {"a": x}, [0.1])
    assert "array" not in str(caught.value).replace("sparse array", "")
    with pytest.raises(StructureError) as caught:
        lars_update({"a": x}, w, 0.1)
    assert str(caught.value).endswith(f"a: expected {name}, got a dict with keys 'b'")


def test_a_file_and_an_array_name_the_type(tmp_path):
    with pytest.raises(LeafError, match=r"a: expected an array, got a pandas.DataFrame of shape"):
        io.save(Container(a=data_frame()), tmp_path / "w.npz")
    with pytest.raises(LeafError, match=r"got a pandas.DataFrame of shape \(2, 3\)"):
        Array(data_frame())


def test_a_dataclass_that_is_not_registered():
    w = {"x": Params(np.ones(2))}
    with pytest.raises(LeafError, match=r"x: expected an array, got a Params: register its class"):
        lars_update(w, np.ones(2), 0.1)


def test_arrays_are_still_called_arrays():
    for x in (np.ones((2, 3)), need("torch").ones(2, 3), need("jax").numpy.ones((2, 3))):
        with pytest.raises(StructureError, match=r"expected an array of shape \(2, 3\), got a di"):
            lars_update({"a": x}, {"a": {"b": 1.0}}, 0.1)


# Leaves that are not arrays


def test_a_leaf_without_a_gradient_is_kept_whatever_it_is():
    w = {"a": len, "b": "relu", "c": 0.5, "d": data_frame(), "e": np.array([3.0, 4.0])}
    g = {**dict.fromkeys("abcd"), "e": np.array([0.0, 10.0])}
    new = lars_update(w, g, 0.1)
    assert all(new[key] is w[key] for key in "abcd")
    assert new["e"].tolist() == [3, 3.5]
    assert lars_update(w, g, 0.1, out=w) is w
    assert w["e"].tolist() == [3, 3.5]


def test_an_optimizer_keeps_leaves_that_are_not_arrays():
    """Its state has None for them; `init` refuses them, because they may be mistakes."""
    w = {"a": len, "b": "relu", "c": 0.5, "e": np.array([3.0, 4.0])}
    others = dict.fromkeys("abc")
    opt = Lars(0.1, trust_coefficient=1.0, eps=0.0)
    with pytest.raises(LeafError, match=r"a: expected an array, got a .*: select the arrays"):
        opt.init(w)
    state = opt.init(w | others)
    new, state = opt.update(w, {**others, "e": np.array([0.0, 10.0])}, state)
    assert all(new[key] is w[key] for key in "abc")
    assert (new["e"].tolist(), state.velocity.e.tolist()) == ([3, 3.5], [0, 0.5])
    with pytest.raises(LeafError, match=r"a: expected an array, got a .*: select the arrays"):
        opt.update(w, {**others, "a": 1.0, "e": None}, state)


def test_out_must_hold_the_same_object():
    w = {"a": len, "e": np.array([3.0, 4.0])}
    g = {"a": None, "e": np.array([0.0, 10.0])}
    out = {"a": max, "e": np.zeros(2)}
    with pytest.raises(LeafError, match="out holds something that is not an array") as caught:
        lars_update(w, g, 0.1, out=out)
    assert (caught.value.argument, caught.value.paths) == ("out", (("a",),))
    assert out["e"].tolist() == [0, 0]
    out["a"] = len
    assert lars_update(w, g, 0.1, out=out)["e"].tolist() == [3, 3.5]


def test_a_model_of_torch_is_not_a_tree():
    model = need("torch").nn.Linear(2, 3)
    with pytest.raises(LeafError, match=r"give dict\(model.named_parameters\(\)\)"):
        lars_update(model, 1.0, 0.1)


def test_errors_of_out_are_errors_of_the_package():
    with pytest.raises((LeafError, OutError)):
        lars_update(np.ones(2), np.ones(2), 0.1, out=data_frame())
