"""The permissions of saved files and of temporary files: saving gives no user more access."""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import need, traced

from lars_tree import Container, io
from lars_tree._files import abandoned, locking, replacing

need("ml_dtypes")
need("safetensors")

ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 16, 32
NOBODY = 2**32 - 1
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(params=[".safetensors", ".npz"])
def path(request, tmp_path):
    return tmp_path / f"w{request.param}"


@pytest.fixture
def umask():
    """A function that sets the umask for the rest of the test."""
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


@pytest.fixture
def open_directory():
    """A directory in which any user can write."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def saved(path, tree=None):
    io.save({"a": np.ones(3)} if tree is None else tree, path)
    assert os.listdir(path.parent) == [path.name]


def acl(*entries):
    """A POSIX ACL in the format of its extended attribute, from (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


SHARED = acl(
    (USER_OBJ, 6, NOBODY),
    (USER, 6, 1234),
    (GROUP_OBJ, 0, NOBODY),
    (MASK, 6, NOBODY),
    (OTHER, 0, NOBODY),
)


def set_attribute(path, name, value):
    try:
        os.setxattr(path, name, value)
    except (AttributeError, OSError):
        pytest.skip(f"no {name} here")


@pytest.mark.parametrize("mask", [0, 0o027, 0o077])
@pytest.mark.parametrize("old", [None, 0o600, 0o604, 0o660])
def test_nobody_can_open_a_file_that_is_being_written(old, mask, path, umask, monkeypatch):
    modes = []
    fetch = io.arrays.Entry.fetch

    def looked(entry):
        modes.extend(mode(path.parent / x) for x in os.listdir(path.parent) if x != path.name)
        return fetch(entry)

    if old is not None:
        saved(path)
        path.chmod(old)
    umask(mask)
    monkeypatch.setattr(io.arrays.Entry, "fetch", looked)
    saved(path)
    assert modes == [0o600]
    assert mode(path) == (0o666 & ~mask if old is None else old)


def test_the_content_is_complete_before_anybody_can_open_it(path, monkeypatch):
    sizes = []
    fchmod = os.fchmod

    def looked(file, bits):
        sizes.append(os.fstat(file).st_size)
        fchmod(file, bits)

    monkeypatch.setattr(os, "fchmod", looked)
    saved(path)
    saved(path)
    assert sizes == [path.stat().st_size] * 2


def test_permissions_changed_during_a_save_count(path, monkeypatch):
    """The permissions are those of the old file at the end of the save, not at its start."""
    saved(path)
    path.chmod(0o644)
    fetch = io.arrays.Entry.fetch
    monkeypatch.setattr(io.arrays.Entry, "fetch", lambda x: path.chmod(0o600) or fetch(x))
    saved(path)
    assert mode(path) == 0o600
    monkeypatch.setattr(io.arrays.Entry, "fetch", lambda x: path.unlink() or fetch(x))
    path.chmod(0o644)
    saved(path)
    assert mode(path) == 0o600  # the permissions of the old file are unknown


def test_a_file_that_is_removed_before_it_is_checked_is_a_new_file(path, monkeypatch):
    """As an old shard of a set that two processes replace."""
    saved(path)
    monkeypatch.setattr(os, "access", lambda name, mode: os.unlink(name) or False)
    saved(path)
    assert io.load(path) == Container(a=np.ones(3))


@root
def test_owner_and_group_are_preserved(path):
    saved(path)
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    saved(path)
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (1234, 4321, 0o640)


OF_OTHER_GROUPS = [
    (0o640, 0o600),  # the new group must not get the rights of the old group
    (0o664, 0o644),
    (0o604, 0o600),  # the members of the old group now count as others
    (0o666, 0o666),
    (0o4755, 0o755),
]


@pytest.mark.parametrize(("before", "after"), OF_OTHER_GROUPS)
def test_no_other_group_gains_a_right(before, after, path, monkeypatch):
    saved(path)
    os.chmod(path, before)
    status = os.stat(path)
    other = os.stat_result([*status[:5], status.st_gid + 1, *status[6:10]])

    def refused(file, owner, group):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchown", refused)
    monkeypatch.setattr(replacing, "status", lambda target: other)
    saved(path)
    assert mode(path) == after


@root
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # from JAX, if already imported
def test_a_user_without_privilege_replaces_a_file_of_another(open_directory):
    path = open_directory / "w.npz"
    saved(path)
    os.chown(path, 0, 4321)
    path.chmod(0o666)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(1234)
            os.setuid(1234)
            io.save({"a": np.zeros(3)}, path)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    status = path.stat()
    assert (status.st_uid, status.st_gid, mode(path)) == (1234, 1234, 0o666)


def test_extended_attributes_are_preserved(path):
    saved(path)
    set_attribute(path, "user.origin", b"run 7")
    saved(path)
    assert os.getxattr(path, "user.origin") == b"run 7"


def test_an_acl_is_preserved(path):
    saved(path)
    path.chmod(0o600)
    set_attribute(path, ACL, SHARED)
    saved(path)
    assert os.getxattr(path, ACL) == SHARED
    assert mode(path) == 0o660


@pytest.mark.parametrize("fails", ["setting it", "the group"])
def test_only_the_owner_has_rights_if_the_acl_cannot_be_copied(fails, path, monkeypatch):
    """With an ACL, the group bits of the mode are the mask of the ACL, not the group's rights."""
    saved(path)
    set_attribute(path, ACL, SHARED)

    def refused(*arguments):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if fails == "setting it":
        monkeypatch.setattr(os, "setxattr", refused)
    else:
        status = os.stat(path)
        other = os.stat_result([*status[:5], status.st_gid + 1, *status[6:10]])
        monkeypatch.setattr(os, "fchown", refused)
        monkeypatch.setattr(replacing, "status", lambda target: other)
    saved(path)
    assert mode(path) == 0o600
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, ACL)


def test_a_default_acl_applies_only_to_new_files(path):
    saved(path)
    path.chmod(0o660)
    set_attribute(path.parent, DEFAULT_ACL, SHARED)
    saved(path)
    assert mode(path) == 0o660
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, ACL)
    path.unlink()
    plain = path.with_name("plain")
    plain.touch()
    expected = os.getxattr(plain, ACL), mode(plain)
    plain.unlink()
    saved(path)
    assert (os.getxattr(path, ACL), mode(path)) == expected


def test_a_hard_link_leads_to_the_old_file(path):
    saved(path)
    other = path.with_name(f"other{path.suffix}")
    os.link(path, other)
    io.save({"a": np.zeros(3)}, path)
    assert io.load(other) == Container(a=np.ones(3))
    assert io.load(path) == Container(a=np.zeros(3))


@pytest.mark.parametrize("fails", ["fsync", "open"])
def test_if_the_directory_cannot_be_synced_the_new_file_is_in_place(fails, path, monkeypatch):
    saved(path)
    call, directory = getattr(os, fails), path.parent

    def broken(file, *arguments, **options):
        if stat.S_ISDIR(os.stat(file).st_mode) if os.path.exists(file) else False:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(file, *arguments, **options)

    monkeypatch.setattr(os, fails, broken)
    with pytest.raises(OSError, match="the new file is in place, but may not survive") as caught:
        io.save({"a": np.zeros(3)}, path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    monkeypatch.undo()
    assert io.load(path) == Container(a=np.zeros(3))
    assert os.listdir(directory) == [path.name]


def test_if_the_file_cannot_be_synced_the_old_file_is_in_place(path, monkeypatch):
    saved(path)

    def broken(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'$"):
        io.save({"a": np.zeros(3)}, path)
    assert io.load(path) == Container(a=np.ones(3))
    assert os.listdir(path.parent) == [path.name]


FILES = {x.__file__ for x in (abandoned, locking, replacing)}


def interrupted_at(opcode, call):
    """Make a call with Ctrl-C at one opcode of `FILES`; False if it runs fewer opcodes."""
    opcodes = iter(range(opcode, -1, -1))

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(opcodes, None) == 0:
            signal.raise_signal(signal.SIGINT)
        return trace

    traced(trace, call)
    return next(opcodes, None) is None


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # unclosed files
@pytest.mark.parametrize("exists", [True, False])
def test_ctrl_c_at_any_opcode_leaves_no_descriptor_and_no_file(exists, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # fsync takes most of the time
    path, stray, opcode = tmp_path / "w.safetensors", tmp_path / ".lars_tree-0.tmp", 0
    while True:
        io.save({"a": np.ones(1)}, path)
        if not exists:
            path.unlink()
        stray.touch()
        before = len(os.listdir("/proc/self/fd"))
        if not interrupted_at(opcode, lambda: io.save({"a": np.zeros(1)}, path)):
            break
        assert len(os.listdir("/proc/self/fd")) == before, opcode
        assert set(os.listdir(tmp_path)) <= {path.name, stray.name}, opcode
        opcode += 1
    assert opcode > 500
