"""What killed writers of sharded checkpoints left is removed by the next save, and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from conftest import need
from sharded_sets import INDEX, found, listed, save, used
from test_io_replacing import run

from lars_tree import Container, io
from lars_tree._files import abandoned, locking, replacing_sets

need("ml_dtypes")
need("safetensors")


def test_a_kill_before_the_first_index_leaves_nothing_after_the_next_save(tmp_path):
    code = """if 1:
        import os, sys
        from lars_tree._files import replacing_sets
        sys.path.insert(0, sys.argv[2])
        from sharded_sets import save
        replacing_sets.os.replace = lambda old, new: os._exit(0)
        save(sys.argv[1], 0)"""
    run(code, tmp_path, Path(__file__).parent)
    names = listed(tmp_path)
    assert len(names) == 4
    assert INDEX not in names
    assert io.load(tmp_path / names[-1]) != Container()
    save(tmp_path, 1)
    assert listed(tmp_path) == used(tmp_path)


@pytest.mark.parametrize("what", ["changed", "replaced", "of another user"])
def test_a_file_that_only_has_the_name_of_a_killed_writers_shard_is_kept(what, tmp_path):
    test_a_kill_before_the_first_index_leaves_nothing_after_the_next_save(tmp_path)
    for name in listed(tmp_path):
        os.unlink(tmp_path / name)
    staged = tmp_path / ".lars_tree-0.set"
    staged.mkdir()
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"of another program")
    journal = staged / abandoned.JOURNAL
    identity = abandoned.identity(str(shard))
    journal.write_bytes(abandoned.journal_text({shard.name: identity}))
    if what == "changed":
        os.utime(shard, ns=(0, identity[1] + 1))
    elif what == "replaced":
        other = tmp_path / "other"
        other.write_bytes(b"of another program")
        os.utime(other, ns=(0, identity[1]))
        os.replace(other, shard)
    elif os.geteuid() != 0:
        pytest.skip("only root can give files away")
    else:
        os.chown(staged, 1234, 1234)
    save(tmp_path, 1)
    assert shard.read_bytes() == b"of another program"


def test_a_link_is_not_a_staged_set(tmp_path):
    """What a link leads to is not removed, even if it looks like a staged set."""
    others, directory = tmp_path / "others", tmp_path / "checkpoint"
    others.mkdir()
    directory.mkdir()
    for name in (abandoned.JOURNAL, abandoned.INDEX, "0", "precious"):
        (others / name).write_bytes(b"{}")
    (directory / ".lars_tree-0.set").symlink_to(others)
    save(directory, 0)
    assert len(listed(others)) == 4


def test_only_the_files_of_a_staged_set_are_removed(tmp_path):
    staged = tmp_path / ".lars_tree-0.set"
    staged.mkdir()
    for name in (abandoned.JOURNAL, abandoned.INDEX, abandoned.MODE, "0", "17", "precious"):
        (staged / name).write_bytes(b"{}")
    save(tmp_path, 0)
    assert listed(staged) == ["precious"]
    (staged / "precious").unlink()
    save(tmp_path, 0)
    assert not staged.exists()


JOURNALS = {
    "empty": b"",
    "cut off": b'{"model-00001-of-00001.safetensors": [',
    "a list": b"[1]",
    "of another file": b'{"precious": [%d, %d]}',
    "of another directory": b'{"../x-00001-of-00001.safetensors": [%d, %d]}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", JOURNALS)
def test_a_malformed_journal_removes_nothing_else(case, tmp_path):
    directory = tmp_path / "checkpoint"
    staged = directory / ".lars_tree-0.set"
    staged.mkdir(parents=True)
    kept = {"of another file": directory / "precious"}
    path = kept.get(case, tmp_path / "x-00001-of-00001.safetensors")
    path.write_bytes(b"kept")
    text = JOURNALS[case]
    text = text % tuple(abandoned.identity(str(path))) if b"%d" in text else text
    (staged / abandoned.JOURNAL).write_bytes(text)
    save(directory, 1)
    assert path.read_bytes() == b"kept"
    assert not staged.exists()


def test_the_staged_set_of_a_running_writer_is_kept(tmp_path, monkeypatch):
    written = []
    write = replacing_sets._write

    def saved_meanwhile(path, content):
        write(path, content)
        if not written:
            written.append(path)
            code = "import sys; from lars_tree import io; io.save({}, sys.argv[1])"
            run(code, tmp_path / "other.npz")
            run(code, tmp_path / "other.safetensors.index.json")
            assert Path(path).exists()

    monkeypatch.setattr(replacing_sets, "_write", saved_meanwhile)
    save(tmp_path, 3)
    assert found(tmp_path) == 3
    assert len(written) == 1
    assert len(listed(tmp_path)) == len(used(tmp_path)) + 2


def test_a_staged_directory_removed_before_its_journal_is_locked_is_made_again(
    tmp_path, monkeypatch
):
    made = []
    mkdir, lock = os.mkdir, locking.lock

    def removed_at_once(path, *arguments):
        mkdir(path, *arguments)
        made.append(path)
        if len(made) == 1:
            abandoned.remove(str(tmp_path))
            assert not os.path.exists(path)

    def removed_later(file, *, wait):
        if len(made) == 2 and wait:
            made.append("journal")
            abandoned.remove(str(tmp_path))
        return lock(file, wait=wait)

    monkeypatch.setattr(os, "mkdir", removed_at_once)
    monkeypatch.setattr(locking, "lock", removed_later)
    save(tmp_path, 1)
    assert len(made) == 4
    assert listed(tmp_path) == used(tmp_path)


@pytest.mark.parametrize("call", ["lstat", "stat", "unlink"])
def test_a_shard_that_could_not_be_removed_is_removed_by_the_next_save(call, tmp_path, monkeypatch):
    save(tmp_path, 0)
    settle = abandoned.settle
    function = getattr(os, call)

    def failing(path):
        if str(path).endswith("00002-of-00003.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return function(path)

    def settled(staged):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            settle(staged)

    monkeypatch.setattr(abandoned, "settle", settled)
    save(tmp_path, 3)
    assert found(tmp_path) == 3
    assert listed(tmp_path) != used(tmp_path)
    monkeypatch.undo()
    save(tmp_path, 6)
    assert listed(tmp_path) == used(tmp_path)
