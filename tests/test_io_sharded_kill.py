"""After kills, concurrent saves and full disks, the index leads to the old or the new set."""

from __future__ import annotations

import os
import stat
import textwrap
from pathlib import Path

import pytest
from conftest import interrupted_at, need
from sharded_sets import FILES, INDEX, found, listed, save, used
from test_io_kill import run, run_together

from lars_tree import io

need("ml_dtypes")
need("safetensors")


# Each forked child saves the next value, and is killed while it does so.
KILLING = """if 1:
    import json, os, random, signal, sys, time
    import numpy as np
    from lars_tree import io

    directory, kills = sys.argv[1], int(sys.argv[2])

    def save(value):
        tree = {str(i): {"w": np.full(50_000, value), "b": np.full(9, value)} for i in range(9)}
        io.save(tree, directory, max_shard_size=1_000_000)

    def value():
        found = {float(x) for leaf in io.load(directory).leaves() for x in (leaf.min(), leaf.max())}
        assert len(found) == 1, f"a mixture: {found}"
        return found.pop()

    def strays():
        with open(os.path.join(directory, "model.safetensors.index.json")) as file:
            used = set(json.load(file)["weight_map"].values())
        return len(os.listdir(directory)) - 1 - len(used)

    times = []
    for _ in range(5):
        start = time.perf_counter()
        save(0.0)
        times.append(time.perf_counter() - start)
    random.seed(kills)
    old = new = left = 0
    for i in range(kills):
        before = value()
        child = os.fork()
        if child == 0:
            save(before + 1)
            os._exit(0)
        time.sleep(random.uniform(0, 1.5 * sorted(times)[2]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = value()
        assert after in (before, before + 1), (before, after)
        old, new = old + (after == before), new + (after > before)
        assert strays() <= 1 + 5, "strays of earlier kills were not removed"
        left += strays() > 0
    save(0.0)
    assert strays() == 0
    print(old, new, left)"""


def test_a_kill_at_any_moment_leaves_the_old_set_or_the_new(tmp_path):
    old, new, left = map(int, run(KILLING, tmp_path, 60).split())
    assert old + new == 60
    assert old > 0
    assert new > 0
    assert left > 0


# Each forked child ends without any cleanup at the next line of the modules that rename files. All
# sets have the same number of shards, so that their names could collide.
EVERY_LINE = """if 1:
    import os, sys
    from lars_tree import io
    sys.path.insert(0, sys.argv[2])
    from sharded_sets import FILES, found, listed, save, used

    directory = sys.argv[1]
    os.fsync = lambda file: None  # it takes most of the time
    names = ("abandoned", "index", "locking", "replacing", "replacing_sets", "sharded")
    files = {os.path.join(FILES, f"{name}.py") for name in names}

    def end_at(line):
        lines = iter(range(line, -1, -1))
        def trace(frame, event, arg):
            if frame.f_code.co_filename not in files:
                return None
            if event == "line" and next(lines) == 0:
                os._exit(9)
            return trace
        sys.settrace(trace)

    value, line, complete, seen = 1.0, 0, 0, set()
    save(directory, value)
    while complete < 3:
        child = os.fork()
        if child == 0:
            end_at(line)
            save(directory, value + 3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        complete += status == 0
        after = found(directory)
        assert after == value + 3 if status == 0 else after in (value, value + 3), (line, after)
        extra = set(listed(directory)) - set(used(directory))
        seen.add((after > value, bool(extra)))
        if extra and line % 2:
            io.save({}, os.path.join(directory, "other.npz"))  # any save removes what was left
            os.unlink(os.path.join(directory, "other.npz"))
            assert listed(directory) == used(directory), (line, listed(directory))
            assert found(directory) == after
        value, line = value + 6, line + 1
        save(directory, value)
        assert listed(directory) == used(directory), (line, listed(directory))
        assert found(directory) == value
    print(line, sorted(seen))"""


def test_a_kill_at_any_line_leaves_a_complete_set_and_the_next_save_removes_the_rest(tmp_path):
    out = run(EVERY_LINE, tmp_path, Path(__file__).parent)
    lines, seen = out.split(maxsplit=1)
    assert int(lines) > 200
    every = "[(False, False), (False, True), (True, False), (True, True)]"
    assert seen.strip() == every


CROWD = """if 1:
    import sys
    sys.path.insert(0, sys.argv[4])
    from sharded_sets import found, save
    from lars_tree import io
    directory, value, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    for _ in range(count):
        if value:
            save(directory, value)
        else:
            found(directory)
            io.open(directory)
    print("done")"""


@pytest.mark.parametrize("locks", [True, False])
def test_concurrent_saves_and_loads(locks, tmp_path):
    save(tmp_path, 1)
    code = textwrap.dedent(CROWD)
    if not locks:  # as in a file system that cannot lock directories
        code = code.replace(
            "    directory,",
            "    from lars_tree._files import locking\n"
            "    locking.lock = lambda file, wait: None\n    directory,",
            1,
        )
    run_together(code, tmp_path, 60, Path(__file__).parent)
    assert found(tmp_path) in (1, 2, 3)
    if locks:
        assert listed(tmp_path) == used(tmp_path)


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


def test_a_full_disk_leaves_only_the_old_set(tmp_path):
    """Also if only the index does not fit any more."""
    code = """if 1:
        import os, resource, signal, sys
        import numpy as np
        from lars_tree import io
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        big = {"a": np.ones(1 << 18), "b": np.ones(3)}
        many = {f"{i}": np.ones(1) for i in range(100)}
        for size, tree in ((0, big), (100, big), (5000, big), (1 << 20, big), (3000, many)):
            io.save({"a": np.ones(1)}, sys.argv[1])
            before = sorted(os.listdir(sys.argv[1]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                io.save(tree, sys.argv[1], max_shard_size=8)
            except OSError as error:
                assert error.errno == 27, error
            else:
                raise SystemExit("no error")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert sorted(os.listdir(sys.argv[1])) == before
            assert io.load(sys.argv[1]).a.shape == (1,)
        print("done")"""
    assert run(code, tmp_path) == "done\n"
