"""The streams of `lars-tree`: a full disk, a closed pipe, and the progress bar of a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import need

import lars_tree
from lars_tree import io

for library in ("click", "ml_dtypes", "safetensors"):
    need(library)

COMMAND = [sys.executable, "-m", "lars_tree"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lars_tree.__file__).parents[1])}
UPDATE = ["update", "w.npz", "w.npz", "--lr", "1", "-o", "o.npz"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.save({"a": np.ones(1), "b": np.ones(3)}, "w.npz")


def run(arguments, **more):
    return subprocess.run([*COMMAND, *arguments], env=ENVIRONMENT, check=False, **more)


FULL = "standard output: No space left on device"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (UPDATE, f"{FULL}; o.npz was written"),
        ([*UPDATE, "--json"], f"{FULL}; o.npz was written"),
        (["show", "w.npz"], FULL),
        (["diff", "w.npz", "w.npz", "--json"], FULL),
        (["--help"], FULL),
        ([], FULL),
        (["update", "-h"], FULL),
        (["--version"], FULL),
    ],
)
def test_a_full_disk_at_stdout(arguments, error):
    with open("/dev/full", "w") as full:
        done = run(arguments, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2
        assert done.stderr.decode() == f"lars-tree: {error}\n"
        assert run(arguments, stdout=full, stderr=full).returncode == 2
    if arguments[:1] == ["update"] and "-o" in arguments:
        assert io.load("o.npz") == {"a": np.zeros(1), "b": np.zeros(3)}


@pytest.mark.parametrize("arguments", [["show", "w.npz"], ["--help"], [], UPDATE])
def test_a_closed_pipe_is_not_an_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
    assert os.path.exists("o.npz") == (arguments is UPDATE)


# ---- Progress

# Every bar appears at once, instead of after half a second.
AT_ONCE = """if 1:
    import sys
    from lars_tree import cli
    from lars_tree._commands import output, step
    output._DELAY, step._MOST_LEAVES = -1, 1
    sys.exit(cli.main())"""


def seen(arguments, is_terminal=True, code=AT_ONCE, **environment):
    """The stderr of a command, and its exit status, if stderr is a terminal or a pipe."""
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=ENVIRONMENT | {"TERM": "xterm"} | environment,
            stdout=subprocess.PIPE,
            stderr=writer,
            check=False,
        )
        os.write(writer, b"|")  # so that there is something to read
        return os.read(reader, 1 << 16).decode().removesuffix("|"), done.returncode
    finally:
        os.close(reader)
        os.close(writer)


WORK = [
    (["update", "w.npz", "g.npz", "--lr", "1", "-o", "o.npz"], 0),
    (["show", "w.npz", "--grads", "g.npz"], 0),
    (["diff", "w.npz", "g.npz"], 1),
]


@pytest.mark.parametrize(("arguments", "status"), WORK)
def test_a_terminal_shows_progress(arguments, status):
    io.save({"a": np.full(1, 2.0), "b": np.ones(3)}, "g.npz")
    text, found = seen(arguments)
    assert found == status
    assert text.startswith("\r")
    assert arguments[0] in text
    assert "25%" in text  # after the first leaf
    assert "100%" in text
    assert seen(arguments, NO_COLOR="1")[0].count("\x1b[3") == 0  # no colors


@pytest.mark.parametrize(("arguments", "status"), WORK)
@pytest.mark.parametrize(
    ("more", "is_terminal", "environment"),
    [([], False, {}), (["--json"], True, {}), ([], True, {"TERM": "dumb"})],
)
def test_nothing_shows_progress_without_a_terminal(
    arguments, status, more, is_terminal, environment
):
    io.save({"a": np.full(1, 2.0), "b": np.ones(3)}, "g.npz")
    assert seen([*arguments, *more], is_terminal, **environment) == ("", status)


def test_fast_work_shows_no_progress():
    code = "import sys; from lars_tree import cli; sys.exit(cli.main())"
    assert seen(["update", "w.npz", "w.npz", "--lr", "1", "-o", "o.npz"], code=code) == ("", 0)


def test_an_error_ends_the_progress_bar():
    io.save({"a": np.ones(1), "b": np.full(3, np.nan)}, "g.npz")
    text, status = seen(WORK[0][0])
    assert status == 2
    assert "lars-tree update: g.npz would make weights that are not finite: b" in text
    assert text.index("\x1b[?25h") < text.index("lars-tree update:")  # the cursor is shown again
