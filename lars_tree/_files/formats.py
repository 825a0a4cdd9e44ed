"""Find the format of a file by suffix, and open files without reading the elements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._files import names, npz, safetensors
from lars_tree._files.arrays import Entry
from lars_tree._files.replacing import Path

_FORMATS: dict[str, Any] = {".safetensors": safetensors, ".npz": npz}
STRUCTURE = "lars_tree.structure"  # the metadata key for the structure of the tree


def find(path: Path) -> Any:
    """The module that reads and writes files with this suffix; a FileError if there is none."""
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in _FORMATS:
        lines = [((), "expected a name that ends in .safetensors or .npz")]
        raise errors.error(
            errors.FileError, "path", f"path {str(path)!r} has an unsupported suffix", lines
        )
    return _FORMATS[suffix]


def check(format_: Any, entries: Mapping[str, Entry], paths: Mapping[str, errors.Path]) -> None:
    """Raise a DtypeError that names each leaf whose dtype the format does not have."""
    faults = []
    for name, entry in entries.items():
        if not format_.has(entry.dtype):
            others = [suffix for suffix, other in _FORMATS.items() if other.has(entry.dtype)]
            hint = f": save it as {others[0]}" if others else ""
            faults.append((paths[name], f"{format_.NAME} has no {entry.dtype}{hint}"))
    if faults:
        headline = "tree has leaves that cannot be saved"
        raise errors.error(errors.DtypeError, "tree", headline, faults)


class Stored(NamedTuple):
    """A tree in an open file.

    Attributes:
        tree: Arrays with the dtypes and shapes of the leaves, but without their elements.
        entries: The entry of each leaf by name; it reads the elements.
        metadata: All metadata, including the structure.
    """

    tree: dict[Any, Any]
    entries: dict[str, Entry]
    metadata: dict[str, str]


@contextmanager
def opened(path: Path) -> Iterator[Stored]:
    """Open a file and check everything but the elements."""
    with find(path).opened(path) as view:
        entries, blanks = {}, {}
        for name in view.names:
            dtype, shape = view.dtype_and_shape(name)
            entries[name] = Entry(dtype, shape, partial(view.read, name))
            with file_errors(path):
                blanks[name] = np.broadcast_to(np.empty((), dtype), shape)
        yield Stored(tree(path, blanks, view.metadata, dict), entries, view.metadata)


def tree(
    path: Path,
    leaves: Mapping[str, Any],
    metadata: Mapping[str, str],
    make: Callable[[], names.Dict],
) -> names.Dict:
    """The tree of the leaves in a file; `make` makes its dicts."""
    with file_errors(path):
        return names.unflatten(leaves, metadata.get(STRUCTURE), make)


@contextmanager
def file_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn a ValueError into a FileError about the file, or about its entry `name`."""
    try:
        yield
    except errors.FileError:
        raise
    except ValueError as error:
        raise errors.file_error(path, str(error), name) from None
