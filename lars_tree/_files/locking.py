"""Locked files and file descriptors that no exception leaks, not even Ctrl-C.

A writer keeps its temporary files locked. If such a file can be locked, its writer was killed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where an open file can be neither removed nor renamed
    fcntl = None


def locked_file(name: str) -> BinaryIO:
    """A new file that no other user can open, locked so that no other writer removes it."""
    while True:
        # `open` and its opener are C code, so Ctrl-C cannot interrupt between os.open and the
        # creation of the file object, where it would leak the descriptor.
        file: BinaryIO = open(name, "x+b", opener=partial(os.open, mode=0o600))  # noqa: SIM115
        # Another writer may have locked and removed the file first.
        if lock(file.fileno(), wait=True) is None or is_at(name, file.fileno()):
            return file
        file.close()


@contextmanager
def descriptor(name: str, flags: int) -> Iterator[int]:
    """A file descriptor that is closed exactly once, even if Ctrl-C comes.

    Only C code adds the descriptor to the list and removes it, so Ctrl-C cannot interrupt that.
    """
    held: list[int] = []
    try:
        try:
            held.extend(map(os.open, [name], [flags | getattr(os, "O_CLOEXEC", 0)]))
            yield held[0]
        finally:
            _close(held)
    finally:  # if Ctrl-C came at the start of the inner `finally`
        _close(held)


def _close(held: list[int]) -> None:
    if held:
        list(map(os.close, map(list.pop, [held])))


def lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file; False if another process has the lock, None if locks are unsupported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(name: str, file: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(name, follow_symlinks=False))
    except FileNotFoundError:
        return False


def sync(directory: str) -> None:
    if fcntl is None:
        return
    with descriptor(directory, os.O_RDONLY) as file:
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not all file systems support it
                raise


@contextmanager
def locked_directory(directory: str) -> Iterator[bool]:
    """Wait until no other process has the lock of a directory; False if locks are unsupported."""
    if fcntl is None:
        yield False
        return
    with descriptor(directory, os.O_RDONLY) as file:
        yield bool(lock(file, wait=True))
