"""Find the format of a file by suffix, and open files without reading the elements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lars_tree import errors
from lars_tree._files import arrays, index, names, npz, recognize, safetensors, sharded
from lars_tree._files.arrays import Entry
from lars_tree._files.replacing import Path

_FORMATS: dict[str, Any] = {".safetensors": safetensors, ".npz": npz}
STRUCTURE = "lars_tree.structure"  # the metadata key for the structure of the tree

_EXPECTED = (
    "expected a name that ends in .safetensors or .npz, or for a sharded checkpoint "
    "an index (.safetensors.index.json) or an existing directory"
)


def find(path: Path) -> Any:
    """The module that reads files with this name; a FileError if there is none."""
    name = os.fsdecode(path)
    format_ = _found(name)
    if format_ is None:
        raise _unsupported(path, _recognized(name) or _EXPECTED)
    return format_


def _recognized(name: str) -> str | None:
    listed, file = index.other_format(name), recognize.suffix(name)
    if listed:
        return f"it lists files whose content {listed}"
    return recognize.content(name) or (file and f"it {file}")


def find_to_write(path: Path) -> Any:
    """The module that writes a single file with this name; a FileError if there is none."""
    format_ = _found(os.fsdecode(path))
    if format_ is sharded:
        raise _unsupported(path, "expected a single file, got a sharded checkpoint")
    if format_ is None:
        raise _unsupported(path, _EXPECTED)
    return format_


def index_to_write(path: Path) -> str | None:
    """The index of the sharded checkpoint with this path; None if it is not one.

    A directory may be removed at any moment, so this looks for it only once.
    """
    name = os.fsdecode(path)
    if os.path.splitext(name)[1] in _FORMATS:
        return None
    if os.path.isdir(name):
        return os.path.join(name, index.DEFAULT)
    return name if index.is_index(name) else None


def _found(name: str) -> Any:
    format_ = _FORMATS.get(os.path.splitext(name)[1])
    return format_ or (sharded if index.is_index(name) or os.path.isdir(name) else None)


def _unsupported(path: Path, text: str) -> errors.LarsTreeError:
    headline = f"path {str(path)!r} has an unsupported suffix"
    return errors.error(errors.FileError, "path", headline, [((), text)])


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
        tree: The leaves, mapped; or arrays with their dtypes and shapes, but without elements.
        entries: The entry of each leaf by name; it reads the elements.
        metadata: All metadata, including the structure and what all shards have in common.
    """

    tree: dict[Any, Any]
    entries: dict[str, Entry]
    metadata: dict[str, str]


@contextmanager
def opened(path: Path, *, to_list: bool = False, to_map: bool = False) -> Iterator[Stored]:
    """Open a file and check everything but the elements. Names that collide are not split.

    With `to_list`, leaves of a dtype that numpy does not have are `Listed` objects without an
    entry; otherwise they are an error. With `to_map`, the leaves are mapped unless it is an .npz.
    """
    with find(path).opened(path) as view:
        path = view.path
        if not to_list:
            arrays.check_supported(path, view)
        entries: dict[str, Entry] = {}
        leaves: dict[str, Any] = {}
        mapped = view.mapped("r") if to_map and not isinstance(view, npz.View) else {}
        for name in view.names:
            if view.unsupported(name):
                leaves[name] = view.listed(name)
                continue
            dtype, shape = view.dtype_and_shape(name)
            read = partial(view.read, name)
            if name in mapped:
                leaves[name] = mapped[name]
                if dtype.kind != "b":  # `view.read` checks bools
                    read = partial(np.asarray, mapped[name])
            else:
                with file_errors(path, name):
                    leaves[name] = np.broadcast_to(np.empty((), dtype), shape)
            entries[name] = Entry(dtype, shape, read)
        metadata = view.metadata
        if isinstance(view, sharded.View):
            metadata = view.shared_metadata() | metadata
        flat = STRUCTURE not in metadata and names.collide(leaves)
        yield Stored(tree(path, leaves, metadata, dict, flat=flat), entries, metadata)


def tree(
    path: Path,
    leaves: Mapping[str, Any],
    metadata: Mapping[str, str],
    make: Callable[[], names.Dict],
    *,
    flat: bool = False,
) -> names.Dict:
    """The tree of the leaves in a file, or one dict with their names; `make` makes its dicts."""
    if flat:
        found = make()
        for name, leaf in leaves.items():
            dict.__setitem__(found, name, leaf)
        return found
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
