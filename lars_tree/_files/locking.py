"""Locked files and file descriptors that no exception leaks, not even Ctrl-C.

A writer keeps its temporary files locked. If such a file can be locked, its writer was killed.
"""

from __future__ import annotations

import errno
import io
import os
from collections import deque
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
        try:
            # Another writer may have locked and removed the file first.
            if lock(file.fileno(), wait=True) is None or is_at(name, file.fileno()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


class Descriptor(io.IOBase):
    """A file descriptor that is closed at the end of a `with` block.

    `__enter__` and `__exit__` are C code, which calls `close`, a C function. The Python code of a
    context manager could be interrupted by Ctrl-C before it closes the descriptor, and then kept
    by the traceback, with the lock of the file.
    """

    def __init__(self, name: str, flags: int) -> None:
        # Only C code adds the descriptor to the list; the iterator takes it from there once.
        # Everything that closing needs is made here, because there may be no memory left then.
        held: list[int] = []
        nothing: deque[Any] = deque(maxlen=0)
        self.close: Any = partial(nothing.extend, map(os.close, held))
        try:
            held.extend(map(os.open, [name], [flags | getattr(os, "O_CLOEXEC", 0)]))
            self._number = held[0]
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._number


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
    with Descriptor(directory, os.O_RDONLY) as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not all file systems support it
                raise


class DirectoryLock(Descriptor):
    """The lock of a directory, which is released at the end of a `with` block."""

    def __init__(self, directory: str) -> None:
        if fcntl is not None:
            super().__init__(directory, os.O_RDONLY)

    def acquire(self) -> bool:
        """Wait until nobody else has the lock; return False if locks are not supported.

        It can be acquired again while it is held.
        """
        return fcntl is not None and bool(lock(self.fileno(), wait=True))
