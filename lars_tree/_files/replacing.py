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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from lars_tree._files import abandoned, locking
from lars_tree._files.abandoned import PREFIX, TEMPORARY

Path = str | bytes | os.PathLike[str]
Write = Callable[[BinaryIO], None]

_ACL = "system.posix_acl_access"
# The ACL is copied separately. The other attributes depend on the old content or grant it
# privileges.
_NOT_COPIED = {_ACL, "security.capability", "security.evm", "security.ima"}


def replace(path: Path, write: Write) -> None:
    """Let `write` write to a temporary file, which then replaces `path`.

    The `name` of the file is its path. If `path` is a link, its target is replaced. The new file
    has the permissions, owner, group and extended attributes of the old file, as far as the system
    allows. After an exception, `path` is unchanged and the temporary file is removed.

    This is not a context manager: Ctrl-C in its own code would leave the temporary file.

    Raises:
        OSError: as `open(path, "wb")` does, with `path`; also if `path` is not a regular file. If
            only the directory could not be synced, the error says that the new file is in place.
    """
    with naming(path) as target:
        directory = os.path.dirname(target)
        is_new = status(target) is None
        abandoned.remove(directory)
        name = os.path.join(directory, f"{PREFIX}{secrets.token_hex(8)}{TEMPORARY}")
        file = None
        try:
            try:  # begins before the file is created, because Ctrl-C may come at any moment
                new_mode = mode_of_new_file(name) if is_new else 0o600
                file = locking.locked_file(name)
                write(file)
                file.flush()
                # The status is read again, because the permissions may have changed meanwhile.
                set_permissions(file.fileno(), new_mode, target, status(target))
                os.fsync(file.fileno())
                if locking.fcntl is None:
                    file.close()
                os.replace(name, target)
                with in_place(target):
                    file.close()
                    locking.sync(directory)
            finally:
                _discard(name, file)
        finally:  # if Ctrl-C came in the inner `finally`
            _discard(name, file)


def _discard(name: str, file: BinaryIO | None) -> None:
    """Close the temporary file, and remove it if it is still there.

    If it cannot be removed, the next save does this. On a full disk, closing fails again.
    """
    with suppress(OSError):
        if file is not None:
            file.close()
    with suppress(OSError):
        os.unlink(name)


@contextmanager
def naming(path: Path) -> Iterator[str]:
    """Yield the target of `path`. An OSError names `path`, not a temporary file, or no file.

    The system calls on an open file, such as a write to a full disk, raise errors without a name.
    """
    target = os.path.realpath(os.fsdecode(path))
    ours = (None, target, os.path.dirname(target))
    try:
        yield target
    except OSError as error:
        name = error.filename
        if error.errno is None or not (name in ours or f"{os.sep}{PREFIX}" in str(name)):
            raise  # the error of a leaf that is read from another file
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error


@contextmanager
def in_place(target: str) -> Iterator[None]:
    """Make an OSError say that the new file has replaced the old."""
    try:
        yield
    except OSError as error:
        text = f"{error.strerror}: the new file is in place, but may not survive a power failure"
        raise OSError(error.errno, text, target) from error


def status(target: str) -> os.stat_result | None:
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
        if not os.path.lexists(target):  # another writer has just removed it
            return None
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    return status


def mode_of_new_file(name: str) -> int:
    """The permissions of a new file in this directory, found by creating a file with this name.

    The umask can be read only by setting it for all threads, and a default ACL overrides it.
    """
    with open(name, "xb", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    with suppress(FileNotFoundError):  # another writer may have removed it
        os.unlink(name)
    return mode


def set_permissions(
    file: int, new_mode: int, target: str, old: os.stat_result | None, most: int = 0o777
) -> None:
    """Give the open file the permissions of the target, or `new_mode` if the target does not exist.

    `most` limits the permissions of the target. The group comes first, because the ACL and the
    permissions depend on it. The owner comes last, because only the owner can change permissions.
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
    os.fchmod(file, most & _permitted(old.st_mode, same_group, same_acl))
    with suppress(OSError):
        os.fchown(file, old.st_uid, -1)


def _permitted(mode: int, same_group: bool, same_acl: bool) -> int:
    """The permissions of the new file, without setuid and setgid, as after any write to a file."""
    if not same_acl:  # with an ACL, the group bits hold the ACL's mask, not the group's permissions
        return mode & 0o700
    if same_group:
        return mode & 0o777
    # The group has changed: old members are now others, and some others are now members. Both get
    # only the permissions that the old file gave to both.
    both = mode >> 3 & mode & 0o7
    return mode & 0o700 | both << 3 | both


def _copy_attributes(file: int, target: str, same_group: bool) -> bool:
    """Copy the attributes and the ACL; return whether the ACL now grants the same permissions."""
    if not hasattr(os, "getxattr"):  # only on Linux
        return True
    with suppress(OSError):
        for name in set(os.listxattr(target)) - _NOT_COPIED:
            with suppress(OSError):  # some namespaces are reserved for root
                os.setxattr(file, name, os.getxattr(target, name))
    old_acl = acl(target)
    with suppress(OSError):
        if old_acl is None:  # remove an ACL inherited from the directory
            os.removexattr(file, _ACL)
        elif same_group:
            os.setxattr(file, _ACL, old_acl)
    return acl(file) == old_acl and (old_acl is None or same_group)


def acl(file: int | str) -> bytes | None:
    """The POSIX ACL of a file, or None."""
    try:
        return os.getxattr(file, _ACL)
    except OSError:
        return None
