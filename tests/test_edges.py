"""Inputs for which the package once failed."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict

import attrs
import numpy as np
import pytest
from conftest import need, to_library, to_numpy

from lars_tree import Container, LeafError, OptionError, OutError, lars_update


def freed():
    x = need("torch").ones(2)
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("name", ["w", "lr", "eps", "adapt", "nonfinite"])
def test_freed_memory_is_never_read_even_to_show_it(name):
    torch = need("torch")
    w, g, options = torch.ones(2), torch.ones(2), {"lr": 0.1}
    if name == "w":
        w, g = freed(), None
    else:
        options[name] = freed()
    with pytest.raises((LeafError, OptionError), match="freed"):
        lars_update(w, g, options.pop("lr"), **options)


def test_storages_can_still_be_resized_after_an_update():
    torch = need("torch")
    w, g, lr = torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.tensor(0.1)
    lars_update(w, g, lr, out=w)
    assert Container(w=w) == Container(w=w.clone())
    for x in (w, g, lr):
        assert x.untyped_storage().resizable()
        x.untyped_storage().resize_(0)


def test_tracing_records_the_step():
    torch = need("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    w, g = (torch.tensor(x, dtype=torch.float64) for x in ([3.0, 4.0], [0.4, 0.3]))
    traced = make_fx(lambda w: lars_update(w, g, 0.1))(w)
    assert traced(2 * w).tolist() == pytest.approx(lars_update(2 * w, g, 0.1).tolist())


def test_tied_weights_of_a_subclass_or_of_any_library_are_refused(library):
    if not library.mutable:
        pytest.skip("nothing can be written in place")
    x = to_library(library.name, np.ones(2))
    if library.name == "torch":

        class Sub(need("torch").Tensor):
            pass

        x = x.as_subclass(Sub)
    w = {"a": x, "b": x}
    with pytest.raises(OutError, match="b: shares memory with a"):
        lars_update(w, 1.0, 0.1, out=w)
    assert to_numpy(x).tolist() == [1, 1]


class Reversed(dict):
    def __iter__(self):
        return iter(reversed(list(dict.keys(self))))


class AttributeDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Twice(list):
    def __init__(self, item):
        super().__init__([item, item])


class Two(tuple):
    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


@attrs.define
class Private:
    _kernel: object
    bias: object = attrs.field(converter=lambda x: x * 2)
    cache: object = attrs.field(init=False, default=None)


@pytest.mark.parametrize("make", [Reversed, AttributeDict, OrderedDict, Container])
def test_dict_subclasses_keep_each_weight_under_its_key(make):
    w = make({"k": np.array([1.0]), "l": np.array([5.0])})
    new = lars_update(w, 1.0, 0.5, adapt=False)
    assert type(new) is make
    assert {key: dict.__getitem__(new, key).tolist() for key in "kl"} == {"k": [0.5], "l": [4.5]}
    if make is AttributeDict:
        assert new.k is new["k"]


def test_sequences_and_classes_with_own_constructors():
    one, two = np.array([1.0]), np.array([2.0])
    assert lars_update(Two(one, two), 1.0, 0.5, adapt=False) == Two(
        np.array([0.5]), np.array([1.5])
    )
    new = lars_update(Twice(one), 1.0, 0.5, adapt=False)
    assert (type(new), len(new), new[1].tolist()) == (Twice, 2, [0.5])
    private = lars_update(Private(one, two), {"_kernel": 1.0, "bias": 1.0, "cache": None}, 0.0)
    assert (private._kernel.tolist(), private.bias.tolist()) == ([1.0], [4.0])


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_scalar_gradient_is_not_rounded_to_half_precision(name):
    w = to_library(name, np.array([3.0, 4.0], np.float16))
    assert to_numpy(lars_update(w, 1e6, 1e-6, adapt=False)).tolist() == [2, 3]


@pytest.mark.parametrize("name", ["torch", "jax", "strict"])
def test_rates_of_any_layout_serve_every_library(name):
    w, rates = np.array([3.0, 4.0]), np.array([0.2, 0.1], np.longdouble)[::-1]
    expected = lars_update(w, w, np.array([0.1, 0.2]))
    ours = to_library(name, w)
    options = {"stop_gradients": False}
    if name == "torch":
        ours.requires_grad_()
    new = to_numpy(lars_update(ours, to_library(name, w), rates, **options))
    np.testing.assert_allclose(new, expected, rtol=1e-15)


def test_vmap_over_rates():
    torch = need("torch")
    w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.4, 0.3])
    new = torch.func.vmap(lambda lr: lars_update(w, g, lr))(torch.tensor([0.1, 0.2]))
    assert new.flatten().tolist() == pytest.approx([2.6, 3.7, 2.2, 3.4])


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_complex_steps_have_gradients_in_single_precision(axis):
    jax = need("jax")

    def loss(w):
        g = w[::-1] * (0.5 + 1j)
        new = lars_update(w, g, 0.1, decay_lambda=0.1, stop_gradients=False, layer_axis=axis)
        return (new.real**2).sum() + new.imag.sum()

    w = jax.numpy.array([[3.0 + 1j, 4.0 - 2j], [1j, 2.0]])
    gradient = np.asarray(jax.grad(loss)(w))
    step = 1e-2
    for k in range(4):
        for direction in (1, 1j):
            shift = np.zeros((2, 2), complex)
            shift.flat[k] = direction * step
            slope = float(loss(w + shift) - loss(w - shift)) / (2 * step)
            ours = (gradient.flat[k] * direction).real
            assert ours == pytest.approx(slope, rel=1e-2, abs=1e-2)


def test_a_skipped_step_has_the_gradients_of_no_step():
    torch = need("torch")
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    bad = torch.tensor([1.0, float("nan")])
    lars_update(w, bad, 0.1, nonfinite="skip", stop_gradients=False).sum().backward()
    assert w.grad.tolist() == [1, 1]


def test_traced_values_cannot_decide_about_other_arrays():
    jax = need("jax")
    w = jax.numpy.ones(2)
    with pytest.raises(OptionError, match="nonfinite"):
        jax.jit(lambda lr: lars_update(w, w, lr, nonfinite="raise"))(0.1)
    with pytest.raises(OptionError, match="nonfinite"):
        jax.jit(lambda a: lars_update({"a": a, "b": np.ones(2)}, 1.0, 0.1, nonfinite="skip"))(w)


def test_out_is_refused_for_rates_in_a_graph():
    torch = need("torch")
    w, lr = torch.ones(2), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(OutError, match="graph"):
        lars_update(w, w, lr, stop_gradients=False, out=torch.zeros(2))


def test_results_are_freed_without_the_garbage_collector():
    gc.disable()
    try:
        new = lars_update(Container(a=[np.ones(3)]), 1.0, 0.1)
        seen = weakref.ref(new["a"][0])
        del new
        assert seen() is None
    finally:
        gc.enable()


def test_weights_without_a_gradient_are_copied_on_dask():
    da = need("dask.array")
    w = {"a": da.ones(3)}
    new = lars_update(w, {"a": None}, 0.1)
    new["a"][0] = 99
    assert w["a"].compute().tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", ["Decimal('sNaN')", "np.timedelta64(3, 's')"])
def test_numbers_of_unusual_types_are_refused_as_rates(bad):
    from decimal import Decimal  # noqa: F401

    with pytest.raises(OptionError):
        lars_update(np.ones(2), 1.0, eval(bad))


def test_a_number_beyond_all_floats_is_infinite():
    assert lars_update(np.ones(2), 10**400, 0.1, nonfinite="skip").tolist() == [1, 1]


def test_bfloat16_of_another_byte_order_is_refused():
    foreign = np.dtype(need("ml_dtypes").bfloat16).newbyteorder(">")
    with pytest.raises(TypeError, match="w is not floating point"):
        lars_update(np.ones(2).astype(foreign), 1.0, 0.1)


def test_axes_that_interleave_without_sharing_elements_are_no_overlap():
    """The elements of the two rows are at 0, 3 and 2, 5: an as_strided view of numpy."""
    memory = np.ones(6)
    w = np.lib.stride_tricks.as_strided(memory, (2, 2), (16, 24))
    lars_update(w, np.ones((2, 2)), 0.5, out=w)
    assert memory.tolist() == [0.5, 1.0, 0.5, 0.5, 1.0, 0.5]
