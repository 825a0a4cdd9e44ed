"""Sharded checkpoints: .safetensors files and an index, as Hugging Face writes them.

The path is that of the index, or of a directory that contains one. A set is refused unless its
index and its shards list the same arrays. The total_size of an index is not checked, because
programs that change the arrays of a checkpoint often leave it as it was.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._files import index, names, recognize, safetensors
from lars_tree._files.arrays import Entry
from lars_tree._files.index import Index
from lars_tree._files.replacing import Path
from lars_tree._files.replacing_sets import replace_set

NAME = safetensors.NAME

has = safetensors.has

# Older versions of transformers refuse a file whose metadata does not name a format.
_SHARD_METADATA = {"format": "pt"}


def index_path(path: Path) -> str:
    """The path of the index: `path`, or the index in this directory.

    Raises a FileError if the directory has no index, or several files that could be meant.
    """
    name = os.fsdecode(path)
    if not os.path.isdir(name):
        return name
    inside = sorted(os.listdir(name))
    found = [x for x in inside if index.is_index(x)]
    if index.DEFAULT in found:
        found = [index.DEFAULT]
        if (single := "model.safetensors") in inside:
            text = f"it has both {single!r} and {index.DEFAULT!r}: give the path of one of them"
            raise errors.file_error(path, text)
    if len(found) != 1:
        raise errors.file_error(path, _without_index(inside, found))
    return os.path.join(name, found[0])


def _without_index(inside: list[str], found: list[str]) -> str:
    """Why a directory with these files cannot be read."""
    if found:
        return f"it has several indexes, {errors.enumerated(found)}: give the path of one of them"
    files = [x for x in inside if x.endswith((".safetensors", ".npz"))]
    text = "it is a directory without an index (*.safetensors.index.json)"
    if files:
        return f"{text}: give the path of a file in it, such as {files[0]!r}"
    for x in inside:
        if known := index.other_format(x) or recognize.suffix(x):
            return f"{text}: {x!r} {known}"
    return text


def write(path: str, entries: dict[str, Entry], metadata: dict[str, str], most: int) -> None:
    """Replace the set at the path of an index. `most` is the size of a shard in bytes."""
    sizes = {name: prod(x.shape) * x.dtype.itemsize for name, x in entries.items()}
    shards = index.split(sizes, most)

    def write_shard(shard: list[str], file: BinaryIO) -> None:
        safetensors.write(file, {name: entries[name] for name in shard}, _SHARD_METADATA)

    def text(files: list[str]) -> bytes:
        pairs = zip(shards, files, strict=True)
        shard_of = {name: file for shard, file in pairs for name in shard}
        weight_map = {name: shard_of[name] for name in entries}
        return index.written(Index(weight_map, metadata), sum(sizes.values()))

    longest = len(text(index.shard_names(index.stem(path), len(shards), "0" * 8)))
    safetensors.check_length("an index", longest, index.LONGEST)
    replace_set(path, [partial(write_shard, shard) for shard in shards], text)


class View(NamedTuple):
    """An open set of shards that match their index; the arrays are in the order of the index."""

    path: str
    shards: dict[str, safetensors.View]  # by array
    metadata: dict[str, str]

    @property
    def names(self) -> Iterable[str]:
        return self.shards

    def size(self, name: str) -> int:
        return self.shards[name].size(name)

    def unsupported(self, name: str) -> str | None:
        return self.shards[name].unsupported(name)

    def dtype_and_shape(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        return self.shards[name].dtype_and_shape(name)

    def listed(self, name: str) -> Any:
        return self.shards[name].listed(name)

    def read(self, name: str, memory: NumpyArray | None = None) -> NumpyArray:
        return self.shards[name].read(name, memory)

    def mapped(self, mode: Literal["r", "r+"]) -> dict[str, NumpyArray]:
        """All arrays by name, as views of one memory map of each shard."""
        maps = {key: shard.mapped(mode) for key, shard in self._distinct().items()}
        return {name: maps[id(shard)][name] for name, shard in self.shards.items()}

    def shared_metadata(self) -> dict[str, str]:
        """The metadata that all shards have, such as their format."""
        pairs = [set(shard.metadata.items()) for shard in self._distinct().values()]
        return dict(sorted(set.intersection(*pairs))) if pairs else {}

    def _distinct(self) -> dict[int, safetensors.View]:
        return {id(shard): shard for shard in self.shards.values()}


@contextmanager
def opened(path: Path, mode: str = "rb") -> Iterator[View]:
    """Open a set and check the index and all headers."""
    while True:
        name = index_path(path)
        with open(name, "rb") as file, ExitStack() as stack:
            try:
                view = _opened(name, file, mode, stack)
            except (errors.FileError, FileNotFoundError):
                if _is_at(name, file):
                    raise
                continue  # another process has replaced the set meanwhile
            if _is_at(name, file):
                yield view
                return


def _is_at(name: str, file: BinaryIO) -> bool:
    """Whether the open index still has its name. An open file is never confused with a new one."""
    return os.path.samestat(os.fstat(file.fileno()), os.stat(name))


def _opened(name: str, file: BinaryIO, mode: str, stack: ExitStack) -> View:
    weight_map, metadata = _parsed(name, file)
    shards = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = os.path.join(os.path.dirname(name), shard)
        _check_file(name, path)
        shards[shard] = stack.enter_context(safetensors.opened(path, mode))
    faults: list[tuple[str | None, str]] = [
        (x, f"the index says that it is in {shard!r}, which does not have it")
        for x, shard in weight_map.items()
        if x not in shards[shard].records
    ]
    counts = Counter(weight_map.values())
    for shard, view in shards.items():
        if not faults and len(view.records) > counts[shard]:
            extra = [x for x in view.records if weight_map.get(x) != shard]
            faults += [(x, f"{shard!r} has it, but the index does not say so") for x in extra]
    if faults:
        raise errors.file_faults(name, faults)
    return View(name, {x: shards[shard] for x, shard in weight_map.items()}, metadata)


def _parsed(name: str, file: BinaryIO) -> Index:
    try:
        return index.read(file)
    except names.TwiceError as error:
        raise errors.file_error(name, "the index has this name twice", error.name) from None
    except ValueError as error:
        text = recognize.content(name, is_text=True) or f"its index cannot be read: {error}"
        raise errors.file_error(name, text) from None


def _check_file(name: str, shard: str) -> None:
    """Raise a FileError unless the shard is a regular file; opening a pipe would wait."""
    try:
        is_file = stat.S_ISREG(os.stat(shard).st_mode)
    except FileNotFoundError:
        text = f"the shard {os.path.basename(shard)!r} is missing: download or copy it too"
        raise errors.file_error(name, text) from None
    except OSError as error:  # its name is too long, or it is a link to itself
        text = f"the shard {os.path.basename(shard)!r} cannot be opened: {error.strerror}"
        raise errors.file_error(name, text) from None
    if not is_file:
        raise errors.file_error(name, f"the shard {os.path.basename(shard)!r} is not a file")
