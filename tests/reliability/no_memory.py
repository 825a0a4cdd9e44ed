"""Steps in which an allocation fails: the process that allocations.py starts.

It reads requests, a line each: the name of a case of steps.py, and the first and the last
allocation that fail. A forked process answers each with a line: the number of allocations, and None
or what was wrong. If it crashes, this process answers, and forks another one. `failing.c` makes the
allocations fail; Python takes all its memory from it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from tests.reliability import steps

Request = tuple[str, int, int]

NEVER = 2**62
ENDED_BY_GLIBC = 127 << 8  # the exit status if a thread gets no thread-local data
WAIT = 60.0  # seconds: a lock that is still held shows after this time

# Errors of CPython, numpy, torch and JAX when there is no memory, besides MemoryError.
OTHER_ERRORS = (
    "Cannot allocate memory",  # an OSError of a system call
    "can't allocate lock",
    "can't allocate read lock",  # of a BufferedReader
    "not PosixPath",  # fspath
    "can't start new thread",
    "DefaultCPUAllocator",
    "Failed to allocate",
    "Error in computing overlap",  # of numpy
    "bad_alloc",
    "with an exception set",
    "without setting an exception",
    "without exception set",
    "MemoryError",
    "str_from_cstr_and_size(): conversion error",  # of nanobind, which JAX uses
    "RESOURCE_EXHAUSTED",
    "maximum recursion depth exceeded",  # CPython, after many MemoryErrors
)
SYSTEM = re.compile(r"/(libc|libstdc|libgcc|libpthread|ld-|failing)[^/]*$")  # libraries


class Region(ctypes.Structure):
    """Memory that a step changes, and what it contains before and after."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("now", "before", "after")]
    _fields_ += [("size", ctypes.c_size_t)]


_lib = ctypes.CDLL(None)
armed, first, last, count, report, region_count = (
    ctypes.c_long.in_dll(_lib, f"failing_{name}")
    for name in ("armed", "first", "last", "count", "report", "region_count")
)
_regions = (Region * 64).in_dll(_lib, "failing_regions")


def attempt(name: str, start: int, end: int) -> tuple[int, str | None]:
    """Take a step without memory, and one with memory."""
    expected = _expected(name)  # first, because cases of one name may use one file
    case = steps.CASES[name]()
    _watch(case, *expected[:2])
    first.value, last.value, count.value = start, end, 0
    error = None
    armed.value = 1
    try:
        case.call()
    except BaseException as caught:
        armed.value = 0
        error = caught
    finally:
        armed.value = 0
    number = count.value
    return number, _wrong(name, case, error)


def _watch(case: steps.Case, before: Any, after: Any) -> None:
    """Let failing.c compare the arrays if the process crashes."""
    rows = list(zip(case.addresses(), before[0], after[0], strict=False))
    for region, (address, *texts) in zip(_regions, rows, strict=False):
        region.now, region.size = address, len(texts[0])
        region.before, region.after = (_address(text) for text in texts)
    region_count.value = len(rows)


@cache
def _address(data: bytes) -> int | None:
    return ctypes.cast(_kept.setdefault(data, ctypes.c_char_p(data)), ctypes.c_void_p).value


_kept: dict[bytes, ctypes.c_char_p] = {}


def _wrong(name: str, case: steps.Case, error: BaseException | None) -> str | None:
    expected = _expected(name)
    if error is not None and not _is_allowed(error):
        return f"raised {type(error).__name__}: {error}"
    found = case.contents()
    if found not in expected[:2] or (error is None and found != expected[1]):
        return f"after {error!r}: the arrays belong to no step, or to another one"
    failures: list[BaseException] = []
    thread = threading.Thread(target=_call, args=(case.call, failures), daemon=True)
    thread.start()
    thread.join(WAIT)
    if thread.is_alive():
        return f"after {error!r}: the next step waits for a lock"
    if failures:
        return f"after {error!r}: the next step raised {failures[0]!r}"
    if case.contents() != expected[expected.index(found) + 1]:
        return f"after {error!r}: the next step is wrong"
    return None


def _call(call: Callable[[], Any], failures: list[BaseException]) -> None:
    try:
        call()
    except BaseException as error:
        failures.append(error)


def _is_allowed(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error) for text in OTHER_ERRORS)


@cache
def _expected(name: str) -> list[Any]:
    """The contents before the first step, and after one and two steps."""
    case = steps.CASES[name]()
    found = [case.contents()]
    for _ in range(2):
        case.call()
        found.append(case.contents())
    return found


# ---- Processes


def answer(requests: list[Request]) -> None:
    """Answer all requests in forked processes."""
    left = list(requests)
    while left:
        with tempfile.TemporaryFile() as stack, tempfile.TemporaryFile() as done:
            child = os.fork()
            if not child:
                report.value = stack.fileno()
                _lib.failing_watch()
                for request in left:
                    _print(attempt(*request))
                    os.write(done.fileno(), b".")
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            done.seek(0)
            left = left[len(done.read()) :]
            if left:
                stack.seek(0)
                _print((0, _crash(status, stack.read().decode())))
                left = left[1:]


def _crash(status: int, text: str) -> str | None:
    """What was wrong in a process that ended: None if another library crashed between two steps."""
    if status == ENDED_BY_GLIBC and "jax" in sys.modules:  # JAX writes to new arrays only
        return None
    state, *stack = text.splitlines() or ["no report"]
    frames = [line for line in stack if not SYSTEM.search(line.split("(")[0])]
    culprit = frames[0].split("(")[0] if frames else "unknown"
    if state == "whole" and frames and "lars_tree" not in culprit:
        print(f"{os.path.basename(culprit)} crashed", file=sys.stderr)
        return None
    return f"the process ended with status {status}; arrays: {state}; {' <- '.join(frames[:4])}"


def _print(answer: tuple[int, str | None]) -> None:
    os.write(1, (json.dumps(answer) + "\n").encode())


def main() -> None:
    """Import the modules that are named in the arguments, then answer lines of requests."""
    sys.unraisablehook = lambda _: None
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        answer(json.loads(line))


if __name__ == "__main__":
    main()
