"""Memory that is mapped read-only but appears writable, so that a write would kill the process.

numpy and torch do not know that memory is read-only if they got it from each other or by its
address. Each case runs in a child process, so that a faulty write does not kill the tests.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest
from conftest import need

from lars_tree import Array, Lars, OutError, lars_update
from lars_tree._backends.memory import is_foreign, is_mapped_read_only

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells how memory is mapped"
)

SIZE = 1000


class Interface:
    """Exposes the memory of an array, and claims that it is writable."""

    def __init__(self, x):
        self.x = x
        address = x.__array_interface__["data"][0]
        self.__array_interface__ = {**x.__array_interface__, "data": (address, False)}


def by_address(x):
    return (ctypes.c_float * SIZE).from_address(x.__array_interface__["data"][0])


# Functions that make an array in the memory of a read-only memmap.
WITHOUT_TORCH = {
    "ctypes": lambda x: np.ctypeslib.as_array(by_address(x)),
    "frombuffer": lambda x: np.frombuffer(by_address(x), np.float32),
    "interface": lambda x: np.asarray(Interface(x)),
    "strided": lambda x: np.asarray(Interface(x))[::2],
    "view": lambda x: np.asarray(Interface(x))[100:].reshape(30, 30),
    "subclass": lambda x: np.asarray(Interface(x)).reshape(10, 100).view(np.matrix),
    "float16": lambda x: np.asarray(Interface(x)).view(np.float16),
    "other bytes": lambda x: np.asarray(Interface(x)).view(">f4"),
    "Array": lambda x: Array(np.asarray(Interface(x))),
    "bfloat16": lambda x: np.asarray(Interface(x)).view(need("ml_dtypes").bfloat16),
    "strict": lambda x: need("array_api_strict").asarray(np.asarray(Interface(x)), copy=False),
}


def subclass(torch):
    return type("Sub", (torch.Tensor,), {})


WITH_TORCH = {
    "numpy of torch": lambda torch, x: torch.from_numpy(x).numpy(),
    "asarray of torch": lambda torch, x: np.asarray(torch.from_numpy(x)),
    "view of numpy of torch": lambda torch, x: torch.from_numpy(x).numpy()[100:].reshape(30, 30),
    "dlpack of torch": lambda torch, x: np.from_dlpack(torch.from_numpy(x)),
    "torch": lambda torch, x: torch.from_numpy(x),
    "torch of numpy of torch": lambda torch, x: torch.from_numpy(torch.from_numpy(x).numpy()),
    "slice": lambda torch, x: torch.from_numpy(x)[100:],
    "strided tensor": lambda torch, x: torch.from_numpy(x)[::2],
    "parameter": lambda torch, x: torch.nn.Parameter(torch.from_numpy(x)),
    "complex": lambda torch, x: torch.view_as_complex(torch.from_numpy(x).reshape(-1, 2)),
    "asarray": lambda torch, x: torch.asarray(x),
    "torch.frombuffer": lambda torch, x: torch.frombuffer(by_address(x), dtype=torch.float32),
    "torch.from_dlpack": lambda torch, x: torch.from_dlpack(torch.from_numpy(x)),
    "set_": lambda torch, x: torch.empty(0).set_(torch.from_numpy(x).untyped_storage()),
    "subclass of Tensor": lambda torch, x: torch.from_numpy(x).as_subclass(subclass(torch)),
}


def copied(x):
    x = x.data if isinstance(x, Array) else x
    if hasattr(x, "detach"):
        return x.detach().clone()
    return x.__array_namespace__().asarray(x, copy=True) if not hasattr(x, "base") else x.copy()


def refused(x, call):
    try:
        call(x, copied(x))
    except OutError as error:
        return "read-only" in str(error)
    return False


def with_velocity(x, good):
    opt = Lars(0.1)
    opt.update([good], [good], {**opt.init([good]), "velocity": [x]}, out=[good])


CALLS = [
    lambda x, good: lars_update([x], [good], 0.1, out=[x]),
    lambda x, good: lars_update([good], [good], 0.1, out=[x]),
    lambda x, good: lars_update([x], [good], 0.1, out=[x], nonfinite="skip"),
    with_velocity,
]


def write_to_all(path, name):
    """Run in a child process: print for each array and each call whether the call is refused."""
    warnings.simplefilter("ignore")
    np.zeros(SIZE, np.float32).tofile(path)
    mapped, ways = np.memmap(path, np.float32, "r"), WITHOUT_TORCH
    if name == "torch":
        import torch

        ways = {key: lambda x, make=make: make(torch, x) for key, make in WITH_TORCH.items()}
    for key, make in ways.items():
        for i, call in enumerate(CALLS):
            if call is with_velocity and "16" in str(make(mapped).dtype):
                continue  # the velocity of float16 weights is float32
            print(f"{key}, call {i}:", end=" ", flush=True)
            print(refused(make(mapped), call), flush=True)
    print("done")


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_memory_that_is_mapped_read_only_is_never_written(name, tmp_path):
    need(name)
    need("array_api_strict")
    code = f"import test_mapped; test_mapped.write_to_all({str(tmp_path / 'x')!r}, {name!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    child = subprocess.run(
        command, cwd=sys.path[0] or None, capture_output=True, text=True, timeout=300, check=False
    )
    lines = child.stdout.splitlines()
    assert lines, child.stderr
    assert lines[-1] == "done", (child.returncode, lines[-1], child.stderr[-500:])
    assert [line for line in lines[:-1] if not line.endswith("True")] == []


def test_writable_mappings_are_written(tmp_path):
    np.ones(SIZE, np.float32).tofile(tmp_path / "x")
    step = 0.1 * np.ones(SIZE, np.float32)
    for mode in ("r+", "c"):
        x = np.memmap(tmp_path / "x", np.float32, mode)
        for view in (x, np.asarray(Interface(x)), np.asarray(x)[::2]):
            for options in ({}, {"nonfinite": "skip"}):
                before = view.copy()
                lars_update(view, step[: view.size], 0.1, adapt=False, out=view, **options)
                assert (view < before).all()
    with open(tmp_path / "x", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        view = np.frombuffer(memory, np.float32)
        lars_update(view, step, 0.1, adapt=False, out=view)
        del view
    shared = (ctypes.c_float * SIZE)(*step)
    view = np.ctypeslib.as_array(shared)
    lars_update(view, step, 1.0, adapt=False, out=view)
    assert shared[0] == 0


def test_memory_of_numpy_is_not_foreign():
    x = np.ones((4, 5))
    for own in (x, x[1:], x.T, x[::2, 1:][:, ::-1], x.reshape(-1).view(np.float32), np.float64(1)):
        assert not is_foreign(np.asarray(own))
    for foreign in (
        np.frombuffer(bytearray(8)),
        np.asarray(Interface(x)),
        np.asarray(memoryview(bytearray(8))),
    ):
        assert is_foreign(foreign)


@pytest.mark.parametrize("with_madvise", [True, False])
def test_read_only_mappings_are_found_with_and_without_madvise(with_madvise, tmp_path, monkeypatch):
    if not with_madvise:
        monkeypatch.setattr("lars_tree._backends.memory._madvise", lambda: None)
    np.zeros(SIZE, np.float32).tofile(tmp_path / "x")
    for mode, expected in (("r", True), ("r+", False), ("c", False)):
        x = np.memmap(tmp_path / "x", np.float32, mode)
        address = x.__array_interface__["data"][0]
        assert is_mapped_read_only(address, x.nbytes) is expected
        assert is_mapped_read_only(address, 0) is False
    with suppress(ValueError):
        x.flush()
