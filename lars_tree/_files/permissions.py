"""Who may read and write a file that takes the place of another. What `replacing.py` asks for.

The rule: what the system lets us preserve is preserved; where it does not, nobody gains a right
that the old file did not give. On Windows nothing is done. `tests/test_io_permissions.py`.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

_ACL = "system.posix_acl_access"
# Attributes about the old content, or about running it: they are wrong for the new content.
_NOT_COPIED = {_ACL, "security.capability", "security.evm", "security.ima"}


def of_new_file(name: str) -> int:
    """The permissions of any new file in this directory, found by making one of this name.

    The umask can only be read by setting it, for all threads, and a default ACL overrides it.
    """
    with open(name, "xb", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    with suppress(FileNotFoundError):  # another saver may have cleared it as a stray
        os.unlink(name)
    return mode


def give(file: int, new_mode: int, target: str, old: os.stat_result | None) -> None:
    """Give the open file all that the target has; if none is there, these permissions.

    First the group, then attributes, ACL and permissions, which depend on whether it is the same
    group, and the owner last: nobody else can change the permissions of a file.
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
    """What the new file permits, given what could be preserved.

    Without setuid and setgid, which writing to a file clears too.
    """
    if not same_acl:  # the group's bits are the mask of the ACL: not the rights of the group
        return mode & 0o700
    if same_group:
        return mode & 0o777
    # Members of the old group are others now, and some others are in the new group.
    both = mode >> 3 & mode & 0o7
    return mode & 0o700 | both << 3 | both


def _copy_attributes(file: int, target: str, same_group: bool) -> bool:
    """Copy what can be copied; whether the ACLs are the same in the end, and mean the same."""
    if not hasattr(os, "getxattr"):  # only Linux has them
        return True
    with suppress(OSError):
        for name in set(os.listxattr(target)) - _NOT_COPIED:
            with suppress(OSError):  # such as those of namespaces that are reserved for root
                os.setxattr(file, name, os.getxattr(target, name))
    acl = _acl(target)
    with suppress(OSError):
        if acl is None:  # the new file may have inherited one from its directory
            os.removexattr(file, _ACL)
        elif same_group:
            os.setxattr(file, _ACL, acl)
    return _acl(file) == acl and (acl is None or same_group)


def _acl(file: int | str) -> bytes | None:
    """The POSIX ACL, None without one."""
    try:
        return os.getxattr(file, _ACL)
    except OSError:
        return None
