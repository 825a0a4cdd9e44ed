"""Trees of one value in files of each format, and calls that are disturbed at one line."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lars_tree import _files, io

INDEX = "model.safetensors.index.json"
FOLDER = str(Path(_files.__file__).parent)


@dataclass(frozen=True)
class Saver:
    """Saves and loads trees whose elements all have one value."""

    suffix: str  # of the file; empty for a sharded checkpoint

    def path(self, directory: Path) -> Path:
        """What is saved in a directory: a file, or the directory itself."""
        return directory / f"w{self.suffix}" if self.suffix else directory

    def target(self, directory: Path) -> Path:
        """The file that is replaced: the path, or the index."""
        return self.path(directory) if self.suffix else directory / INDEX

    def save(self, directory: Path, value: float, size: int = 3) -> None:
        """Save three arrays of this size; in 3, 2 and 1 shards by turns."""
        x = np.full(size, value)
        tree = {"a": x, "b": {"c": x}, "d": x}
        most = None if self.suffix else 8 * size * (1 + int(value) % 3)
        io.save(tree, self.path(directory), max_shard_size=most)

    def found(self, directory: Path) -> float:
        """The value of the saved tree; fails if it is a mixture or has other elements."""
        return value_of(io.load(self.path(directory)))

    def used(self, directory: Path) -> list[str]:
        """The files that belong to what was saved."""
        target = self.target(directory)
        if self.suffix:
            return [target.name]
        return sorted({INDEX, *json.loads(target.read_text())["weight_map"].values()})

    def strays(self, directory: Path) -> list[str]:
        """The other files in the directory."""
        return sorted({*os.listdir(directory)} - {*self.used(directory)})


SAVERS = [Saver(".npz"), Saver(".safetensors"), Saver("")]


def value_of(tree: Any) -> float:
    """The only value of a tree of three arrays of one size."""
    assert [".".join(path) for path in tree.paths()] == ["a", "b.c", "d"], tree
    leaves = tree.leaves()
    assert len({x.shape for x in leaves}) == 1, tree
    values = {float(x) for leaf in leaves for x in (leaf.min(), leaf.max())}
    assert len(values) == 1, f"a mixture: {values}"
    return values.pop()


def at_line(
    line: int, hook: Callable[[], object], call: Callable[..., Any], *arguments: Any
) -> Any:
    """The result of a call, before whose line `line` in the modules of files `hook` is called."""
    lines = iter(range(line, -1, -1))

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line" and next(lines, None) == 0:
            sys.settrace(None)
            hook()
        return trace

    sys.settrace(trace)
    try:
        return call(*arguments)
    finally:
        sys.settrace(None)


def count_of_lines(call: Callable[..., Any], *arguments: Any) -> int:
    """How many lines a call runs in the modules of files."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call(*arguments)
    finally:
        sys.settrace(None)
    return count


def shuffled(rng: np.random.Generator, cases: Iterable[Any]) -> list[Any]:
    """All cases in a random order."""
    cases = list(cases)
    return [cases[i] for i in rng.permutation(len(cases))]


def checked(check: Callable[..., None], *case: Any) -> str | None:
    """None if a check of a case passes, or what happened."""
    try:
        check(*case)
    except Exception as error:
        return f"{check.__name__}{case}: {type(error).__name__}: {error}"
    return None


@contextmanager
def child(call: Callable[..., Any], *arguments: Any) -> Iterator[int]:
    """A forked process that makes a call; it is killed at the end of the block."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            call(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("an error in the child process")
