"""Replace a file atomically: at any moment, its path leads to the complete old or new file.

The new content is written to a temporary file in the same directory, synced and renamed. The writer
keeps the temporary file locked until it is renamed or removed. If a temporary file can be locked,
its writer was killed, and the next writer removes the file.

No other user can open the temporary file (mode 0600) until it is complete. Then it gets the
permissions, owner and attributes of the old file, as far as the system allows; nobody gains a right
that the old file did not give. On Windows permissions are not preserved.
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

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where an open file can be neither removed nor renamed
    fcntl = None

Path = str | os.PathLike[str]

_PREFIX, _SUFFIX = ".lars_tree-", ".tmp"
_ACL = "system.posix_acl_access"
# The ACL is copied separately. The other attributes depend on the old content or grant it
# privileges.
_NOT_COPIED = {_ACL, "security.capability", "security.evm", "security.ima"}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file, which replaces `path` when the block ends without an exception.

    The `name` of the file is its path. If `path` is a link, its target is replaced. The new file
    has the permissions, owner, group and extended attributes of the old file, as far as the system
    allows. After an exception, `path` is unchanged and the temporary file is removed.

    Raises:
        OSError: as `open(path, "wb")` does; also if `path` is not a regular file. If only the
            directory could not be synced, the error says that the new file is in place.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    is_new = _status(target) is None
    _remove_abandoned_files(directory)
    name = os.path.join(directory, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
    file = None
    try:  # begins before the file is created, because Ctrl-C may come at any moment
        new_mode = _mode_of_new_file(name) if is_new else 0o600
        file = _locked_file(name)
        yield file
        file.flush()
        # The status is read again, because the permissions may have changed meanwhile.
        _give_rights(file.fileno(), new_mode, target, _status(target))
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):  # on a full disk, closing fails again
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
    """The status of the target; None if it does not exist, an OSError if it cannot be replaced."""
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
    """A new file that no other user can open, locked so that no other writer removes it."""
    while True:
        # `open` and its opener are C code, so Ctrl-C cannot interrupt between os.open and the
        # creation of the file object, where it would leak the descriptor.
        file: BinaryIO = open(name, "x+b", opener=partial(os.open, mode=0o600))  # noqa: SIM115
        # Another writer may have locked and removed the file first.
        if _lock(file.fileno(), wait=True) is None or _is_at(name, file.fileno()):
            return file
        file.close()


def _remove_abandoned_files(directory: str) -> None:
    with os.scandir(directory) as entries:
        names = [x.path for x in entries if x.name.startswith(_PREFIX) and x.name.endswith(_SUFFIX)]
    for name in names:
        # Ignore files of other users, and files that are already gone.
        with suppress(OSError):
            _remove_if_abandoned(name)


def _remove_if_abandoned(name: str) -> None:
    if fcntl is None:
        os.unlink(name)
        return
    with _descriptor(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        # The writer may have renamed the file in the meantime: check the name again.
        if _lock(file, wait=False) and _is_at(name, file):
            os.unlink(name)


@contextmanager
def _descriptor(name: str, flags: int) -> Iterator[int]:
    """A file descriptor that is closed exactly once, even if Ctrl-C comes.

    Only C code adds the descriptor to the list and removes it, so Ctrl-C cannot interrupt that.
    """
    held: list[int] = []
    try:
        try:
            held.extend(map(os.open, [name], [flags | os.O_CLOEXEC]))
            yield held[0]
        finally:
            _close(held)
    finally:  # if Ctrl-C came at the start of the inner `finally`
        _close(held)


def _close(held: list[int]) -> None:
    if held:
        list(map(os.close, map(list.pop, [held])))


def _lock(file: int, *, wait: bool) -> bool | None:
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


def _is_at(name: str, file: int) -> bool:
    """Whether the open file still has this name."""
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
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not all file systems support it
                raise


def _mode_of_new_file(name: str) -> int:
    """The permissions of a new file in this directory, found by creating a file with this name.

    The umask can be read only by setting it for all threads, and a default ACL overrides it.
    """
    with open(name, "xb", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    with suppress(FileNotFoundError):  # another writer may have removed it
        os.unlink(name)
    return mode


def _give_rights(file: int, new_mode: int, target: str, old: os.stat_result | None) -> None:
    """Give the open file the rights of the target, or `new_mode` if the target does not exist.

    The group comes first, because the ACL and the permissions depend on it. The owner comes last,
    because only the owner can change permissions.
    """
    if not hasattr(os, "fchown"):
        return
    if old is None:
        os.fchmod(file, new_mode)
        return
    with suppress(OSError):
        os.fchown(file, -1, old.st_gid)
    same_group = os.fstat(file).st_gid == old.st_gid
    same_acl = _copy_attributes(file, target, same_group)
    os.fchmod(file, _permitted(old.st_mode, same_group, same_acl))
    with suppress(OSError):
        os.fchown(file, old.st_uid, -1)


def _permitted(mode: int, same_group: bool, same_acl: bool) -> int:
    """The permissions of the new file, without setuid and setgid, as after any write to a file."""
    if not same_acl:  # with an ACL, the group bits hold the ACL's mask, not the group's rights
        return mode & 0o700
    if same_group:
        return mode & 0o777
    # The group has changed: old members are now others, and some others are now members. Both get
    # only the rights that the old file gave to both.
    both = mode >> 3 & mode & 0o7
    return mode & 0o700 | both << 3 | both


def _copy_attributes(file: int, target: str, same_group: bool) -> bool:
    """Copy the attributes and the ACL; return whether the ACL now grants the same rights."""
    if not hasattr(os, "getxattr"):  # only on Linux
        return True
    with suppress(OSError):
        for name in set(os.listxattr(target)) - _NOT_COPIED:
            with suppress(OSError):  # some namespaces are reserved for root
                os.setxattr(file, name, os.getxattr(target, name))
    acl = _acl(target)
    with suppress(OSError):
        if acl is None:  # remove an ACL inherited from the directory
            os.removexattr(file, _ACL)
        elif same_group:
            os.setxattr(file, _ACL, acl)
    return _acl(file) == acl and (acl is None or same_group)


def _acl(file: int | str) -> bytes | None:
    """The POSIX ACL of a file, or None."""
    try:
        return os.getxattr(file, _ACL)
    except OSError:
        return None
