"""Invalid leaves, which every function that reads or writes leaves must refuse.

Invalid leaves are objects with a false `__class__`, arrays without data, and torch tensors that
wrap other tensors. Further tests cover arrays of many axes, and how the backend of a leaf is found.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from conftest import need, to_library, to_numpy

from lars_tree import (
    Array,
    DtypeError,
    Lars,
    LarsTreeError,
    LeafError,
    _backends,
    lars_update,
    report,
)

SHAPE = (2, 3)
KEPT = []  # the objects behind weak proxies


class Proxy:
    """A wrapper whose `__class__` is that of the wrapped object, as in many libraries."""

    def __init__(self, x):
        self.__dict__["_x"] = x

    @property
    def __class__(self):
        return type(self._x)

    def __getattr__(self, name):
        return getattr(self._x, name)


class NoNamespace:
    """Claims to follow the array API standard, but does not."""

    def __array_namespace__(self, *, api_version=None):
        raise ValueError


def plain(name):
    return to_library(name, np.ones(SHAPE, np.float32))


def weak(name):
    KEPT.append(plain(name))
    return weakref.proxy(KEPT[-1])


def gone():
    return weakref.proxy(Proxy(1.0))


def zero_tensor():
    return need("torch")._efficientzerotensor(SHAPE)


def fake():
    need("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(plain("torch"))


def functional():
    return need("torch")._to_functional_tensor(plain("torch"))


def functional_subclass():
    need("torch")
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(plain("torch"))


def prototype(make):
    """Return make(torch), and ignore torch's warning that the class is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(need("torch"))


def masked(torch):
    return torch.masked.masked_tensor(plain("torch"), torch.ones(SHAPE, dtype=torch.bool))


def nested(torch):
    return torch.nested.nested_tensor([plain("torch")])


def escaped():
    found = []
    need("torch").func.vmap(lambda x: (found.append(x), x)[1])(plain("torch").expand(4, *SHAPE))
    return found[0]


def escaped_from_jit():
    found = []
    need("jax").jit(lambda x: (found.append(x), x)[1])(plain("jax"))
    return found[0]


def many_axes(name):
    return plain(name).reshape((*SHAPE, *[1] * 63))


def deleted():
    x = plain("jax")
    x.delete()
    return x


def freed():
    x = plain("torch")
    x.untyped_storage().resize_(0)
    return x


def unknown_shape():
    x = need("dask.array").ones(6)
    return x[x > 0]


# Invalid leaves, each with the library that it appears to belong to.
IMPOSTORS = {
    "mock": (lambda: Mock(spec=np.ndarray), "numpy"),
    "magic mock": (lambda: MagicMock(spec=np.ndarray), "numpy"),
    "mock tensor": (lambda: Mock(spec=need("torch").Tensor), "torch"),
    "mock jax array": (lambda: Mock(spec=need("jax").Array), "jax"),
    "mock Array": (lambda: Mock(spec=Array), "numpy"),
    "mock number": (lambda: MagicMock(spec=float), "numpy"),
    "mock list": (lambda: Mock(spec=list), "numpy"),
    "proxy": (lambda: Proxy(plain("numpy")), "numpy"),
    "proxy of a tensor": (lambda: Proxy(plain("torch")), "torch"),
    "weak proxy": (lambda: weak("numpy"), "numpy"),
    "weak proxy of a tensor": (lambda: weak("torch"), "torch"),
    "proxy of nothing": (gone, "numpy"),
    "no namespace": (lambda: need("array_api_compat") and NoNamespace(), "numpy"),
    "object": (object, "numpy"),
    "string": (lambda: "relu", "numpy"),
}
WITHOUT_DATA = {
    "ZeroTensor": (zero_tensor, "torch"),
    "FakeTensor": (fake, "torch"),
    "functional": (functional, "torch"),
    "FunctionalTensor": (functional_subclass, "torch"),
    "MaskedTensor": (lambda: prototype(masked), "torch"),
    "escaped from vmap": (escaped, "torch"),
    "escaped from jit": (escaped_from_jit, "jax"),
    "65 axes": (lambda: many_axes("torch"), "torch"),
    "65 axes of jax": (lambda: many_axes("jax"), "jax"),
    "lazy parameter": (lambda: need("torch").nn.UninitializedParameter(), "torch"),
    "sparse": (lambda: plain("torch").to_sparse(), "torch"),
    "nested": (lambda: prototype(nested), "torch"),
    "meta": (lambda: plain("torch").to("meta"), "torch"),
    "freed": (freed, "torch"),
    "deleted": (deleted, "jax"),
    "masked": (lambda: np.ma.ones(SHAPE, np.float32), "numpy"),
    "unknown shape": (unknown_shape, "dask"),
    "dask of 33 axes": (lambda: plain("dask").reshape((*SHAPE, *[1] * 31)), "dask"),
}
LEAVES = IMPOSTORS | WITHOUT_DATA
FEW_LEAVES = ("mock", "weak proxy of a tensor", "65 axes of jax", "unknown shape", "meta")


def tree(x, name):
    return {"a": plain(name), "b": [x]}


def stepped(opt, w, g, out, **state):
    return opt.update(w, g, {**opt.init(w), **state}, out=out)


OPT = Lars(0.1)
# Each function gets a valid tree w and a tree x with an invalid leaf at b/0; the string is the name
# of the argument in the error.
CALLS = {
    "w": (lambda w, x: lars_update(x, w, 0.1), "w"),
    "w in place": (lambda w, x: lars_update(x, w, 0.1, out=x), "w"),
    "w on the general path": (lambda w, x: lars_update(x, w, np.full(SHAPE, 0.1)), "w"),
    "dcdw": (lambda w, x: lars_update(w, x, 0.1), "dcdw"),
    "out": (lambda w, x: lars_update(w, w, 0.1, out=x), "out"),
    "lr": (lambda w, x: lars_update(w, w, {"a": 0.1, "b": x["b"]}), "lr"),
    "eps": (lambda w, x: lars_update(w, w, 0.1, eps={"a": 0.1, "b": x["b"]}), "eps"),
    "velocity": (lambda w, x: stepped(OPT, w, w, None, velocity=x), "state"),
    "velocity in place": (lambda w, x: stepped(OPT, w, w, w, velocity=x), "state"),
    "w of Lars": (lambda w, x: OPT.update(x, w, OPT.init(w)), "w"),
    "init": (lambda w, x: OPT.init(x), "w"),
    "init without momentum": (lambda w, x: Lars(0.1, momentum=0).init(x), "w"),
    "trust_ratios of w": (lambda w, x: report.trust_ratios(x, w, 0.1), "w"),
    "trust_ratios of dcdw": (lambda w, x: report.trust_ratios(w, x, 0.1), "dcdw"),
    "layer_table": (lambda w, x: report.layer_table(x, w, 0.1), "w"),
    "TrustHistory": (lambda w, x: report.TrustHistory().record({"b": x["b"]}), "ratios"),
    "ScalarCallback": (lambda w, x: report.ScalarCallback(None)({"b": x["b"]}, 0), "ratios"),
}


CASES = [(leaf, call) for call in ("w", "dcdw", "out", "velocity in place") for leaf in LEAVES]
CASES += [(leaf, call) for call in CALLS for leaf in FEW_LEAVES if (leaf, call) not in CASES]


@pytest.mark.parametrize(("leaf", "call"), CASES)
def test_an_invalid_leaf_is_refused_with_its_path(leaf, call):
    make, name = LEAVES[leaf]
    function, argument = CALLS[call]
    if name in ("jax", "dask") and ("out" in call or "in place" in call):
        pytest.skip("its arrays are immutable")
    w, x = tree(plain(name), name), tree(make(), name)
    with pytest.raises(LarsTreeError) as caught:
        function(w, x)
    assert caught.value.argument == argument
    assert caught.value.paths == (("b", 0),)
    assert (to_numpy(w["a"]) == 1).all()
    assert (to_numpy(x["a"]) == 1).all()


@pytest.mark.parametrize("leaf", LEAVES)
def test_init_and_update_refuse_a_leaf_with_the_same_message(leaf):
    make, name = LEAVES[leaf]
    messages = []
    for call in (lambda x: OPT.init(x), lambda x: lars_update(x, tree(plain(name), name), 0.1)):
        with pytest.raises(LeafError) as caught:
            call(tree(make(), name))
        messages.append(str(caught.value).partition(" object at")[0])
    assert messages[0] == messages[1]


def test_init_refuses_arrays_of_objects_and_keeps_arrays_that_are_not_floating_point():
    objects = np.array([object(), 1.0])
    with pytest.raises(DtypeError, match=r"b/0: expected float16.*got object"):
        OPT.init({"a": np.ones(2), "b": [objects]})
    kept = {"n": None, "i": np.arange(3), "t": np.array([True]), "s": np.array(["x"])}
    state = OPT.init({"a": np.ones(2), **kept})
    assert {key: state.velocity[key] for key in kept} == dict.fromkeys(kept)
    assert state.velocity.a.tolist() == [0, 0]


def test_init_keeps_integers_of_any_library(library):
    w = {"a": np.ones(2), "b": np.arange(3)}
    state = OPT.init({key: to_library(library.name, x) for key, x in w.items()})
    assert to_numpy(state.velocity.a).tolist() == [0, 0]
    assert state.velocity.b is None


@pytest.mark.parametrize("leaf", IMPOSTORS)
def test_leaves_without_a_gradient_may_be_any_objects(leaf):
    x = IMPOSTORS[leaf][0]()
    assert lars_update({"a": np.ones(2), "b": x}, {"a": 1.0, "b": None}, 0.1)["b"] is x


def test_fake_tensors_work_in_their_mode():
    need("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    real, mode = plain("torch"), FakeTensorMode()
    w = mode.from_tensor(real)
    with mode:
        assert type(lars_update(w, w, 0.1)) is type(w)
        assert lars_update(w, w, 0.1, out=w) is w
        with pytest.raises(LeafError, match=r"dcdw: .* a tensor that is not a FakeTensor"):
            lars_update(w, real, 0.1)
    assert type(OPT.init(real).velocity) is type(real)


@pytest.mark.parametrize("leaf", ["ZeroTensor", "FakeTensor", "functional", "freed"])
@pytest.mark.parametrize("role", ["parameter", "gradient"])
def test_torch_lars_refuses_tensors_without_data(role, leaf):
    torch = need("torch")
    from lars_tree.torch import Lars as Optimizer

    def step():
        given = {"parameter": plain("torch"), "gradient": plain("torch")}
        given[role] = WITHOUT_DATA[leaf][0]()
        w = torch.nn.Parameter(given["parameter"])
        w.grad = given["gradient"]
        Optimizer([torch.nn.Parameter(plain("torch")), w], lr=0.1).step()

    with pytest.raises(LeafError, match="expected dense data"):
        step()


def test_functional_tensors_work_in_their_transform():
    torch = need("torch")
    w, expected = plain("torch"), lars_update(plain("torch"), 1.0, 0.1)
    step = torch.func.functionalize(lambda w, out: lars_update(w, w, 0.1, out=out))
    assert torch.equal(step(w, None), expected)
    assert torch.equal(step(w, w), expected)
    assert torch.equal(w, expected)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "strict"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "skip"},
        {"layer_axis": 0},
        {"layer_axis": -1},
        {"lr": np.full(SHAPE, 0.1)},
        {"dcdw": np.full((3,), 0.5)},
        {"dcdw": 0.5},
        {"strides": lambda x: np.asfortranarray(x)},
        {"strides": lambda x: np.repeat(x, 2, axis=1)[:, ::2]},
    ],
    ids=["plain", "guarded", "first axis", "last axis", "rates", "row", "number", "F", "strided"],
)
def test_arrays_of_64_axes_are_updated_like_those_of_two(options, name):
    """Axes of length 1 at the front only shift the indices of the other axes."""
    ones = (1,) * 62

    def step(more):
        def shaped(x):
            return x.reshape(more + x.shape) if np.ndim(x) == 2 else x

        given = {"dcdw": np.ones(SHAPE), "lr": 0.1, "strides": lambda x: x} | options
        w = shaped(given.pop("strides")(np.arange(1.0, 7).reshape(SHAPE)))
        dcdw, lr = (shaped(given.pop(key)) for key in ("dcdw", "lr"))
        if more and given.get("layer_axis") == 0:
            given["layer_axis"] = len(more)
        w = to_library(name, w) if name != "numpy" else w
        dcdw = to_library(name, dcdw) if np.ndim(dcdw) else dcdw
        new = to_numpy(lars_update(w, dcdw, lr, decay_lambda=0.1, **given))
        if name != "jax":
            lars_update(w, dcdw, lr, decay_lambda=0.1, out=w, **given)
            assert np.array_equal(to_numpy(w), new)
        given.pop("nonfinite", None)
        ratios = to_numpy(report.trust_ratios(new, given.pop("dcdw", 1.0), lr, **given))
        return new.reshape(SHAPE), ratios

    for actual, expected in zip(step(ones), step(()), strict=True):
        assert np.array_equal(actual, expected)


def test_a_gradient_that_does_not_broadcast_to_many_axes_is_refused():
    w = np.ones((2, *[1] * 62))
    for shape in [(3,), (3, *[1] * 62), (1, *w.shape[:-1], 2)]:
        with pytest.raises(LarsTreeError, match="expected a shape that broadcasts to"):
            lars_update(w, np.ones(shape), 0.1)


# How the backend of a leaf is found


@pytest.mark.parametrize("name", ["numpy", "torch", None])
def test_local_classes_of_arrays_are_freed(name):
    base = {"numpy": np.ndarray, "torch": getattr(need("torch"), "Tensor", None)}.get(name, object)
    cls = type("Local", (base,), {})
    if name == "numpy":
        x = np.ones(2).view(cls)
    else:
        x = cls() if name is None else plain("torch").as_subclass(cls)
    for _ in range(2):
        assert getattr(_backends.find(x), "name", None) == name
    seen = weakref.ref(cls)
    del cls, x
    gc.collect()
    assert seen() is None


def test_tracers_of_one_class_may_be_arrays_or_references():
    jax = need("jax")
    code = jax.jit(lambda ref: (_backends.find(ref), lars_update(ref[...], 1.0, 0.1))[1])
    ref = jax.new_ref(jax.numpy.array([3.0, 4.0]))
    assert code(ref).shape == (2,)
    with pytest.raises(LeafError, match="a reference to an array"):
        jax.jit(lambda ref: lars_update(ref, ref, 0.1))(ref)
