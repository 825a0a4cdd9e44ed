"""Replace a file in one step: at any moment there is the old file or the new one, and it is whole.

The new content goes to a temporary file in the same directory, which is renamed when all of it is
on the disk. Whoever writes to a temporary file holds a lock on it, which ends with the process: one
that can be locked is the stray of a process that was killed, and the next to write clears it.

Nobody else can open the temporary file (mode 0600) until it is complete: `permissions.py`.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO

from lars_tree._files import permissions

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

    Its `name` is where it is. Of a link, the file it leads to is replaced. The new file has the
    permissions, owner, group and extended attributes of the old one, as far as the system allows
    it, or the permissions of any new file. After an exception, `path` is as it was and the
    temporary file is gone.

    Raises:
        OSError: as `open(path, "wb")` does; also where something else than a file is there. Where
            the file was replaced but its directory could not be synced, the error says so.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    is_new = _status(target) is None
    _clear_strays(directory)
    name = os.path.join(directory, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    file = None
    try:  # from before it is there: Ctrl-C may come at any moment
        new_mode = permissions.of_new_file(name) if is_new else 0o600
        file = _locked_file(name)
        yield file
        file.flush()
        # The status as it is now: the permissions may have changed meanwhile.
        permissions.give(file.fileno(), new_mode, target, _status(target))
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
    try:
        file.close()
        _sync(directory)
    except OSError as error:
        text = f"{error.strerror}: the new file is in place, but may not survive a power failure"
        raise OSError(error.errno, text, target) from error


def _status(target: str) -> os.stat_result | None:
    """The status of the file that is there; None if none is.

    Raises:
        OSError: it cannot be replaced.
    """
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", target)
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    return status


def _locked_file(name: str) -> BinaryIO:
    """A new file of this name that nobody else can open or takes for a stray."""
    while True:
        # No function of Python between the descriptor and its owner: Ctrl-C would lose it there.
        file: BinaryIO = open(name, "x+b", opener=partial(os.open, mode=0o600))  # noqa: SIM115
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
    with _descriptor(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        # A saver that was done meanwhile has renamed what is open here: look at the name again.
        if _lock(file, wait=False) and _is_at(name, file):
            os.unlink(name)


@contextmanager
def _descriptor(name: str, flags: int) -> Iterator[int]:
    """A file descriptor, which is closed exactly once, at whichever line Ctrl-C comes.

    It goes into the list, and out of it to be closed, without a function of Python in between.
    """
    held: list[int] = []
    try:
        try:
            held.extend(map(os.open, [name], [flags | os.O_CLOEXEC]))
            yield held[0]
        finally:
            _close(held)
    finally:  # where Ctrl-C came at the start of the first one
        _close(held)


def _close(held: list[int]) -> None:
    if held:
        list(map(os.close, map(list.pop, [held])))


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


def _sync(directory: str) -> None:
    if fcntl is None:
        return
    with _descriptor(directory, os.O_RDONLY) as file:
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not offered by every file system
                raise
