"""The safetensors format: 8 bytes of length, a JSON header with offsets, then the elements.

The safetensors package validates files: it refuses holes, overlaps and inconsistent sizes before
any allocation. This module also refuses duplicate names, and reads dtypes that the package does not
read for numpy. It writes files itself, because the package needs all arrays at once in CPU memory
and sorts the names. This module writes one leaf at a time, and keeps the order of the tree.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from math import prod
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._display.show import Listed
from lars_tree._files import names, recognize
from lars_tree._files.arrays import Entry, dtype_named, little_endian
from lars_tree._files.replacing import Path

NAME = "safetensors"

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_SHORT = {name: short for short, name in _TYPES.items()}

_ALIGNMENT = 8


@cache  # numpy computes `dtype.name` anew each time
def _short(dtype: np.dtype[Any]) -> str | None:
    return _SHORT.get(dtype.name)


def has(dtype: np.dtype[Any]) -> bool:
    return _short(dtype) is not None


@cache
def _dtype(short: str) -> np.dtype[Any] | None:
    """The little-endian dtype that the format calls `short`; None if numpy does not have it."""
    dtype = dtype_named(_TYPES[short]) if short in _TYPES else None
    return dtype and little_endian(dtype)


def write(file: BinaryIO, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    # The largest dtypes first, as in the package, so that every array is aligned.
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, Any] = {names.RESERVED: metadata} if metadata else {}
    header |= dict.fromkeys(entries)
    end = 0
    for name in order:
        dtype, shape, _ = entries[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _short(dtype), "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    check_length("a header", len(text), recognize.LONGEST_HEADER)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        file.write(entries[name].fetch().reshape(-1).view(np.uint8).data)


def check_length(what: str, length: int, most: int) -> None:
    """Raise a StructureError if a text with all names is too long."""
    if length > most:
        fault = f"expected {what} of at most {most:,} bytes, got {length:,}"
        raise errors.error(errors.StructureError, "tree", "tree has too many names", [((), fault)])


class Record(NamedTuple):
    """The position of an array in the file, from the header; start and size are in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class View(NamedTuple):
    """An open file with a valid header; the arrays are in the order of the header.

    `read` and `mapped` raise a FileError if elements are invalid or missing, or if numpy does not
    support the shape. The dtype must be supported.
    """

    path: Path
    file: BufferedReader
    records: dict[str, Record]
    metadata: dict[str, str]

    @property
    def names(self) -> Iterable[str]:
        return self.records

    def size(self, name: str) -> int:
        """The number of bytes of an array."""
        return self.records[name].size

    def unsupported(self, name: str) -> str | None:
        """Why numpy arrays cannot hold an array; None if they can."""
        dtype = self.records[name].dtype
        if _dtype(dtype) is not None:
            return None
        return f"numpy and ml_dtypes have no {dtype}: read it with safetensors.safe_open"

    def dtype_and_shape(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The little-endian dtype and the shape of an array."""
        record = self.records[name]
        dtype = _dtype(record.dtype)
        assert dtype is not None
        return dtype, record.shape

    def listed(self, name: str) -> Listed:
        """An array with an unsupported dtype, as it is shown."""
        record = self.records[name]
        return Listed(record.dtype, record.shape, record.size)

    def read(self, name: str, memory: NumpyArray | None = None) -> NumpyArray:
        """Read an array into memory of its size, by default into new memory."""
        record = self.records[name]
        if memory is None:
            memory = np.empty(record.size, np.uint8)
        self.file.seek(record.start)
        if self.file.readinto(memory.data) != len(memory):
            raise errors.file_error(self.path, "it was truncated while it was read", name)
        if record.dtype == "BOOL" and memory.size and memory.max() > 1:
            raise errors.file_error(self.path, "expected bools of 0 or 1", name)
        return self._array(name, memory)

    def mapped(self, mode: Literal["r", "r+"]) -> dict[str, NumpyArray]:
        """All arrays by name, as views of one memory map of the file."""
        memory = np.memmap(self.file, np.uint8, mode)
        return {
            name: self._array(name, memory[record.start : record.start + record.size])
            for name, record in self.records.items()
        }

    def _array(self, name: str, memory: NumpyArray) -> NumpyArray:
        """The array of this name, as a view of memory that contains its bytes."""
        dtype, shape = self.dtype_and_shape(name)
        try:
            array: NumpyArray = memory.view(dtype).reshape(shape)
        except ValueError as error:  # too many axes, or an overlong axis in an empty array
            raise errors.file_error(self.path, str(error), name) from error
        return array


@contextmanager
def opened(path: Path, mode: str = "rb") -> Iterator[View]:
    """Open a file and check its header."""
    while True:
        file: Any
        with open(path, mode) as file:
            _check(path)
            # The package opens the path again; the file may have been replaced in between.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield View(path, file, *_parsed(path, file))
                return


def _check(path: Path) -> None:
    with errors.requiring("lars_tree.io", "'lars-tree[io]'"):
        from safetensors import SafetensorError, safe_open

    name = os.fsdecode(path)
    try:
        with safe_open(name, framework="np"):
            pass
    except OSError as error:  # the package gives the number only in the text, and no path
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), name) from None
    except SafetensorError as error:
        text = recognize.content(name) or _wrong_length(name) or str(error)
        raise errors.file_error(path, text) from error


def _wrong_length(name: str) -> str | None:
    """The difference between the length of a file and that in its valid header, if there is one."""
    try:
        with open(name, "rb") as file:
            start, size = (
                8 + int.from_bytes(file.read(8), "little"),
                os.fstat(file.fileno()).st_size,
            )
            if start > min(size, recognize.LONGEST_HEADER):
                return None
            header = names.parsed(file.read(start - 8).decode())
            header.pop(names.RESERVED, None)
            end = start + max(int(x["data_offsets"][1]) for x in header.values())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return None
    if end > size:
        return f"it is cut off: its arrays end at byte {end:,}, but it has {size:,} bytes"
    return f"it has {size - end:,} bytes after its arrays" if end < size else None


def _parsed(path: Path, file: BufferedReader) -> tuple[dict[str, Record], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    most = os.fstat(file.fileno()).st_size - 8 - length

    def record(found: dict[str, Any]) -> Any:
        """Convert the entry of an array at once, to save memory; leave other objects unchanged."""
        match found:
            case {
                "dtype": str(dtype),
                "shape": [*shape],
                "data_offsets": [int(start), int(end)],
            } if 0 <= start <= end <= most and all(type(n) is int and n >= 0 for n in shape):
                return Record(sys.intern(dtype), tuple(shape), 8 + length + start, end - start)
        return found

    try:
        header = names.parsed(file.read(length).decode(), record)
        metadata = header.pop(names.RESERVED, {})
        if not all(isinstance(x, Record) for x in header.values()):
            raise ValueError("it changed while it was read")
    except names.TwiceError as error:
        raise errors.file_error(path, "the header has this name twice", error.name) from None
    except (AttributeError, ValueError) as error:
        raise errors.file_error(path, f"its header cannot be read: {error}") from error
    if not isinstance(metadata, dict):  # the package accepts null too
        text = f"expected an object of strings, got {metadata!r}"
        raise errors.file_error(path, text, names.RESERVED)
    return header, metadata
