"""Trees in files: safetensors, and numpy's .npz without pickle.

What is in the files is what other programs expect: each array under the keys of its path, joined by
'.'. Saving replaces a file in one step; loading runs no code and refuses what is malformed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np

from lars_tree import errors
from lars_tree._core.wrapper import unwrap
from lars_tree._files import arrays, formats, names, npz, safetensors
from lars_tree._files.replacing import Path, replacing
from lars_tree.container import Container

__all__ = ["from_state_dict", "load", "metadata", "open", "save", "to_state_dict"]

_FROM_NUMPY: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda x: x,
    "torch": arrays.to_torch,
    "jax": arrays.to_jax,
}


def save(path: Path, tree: Mapping[Any, Any], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of arrays to a .safetensors or .npz file.

    >>> w = Container(encoder={"kernel": np.ones((2, 3)), "bias": np.zeros(3)}, head=np.ones(3))
    >>> save("w.safetensors", w, metadata={"step": "100"})
    >>> load("w.safetensors")
    Container: 3 leaves, 12 parameters, 96 bytes
      encoder/kernel  float64 (2, 3)
      encoder/bias    float64 (3,)
      head            float64 (3,)
    >>> metadata("w.safetensors")
    {'step': '100'}

    The old file, if any, is replaced in one step: a reader, a crash or a kill at any moment finds
    the old file or the new one, and what is on the disk is synced before it counts. A temporary
    file that a killed process left in the directory is cleared by the next save there. Nobody else
    can open the temporary file. Permissions, owner, group, extended attributes and ACL stay, where
    the system allows it.

    Arrays may be of any library, on any device, in any memory order, and `Array`s. They are copied
    to CPU memory, and made contiguous, one at a time. Each is written in full: tied weights come
    back as two arrays. What cannot be found again from names that are split at '.' is recorded in
    the metadata: keys that hold '.' or are integers, lists, tuples, None, empty nodes.

    Args:
        path: A name that ends in .safetensors or .npz. Of a link, what it leads to is replaced.
        tree: A Container or dict, of dicts, lists and tuples, of arrays. Mappings of other kinds
            come back as Containers.
        metadata: Strings by name, to be kept in the file.

    Raises:
        StructureError: two leaves have the same name; a key is neither str nor int; a node is of a
            class that could not be made again, such as a namedtuple; more than 100 levels.
        LeafError, DtypeError: a leaf is no array, or of a dtype that the format does not have:
            safetensors has no complex128, .npz no bfloat16.
        OptionError: metadata is not made of strings.
        FileError: the name ends in neither .safetensors nor .npz.
        OSError: the file cannot be written. In all cases the old file is as it was, except where
            the message says that the new file is in place, but its directory could not be synced.
    """
    format_ = formats.find(path)
    leaves, structure = names.flatten(tree)
    entries = arrays.check(leaves)
    formats.check(format_, entries, {name: where for name, (where, _) in leaves.items()})
    kept = _checked(metadata)
    if structure is not None:
        kept[formats.STRUCTURE] = structure
    with replacing(path) as file:
        format_.write(file, entries, kept)


def load(path: Path, *, library: Literal["numpy", "torch", "jax"] = "numpy") -> Container:
    """Read a .safetensors or .npz file, whoever wrote it.

    >>> save("w.npz", {"layers": [{"w": np.ones(2)}, {"w": np.zeros(2)}]})
    >>> load("w.npz").to_dict()
    {'layers': [{'w': array([1., 1.])}, {'w': array([0., 0.])}]}

    No code in the file is run, and nothing is allocated before the file has been checked: memory is
    bounded by the length of the file, and by 1032 times that of a compressed .npz.

    Args:
        path: A name that ends in .safetensors or .npz.
        library: What arrays to make: "numpy", "torch" (in CPU memory) or "jax". bfloat16 and
            float8 are those of ml_dtypes in numpy.

    Returns:
        A Container, in the order of the file. Names are split at '.', unless `save` recorded
        another structure: a state_dict that was saved comes back with its own flat names.

    Raises:
        FileError: the file is malformed, names in it collide (a leaf 'a' and one 'a.b'), the tree
            has more than 100 levels, or the library does not have the dtype of an array in it.
        OptionError: the library is not one of these.
        OSError: the file cannot be opened.
    """
    if library not in _FROM_NUMPY:
        text = f"library is not known: expected 'numpy', 'torch' or 'jax', got {library!r}"
        raise errors.error(errors.OptionError, "library", text, [])
    found = {}
    if formats.find(path) is npz:
        read, kept = npz.read(path)
        for name, x in read.items():
            with _naming(path, name):
                found[name] = _FROM_NUMPY[library](x)
    else:
        with safetensors.opened(path) as view:
            kept = view.metadata
            for name, place in view.places.items():
                fill = partial(view.read, name)
                with _naming(path, name):
                    if library == "torch":
                        found[name] = arrays.fill_torch(place.size, fill)
                    else:
                        found[name] = _FROM_NUMPY[library](fill(np.empty(place.size, np.uint8)))
    return _tree(path, found, kept)


def open(path: Path, mode: Literal["r", "r+"] = "r") -> Container:  # noqa: A001
    """Map a .safetensors file: a Container of `np.memmap` leaves, of which nothing is read yet.

    >>> save("w.safetensors", {"w": np.array([3.0, 4.0]), "step": np.array(0)})
    >>> w = open("w.safetensors", "r+")
    >>> _ = Container(w=w.w).lars_update({"w": np.array([0.0, 10.0])}, 0.1, out={"w": w.w})
    >>> load("w.safetensors").w                              # ratio 5 / 10: in the file
    array([3. , 3.5])

    `lars_update(w, g, lr, out=w)` steps the weights in the file, be they larger than memory. The
    process allocates nothing that grows with the file. The pages that it touches are those of the
    system's file cache: tools may count them as resident (RssFile), but they are given up whenever
    memory is short, changed ones after they were written back.

    Changes reach the disk when the system writes them back, or at `flush()` of any leaf, which
    flushes the whole file. They are made in place: unlike `save`, a crash of the machine meanwhile
    may leave some of them out. Do not truncate a file that is mapped: reading it would end the
    process.

    Args:
        path: A name that ends in .safetensors.
        mode: "r": the leaves are read-only. "r+": writing to a leaf writes to the file.

    Raises:
        FileError: the file is malformed or is no .safetensors file, or numpy and ml_dtypes do not
            have the dtype of an array in it.
        OptionError: the mode is not one of these.
        OSError: the file cannot be opened.
    """
    if mode not in ("r", "r+"):
        text = f"mode is not known: expected 'r' or 'r+', got {mode!r}"
        raise errors.error(errors.OptionError, "mode", text, [])
    if formats.find(path) is npz:
        raise errors.file_error(path, "expected a .safetensors file: an .npz cannot be mapped")
    with safetensors.opened(path, "rb" if mode == "r" else "r+b") as view:
        mapped = np.memmap(view.file, np.uint8, "r" if mode == "r" else "r+")
        found = {
            name: view.array(name, mapped[place.start : place.start + place.size])
            for name, place in view.places.items()
        }
    return _tree(path, found, view.metadata)


def metadata(path: Path) -> dict[str, str]:
    """The metadata that was given to `save`, or that another program put there.

    Raises:
        FileError: the file is malformed.
        OSError: the file cannot be opened.
    """
    with formats.find(path).opened(path) as view:
        kept = view.metadata
        with _naming(path):
            names.check(view.names, kept.get(formats.STRUCTURE))
    return {name: text for name, text in kept.items() if name != formats.STRUCTURE}


def from_state_dict(state_dict: Mapping[str, Any]) -> Container:
    """The nested Container of a state_dict of torch, sharing its tensors.

    >>> w = from_state_dict({"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2)})
    >>> list(w["0"])
    ['weight', 'bias']
    >>> list(to_state_dict(w))
    ['0.weight', '0.bias']

    The tensors are those of the module: `lars_update(w, g, lr, out=w)` trains it. Where a module
    has buffers that are not to be trained, such as the counts of a BatchNorm, take
    `dict(module.named_parameters())`.

    Raises:
        StructureError: state_dict is no mapping.
        PathKeyError: names collide, such as 'a' and 'a.b'.
    """
    if not isinstance(state_dict, Mapping):
        lines = [((), f"expected a mapping of names, got {errors.describe(state_dict)}")]
        text = "state_dict cannot be nested"
        raise errors.error(errors.StructureError, "state_dict", text, lines)
    return Container._from_flat(state_dict, ".", "state_dict")


def to_state_dict(tree: Any) -> dict[str, Any]:
    """The leaves by the names that `module.load_state_dict` takes: keys joined by '.'.

    Arrays of lists are named by their index, `Array`s are unwrapped, and None and empty nodes,
    which hold nothing, are left out, as torch does.

    Raises:
        StructureError: two leaves have the same name, or a tree that `save` would refuse.
    """
    return {name: unwrap(leaf) for name, (_, leaf) in names.flatten(tree)[0].items()}


def _checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    kept = dict(metadata or {})
    for pair in kept.items():
        if not all(isinstance(x, str) and names.is_text(x) for x in pair):
            text = f"metadata is not made of strings: expected str for str, got {pair!r}"
            raise errors.error(errors.OptionError, "metadata", text, [])
    if formats.STRUCTURE in kept:
        text = f"metadata has the name {formats.STRUCTURE!r}, which `save` needs for itself"
        raise errors.error(errors.OptionError, "metadata", text, [])
    return kept


@contextmanager
def _naming(path: Path, name: str | None = None) -> Iterator[None]:
    """Say which file, and which entry, a ValueError is about."""
    try:
        yield
    except errors.FileError:
        raise
    except ValueError as error:
        raise errors.file_error(path, str(error), name) from None


def _tree(path: Path, found: dict[str, Any], kept: dict[str, str]) -> Container:
    with _naming(path):
        tree = names.unflatten(found, kept.get(formats.STRUCTURE), Container)
    assert isinstance(tree, Container)
    return tree
