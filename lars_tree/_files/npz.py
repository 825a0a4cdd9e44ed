"""numpy's .npz format: a zip archive of .npy files. Nothing is pickled or unpickled.

Archives are written without compression, as by `numpy.savez`; compressed archives can be read too.
numpy parses the headers. The sizes that they declare are checked against the archive before memory
is allocated.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from lars_tree import errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._files import names, recognize
from lars_tree._files.arrays import Entry, is_extension, little_endian
from lars_tree._files.replacing import Path

NAME = "npz"

_SUFFIX = ".npy"
# Python's parser raises MemoryError for 4,000 nested operators; a header of an array is shorter.
_NESTED = 2_000
_MOST_INFLATED = 1032  # deflate encodes at most this many bytes in one byte


def has(dtype: np.dtype[Any]) -> bool:
    return not is_extension(dtype)


def write(file: BinaryIO, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    if metadata:
        text = np.array(json.dumps(metadata))
        entries = {names.RESERVED: Entry(text.dtype, (), lambda: text), **entries}
    archive = zipfile.ZipFile(file, "w")
    try:
        for name, entry in entries.items():
            # A new ZipInfo has a fixed date, so equal trees make equal files.
            with archive.open(zipfile.ZipInfo(name + _SUFFIX), "w", force_zip64=True) as stream:
                npy.write_array(stream, entry.fetch(), allow_pickle=False)
        archive.close()
    finally:
        # After Ctrl-C in `archive.open`, closing the archive would raise a ValueError instead.
        archive.fp = None


class View(NamedTuple):
    """An open archive with a valid directory; the arrays are in the order of the directory.

    Its methods raise a FileError if an array is malformed, or neither numeric nor bool.
    """

    path: Path
    archive: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]

    @property
    def names(self) -> Iterable[str]:
        return [name for name in self.members if name != names.RESERVED]

    @property
    def metadata(self) -> dict[str, str]:
        if names.RESERVED not in self.members:
            return {}
        text = self.read(names.RESERVED)
        with suppress(ValueError):
            # text.item() would accept invalid code points.
            codes = text.astype(text.dtype.newbyteorder("<")).tobytes()
            metadata = names.parsed(codes.decode("utf-32-le").rstrip("\0"))
            if isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values()):
                return metadata
        raise errors.file_error(self.path, "expected a JSON object of strings", names.RESERVED)

    def unsupported(self, name: str) -> None:
        """Numpy arrays can hold each array of an .npz file."""

    def dtype_and_shape(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The little-endian dtype and the shape of an array."""
        with self._member(name) as (shape, _, dtype, _):
            return little_endian(dtype), shape

    def read(self, name: str) -> NumpyArray:
        with self._member(name) as (shape, fortran_order, dtype, stream):
            data = np.empty(prod(shape) * dtype.itemsize, np.uint8)
            if stream.readinto(data.data) != data.size:
                raise ValueError("its data is truncated")
            if dtype.kind == "b" and data.size and data.max() > 1:
                raise ValueError("expected bools of 0 or 1")
            return data.view(dtype).reshape(shape, order="F" if fortran_order else "C")

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[tuple[int, ...], bool, np.dtype[Any], Any]]:
        """The shape of an array, whether it is in Fortran order, its dtype, its element stream."""
        info = self.members[name]
        stream: Any
        try:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("expected an entry that is stored or deflated")
            if info.file_size > info.compress_size * _MOST_INFLATED:
                raise ValueError(f"declares {info.file_size} bytes in {info.compress_size}")
            with self.archive.open(info) as stream:
                version = npy.read_magic(stream)
                readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                if version not in readers:
                    raise ValueError(f"expected npy format version 1.0 or 2.0, got {version}")
                try:
                    shape, fortran_order, dtype = readers[version](stream)
                except MemoryError as error:
                    if stream.tell() < _NESTED:
                        raise
                    raise ValueError("its header is nested too deeply") from error
                is_text = name == names.RESERVED
                if dtype.kind not in ("U" if is_text else "biufc") or dtype.itemsize == 0:
                    kind = "text" if is_text else "numbers or bools"
                    raise ValueError(f"expected {kind}, got {dtype}")
                size = prod(shape) * dtype.itemsize
                if size != info.file_size - stream.tell() or min(shape, default=0) < 0:
                    raise ValueError(f"expected {size} bytes for {dtype} {shape}")
                yield shape, fortran_order, dtype, stream
        except MemoryError:
            raise
        except Exception as error:
            raise errors.file_error(self.path, str(error), name) from error


@contextmanager
def opened(path: Path) -> Iterator[View]:
    """Open an archive and check its directory."""
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            members = _members(archive, os.fstat(file.fileno()).st_size)
        except MemoryError:
            raise
        except Exception as error:  # the parser raises errors of many kinds
            text = recognize.content(os.fsdecode(path)) or f"not a readable zip archive: {error}"
            raise errors.file_error(path, text) from error
        yield View(path, archive, members)


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(_SUFFIX)
        if name == info.filename:
            raise ValueError(f"{name!r} is not a {_SUFFIX} file")
        if name in members:
            raise ValueError(f"it has {name!r} twice")
        members[name] = info
    if sum(info.compress_size for info in members.values()) > size:
        raise ValueError("its entries overlap, or are longer than the file")
    return members
