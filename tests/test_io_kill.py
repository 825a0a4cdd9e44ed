"""After kills, concurrent saves and full disks, the path leads to the old or the new file."""

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


# Each forked child saves the next value to the file, and is killed while it does so.
KILLING = """if 1:
    import os, random, signal, sys, time
    import numpy as np
    from lars_tree import io

    path, kills = sys.argv[1], int(sys.argv[2])
    directory = os.path.dirname(path)

    def tree(value):
        return {str(i): {"w": np.full(50_000, value), "b": np.full(9, value)} for i in range(9)}

    def value():
        found = {float(x) for leaf in io.load(path).leaves() for x in (leaf.min(), leaf.max())}
        assert len(found) == 1, f"a mixture: {found}"
        return found.pop()

    def strays():
        return len(os.listdir(directory)) - 1

    times = []
    for _ in range(5):
        start = time.perf_counter()
        io.save(tree(0.0), path)
        times.append(time.perf_counter() - start)
    random.seed(kills)
    old = new = left = 0
    for i in range(kills):
        before = value()
        child = os.fork()
        if child == 0:
            io.save(tree(before + 1), path)
            os._exit(0)
        time.sleep(random.uniform(0, 1.5 * sorted(times)[2]))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = value()
        assert after in (before, before + 1), (before, after)
        old, new = old + (after == before), new + (after > before)
        assert strays() <= 1, "strays of earlier kills were not cleared"
        left += strays()
    io.save(tree(0.0), path)
    assert strays() == 0
    print(old, new, left)"""


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(suffix, tmp_path):
    old, new, left = map(int, run(KILLING, tmp_path / f"w{suffix}", 60).split())
    assert old + new == 60
    assert old > 0
    assert new > 0
    assert left > 0  # some kills came while the temporary file existed


CROWD = """if 1:
    import sys
    import numpy as np
    from lars_tree import io
    path, value, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    for _ in range(count):
        if value:
            io.save({"a": np.full(9, value), "b": [np.full((2, 2), value)]}, path)
        else:
            w = io.load(path)
            assert len({float(x) for leaf in w.leaves() for x in leaf.flat}) == 1
            io.open(path)
    print("done")"""


def run_together(code, path, count, *arguments):
    """Run a program with the values 0 to 3 at the same time; each prints "done" at its end."""
    environment = os.environ | {"PYTHONPATH": str(Path(lars_tree.__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), path, str(value), str(count), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for value in (0, 1, 2, 3)
    ]
    for process in processes:
        out, err = process.communicate()
        assert out == "done\n", err


def test_concurrent_saves_and_loads(tmp_path):
    path = tmp_path / "w.safetensors"
    io.save({"a": np.ones(9), "b": [np.ones((2, 2))]}, path)
    run_together(CROWD, path, 100)
    assert os.listdir(tmp_path) == [path.name]


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


def test_a_full_disk_leaves_only_the_old_file(tmp_path):
    code = """if 1:
        import os, resource, signal, sys
        import numpy as np
        from lars_tree import io
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for size in (0, 100, 5000, 1 << 20):
            for suffix in (".safetensors", ".npz"):
                path = sys.argv[1] + suffix
                io.save({"a": np.ones(1)}, path)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                try:
                    io.save({"a": np.ones(1 << 18), "b": np.ones(3)}, path)
                except OSError as error:
                    assert error.errno == 27, error
                else:
                    raise SystemExit("no error")
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                assert io.load(path).a.shape == (1,)
        print(*sorted(os.listdir(os.path.dirname(path))))"""
    assert run(code, tmp_path / "w") == "w.npz w.safetensors\n"


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
