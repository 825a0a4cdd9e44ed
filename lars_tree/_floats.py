"""The floating-point environment: the default one, whatever the caller or a library has set.

Rounding modes and flushing subnormal numbers to zero change what numpy and Python compute. The
native kernel (step.hpp) sees to itself; this is for what is computed in Python. The functions are
those of the C library, on Linux and macOS; elsewhere the caller's environment stays.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_SIZE = 256  # of any fenv_t, and more


def _environment() -> tuple[Any, Any, Any] | None:
    """Fegetenv, fesetenv and FE_DFL_ENV; None where they are not known."""
    if sys.platform not in ("linux", "darwin"):
        return None
    # PyDLL: such short calls keep the GIL.
    for name in (None, "libm.so.6"):
        try:
            library = ctypes.PyDLL(name)
            functions = library.fegetenv, library.fesetenv
        except (OSError, AttributeError):
            continue
        if sys.platform == "darwin":
            return *functions, ctypes.byref(ctypes.c_char.in_dll(library, "_FE_DFL_ENV"))
        return *functions, ctypes.c_void_p(-1)  # of glibc and musl, on any processor
    return None


_ENVIRONMENT = _environment()


def in_default_floats(function: Callable[P, T]) -> Callable[P, T]:
    """The function, called in the default environment; that of the caller is there again after."""
    if _ENVIRONMENT is None:
        return function
    get, set_, default = _ENVIRONMENT

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        before = ctypes.create_string_buffer(_SIZE)
        get(before)
        # C functions, called directly: no signal is handled between one and the `try` around it.
        try:
            set_(default)
            return function(*args, **kwargs)
        finally:
            set_(before)

    return call
