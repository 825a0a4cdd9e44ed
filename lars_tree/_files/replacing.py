"""Replace a file in one step: at any moment there is the old file or the new one, and it is whole.

The new content goes to a temporary file in the same directory, which is renamed when all of it is
on the disk. Whoever writes to a temporary file holds a lock on it, which ends with the process: one
that can be locked is the stray of a process that was killed, and the next to write clears it.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where a file that is open can be neither removed nor renamed
    fcntl = None

Path = str | os.PathLike[str]

_PREFIX, _SUFFIX = ".lars_tree-", ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write to, which takes the place of `path` when the block ends well.

    Its `name` is where it is. Of a link, the file it leads to is replaced. The permissions are
    those of the old file, or those of any new file. After an exception, `path` is as it was and
    the temporary file is gone.

    Raises:
        OSError: as `open(path, "wb")` does; also where something else than a file is there.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    mode = _mode_of(target)
    _clear_strays(directory)
    name = os.path.join(directory, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    file = None
    try:  # from before it is there: Ctrl-C may come at any moment
        file = _locked_file(name)
        if mode is not None:
            os.chmod(name, mode)
        yield file
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):  # such as that of a full disk, again
            if file is not None:
                file.close()
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    file.close()
    _sync_directory(directory)


def _mode_of(target: str) -> int | None:
    """The permissions of the file that is there; None if none is."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", target)
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    return stat.S_IMODE(mode)


def _locked_file(name: str) -> BinaryIO:
    """A new file of this name that nobody else takes for a stray."""
    while True:
        file: BinaryIO = open(name, "x+b")  # noqa: SIM115
        # Another saver may have locked and cleared it before this one could lock it.
        if _lock(file.fileno(), wait=True) is None or _is_at(name, file.fileno()):
            return file
        file.close()


def _clear_strays(directory: str) -> None:
    with os.scandir(directory) as entries:
        names = [x.path for x in entries if x.name.startswith(_PREFIX) and x.name.endswith(_SUFFIX)]
    for name in names:
        # What cannot be opened or removed belongs to somebody else, or is gone already.
        with suppress(OSError):
            _clear(name)


def _clear(name: str) -> None:
    if fcntl is None:
        os.unlink(name)
        return
    file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # A saver that was done meanwhile has renamed what is open here: look at the name again.
        if _lock(file, wait=False) and _is_at(name, file):
            os.unlink(name)
    finally:
        os.close(file)


def _lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file; False if another has it, None where the file system knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(name: str, file: int) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(name, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_directory(directory: str) -> None:
    if fcntl is None:
        return
    file = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not offered by every file system
            raise
    finally:
        os.close(file)
