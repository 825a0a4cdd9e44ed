"""Libraries that follow the array API standard: updates in place, dtypes, devices."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import need, to_numpy

from lars_tree import BackendError, Container, LeafError, OutError, _backends, lars_update

xp = need("array_api_strict")


def test_in_place_and_into_another_array():
    w, g, out = xp.asarray([3.0, 4.0]), xp.asarray([0.4, 0.3]), xp.zeros(2)
    assert lars_update(w, g, 0.1, out=out) is out
    assert to_numpy(w).tolist() == [3, 4]
    lars_update(w, g, 0.1, out=w)
    assert to_numpy(w).tolist() == to_numpy(out).tolist() == pytest.approx([2.6, 3.7])


def test_the_device_and_the_dtype_are_kept():
    device = xp.Device("device1")
    w = xp.ones(3, dtype=xp.float32, device=device)
    new = lars_update(w, w, xp.asarray(0.1), decay_lambda=0.1)
    assert (new.device, new.dtype) == (device, xp.float32)
    with pytest.raises(BackendError, match="device1"):
        lars_update(w, xp.ones(3, dtype=xp.float32), 0.1)


def test_complex_and_a_rate_for_each_element():
    w = xp.asarray([3 + 4j, 0j])
    new = lars_update(w, w, np.array([0.1, 0.5]))
    assert to_numpy(new).tolist() == pytest.approx([2.7 + 3.6j, 0])


def test_leaves_that_overlap_are_refused():
    memory = xp.asarray(np.arange(1.0, 11.0))
    w = {"a": memory[:6], "b": memory[4:]}
    with pytest.raises(OutError, match="b: shares memory with a"):
        lars_update(w, {"a": xp.ones(6), "b": xp.ones(6)}, 0.1, out=w)
    assert to_numpy(memory).tolist() == list(range(1, 11))


def test_the_memory_of_an_array_on_a_gpu_is_known():
    start = 0x7F0000000000
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (start, False), "strides": (4, 8)}
    x = SimpleNamespace(__cuda_array_interface__={**interface, "version": 3})
    memory = _backends.find(xp.ones(1)).memory(x)
    assert (memory.ctypes.data, memory.shape, memory.strides) == (start, (2, 3), (4, 8))


def test_an_unknown_object_is_not_taken_for_an_array():
    class Pretender:
        shape = (2,)
        dtype = float

    with pytest.raises(TypeError, match="expected an array, got"):
        lars_update(Pretender(), np.ones(2), 0.1)


def test_array_api_compat_is_missing(monkeypatch):
    """Errors name the leaf and the command; a Container that holds the array is shown."""
    from lars_tree._backends import standard

    w = Container(a=xp.asarray([3.0, 4.0]))
    monkeypatch.setattr(standard, "array_api_compat", None)
    monkeypatch.setattr(standard, "_BACKENDS", {})
    monkeypatch.setattr(_backends, "_CACHE", {type(None): None})
    with pytest.raises(
        LeafError, match=r"a: .* of array_api_strict, .* pip install array-api-compat"
    ):
        w.lars_update(w, 0.1)
    assert "a  Array that cannot be used" in repr(w)


def test_array_api_compat_is_looked_for_at_the_first_use():
    """Without it, the module of the backend can still be imported."""
    code = """if 1:
        import sys
        sys.modules["array_api_compat"] = None
        import array_api_strict as xp, lars_tree as lt
        try:
            lt.Lars(0.1).init({"a": xp.ones(2)})
        except lt.LeafError as error:
            print(error)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a: expected dense data" in result.stdout, result.stderr
    assert "pip install array-api-compat" in result.stdout
