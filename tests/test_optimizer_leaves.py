"""Lars with special leaves: inference tensors, leaves that are not floating point, JAX arrays."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
from conftest import need, to_library
from conftest import unit_lars as Lars
from test_optimizer import G, W, steps

from lars_tree import Array, DtypeError, LeafError

# ---- Inference tensors, to which torch allows writing only in inference mode


def inferred(torch, x):
    with torch.inference_mode():
        return torch.tensor(np.asarray(x))


OPTIONS = {
    "fast path": {},
    "guarded": {"nonfinite": "skip"},
    "layers": {"layer_axis": 0},
    "rates": {"lr": np.array([0.1, 0.1])},
    "graph": {"stop_gradients": False},
}


@pytest.mark.parametrize("which", ["w", "velocity", "step", "skipped", "dcdw", "all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_inference_tensors_are_updated_like_other_tensors(name, which):
    torch = need("torch")
    opt = Lars(**{"lr": 0.1, **OPTIONS[name]})
    made = {
        name: inferred(torch, x) if which in (name, "all") else torch.tensor(np.asarray(x))
        for name, x in {"w": W, "dcdw": G, "velocity": G, "step": 3, "skipped": 1}.items()
    }
    copies = {name: x.clone() for name, x in made.items()}
    keys = ("step", "skipped", "velocity")
    expected, after = opt.update(copies["w"], copies["dcdw"], {name: copies[name] for name in keys})
    state = {name: made[name] for name in keys}
    for out in (None, made["w"]):
        new, moved = opt.update(made["w"], made["dcdw"], state, out=out)
        assert torch.equal(new, expected)
        assert torch.equal(moved["velocity"], after["velocity"])
        assert (int(moved["step"]), int(moved["skipped"])) == (4, 1)
    assert new is made["w"]


# ---- Leaves that are not floating point are never updated and have no velocity


def a_key():
    return need("jax").random.key(0)


def quantized():
    torch = need("torch")
    warnings.simplefilter("ignore", UserWarning)  # torch deprecates quantized tensors
    return torch._empty_affine_quantized([2], scale=0.1, zero_point=0, dtype=torch.qint8)


def strings():
    return np.array(["a", "b"])


def integers():
    return np.array([1, 2])


@pytest.mark.parametrize("make", [a_key, quantized, strings, integers], ids=lambda f: f.__name__)
def test_leaves_that_are_not_floating_point_are_kept(make):
    opt, other = Lars(0.1), make()
    w, g = {"a": W, "b": other}, {"a": G, "b": None}
    state = opt.init(w)
    assert state.velocity.b is None
    new, after = steps(opt, w, [g, g])
    assert type(new["b"]) is type(other)
    assert new["b"].shape == other.shape
    assert after.velocity.b is None
    expected, wanted = steps(opt, {"a": W}, [{"a": G}] * 2)
    assert np.array_equal(new["a"], expected["a"])
    assert np.array_equal(after.velocity.a, wanted.velocity.a)
    w["a"] = W.copy()
    opt.update(w, g, state, out=w)
    assert not np.array_equal(w["a"], W)
    assert w["b"] is other
    with pytest.raises((DtypeError, LeafError), match="b: expected float16"):
        opt.update({"a": W, "b": make()}, {"a": G, "b": make()}, opt.init(w))


def test_an_integer_velocity_of_an_older_version_is_kept():
    opt, w = Lars(0.1), {"a": W, "b": np.array([1, 2])}
    state = opt.init(w)
    state.velocity["b"] = np.zeros(2, int)
    before = copy.deepcopy(state.velocity.b)
    _, after = opt.update(w, {"a": G, "b": None}, state)
    assert np.array_equal(after.velocity.b, before)


# ---- JAX: one compilation for all steps, and devices


@pytest.mark.parametrize("where", ["uncommitted", "first", "last", "Auto", "Explicit"])
def test_a_step_is_compiled_once(where):
    jax = need("jax")
    sharding = {"first": jax.devices()[0], "last": jax.devices()[-1]}.get(where)
    if where in ("Auto", "Explicit"):
        kind = getattr(jax.sharding.AxisType, where)
        mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w = jax.numpy.arange(8.0)
    w = w if sharding is None else jax.device_put(w, sharding)
    state = OPT.init(w)
    assert all(x.committed == w.committed for x in state.leaves())
    assert all(x.devices() == w.devices() for x in state.leaves())
    update = jax.jit(OPT.update)
    for _ in range(3):
        w, state = update(w, w, state)
    assert update._cache_size() == 1
    assert int(state.step) == 3


def test_velocities_of_uncommitted_jax_arrays_are_on_their_device():
    jax = need("jax")
    with jax.default_device(jax.devices()[2]):
        w = jax.numpy.ones(3)
    state = OPT.init(w)
    assert state.velocity.devices() == w.devices() == {jax.devices()[2]}
    assert not state.velocity.committed


OPT = Lars(0.1)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_counters_may_be_wrapped_arrays(name):
    opt, w, g = Lars(0.1), to_library(name, W), to_library(name, G)
    state = opt.init(w)
    for counter in ("step", "skipped"):
        state[counter] = Array(state[counter])
    for _ in range(2):
        _, state = opt.update(w, g, state)
        opt.update(w, g, state, out=w)
    assert [type(state[counter]) for counter in ("step", "skipped")] == [Array, Array]
    assert (int(state.step), int(state.skipped)) == (4, 0)
