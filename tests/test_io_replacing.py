"""A save that fails leaves the old file, and removes only what killed writers left.

`tests/reliability/writers.py` has kills, concurrent saves and full disks.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import interrupted_at, need

import lars_tree
from lars_tree import Container, io
from lars_tree._files import abandoned, locking, replacing

need("ml_dtypes")
need("safetensors")


def run(code, *arguments):
    """Run code in a new process and return its output."""
    environment = os.environ | {"PYTHONPATH": str(Path(lars_tree.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_temporary_file_of_a_running_save_is_kept(tmp_path):
    path = tmp_path / "w.safetensors"

    def write(file):
        io.save({"a": np.ones(1)}, tmp_path / "other.safetensors")
        run("import sys; from lars_tree import io; io.save({}, sys.argv[1])", tmp_path / "x.npz")
        assert Path(file.name).exists()
        file.write(b"whole")

    replacing.replace(path, write)
    assert path.read_bytes() == b"whole"
    assert len(os.listdir(tmp_path)) == 3


def test_a_temporary_file_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    made = []
    lock = locking.lock

    def late(file, *, wait):
        if wait:
            made.append(sorted(tmp_path.iterdir()))
            if len(made) == 1:
                abandoned.remove_file(str(made[0][0]))  # as another writer might do
                assert not made[0][0].exists()
        return lock(file, wait=wait)

    monkeypatch.setattr(locking, "lock", late)
    io.save({"a": np.ones(1)}, tmp_path / "w.npz")
    assert len(made) == 2
    assert os.listdir(tmp_path) == ["w.npz"]


def test_a_temporary_file_renamed_by_its_writer_is_not_removed(tmp_path, monkeypatch):
    """The writer renames the file while another process has opened but not yet locked it."""
    stray, target = tmp_path / ".lars_tree-0.tmp", tmp_path / "w.npz"
    stray.write_bytes(b"new")
    lock = locking.lock

    def renamed_first(file, *, wait):
        stray.rename(target)
        stray.write_bytes(b"of another saver")
        return lock(file, wait=wait)

    monkeypatch.setattr(locking, "lock", renamed_first)
    abandoned.remove_file(str(stray))
    assert target.read_bytes() == b"new"
    assert stray.read_bytes() == b"of another saver"


def test_only_regular_files_are_removed_as_temporary_files(tmp_path):
    (tmp_path / "precious").write_text("kept")
    names = [f".lars_tree-{i}.tmp" for i in range(3)]
    os.symlink(tmp_path / "precious", tmp_path / names[0])
    os.mkfifo(tmp_path / names[1])
    os.mkdir(tmp_path / names[2])
    io.save({}, tmp_path / "w.npz")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / names[2]).is_dir()


def test_the_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(file):
        status = os.fstat(file)
        done.append("directory" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(file)

    def replaced(old, new):
        done.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    io.save({"a": np.ones(3)}, tmp_path / "w.safetensors")
    assert done == [(tmp_path / "w.safetensors").stat().st_size, "renamed", "directory"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ZeroDivisionError])
def test_an_exception_leaves_only_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    io.save({"a": np.ones(3)}, path)

    def fail(entry):
        raise error

    monkeypatch.setattr(io.arrays.Entry, "fetch", fail)
    with pytest.raises(error):
        io.save({"a": np.zeros(3)}, path)
    monkeypatch.undo()
    assert io.load(path) == Container(a=np.ones(3))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # unclosed files
def test_ctrl_c_at_any_line_leaves_no_temporary_file(tmp_path):
    path, line, seen = tmp_path / "w.safetensors", 0, set()
    folder = str(Path(replacing.__file__).parent)
    while True:
        io.save({"a": np.ones(3)}, path)
        if not interrupted_at(line, folder, lambda: io.save({"a": np.zeros(3)}, path)):
            break
        assert os.listdir(tmp_path) == [path.name], line
        seen.add(io.load(path).a.any())
        line += 1
    assert seen == {False, True}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # unclosed files
def test_ctrl_c_in_the_zip_module_is_not_replaced_by_another_error(tmp_path):
    path, line = tmp_path / "w.npz", 0
    io.save({"a": np.ones(3)}, path)
    while interrupted_at(line, zipfile.__file__, lambda: io.save({"a": np.ones(3)}, path)):
        assert os.listdir(tmp_path) == [path.name], line
        line += 7
    assert line > 100


def test_only_regular_files_are_replaced(tmp_path):
    directory, pipe, device = (tmp_path / f"{name}.npz" for name in ("directory", "pipe", "device"))
    directory.mkdir()
    os.mkfifo(pipe)
    device.symlink_to(os.devnull)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(IsADirectoryError):
        io.save({}, directory)
    for path in (pipe, device):
        with pytest.raises(OSError, match="not a regular file"):
            io.save({}, path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        io.save({}, tmp_path / "nowhere" / "w.npz")
    with pytest.raises(NotADirectoryError):
        io.save({}, pipe / "w.npz")
    assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    io.save({"a": np.ones(1)}, path)
    path.chmod(0o444)
    # Root can write to any file, so os.access is patched to answer as for an ordinary user.
    monkeypatch.setattr(os, "access", lambda name, mode: bool(os.stat(name).st_mode & 0o222))
    with pytest.raises(PermissionError):
        io.save({}, path)
    assert io.load(path) == Container(a=np.ones(1))
    assert os.listdir(tmp_path) == [path.name]


def test_a_name_of_maximal_length(tmp_path):
    path = tmp_path / ("w" * 251 + ".npz")
    io.save({"a": np.ones(1)}, path)
    assert os.listdir(tmp_path) == [path.name]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.save({"a": np.ones(1)}, "w.npz")
    assert os.listdir() == ["w.npz"]
