"""Races: another program changes the path at any line of a save or of a reader.

Before each line of the modules of files, in turn, the path, its directory or the temporary files
become something else. A save then completes, or raises an error with the path. Wherever a path
leads to a tree, it leads to a whole one; no other file is changed; the next save in the directory
removes what was left, also if the directory was renamed. A reader gives the old or the new tree,
whole, or raises an error with the path; all files are closed, also after Ctrl-C.

Two things cannot be survived. If another program overwrites a file in place, its elements are read
as they are at that moment. If it truncates a file that is mapped, the system kills the process that
reads the missing elements. `io.save` does neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lars_tree import FileError, io
from tests.reliability.attack import Attempts, attack
from tests.reliability.readers import in_memory
from tests.reliability.savers import (
    SAVERS,
    Saver,
    at_line,
    checked,
    count_of_lines,
    shuffled,
    value_of,
)

Random = np.random.Generator
NEEDS = ("safetensors", "ml_dtypes")
NOBODY = 65534  # a user

OTHER = b"of another program"


class Place:
    """A directory with a saved tree of ones, next to a file of another program."""

    def __init__(self, above: Path, saver: Saver) -> None:
        self.saver, self.above = saver, above
        self.directory, self.renamed = above / "here", above / "renamed"
        self.other = above / f"other{saver.suffix}"
        self.target = saver.target(self.directory)
        self.has_begun = False  # whether there were temporary files when a link was made
        for path in above.iterdir():
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        self.directory.mkdir()
        self.other.write_bytes(OTHER)
        saver.save(self.directory, 1)

    def first_shard(self) -> Path:
        """The file with the elements."""
        return min(self.directory.glob("model-*"), default=self.target)

    def replace(self) -> None:
        self.saver.save(self.directory, 4)

    def remove(self) -> None:
        self.target.unlink()

    def remove_shard(self) -> None:
        self.first_shard().unlink()

    def make_directory(self) -> None:
        self.target.unlink()
        self.target.mkdir()

    def make_link(self) -> None:
        self.has_begun = any(self.directory.glob(".lars_tree-*"))
        self.target.unlink()
        self.target.symlink_to(self.other)

    def put_other(self) -> None:
        new = self.above / "new"
        new.write_bytes(OTHER)
        new.rename(self.target)

    def rename_directory(self) -> None:
        self.directory.rename(self.renamed)

    def exchange_directory(self) -> None:
        self.directory.rename(self.renamed)
        self.directory.mkdir()

    def remove_directory(self) -> None:
        shutil.rmtree(self.directory)

    def remove_temporary(self) -> None:
        for path in self.directory.glob(".lars_tree-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def protect_directory(self) -> None:
        """Make it read-only; root becomes another user until the end of the attempt."""
        self.directory.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)

    def unprotect(self) -> None:
        if os.getuid() == 0:
            os.seteuid(0)
        with suppress(FileNotFoundError):
            self.directory.chmod(0o755)

    def truncate(self) -> None:
        os.truncate(self.first_shard(), self.first_shard().stat().st_size // 2)

    def truncate_all(self) -> None:
        os.truncate(self.target, 0)

    def overwrite(self) -> None:
        """Write other numbers over the header and the elements, in place."""
        path = self.first_shard()
        path.write_bytes(path.read_bytes().replace(b"24", b"-9").replace(b"3", b"7"))

    def overwrite_header(self) -> None:
        """Write a header of the same length over the header, in place."""
        path = self.first_shard()
        path.write_bytes(path.read_bytes().replace(b"[0,24]", b"[9E9]1").replace(b"F64", b"F99"))

    def overwrite_index(self) -> None:
        self.target.write_bytes(self.target.read_bytes().replace(b"model-", b"../../"))

    def interrupt(self) -> None:
        raise KeyboardInterrupt


Event = Callable[[Place], None]

ON_SAVES: list[Event] = [Place.remove, Place.make_directory, Place.make_link, Place.put_other]
ON_SAVES += [Place.rename_directory, Place.exchange_directory]
ON_SAVES += [Place.remove_directory, Place.remove_temporary, Place.protect_directory]
ON_SAVES += [Place.remove_shard, Place.interrupt]

# After these, the shards of an index cannot be distinguished from other files.
UNKNOWN = (Place.remove, Place.make_directory, Place.make_link, Place.put_other)
UNKNOWN += (Place.remove_temporary,)


@attack(
    "A save whose path changes leaves whole files, and no others",
    "changes, each before each line of saves of the three formats",
    count=9000,
    short=200,
    seconds=60,
    needs=NEEDS,
)
def saves(rng: Random) -> Attempts:
    with in_memory() as above:
        lines = {x: count_of_lines(x.save, Place(above, x).directory, 4) for x in SAVERS}
        cases = ((x, event, i) for x in SAVERS for event in ON_SAVES for i in range(lines[x]))
        for saver, event, line in shuffled(rng, cases):
            yield checked(_save, above, saver, event, line)


def _save(above: Path, saver: Saver, event: Event, line: int) -> None:
    place = Place(above, saver)
    files = len(os.listdir("/proc/self/fd"))
    try:
        at_line(line, lambda: event(place), saver.save, place.directory, 4)
    except (OSError, FileError) as error:
        text = str(error)
        if str(place.directory) not in text:
            raise AssertionError(f"an error without the path: {text}") from error
    except KeyboardInterrupt:
        if event is not Place.interrupt:
            raise
    finally:
        place.unprotect()
    assert len(os.listdir("/proc/self/fd")) == files, "a file is open"
    if place.other.read_bytes() != OTHER:  # only a link from the start is followed
        assert event is Place.make_link, "another file was changed"
        assert not place.has_begun, "a link was followed"
        assert value_of(io.load(place.other)) == 4
    for directory in (place.directory, place.renamed):
        if directory.is_dir():
            _check_whole(saver, directory, event)


def _check_whole(saver: Saver, directory: Path, event: Event) -> None:
    target = saver.target(directory)
    is_tree = target.is_file() and target.read_bytes() != OTHER
    if is_tree and event is not Place.remove_shard:
        assert saver.found(directory) in (1, 4)
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        target.rmdir()
    saver.save(directory, 7)
    assert saver.found(directory) == 7
    left = saver.strays(directory)
    if event in UNKNOWN and not saver.suffix:
        left = [name for name in left if name.startswith(".lars_tree-")]
    assert not left, f"left: {left}"


IN_PLACE = (Place.truncate, Place.truncate_all, Place.overwrite, Place.overwrite_header)

ON_READS: list[Event] = [Place.replace, Place.remove, Place.make_directory, Place.make_link]
ON_READS += [Place.put_other, Place.rename_directory, Place.exchange_directory, Place.interrupt]
ON_READS += [Place.remove_directory, Place.remove_shard, Place.overwrite_index, *IN_PLACE]


def load(path: Path) -> Any:
    return io.load(path)


def load_flat(path: Path) -> Any:
    return io.load(path, flat=True)


def map_to_write(path: Path) -> Any:
    return io.open(path, "r+")


@attack(
    "A reader whose path changes gives a whole tree, or an error with the path",
    "changes, each before each line of three readers of the three formats",
    count=9000,
    short=200,
    seconds=60,
    needs=NEEDS,
)
def reads(rng: Random) -> Attempts:
    with in_memory() as above:
        cases = []
        for saver in SAVERS:
            for read in (load, load_flat, map_to_write):
                if read is not map_to_write or saver.suffix != ".npz":
                    count = count_of_lines(read, saver.path(Place(above, saver).directory))
                    cases += [(saver, read, x, i) for x in ON_READS for i in range(count)]
        for saver, read, event, line in shuffled(rng, cases):
            yield checked(_read, above, saver, read, event, line)


def _read(above: Path, saver: Saver, read: Callable[[Path], Any], event: Event, line: int) -> None:
    place = Place(above, saver)
    files = len(os.listdir("/proc/self/fd"))
    tree = None
    try:
        tree = at_line(line, lambda: event(place), read, saver.path(place.directory))
    except (OSError, FileError) as error:
        text = str(error)
        if str(place.directory) not in text or event is Place.replace:
            raise AssertionError(f"another error: {text}") from error
    except KeyboardInterrupt:
        if event is not Place.interrupt:
            raise
    if tree is not None and not (read is map_to_write and event in IN_PLACE):
        values = {float(x) for leaf in tree.leaves() for x in leaf.reshape(-1)}
        assert len(values) == 1 or event in IN_PLACE, f"a mixture: {values}"
        assert values <= {1.0, 4.0} or event in IN_PLACE, values
    del tree
    assert len(os.listdir("/proc/self/fd")) == files, "a file is open"
