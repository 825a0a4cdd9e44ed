"""Which JAX arrays the native engine supports; all other JAX arrays take the general path."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import CI, need

from lars_tree import Array, BackendError, LeafError, ShapeError, _native, lars_update
from lars_tree._backends.wrapper import unwrap
from lars_tree._core.advance import matched
from lars_tree._core.native import Native
from lars_tree._core.options import DEFAULTS
from lars_tree.optimizer import Lars
from lars_tree.report import trust_ratios
from lars_tree.testing import assert_identical

if _native.kernel is None and (not CI or os.environ.get("LARS_TREE_NATIVE") == "0"):
    pytest.skip("the native kernel was not built, or is turned off", allow_module_level=True)

jax = need("jax")
jnp = jax.numpy

from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
SHAPES = [(), (3, 4), (0,), (300, 301)]  # JAX takes results of the last shape without a copy


def array(shape=(3, 4), dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    with jax.enable_x64(True):
        return jnp.asarray(x + 1j * x[::-1] if "complex" in dtype and x.ndim else x, dtype)


def arrays(dtype, seed):
    return [array(shape, dtype, seed) for shape in SHAPES]


def native_engine(w, g):
    return Native(matched(w, g, {**DEFAULTS, "lr": 0.1})[0])


def rest(w, g):
    return native_engine(w, g).rest


def on(device, x):
    return jax.device_put(x, jax.devices()[device])


def on_uncommitted(device, x):
    with jax.default_device(jax.devices()[device]):
        return jnp.asarray(np.asarray(x))


def deleted():
    x = array() + 1
    x.delete()
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_arrays_are_supported_and_get_the_bits_of_the_twin(dtype, monkeypatch):
    w, g = arrays(dtype, 1), arrays(dtype, 2)
    lars = Lars(0.1, 0.9, weight_decay=0.01, nesterov=True)
    state = lars.init(w)
    assert rest(w, g) == []
    actual = lars_update(w, g, 0.1, decay_lambda=0.01), lars.update(w, g, state)
    monkeypatch.setattr(_native, "kernel", None)
    assert_identical(actual, (lars_update(w, g, 0.1, decay_lambda=0.01), lars.update(w, g, state)))


# Weights and gradients that take the general path.
ODD = {
    "another library for the gradient": lambda: (array(), np.ones((3, 4), np.float32)),
    "broadcast gradient": lambda: (array(), array((4,))),
    "deleted gradient": lambda: (array(), deleted()),
    "deleted weights": lambda: (deleted(), array()),
    "devices that differ": lambda: (on(0, array()), on(1, array())),
    "gradient elsewhere, not committed": lambda: (array(), on(1, array())),
    "integers": lambda: (jnp.arange(3), None),
    "more axes than numpy has": lambda: (jnp.ones((1,) * 65), jnp.ones((1,) * 65)),
    "no gradient": lambda: (array(), None),
    "number for a gradient": lambda: (array(), 0.5),
    "random key": lambda: (jax.random.key(0), array()),
    "shape that does not fit": lambda: (array(), array((5,))),
    "short floats": lambda: (jnp.ones(3, jnp.float8_e4m3fn), jnp.ones(3)),
    "two devices": lambda: (sharded(), sharded()),
    "reference": lambda: (jax.new_ref(array()), array()),
}


def sharded():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    return jax.device_put(array((4, 4)), NamedSharding(mesh, PartitionSpec("x")))


def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("kind", ODD)
def test_an_unsupported_leaf_gets_the_result_of_the_general_path(kind, monkeypatch):
    odd, gradient = ODD[kind]()
    w, g = [array(), odd, array((5,))], [array(), gradient, array((5,))]
    if not isinstance(odd, jax.Array) or not jnp.issubdtype(odd.dtype, jax.dtypes.prng_key):
        assert rest(w, g) == [1]
    actual = outcome(lambda: lars_update(w, g, 0.1))
    monkeypatch.setattr(_native, "kernel", None)
    expected = outcome(lambda: lars_update(w, g, 0.1))
    if isinstance(actual, str):
        assert actual == expected
    else:
        assert_identical(actual, expected)


def test_the_errors_of_the_general_path_name_the_leaf():
    for kind, error in {
        "deleted weights": LeafError,
        "devices that differ": BackendError,
        "shape that does not fit": ShapeError,
    }.items():
        odd, gradient = ODD[kind]()
        with pytest.raises(error, match="\n  1: expected"):
            lars_update([array(), odd], [array(), gradient], 0.1)


def test_arrays_in_wrappers_are_supported():
    w, g = [array(), Array(array())], [array(), Array(array(seed=1))]
    assert rest(w, g) == []
    new = lars_update(w, g, 0.1)[1]
    assert isinstance(new, Array)
    assert_identical(unwrap(new), lars_update(array(), array(seed=1), 0.1))


def test_results_have_the_device_and_commitment_of_the_weights():
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[2:3])
    over_one = NamedSharding(mesh, PartitionSpec("x"))
    w = [on(1, array()), on_uncommitted(1, array()), jax.device_put(array(), over_one), array()]
    lars = Lars(0.1, 0.9)
    state = lars.init(w)
    assert rest(w, w) == []
    new, state = lars.update(w, w, state)
    for xs in (new, state["velocity"]):
        assert [x.committed for x in xs] == [True, False, True, False]
        assert [x.sharding for x in xs] == [
            SingleDeviceSharding(jax.devices()[1]),
            SingleDeviceSharding(jax.devices()[1]),
            over_one,
            SingleDeviceSharding(jax.devices()[0]),
        ]


def test_memory_is_kept_alive_until_it_was_read():
    w, g = [array() + 1], [array()]
    expected = lars_update(w, g, 0.1)
    step = native_engine(w, g)
    w[0].delete()  # another thread could do this
    step.step()
    assert_identical(np.asarray(step.results.ws[0]), np.asarray(expected[0]))


def test_large_results_are_not_copied():
    w = [array((300, 301)) + 1]
    step = native_engine(w, w)
    step.step()
    address = step.results.ws[0].ctypes.data
    step.finish()
    assert step.results.ws[0].unsafe_buffer_pointer() == address


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_that_is_skipped_under_jit_leaves_constants_unchanged(bad):
    constant, g = array(), array(seed=1)
    update = jax.jit(lambda x: lars_update([x, constant], [x, g], 0.1, nonfinite="skip"))
    actual = update(jnp.full(3, jnp.inf if bad else 1.0))[1]
    assert_identical(actual, constant if bad else lars_update(constant, g, 0.1))


def test_a_skipped_step_leaves_weights_and_velocity_unchanged():
    w, lars = [on(1, array()), array()], Lars(0.1, 0.9, nonfinite="skip")
    state = lars.init(w)
    new, after = lars.update(w, [on(1, array()), array().at[0].set(jnp.nan)], state)
    assert_identical((new, after["velocity"]), (w, state["velocity"]))
    assert (int(after["step"]), int(after["skipped"])) == (0, 1)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_are_the_same_arrays_as_on_the_general_path(dtype, x64, monkeypatch):
    w, g = arrays(dtype, 1), arrays(dtype, 2)
    with jax.enable_x64(x64):
        actual = trust_ratios(w, g, 0.1)
        monkeypatch.setattr(_native, "kernel", None)
        assert_identical(actual, trust_ratios(w, g, 0.1))
