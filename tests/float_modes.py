"""The modes of floating-point arithmetic that a caller may have set: rounding, flushing to zero.

`MODES` has those of this system; on systems other than Linux it is empty.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

IS_LINUX = sys.platform == "linux"
IS_X86 = IS_LINUX and os.uname().machine == "x86_64"

# The constants of fenv.h.
ROUNDING = {
    "to nearest": 0,
    "downward": 0x400 if IS_X86 else 0x800000,
    "upward": 0x800 if IS_X86 else 0x400000,
    "toward zero": 0xC00 if IS_X86 else 0xC00000,
}
# The bits of the control register: results that are subnormal become 0, and operands that are.
if IS_X86:
    FLUSHING = {"": 0, "flushed results": 0x8000, "flushed operands": 0x40, "flushed": 0x8040}
else:
    FLUSHING = {"": 0, "flushed": 1 << 24}
_REGISTER = 28 if IS_X86 else 0  # its offset in fenv_t: MXCSR, or FPCR on ARM

MODES = {
    ", ".join(filter(None, (rounding, flushing))): (ROUNDING[rounding], FLUSHING[flushing])
    for rounding, flushing in itertools.product(ROUNDING, FLUSHING)
    if IS_LINUX
}
LIBM = ctypes.CDLL(ctypes.util.find_library("m")) if IS_LINUX else None


def _read() -> ctypes.Array[ctypes.c_char]:
    environment = ctypes.create_string_buffer(256)
    LIBM.fegetenv(environment)
    return environment


def current() -> tuple[int, int]:
    """The rounding and the flushing, as in `MODES`."""
    register = ctypes.c_uint32.from_buffer(_read(), _REGISTER).value
    return LIBM.fegetround(), register & FLUSHING["flushed"]


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Run the block in one of `MODES`. Assert that the block does not change it."""
    before = _read()
    rounding, flushing = MODES[name]
    try:
        assert LIBM.fesetround(rounding) == 0
        environment = _read()
        ctypes.c_uint32.from_buffer(environment, _REGISTER).value |= flushing
        LIBM.fesetenv(environment)
        assert current() == (rounding, flushing), "the processor does not have this mode"
        yield
        kept = current()
    finally:
        LIBM.fesetenv(before)
    assert kept == (rounding, flushing)
