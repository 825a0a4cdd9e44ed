"""The safetensors format: 8 bytes of length, a JSON header with offsets, then the elements.

The safetensors package says whether a file is valid: its parser is typed, and refuses holes,
overlaps and whatever does not add up before anything is allocated. Beyond it we refuse duplicate
names, and read the types that it has not for numpy.

Files are written here: the package wants all arrays at once, contiguous and in CPU memory, where
this takes one leaf at a time, and it sorts the names, where this keeps the order of the tree.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from math import prod
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._files import names
from lars_tree._files.arrays import Array, Entry, dtype_named
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

_LONGEST_HEADER = 100_000_000  # that of the package
_ALIGNMENT = 8


def has(dtype: np.dtype[Any]) -> bool:
    """Whether the format has this dtype."""
    return _short(dtype) is not None


@cache
def _short(dtype: np.dtype[Any]) -> str | None:
    """What the format calls a dtype."""
    return _SHORT.get(dtype.name)


@cache
def _dtype(short: str) -> np.dtype[Any] | None:
    """The dtype of which the format has this name, little-endian; None if numpy has none."""
    dtype = dtype_named(_TYPES[short]) if short in _TYPES else None
    return dtype and dtype.newbyteorder("<")


def write(file: BinaryIO, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
    """Write these entries, one after the other, to an empty file."""
    # The longest types first: each array is aligned, as in the files of the package.
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
    if len(text) > _LONGEST_HEADER:
        raise errors.StructureError(f"tree has too many names: a header of {len(text)} bytes")
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        file.write(entries[name].fetch().reshape(-1).view(np.uint8).data)


class Place(NamedTuple):
    """Where an array is in a file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class View(NamedTuple):
    """A valid file, open for reading, in the order of its header."""

    path: Path
    file: BufferedReader
    places: dict[str, Place]
    metadata: dict[str, str]

    @property
    def names(self) -> Iterable[str]:
        """The names of the arrays."""
        return self.places

    def dtype_and_shape(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype, little-endian, and the shape of an array.

        Raises:
            FileError: numpy has no such dtype.
        """
        place = self.places[name]
        dtype = _dtype(place.dtype)
        if dtype is None:
            text = f"numpy and ml_dtypes have no {place.dtype}"
            raise errors.file_error(self.path, text, name)
        return dtype, place.shape

    def read(self, name: str, memory: Array | None = None) -> Array:
        """Read an array, to the memory given, which has the size of the array, or to new memory.

        Raises:
            FileError: as `array` does; and for a bool that is neither 0 nor 1.
        """
        if memory is None:
            memory = np.empty(self.places[name].size, np.uint8)
        self.file.seek(self.places[name].start)
        if self.file.readinto(memory.data) != len(memory):
            raise errors.file_error(self.path, "it was truncated while it was read", name)
        if self.places[name].dtype == "BOOL" and memory.size and memory.max() > 1:
            text = "expected truth values of 0 or 1"
            raise errors.file_error(self.path, text, name)
        return self.array(name, memory)

    def array(self, name: str, memory: Array) -> Array:
        """The array of this name over the memory that has its bytes.

        Raises:
            FileError: a type or a shape that numpy does not have.
        """
        dtype, shape = self.dtype_and_shape(name)
        try:
            array: Array = memory.view(dtype).reshape(shape)
        except ValueError as error:  # an empty array with axes that are too long
            raise errors.file_error(self.path, str(error), name) from error
        return array


@contextmanager
def opened(path: Path, mode: str = "rb") -> Iterator[View]:
    """Open a file and check all of its header.

    Raises:
        FileError: the file is malformed.
        OSError: as the built-in `open` does.
    """
    while True:
        file: Any
        with open(path, mode) as file:
            _check(path)
            # That opened the path by itself: between the two the file may have been replaced.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield View(path, file, *_parsed(path, file))
                return


def mapped(path: Path, mode: Literal["r", "r+"]) -> tuple[dict[str, Array], dict[str, str]]:
    """All arrays by name, as parts of one memory map of the file, and the metadata.

    Raises:
        FileError: the file is malformed, or numpy does not have a dtype or shape in it.
        OSError: as the built-in `open` does.
    """
    with opened(path, f"{mode}b") as view:
        memory = np.memmap(view.file, np.uint8, mode)
        found = {
            name: view.array(name, memory[place.start : place.start + place.size])
            for name, place in view.places.items()
        }
        return found, view.metadata


def _check(path: Path) -> None:
    """Have the package check the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np"):
            pass
    except SafetensorError as error:
        raise errors.file_error(path, str(error)) from error


def _parsed(path: Path, file: BufferedReader) -> tuple[dict[str, Place], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")

    def place(found: dict[str, Any]) -> Any:
        """The place of an array, made at once, as that takes less memory; others as they are."""
        match found:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
                return Place(sys.intern(dtype), tuple(shape), 8 + length + start, end - start)
        return found

    try:
        header = names.parsed(file.read(length).decode(), place)
        metadata = header.pop(names.RESERVED, {})
        if not all(isinstance(x, Place) for x in header.values()):
            raise ValueError("it changed while it was read")
    except names.TwiceError as error:
        raise errors.file_error(path, "the header has this name twice", error.name) from None
    except (AttributeError, ValueError) as error:
        raise errors.file_error(path, f"its header cannot be read: {error}") from error
    if not isinstance(metadata, dict):  # the package takes null too
        text = f"expected an object of strings, got {metadata!r}"
        raise errors.file_error(path, text, names.RESERVED)
    return header, metadata
