"""Files of torch state_dicts and optimizer states: a run continues from a saved state."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars

from lars_tree import Array, Container, FileError, StructureError, io, lars_update, schedules
from lars_tree.testing import assert_identical

need("ml_dtypes")
need("safetensors")


@pytest.fixture(params=[".safetensors", ".npz"])
def file(request, tmp_path):
    return tmp_path / f"w{request.param}"


def test_state_dict(tmp_path):
    torch = need("torch")
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    w = io.from_state_dict(module.state_dict())
    assert w["0"].weight.data_ptr() == module[0].weight.data_ptr()
    lars_update(
        w, w.map(lambda x: torch.ones_like(x) if x.is_floating_point() else None), 0.5, out=w
    )
    io.save(w, tmp_path / "w.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    loaded = io.load(tmp_path / "w.safetensors", library="torch")
    assert not other.load_state_dict(io.to_state_dict(loaded)).missing_keys
    for name, x in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], x)
    assert list(io.to_state_dict({"a": [Array(np.ones(1)), None], "b": {}})) == ["a.0"]
    with pytest.raises(StructureError, match="state_dict: expected a mapping of names, got a Seq"):
        io.from_state_dict(module)
    with pytest.raises(StructureError, match="a/b: its name"):
        io.to_state_dict({"a.b": np.ones(1), "a": {"b": np.ones(1)}})


def test_a_run_continues_from_a_saved_state(file):
    w = Container(a=np.array([3.0, 4.0]), b=[np.ones(2, np.float32)])
    g, opt = w.map(np.ones_like), Lars(0.1)
    w, state = opt.update(w, g, opt.init(w))
    io.save({"w": w, "state": state}, file)
    loaded = io.load(file)
    assert_identical(loaded.state, state)
    expected, actual = opt.update(w, g, state), opt.update(loaded.w, g, loaded.state)
    assert_identical(actual, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_run_of_torch_continues_in_torch(dtype, tmp_path):
    torch = need("torch")
    w = Container(a=torch.tensor([3.0, 4.0]), b=[torch.ones(2)]).map(
        lambda x: x.to(getattr(torch, dtype))
    )
    g, opt = w.map(lambda x: 0.3 * x), Lars(schedules.Polynomial(0.1, 10, warmup_steps=2))
    state = opt.init(w)
    for _ in range(3):
        w, state = opt.update(w, g, state)
    io.save({"w": w, "state": state}, tmp_path / "run.safetensors")
    loaded = io.load(tmp_path / "run.safetensors", library="torch")
    assert_identical([loaded.w, loaded.state], [w, state])
    expected = opt.update(w, g, state)
    assert_identical(opt.update(loaded.w, g, loaded.state, out=loaded.w), expected)
    assert loaded.state.step.tolist() == 4  # updated in place


def test_a_run_of_numpy_continues_in_jax(file):
    """JAX has no int64 here; the counters become those of `Lars.init`."""
    jnp = need("jax.numpy")
    w = Container(a=np.array([3, 4], np.float32), b=[np.ones(2, np.float32)])
    g, opt = w.map(np.ones_like), Lars(schedules.Polynomial(0.1, 10, warmup_steps=1))
    state = opt.init(w)
    for _ in range(3):
        w, state = opt.update(w, g, state)
    io.save({"w": w, "state": state}, file)
    loaded = io.load(file, library="jax")
    fresh = opt.init(w.map(jnp.asarray))
    assert [loaded.state[name].dtype for name in ("step", "skipped")] == [fresh.step.dtype] * 2
    new, after = opt.update(loaded.w, g.map(jnp.asarray), loaded.state)
    expected, counted = opt.update(w, g, state)
    assert_identical(new.map(np.asarray), expected)
    assert int(after.step) == int(counted.step) == 4


def test_only_counters_become_shorter_in_jax(file):
    need("jax")
    for x in (np.arange(2), np.array(2**31), np.array(0.1)):
        io.save({"x": x}, file)
        with pytest.raises(FileError, match=f"x: {x.dtype} is disabled in JAX"):
            io.load(file, library="jax")
    with need("jax").enable_x64(True):
        assert io.load(file, library="jax").x.dtype == np.float64
    io.save({"x": np.array(2**31 - 1), "y": np.array(2**32 - 1, np.uint64)}, file)
    loaded = io.load(file, library="jax")
    assert (loaded.x.dtype, loaded.y.dtype) == (np.int32, np.uint32)
    assert (int(loaded.x), int(loaded.y)) == (2**31 - 1, 2**32 - 1)
