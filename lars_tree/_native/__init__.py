"""The native kernel for CPU memory; `kernel` is None if it was not built, or cannot be used.

kernel.hpp has the arithmetic, without Python; plan.hpp binds it to Python. Only speed depends on
the kernel: `_backends/cpu/twin.py` gives the same bits. Without the kernel, importing the package
warns. In the environment, LARS_TREE_NATIVE=0 turns the kernel off, without a warning, and
LARS_TREE_NATIVE=require makes a missing kernel an error.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, cast

import numpy as np

from lars_tree._native import threads

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan, Reader, _Kernel


_MISSING = (
    "lars_tree works without its C++ kernel, so steps on CPU memory take longer, up to 200 times "
    "for many small arrays: {}. Install a C++ compiler, and then lars_tree again; or set "
    "LARS_TREE_NATIVE=0 in the environment if speed does not matter"
)


def _load() -> _Kernel | None:
    wanted = os.environ.get("LARS_TREE_NATIVE") or "1"
    if wanted not in ("0", "1", "require"):
        raise ValueError(f"LARS_TREE_NATIVE: expected 0, 1 or require, got {wanted!r}")
    if wanted == "0":
        return None
    try:
        if not np.__version__.startswith("2."):  # memory.hpp has its layout of arrays
            raise ImportError(f"it was built for numpy 2, and this is numpy {np.__version__}")
        from lars_tree._native import _kernel
    except ImportError as error:
        if wanted == "require":
            text = f"LARS_TREE_NATIVE=require, but the C++ kernel cannot be used: {error}"
            raise ImportError(text) from error
        warnings.warn(_MISSING.format(error), RuntimeWarning, stacklevel=2)
        return None
    return _kernel


kernel = _load()

# The instruction set that the kernel uses; all instruction sets give the same bits.
instruction_set = kernel.best_instruction_set() if kernel else 0


def is_compiling() -> bool:
    """Whether torch.compile traces the Python code."""
    torch = sys.modules.get("torch")
    compiler = getattr(torch, "compiler", None)  # missing while torch is being imported
    return compiler is not None and bool(compiler.is_compiling())


def in_use() -> _Kernel | None:
    """The kernel; None if it is missing, or while torch.compile traces the Python code."""
    return None if is_compiling() else kernel


def native_available() -> bool:
    r"""Whether the native kernel was built and is in use; without it, the same results take longer.

    >>> import os, subprocess, sys
    >>> command = [sys.executable, "-c", "import lars_tree; print(lars_tree.native_available())"]
    >>> environment = {**os.environ, "LARS_TREE_NATIVE": "0"}      # turns the kernel off
    >>> subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout
    'False\n'
    """
    return kernel is not None


def plan() -> Plan | None:
    """An empty plan of the native engine; None if the kernel is not in use."""
    found = in_use()
    if found is None:
        return None
    return found.Plan(min(threads.get_num_threads(), sys.maxsize), instruction_set)


# The class `Reader` (see _kernel.pyi); without a kernel, a function that returns None.
reader = kernel.Reader if kernel else cast("type[Reader]", lambda *_, **__: None)
