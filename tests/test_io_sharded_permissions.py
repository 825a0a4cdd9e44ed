"""The permissions of the files of a sharded checkpoint: saving gives no user more access."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from conftest import need
from sharded_sets import INDEX, found, listed, save, used
from test_io_permissions import ACL, SHARED, mode, root, set_attribute, umask

from lars_tree import io

need("ml_dtypes")
need("safetensors")

__all__ = ["umask"]


@pytest.mark.parametrize("mask", [0, 0o027, 0o077])
def test_nobody_can_open_a_set_that_is_being_written(mask, tmp_path, umask, monkeypatch):
    modes = set()
    fetch = io.arrays.Entry.fetch

    def looked(entry):
        for staged in tmp_path.glob(".lars_tree-*"):
            modes.add(("directory", mode(staged)))
            modes.update(("file", mode(x)) for x in staged.iterdir())
        return fetch(entry)

    umask(mask)
    monkeypatch.setattr(io.arrays.Entry, "fetch", looked)
    save(tmp_path, 0)
    assert modes == {("directory", 0o700), ("file", 0o600)}
    assert {mode(tmp_path / name) for name in listed(tmp_path)} == {0o666 & ~mask}


def test_permissions_are_preserved(tmp_path):
    save(tmp_path, 0)
    for name in listed(tmp_path):
        os.chmod(tmp_path / name, 0o640 if name == INDEX else 0o604)
    save(tmp_path, 1)  # another number of shards
    modes = {name: mode(tmp_path / name) for name in listed(tmp_path)}
    assert modes.pop(INDEX) == 0o640
    assert set(modes.values()) == {0o604}
    *_, last = modes
    os.chmod(tmp_path / last, 0o600)
    save(tmp_path, 2)  # an array may move from one shard to another
    modes = {name: mode(tmp_path / name) for name in listed(tmp_path)}
    assert modes.pop(INDEX) == 0o640
    assert set(modes.values()) == {0o600}


def test_old_shards_with_names_of_another_index_also_limit_the_permissions(tmp_path):
    save(tmp_path, 0)
    text = (tmp_path / INDEX).read_text()
    for name in listed(tmp_path):
        os.chmod(tmp_path / name, 0o600)
        os.rename(tmp_path / name, tmp_path / name.replace("model", "copied"))
    (tmp_path / INDEX).write_text(text.replace("model-", "copied-"))
    save(tmp_path, 1)
    assert {mode(tmp_path / name) for name in listed(tmp_path) if "-of-" in name} == {0o600}


@root
def test_owner_and_group_are_preserved(tmp_path):
    save(tmp_path, 0)
    for name in listed(tmp_path):
        os.chown(tmp_path / name, 1234, 4321)
        os.chmod(tmp_path / name, 0o640)
    save(tmp_path, 1)
    for name in listed(tmp_path):
        status = (tmp_path / name).stat()
        assert (status.st_uid, status.st_gid, mode(tmp_path / name)) == (1234, 4321, 0o640)
    shards = listed(tmp_path)[:-1]
    assert len(shards) == 2
    os.chown(tmp_path / shards[1], 1234, 99)  # the rights of two groups have nothing in common
    save(tmp_path, 2)
    assert {mode(tmp_path / name) for name in listed(tmp_path)[:-1]} == {0o600}


def test_an_acl_is_preserved_if_all_shards_have_it(tmp_path):
    save(tmp_path, 0)
    for name in listed(tmp_path):
        os.chmod(tmp_path / name, 0o600)
        set_attribute(tmp_path / name, ACL, SHARED)
    save(tmp_path, 1)
    for name in listed(tmp_path):
        assert os.getxattr(tmp_path / name, ACL) == SHARED
    os.removexattr(tmp_path / listed(tmp_path)[0], ACL)
    save(tmp_path, 2)
    assert {mode(tmp_path / name) & 0o077 for name in listed(tmp_path)[:-1]} == {0}


def test_read_only_files_are_not_replaced(tmp_path, monkeypatch):
    save(tmp_path, 0)
    monkeypatch.setattr(io.arrays.Entry, "fetch", lambda entry: pytest.fail("it was written"))
    monkeypatch.setattr(os, "access", lambda name, mode: bool(os.stat(name).st_mode & 0o222))
    for name in listed(tmp_path):
        os.chmod(tmp_path / name, 0o444)
        with pytest.raises(PermissionError, match=name):
            save(tmp_path, 1)
        os.chmod(tmp_path / name, 0o644)
    assert found(tmp_path) == 0
    assert listed(tmp_path) == used(tmp_path)


def test_if_the_directory_cannot_be_synced_the_new_set_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 0)
    fsync, replace, replaced = os.fsync, os.replace, []

    def broken(file):
        if replaced and stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(file)

    monkeypatch.setattr(os, "replace", lambda *x: replaced.append(x) or replace(*x))
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="the new file is in place, but may not survive") as caught:
        save(tmp_path, 3)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / INDEX))
    monkeypatch.undo()
    assert found(tmp_path) == 3
