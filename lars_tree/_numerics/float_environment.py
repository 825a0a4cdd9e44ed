"""Runs Python code in the default floating-point environment, whatever the caller has set.

Numpy's warnings about floating-point errors are a setting of the caller, too.

Rounding modes and flushing of subnormal numbers to zero change the results of numpy and Python.
The native kernel sets its own environment (step.hpp). On systems other than Linux and macOS, the
environment of the caller remains in effect.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextvars import copy_context
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from lars_tree import _native

P = ParamSpec("P")
T = TypeVar("T")

_SIZE = 256  # bytes; every fenv_t is smaller


def _environment() -> tuple[Any, Any, Any] | None:
    """`fegetenv`, `fesetenv` and `FE_DFL_ENV` of the C library; None if they are unknown."""
    if sys.platform not in ("linux", "darwin"):
        return None
    # PyDLL does not release the GIL, which would take longer than these calls.
    for name in (None, "libm.so.6"):
        try:
            library = ctypes.PyDLL(name)
            functions = library.fegetenv, library.fesetenv
        except (OSError, AttributeError):
            continue
        if sys.platform == "darwin":
            return *functions, ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV"))
        return *functions, ctypes.c_void_p(-1)  # glibc and musl, on any processor
    return None


_ENVIRONMENT = _environment()


def in_default_floats(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: call the function in the default environment, then restore the caller's."""
    if _ENVIRONMENT is None:
        return function
    get, set_, default = _ENVIRONMENT

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        before = ctypes.create_string_buffer(_SIZE)
        get(before)
        # `set_` is inside the `try`: the environment is restored even if a signal handler raises.
        try:
            set_(default)
            return function(*args, **kwargs)
        finally:
            set_(before)

    return call


def without_warnings(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: numpy does not warn about overflow or invalid values in the function.

    `np.errstate` alone would keep its setting if a signal handler raises while it begins or ends.
    Numpy has the setting in a context variable, so C code ends it here, with the copied context.

    >>> previous = np.geterr()
    >>> without_warnings(np.geterr)()["over"]
    'ignore'
    >>> np.geterr() == previous
    True
    """
    silent: Callable[P, T] = np.errstate(all="ignore")(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _native.is_compiling():  # torch cannot trace contexts, and computes without numpy
            return function(*args, **kwargs)
        return copy_context().run(silent, *args, **kwargs)

    return call
