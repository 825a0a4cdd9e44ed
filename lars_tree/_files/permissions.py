"""The permissions, owner and attributes of a file that replaces another.

They are preserved as far as the system allows. Where it does not allow it, nobody gains a right
that the old file did not give. On Windows nothing is done. Tests: `tests/test_io_permissions.py`.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

_ACL = "system.posix_acl_access"
# Attributes that describe the old content or how it is run.
_NOT_COPIED = {_ACL, "security.capability", "security.evm", "security.ima"}


def of_new_file(name: str) -> int:
    """The permissions of a new file in this directory, found by creating one with this name.

    Reading the umask would need setting it, for all threads; and a default ACL overrides it.
    """
    with open(name, "xb", buffering=0) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    with suppress(FileNotFoundError):  # another writer may have removed it
        os.unlink(name)
    return mode


def give(file: int, new_mode: int, target: str, old: os.stat_result | None) -> None:
    """Give the open file the rights of the target, or `new_mode` if there is no old file.

    The group comes first, as the ACL and the permissions depend on it. The owner comes last: only
    the owner can change permissions.
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
    """The permissions of the new file; without setuid and setgid, which a write clears too."""
    if not same_acl:  # with an ACL, the group's bits are its mask, not the rights of the group
        return mode & 0o700
    if same_group:
        return mode & 0o777
    # Members of the old group now count as others, and some others are in the new group.
    both = mode >> 3 & mode & 0o7
    return mode & 0o700 | both << 3 | both


def _copy_attributes(file: int, target: str, same_group: bool) -> bool:
    """Copy the attributes and the ACL; return whether the ACLs now grant the same rights."""
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
    """The POSIX ACL, None if there is none."""
    try:
        return os.getxattr(file, _ACL)
    except OSError:
        return None
