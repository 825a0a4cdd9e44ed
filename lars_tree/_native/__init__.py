"""The native kernel for CPU memory; `kernel` is None if it was not built, or cannot be used.

kernel.hpp has the arithmetic, without Python; plan.hpp binds it to Python. Only speed depends on
the kernel: `_backends/cpu/twin.py` gives the same bits. LARS_TREE_NATIVE=0 in the environment turns
the kernel off.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

import numpy as np

from lars_tree._native import threads

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan, Reader, _Kernel


def _load() -> _Kernel | None:
    if os.environ.get("LARS_TREE_NATIVE") == "0":
        return None
    if not np.__version__.startswith("2."):  # memory.hpp has the layout of the arrays of numpy 2
        return None
    try:
        from lars_tree._native import _kernel
    except ImportError:  # the kernel was not built
        return None
    return _kernel


kernel = _load()

# The instruction set that the kernel uses; all instruction sets give the same bits.
instruction_set = kernel.best_instruction_set() if kernel else 0


def in_use() -> _Kernel | None:
    """The kernel; None if it is missing, or while torch.compile traces the Python code."""
    torch = sys.modules.get("torch")
    compiler = getattr(torch, "compiler", None)  # missing while torch is being imported
    return None if compiler is not None and compiler.is_compiling() else kernel


def native_available() -> bool:
    """Whether the native kernel was built and is in use.

    >>> native_available() in (True, False)         # without it, the same results take longer
    True
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
