"""Fixtures and helpers for all tests: hypothesis profiles, array libraries, interruptions.

Tests of a library that is not installed are skipped; with CI=true they fail.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import lars_tree

# Four CPU devices for tests of sharded arrays. JAX reads the variable when it is first imported.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

CI = os.environ.get("CI") == "true"

# Importing the package without the kernel warns; processes that tests start print nothing extra.
if not lars_tree.native_available():
    os.environ["LARS_TREE_NATIVE"] = "0"

# A shell makes its background processes ignore Ctrl-C, but tests of Ctrl-C need the handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile("repeatable", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=10_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if CI else "default"))


def unit_lars(*args: Any, decay_lambda: Any = 0, **options: Any) -> lars_tree.Lars:
    """A `Lars` with the option names and defaults of `lars_update`."""
    given = {"weight_decay": decay_lambda, "trust_coefficient": 1.0, "eps": 0.0, **options}
    return lars_tree.Lars(*args, **given)


class Library(NamedTuple):
    """An array library and its properties."""

    name: str
    module: str
    mutable: bool  # its arrays can be written to
    exact: bool  # uses the CPU kernel, so results have the same bits as numpy's


# To test another library, add a row.
LIBRARIES = [
    Library("numpy", "numpy", mutable=True, exact=True),
    Library("torch", "torch", mutable=True, exact=True),
    Library("jax", "jax", mutable=False, exact=True),
    Library("dask", "dask.array", mutable=False, exact=False),
    Library("strict", "array_api_strict", mutable=True, exact=False),
]


def need(module: str) -> Any:
    """Import a module. If it is not installed, skip the test, or fail on CI."""
    if CI:
        return importlib.import_module(module)
    return pytest.importorskip(module, reason=f"{module} is not installed")


def need_installed(*modules: str) -> None:
    """Like `need`, but does not import the modules: some packages cannot be imported whole."""
    for module in modules:
        if find_spec(module) is None:
            (pytest.fail if CI else pytest.skip)(f"{module} is not installed")


def need_program(name: str) -> str:
    """Return the path of a program. If it is not installed, skip the test, or fail on CI."""
    path = shutil.which(name)
    if path is None:
        (pytest.fail if CI else pytest.skip)(f"{name} is not installed")
    return str(path)


@contextmanager
def interpreting() -> Iterator[None]:
    """Make Triton interpret kernels, unless there is a GPU to run them."""
    with pytest.MonkeyPatch.context() as patch:
        if not need("torch").cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def need_triton() -> None:
    """Import Triton so that it can interpret kernels; skip the test if it is not installed."""
    if not find_spec("triton") and sys.platform != "linux":
        pytest.skip("Triton has wheels for Linux only", allow_module_level=True)
    with interpreting():
        need("triton")


# Import Triton before a test module can: torch would import it without the interpreter.
if find_spec("torch") and find_spec("triton"):
    need_triton()


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve the time of the interpreter, which prepares Triton's language for each function call.

    Here it does so only once for each launch of a kernel and each module with functions.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = getattr(interpreter, "_patch_lang", None)  # not a public function
    call = interpreter.InterpretedFunction.__call__.__code__
    done: set[int] = set()

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if sys._getframe(1).f_code is not call:  # a launch
            done.clear()
        elif module in done:
            return None
        done.add(module)
        return original(function)

    if original is not None:
        monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make Triton interpret kernels, unless there is a GPU to run them."""
    need_triton()
    patch_language_once(monkeypatch)
    # By `monkeypatch`, so that tests that change the variable with it leave it as it was.
    if not need("torch").cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with warnings.catch_warnings():
        # The interpreter computes with numpy, which warns about overflow and invalid values.
        warnings.filterwarnings("ignore", ".* encountered in ", RuntimeWarning)
        yield


@pytest.fixture
def small_chunks(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make chunks of the fused engine small, because the interpreter takes long for each chunk."""
    if need("torch").cuda.is_available():
        yield
        return
    kernels = importlib.import_module("lars_tree._backends.torch.kernels")
    tables = importlib.import_module("lars_tree._backends.torch.fused")._TABLES
    monkeypatch.setattr(kernels, "CHUNK", kernels.tl.constexpr(16))
    monkeypatch.setattr(kernels, "BLOCK", kernels.tl.constexpr(8))
    tables.clear()
    yield
    tables.clear()


@pytest.fixture(params=[{}, {"foreach": True}, {"fused": True}], ids=str)
def engine(request: pytest.FixtureRequest) -> dict[str, bool]:
    """Options of `lars_tree.torch.Lars` for each engine that updates tensors in CPU memory."""
    if "fused" in request.param:
        if need("torch").cuda.is_available():
            pytest.skip("Triton interprets no kernels if it runs them on a GPU")
        request.getfixturevalue("small_chunks")
    return request.param


def to_library(name: str, x: Any) -> Any:
    """A copy of a numpy array as an array of the library."""
    x = np.asarray(x)
    if name == "numpy":
        return x.copy()
    if name == "torch":
        return need("torch").tensor(x.copy())
    if name == "jax":
        with need("jax").enable_x64(True):
            return need("jax.numpy").asarray(x)
    if name == "dask":
        return need("dask.array").from_array(x.copy(), chunks=2)
    return need("array_api_strict").asarray(x, copy=True)


def to_numpy(x: Any) -> np.ndarray:
    """An array of any library as a numpy array."""
    if isinstance(x, lars_tree.Array):
        x = x.data
    if hasattr(x, "detach"):
        return x.detach().cpu().numpy()
    if hasattr(x, "compute"):
        return np.asarray(x.compute())
    if type(x).__module__.startswith("array_api_strict"):
        return np.from_dlpack(x)
    return np.asarray(x)


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> Library:
    """Each array library that is installed."""
    need(request.param.module)
    return request.param


def traced(trace: Callable[..., Any], call: Callable[[], Any]) -> None:
    """Make a call under a trace function, which may interrupt the call with Ctrl-C."""
    before = sys.gettrace()  # of coverage or a debugger
    # CPython 3.12 traces opcodes only if a frame has asked for them before settrace.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def interrupted_at(line: int, folder: str, call: Callable[[], Any]) -> bool:
    """Make a call that gets Ctrl-C at its line number `line`, counted from 0, in a folder.

    Return False if the call executes fewer lines in the folder.
    """
    lines = iter(range(line, -1, -1))

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line" and next(lines, None) == 0:
            signal.raise_signal(signal.SIGINT)
        return trace

    traced(trace, call)
    return next(lines, None) is None


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Check after each test that the CPU is not in flush-to-zero mode."""
    yield
    smallest = np.float64(5e-324)
    assert smallest * 1 > 0
