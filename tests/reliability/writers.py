"""Saving: the old or the new file, whole, whatever happens.

Small trees of one value are saved over each other as .npz, .safetensors and sharded checkpoints, in
memory. After each attempt the path leads to the complete old or new tree, and the next save
removes everything else. Processes are killed while they save; two of them save to one path while
another reads it, also where files cannot be locked; the disk is full (a limit of the size of files
and, for root, small file systems without space or inodes); each system call of a save fails in
turn. The errors name the path. Files keep their permissions, and nobody else can open them before.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from lars_tree import io
from lars_tree._files import locking
from tests.reliability import file_systems
from tests.reliability.attack import Attempts, attack
from tests.reliability.readers import in_memory
from tests.reliability.savers import (
    FOLDER,
    SAVERS,
    Saver,
    at_line,
    checked,
    child,
    count_of_lines,
    shuffled,
    value_of,
)

Random = np.random.Generator
NEEDS = ("safetensors", "ml_dtypes")


@contextmanager
def _directories() -> Iterator[dict[Saver, Path]]:
    """A directory for each saver, with a tree of zeros."""
    with in_memory() as above:
        found = {saver: above / f"of{saver.suffix}" for saver in SAVERS}
        for saver, directory in found.items():
            directory.mkdir()
            saver.save(directory, 0)
        yield found


def _clear(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def _expect_whole(saver: Saver, directory: Path, *values: float) -> float:
    found = saver.found(directory)
    assert found in values, f"{found}, expected one of {values}"
    return found


def _expect_saved(saver: Saver, directory: Path, value: float) -> None:
    """The next save works, and leaves no other files."""
    saver.save(directory, value)
    _expect_whole(saver, directory, value)
    assert not saver.strays(directory), f"left: {saver.strays(directory)}"


@attack(
    "A killed save leaves the old file or the new one",
    "saves killed by SIGKILL at random moments, 200 in each format",
    count=600,
    short=60,
    seconds=60,
    needs=NEEDS,
)
def kills(rng: Random) -> Attempts:
    with _directories() as directories:
        seconds = {}
        for saver, directory in directories.items():
            for size in (3, 40_000):
                start = time.perf_counter()
                for _ in range(5):
                    saver.save(directory, 0, size)
                seconds[saver, size] = (time.perf_counter() - start) / 5
        for saver, directory in cycle(directories.items()):
            size = int(rng.choice([3, 40_000]))
            delay = rng.uniform(0, 2 * seconds[saver, size])
            old = saver.found(directory)
            with child(saver.save, directory, old + 1, size):
                time.sleep(delay)
            outcome = checked(_after_a_kill, saver, directory, old, rng.random() < 0.5)
            if outcome:  # begin anew
                _clear(directory)
                saver.save(directory, 0)
            yield outcome


def _after_a_kill(saver: Saver, directory: Path, old: float, is_next: bool) -> None:
    new = _expect_whole(saver, directory, old, old + 1)
    if is_next:  # otherwise what is left may meet what the next kill leaves
        _expect_saved(saver, directory, new + 1)


@attack(
    "A process that ends at any line of a save leaves the old or the new file",
    "lines of saves at which the process ended",
    count=2000,
    short=60,
    seconds=60,
    needs=NEEDS,
)
def ends(rng: Random) -> Attempts:
    with _directories() as directories:
        counts = {x: count_of_lines(x.save, directory, 0) for x, directory in directories.items()}
        for saver, line in shuffled(rng, ((x, i) for x in SAVERS for i in range(counts[x]))):
            yield checked(_end_at, saver, directories[saver], line, float(rng.integers(9)))


def _end_at(saver: Saver, directory: Path, line: int, old: float) -> None:
    saver.save(directory, old)
    # The same number of shards, so that their names could collide.
    with child(at_line, line, lambda: os._exit(0), saver.save, directory, old + 3) as pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    found = _expect_whole(saver, directory, old, old + 3)
    other = directory / "other.npz"
    io.save({}, other)  # any save removes what was left
    other.unlink()
    assert not saver.strays(directory), f"left: {saver.strays(directory)}"
    _expect_whole(saver, directory, found)


@attack(
    "A reader sees one whole tree while two processes save to its path",
    "reads of .npz, .safetensors and sharded checkpoints, half of them without locks",
    count=3000,
    short=132,
    seconds=60,
    needs=NEEDS,
)
def concurrent(rng: Random) -> Attempts:
    for saver, locks in cycle([(saver, locks) for locks in (True, False) for saver in SAVERS]):
        with in_memory() as directory:
            saver.save(directory, 0)
            arguments = (_save_often, saver, directory, locks)
            with child(*arguments, 1), child(*arguments, 2):
                for i in range(20):
                    yield checked(_read, saver, directory, locks, i)
            yield checked(_after_writers, saver, directory, locks)


def _save_often(saver: Saver, directory: Path, locks: bool, value: float) -> None:
    if not locks:  # as in a file system that has none
        mock.patch.object(locking, "lock", return_value=None).start()
    while True:
        saver.save(directory, value)
        value += 2


def _read(saver: Saver, directory: Path, locks: bool, i: int) -> None:
    if i % 2 and saver.suffix != ".npz":
        value_of(io.open(saver.path(directory), "r" if i % 4 == 1 else "r+"))
    else:
        saver.found(directory)


def _after_writers(saver: Saver, directory: Path, locks: bool) -> None:
    saver.found(directory)
    if locks:  # without them, it is unknown which files belong to a running writer
        _expect_saved(saver, directory, 0)


@attack(
    "On a full disk the old file stays, and the error names the path",
    "saves with too little space, too few inodes or a limit of the size of files",
    count=1200,
    short=90,
    seconds=60,
    needs=NEEDS,
)
def full_disks(rng: Random) -> Attempts:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    is_root = file_systems.can_mount()
    with _directories() as directories:
        for saver, directory in cycle(directories.items()):
            sizes = [int(rng.integers(1, 1000)), int(rng.integers(1000, 9000))]
            most = int(rng.integers(8 * 3 * sizes[1]))
            yield checked(_fill, saver, directory, sizes, most)
            if is_root:
                pages, inodes = int(rng.integers(12, 80)), int(rng.choice([9, 9, 11, 12, 99, 99]))
                yield checked(_fill_file_system, saver, sizes, pages, inodes)


def _fill(saver: Saver, directory: Path, sizes: list[int], most: int | None) -> None:
    """Save twice; files may have at most this many bytes at the second time."""
    saver.save(directory, 1, sizes[0])
    before = {x.name: x.read_bytes() for x in directory.iterdir()}
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    error = None
    try:
        saver.save(directory, 2, sizes[1])
    except OSError as raised:
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    if error is None:
        _expect_whole(saver, directory, 2)
        assert not saver.strays(directory), f"left: {saver.strays(directory)}"
    else:
        path = str(saver.target(directory))
        assert error.errno in (errno.EFBIG, errno.ENOSPC), error
        assert error.filename == path, f"it names {error.filename}, not {path}"
        assert {x.name: x.read_bytes() for x in directory.iterdir()} == before, "it changed"


def _fill_file_system(saver: Saver, sizes: list[int], pages: int, inodes: int) -> None:
    options = f"size={4 * pages}k,nr_inodes={inodes}"
    raised = file_systems.called_in(options, _fill_in, saver, sizes)
    assert raised is None, raised


def _fill_in(directory: Path, saver: Saver, sizes: list[int]) -> None:
    _fill(saver, directory, sizes, None)


_CALLS = ["access", "fchmod", "fchown", "fstat", "fsync", "getxattr", "listdir", "listxattr"]
_CALLS += ["lstat", "mkdir", "open", "removexattr", "rename", "replace", "rmdir", "scandir"]
_CALLS += ["setxattr", "stat", "unlink"]
_CODES = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOMEM]


@attack(
    "A save whose system calls fail leaves the old or the new file",
    "calls that failed, each with six errors",
    count=3000,
    short=120,
    seconds=60,
    needs=NEEDS,
)
def failing_calls(rng: Random) -> Attempts:
    with _directories() as directories:
        counts = {}
        for saver, directory in directories.items():
            with _failing(-1, 0) as called:
                saver.save(directory, 0)
            counts[saver] = len(called)
        cases = ((x, i, code) for x in SAVERS for i in range(counts[x]) for code in _CODES)
        for saver, number, code in shuffled(rng, cases):
            yield checked(_fail, saver, directories[saver], number, code)


@contextmanager
def _failing(number: int, code: int) -> Iterator[list[str]]:
    """Make a system call of the modules of files fail, by its number; yields their names."""
    called: list[str] = []

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not sys._getframe(1).f_code.co_filename.startswith(FOLDER):
                return function(*arguments, **options)
            called.append(name)
            if len(called) == number + 1:
                path = arguments[0] if isinstance(arguments[0], str) else None
                raise OSError(code, os.strerror(code), path)
            return function(*arguments, **options)

        return call

    with ExitStack() as stack:
        for module, name in [*((os, x) for x in _CALLS), (builtins, "open"), (fcntl, "flock")]:
            new = wrapped(name, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, new))
        yield called


def _fail(saver: Saver, directory: Path, number: int, code: int) -> None:
    _clear(directory)
    saver.save(directory, 0)
    error = None
    with _failing(number, code) as called:
        try:
            saver.save(directory, 3)
        except OSError as raised:
            error = raised
    is_new = error is None or "the new file is in place" in str(error)
    _expect_whole(saver, directory, 3 if is_new else 0)
    if error is not None:
        paths = [saver.target(directory), *directory.glob("model-*")]
        assert Path(str(error.filename)) in paths, f"{called[number]}: it names {error.filename}"
    _expect_saved(saver, directory, 6)


@attack(
    "A saved file keeps its permissions; until it is in place, only its owner can open it",
    "modes of old files and umasks, checked at a random line",
    count=1536,
    short=120,
    seconds=60,
    needs=NEEDS,
)
def permissions(rng: Random) -> Attempts:
    with _directories() as directories:
        counts = {x: count_of_lines(x.save, directory, 0) for x, directory in directories.items()}
        for saver, mode in shuffled(rng, ((x, mode) for x in SAVERS for mode in range(0o1000))):
            mask, line = int(rng.integers(0o400)), int(rng.integers(counts[saver]))
            yield checked(_save_over_mode, saver, directories[saver], mode, line)
            yield checked(_save_new, saver, directories[saver], mask)


def _modes(directory: Path, names: list[str]) -> set[int]:
    return {stat.S_IMODE(os.lstat(directory / name).st_mode) for name in names}


def _save_over_mode(saver: Saver, directory: Path, mode: int, line: int) -> None:
    saver.save(directory, 0)
    for name in saver.used(directory):
        os.chmod(directory / name, mode)
    seen: set[int] = set()

    def look() -> None:
        seen.update(_modes(directory, saver.strays(directory)))

    if os.access(saver.target(directory), os.W_OK):
        at_line(line, look, saver.save, directory, 3)
    assert seen <= {0o600, 0o700, mode}, f"before, {[*map(oct, seen)]}"
    modes = _modes(directory, saver.used(directory))
    assert modes == {mode}, f"saved with {[*map(oct, modes)]}"


def _save_new(saver: Saver, directory: Path, mask: int) -> None:
    _clear(directory)
    before = os.umask(mask)
    try:
        saver.save(directory, 0)
    finally:
        os.umask(before)
    modes = _modes(directory, saver.used(directory))
    assert modes == {0o666 & ~mask}, f"new, with {[*map(oct, modes)]}"
