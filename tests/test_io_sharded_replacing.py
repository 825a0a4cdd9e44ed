"""A save of a set that fails leaves the old set.

`tests/reliability/writers.py` has kills, concurrent saves and full disks.
"""

from __future__ import annotations

import os
import stat

import pytest
from conftest import interrupted_at, need
from sharded_sets import FILES, INDEX, found, listed, save, used

from lars_tree import io

need("ml_dtypes")
need("safetensors")


def test_files_are_synced_before_the_rename_that_depends_on_them(tmp_path, monkeypatch):
    done = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(file):
        done.append("sync of a directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "sync")
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *x: done.append("shard") or rename(*x))
    monkeypatch.setattr(os, "replace", lambda *x: done.append("index") or replace(*x))
    save(tmp_path, 0)  # 3 shards
    tail = ["sync of a directory", "shard", "shard", "shard", "sync of a directory", "index"]
    assert done[-7:] == [*tail, "sync of a directory"]
    assert done[:-7] == ["sync"] * (2 * 4 + 1)  # the content, then the rights; and the journal


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ZeroDivisionError])
@pytest.mark.parametrize("call", ["fetch", "rename", "replace"])
def test_an_exception_leaves_only_the_old_set(error, call, tmp_path, monkeypatch):
    save(tmp_path, 0)
    before = listed(tmp_path)

    def fail(*arguments):
        raise error

    target = io.arrays.Entry if call == "fetch" else os
    if call == "rename":
        rename, calls = os.rename, []
        monkeypatch.setattr(
            os, call, lambda *x: calls.append(x) or (fail if len(calls) > 2 else rename)(*x)
        )
    else:
        monkeypatch.setattr(target, call, fail)
    with pytest.raises(error):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert listed(tmp_path) == before
    assert found(tmp_path) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # unclosed files
@pytest.mark.parametrize("exists", [True, False])
def test_ctrl_c_at_any_line_leaves_one_complete_set(exists, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # it takes most of the time
    line, seen = 0, set()
    while True:
        for name in [] if exists else listed(tmp_path):
            os.unlink(tmp_path / name)
        if exists:
            save(tmp_path, 4)
        if not interrupted_at(line, FILES, lambda: save(tmp_path, 1)):
            break
        is_new = (tmp_path / INDEX).exists() and found(tmp_path) == 1
        seen.add(is_new)
        assert listed(tmp_path) == (used(tmp_path) if exists or is_new else []), line
        line += 1
    assert seen == {False, True}
    assert line > 200
