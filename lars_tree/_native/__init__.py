"""The native kernel for CPU memory, where it was built: `kernel`, else None.

kernel.hpp has the arithmetic and knows no Python, module.cpp binds it. Nothing depends on it but
speed: `_backends/cpu.py` gives the same bits. LARS_TREE_NATIVE=0 in the environment turns it off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from lars_tree._native import threads


def _load() -> Any:
    if os.environ.get("LARS_TREE_NATIVE") == "0":
        return None
    try:
        return import_module("lars_tree._native._kernel")
    except ImportError:  # not built; `native_available` tells
        return None


kernel = _load()

# Which of its instruction sets the kernel takes; all give the same bits.
instruction_set: int = kernel.best_instruction_set() if kernel else 0


def in_use() -> Any:
    """The kernel; None where there is none, or where torch.compile traces and must see Python."""
    torch = sys.modules.get("torch")
    compiler = getattr(torch, "compiler", None)  # not there yet while torch is being imported
    return None if compiler is not None and compiler.is_compiling() else kernel


def native_available() -> bool:
    """Whether the native kernel was built and is in use.

    >>> native_available() in (True, False)         # without it, the same numbers take longer
    True
    """
    return kernel is not None


def update(
    columns: Any,
    *,
    types: tuple[type, ...],
    make: Callable[[Any], Any] | None = None,
    copy: Callable[[Any], Any] | None = None,
    begin: Callable[[list[Any]], Any] | None = None,
    tensors: tuple[Any, ...] | None = None,
    as_bits: Callable[[Any], Any] | bool | None = None,
) -> tuple[list[Any], list[Any]] | None:
    """Step all arrays in one call, and return the weights and the velocities; None, with nothing
    written, if any of them is not of the plain kind that the kernel takes.

    Args:
        columns: A `Columns`: arrays of these types, or None for no weights, and in the place of a
            gradient to leave the weights. Gradients and velocities have the shapes of w.
        types: The types of arrays to take.
        make: Gives new memory for a result.
        copy: Gives a copy of a velocity, to be stepped in its place.
        begin: Called when all is checked, with the list of those given arrays that are written to.
        tensors: How to read torch tensors, see memory.hpp; None for the buffer protocol.
        as_bits: Views bfloat16 arrays, which have no buffer protocol, as uint16; True where arrays
            of uint16 are such views already.
    """
    found = in_use()
    if found is None:
        return None
    results: tuple[list[Any], list[Any]] | None = found.update(
        *columns,
        make,
        copy,
        begin,
        types,
        tensors,
        as_bits,
        min(threads.get_num_threads(), sys.maxsize),
        instruction_set,
    )
    return results


class _Taken(Exception):
    """The kernel is about to write."""


def _stop(written: list[Any]) -> None:
    raise _Taken


def takes(columns: Any, *, types: tuple[type, ...], as_bits: Any = None) -> bool:
    """Whether `update` would step these arrays in place; nothing is written."""
    try:
        update(columns, types=types, begin=_stop, as_bits=as_bits)
    except _Taken:
        return True
    return False


def deferred(columns: Any, *, types: tuple[type, ...], as_bits: Any = None) -> Callable[[], Any]:
    """A call of the kernel that runs no Python: `update` in place, of what it `takes`."""
    count = min(threads.get_num_threads(), sys.maxsize)
    nothing = (None, None, None)  # no make, copy, begin
    return partial(kernel.update, *columns, *nothing, types, None, as_bits, count, instruction_set)
