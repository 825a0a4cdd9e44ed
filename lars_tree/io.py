"""Trees in files: safetensors, also sharded, and numpy's .npz without pickle.

Other programs can read the files: each array is stored under the keys of its path, joined by '.'.
Saving replaces a file atomically; loading runs no code and refuses malformed files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from lars_tree import errors
from lars_tree._backends.wrapper import unwrap
from lars_tree._files import arrays, formats, index, names, npz, sharded
from lars_tree._files.replacing import Path, replace
from lars_tree.container import Container

__all__ = ["from_state_dict", "load", "metadata", "open", "save", "to_state_dict"]


def __dir__() -> list[str]:
    return __all__


_FROM_NUMPY: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda x: x,
    "torch": arrays.to_torch,
    "jax": arrays.to_jax,
}


def save(
    tree: Mapping[Any, Any],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    r"""Write a tree of arrays to a .safetensors or .npz file, or to a sharded checkpoint.

    >>> from lars_tree.io import load, metadata, save
    >>> w = Container(encoder={"kernel": np.ones((2, 3)), "bias": np.zeros(3)}, head=np.ones(3))
    >>> save(w, "w.safetensors", metadata={"step": "100"})
    >>> load("w.safetensors")
    Container: 3 leaves, 12 parameters, 96 bytes
      encoder/kernel  float64 (2, 3)
      encoder/bias    float64 (3,)
      head            float64 (3,)
    >>> metadata("w.safetensors")
    {'step': '100'}

    If `path` is an index or a directory, the tree is split into shards as Hugging Face does it:

    >>> import os
    >>> os.mkdir("checkpoint")
    >>> save(w, "checkpoint", max_shard_size=72)
    >>> print(*sorted(os.listdir("checkpoint")), sep="\n")
    model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors
    model.safetensors.index.json
    >>> load("checkpoint") == w
    True

    An old file is replaced atomically: its path always leads to the complete old or new file, even
    after a crash or a kill. The new file is synced before it is renamed. No other user can open the
    temporary file; if the process is killed, the next save in the same directory removes the file.
    Permissions, owner, group, extended attributes and ACL are preserved if the system allows it.
    The same holds for a sharded checkpoint: its index always leads to the complete old or new set.
    The old shards are removed after the index was replaced. While shards with the usual names
    exist, the new names get a random part, as in 'model-5f0c9a1e-00001-of-00002.safetensors'.

    Leaves may be arrays of any library, on any device, in any memory order, or an `Array`. They are
    copied to contiguous CPU memory one at a time. Each leaf is written in full, so tied weights are
    loaded as two arrays. Lists, tuples, None, empty nodes, integer keys and keys that contain '.'
    cannot be restored from the names, so they are recorded in the metadata.

    Args:
        tree: A Container or dict of arrays, dicts, lists and tuples. Other mappings are loaded as
            Containers.
        path: A name that ends in .safetensors or .npz; if it is a link, its target is replaced. For
            a sharded checkpoint, a name that ends in .safetensors.index.json, or an existing
            directory, in which the index is 'model.safetensors.index.json'.
        metadata: Strings by name, stored in the file or in the index.
        max_shard_size: The most bytes of arrays in a shard: a number, or a string such as "500MB"
            or "2GiB". An array that is larger gets its own shard. By default "5GB". Only for a
            sharded checkpoint.

    Raises:
        StructureError: two leaves have the same name; a key is neither str nor int; a node is not a
            mapping, list or tuple (a namedtuple, for example); the tree has more than 100 levels.
        LeafError, DtypeError: a leaf is not an array, or the format does not have its dtype:
            safetensors has no complex128, .npz no bfloat16. Also LeafError: `tree` and `path` are
            in the wrong order.
        OptionError: a name or value in metadata is not a string; max_shard_size is not a size, or
            is given for a single file.
        FileError: the name has another suffix; the index is a link to another directory, or next to
            a single file with the same stem, which other programs would still load.
        OSError: the file cannot be written. The old file is unchanged, unless the message says that
            the new file is in place but its directory could not be synced.
    """
    _check_order(tree, path)
    index_path = formats.index_to_write(path)
    format_ = formats.find_to_write(path) if index_path is None else sharded
    if max_shard_size is not None and index_path is None:
        text = f"max_shard_size is for an index or a directory, got the path {str(path)!r}"
        raise errors.error(errors.OptionError, "max_shard_size", text, [])
    most = index.parsed_size(index.DEFAULT_SIZE if max_shard_size is None else max_shard_size)
    leaves, structure = names.flatten(tree)
    entries = arrays.check(leaves)
    formats.check(format_, entries, {name: where for name, (where, _) in leaves.items()})
    strings = _checked(metadata, None if index_path is None else index.TOTAL_SIZE)
    if structure is not None:
        strings[formats.STRUCTURE] = structure
    if index_path is not None:
        sharded.write(index_path, entries, strings, most)
        return
    replace(path, lambda file: format_.write(file, entries, strings))


def _check_order(tree: Any, path: Any) -> None:
    """Refuse arguments that are not a tree and a path, and those in the order (path, tree)."""
    is_name = isinstance(path, (str, bytes, os.PathLike))
    if is_name and not isinstance(tree, (str, bytes, os.PathLike)):
        return
    if not is_name and isinstance(tree, (str, bytes, os.PathLike)):
        headline = "save(tree, path): the arguments are in the old order"
        line = ((), f"expected a Container or dict, got the path {os.fspath(tree)!r}")
        raise errors.error(errors.LeafError, "tree", headline, [line])
    if not is_name:
        line = ((), f"expected a str or a path, got {errors.describe(path)}")
        raise errors.error(errors.LeafError, "path", "path is not the name of a file", [line])


def load(
    path: Path,
    *,
    library: Literal["numpy", "torch", "jax"] = "numpy",
    flat: bool = False,
) -> Container:
    """Read a .safetensors or .npz file or a sharded checkpoint, written by any program.

    >>> save({"layers": [{"w": np.ones(2)}, {"w": np.zeros(2)}]}, "w.npz")
    >>> load("w.npz").to_dict()
    {'layers': [{'w': array([1., 1.])}, {'w': array([0., 0.])}]}
    >>> list(load("w.npz", flat=True))
    ['layers.0.w', 'layers.1.w']

    No code in the file is run. Sizes are checked before memory is allocated, so the memory used
    is at most the length of the file, or 1032 times that length for a compressed .npz.

    Args:
        path: A name that ends in .safetensors or .npz; the index of a sharded checkpoint, such as
            'model.safetensors.index.json', or a directory that contains one.
        library: The library of the arrays: "numpy" (with the bfloat16 and float8 of ml_dtypes),
            "torch" (in CPU memory) or "jax". Without jax_enable_x64, JAX has no 64-bit arrays; then
            an int64 of shape (), such as the counters of a state that numpy saved, becomes int32.
        flat: Do not split the names: the Container has one level, with the names in the file as
            keys. This also loads files in which one name is the beginning of another.

    Returns:
        A Container, in the order of the file or index. Unless `flat`, names are split at '.', if
        `save` did not record another structure: a saved state_dict keeps its flat names.

    Raises:
        FileError: the file is malformed or of another kind, names collide (leaves 'a' and 'a.b'),
            the tree has more than 100 levels, or the library does not support the dtype of an
            array. Also: an index names a file outside of its directory, a shard is missing, or
            index and shards do not list the same arrays.
        OptionError: the library is unknown.
        OSError: the file cannot be opened.
    """
    if library not in _FROM_NUMPY:
        text = f"library is unknown: expected 'numpy', 'torch' or 'jax', got {library!r}"
        raise errors.error(errors.OptionError, "library", text, [])
    found = {}
    with formats.find(path).opened(path) as view:
        arrays.check_supported(view.path, view, library)
        for name in view.names:
            if library == "torch" and not isinstance(view, npz.View):
                found[name] = arrays.fill_torch(view.size(name), partial(view.read, name))
            else:
                with formats.file_errors(view.path, name):
                    found[name] = _FROM_NUMPY[library](view.read(name))
        return formats.tree(view.path, found, view.metadata, Container, flat=flat)


def open(  # noqa: A001
    path: Path, mode: Literal["r", "r+"] = "r", *, flat: bool = False
) -> Container:
    """Map .safetensors files: a Container of `np.memmap` leaves. No elements are read yet.

    >>> save({"w": np.array([3.0, 4.0]), "step": np.array(0)}, "w.safetensors")
    >>> w = open("w.safetensors", "r+")
    >>> _ = Container(w=w.w).lars_update({"w": np.array([0.0, 10.0])}, 0.1, out={"w": w.w})
    >>> load("w.safetensors").w                              # ratio 5 / 10: in the file
    array([3. , 3.5])

    `lars_update(w, g, lr, out=w)` updates the weights in the file, even if they are larger than
    memory. The process allocates no memory for the elements. The mapped pages belong to the
    file cache of the system. Tools may count these pages as resident memory (RssFile), but the
    system reclaims them when memory is short.

    Changes reach the disk when the system writes them back, or when `flush()` of any leaf is
    called, which flushes the whole file (of a sharded checkpoint, the shard of the leaf). The file
    is changed in place: unlike with `save`, after a crash of the machine only some of the changes
    may be on disk. Do not truncate a mapped file: reading it would then kill the process.

    Args:
        path: A name that ends in .safetensors; the index of a sharded checkpoint, or a directory
            that contains one.
        mode: "r": the leaves are read-only. "r+": writing to a leaf writes to the file.
        flat: Do not split the names, as in `load`.

    Raises:
        FileError: the file is malformed or not a .safetensors file, or neither numpy nor ml_dtypes
            has the dtype of an array. Also the errors of a sharded checkpoint that `load` has.
        OptionError: the mode is unknown.
        OSError: the file cannot be opened. Each shard takes one file descriptor.
    """
    if mode not in ("r", "r+"):
        text = f"mode is unknown: expected 'r' or 'r+', got {mode!r}"
        raise errors.error(errors.OptionError, "mode", text, [])
    format_ = formats.find(path)
    if format_ is npz:
        raise errors.file_error(path, "expected a .safetensors file: an .npz cannot be mapped")
    with format_.opened(path, f"{mode}b") as view:
        arrays.check_supported(view.path, view)
        return formats.tree(view.path, view.mapped(mode), view.metadata, Container, flat=flat)


def metadata(path: Path) -> dict[str, str]:
    """The metadata given to `save`, or written by another program.

    >>> save({"w": np.ones(2)}, "w.npz", metadata={"step": "100"})
    >>> metadata("w.npz")
    {'step': '100'}

    For a sharded checkpoint, this is the metadata of the index without total_size. Values that are
    not strings, as other programs write them, are returned as JSON.

    Raises:
        FileError: the file is malformed.
        OSError: the file cannot be opened.
    """
    with formats.find(path).opened(path) as view:
        strings = dict(view.metadata)
        with formats.file_errors(view.path):
            names.check(view.names, strings.pop(formats.STRUCTURE, None))
    return strings


def from_state_dict(state_dict: Mapping[str, Any]) -> Container:
    """A nested Container that shares the tensors of a torch state_dict.

    >>> w = from_state_dict({"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2)})
    >>> list(w["0"])
    ['weight', 'bias']
    >>> list(to_state_dict(w))
    ['0.weight', '0.bias']

    `lars_update(w, g, lr, out=w)` updates the tensors of the module. If the module has buffers,
    such as those of BatchNorm, pass `dict(module.named_parameters())`, which has no buffers.

    Raises:
        StructureError: state_dict is not a mapping.
        PathKeyError: names collide, such as 'a' and 'a.b'.
    """
    if not isinstance(state_dict, Mapping):
        lines = [((), f"expected a mapping of names, got {errors.describe(state_dict)}")]
        text = "state_dict is not a mapping"
        raise errors.error(errors.StructureError, "state_dict", text, lines)
    return Container._from_flat(state_dict, ".", "state_dict")


def to_state_dict(tree: Any) -> dict[str, Any]:
    """The leaves by name, as `module.load_state_dict` expects them: keys joined by '.'.

    >>> to_state_dict(Container(layers=[{"bias": np.zeros(2)}], unused=None))
    {'layers.0.bias': array([0., 0.])}

    Items of lists are named by index, and `Array`s are unwrapped. None and empty nodes are omitted,
    as in torch.

    Raises:
        StructureError: two leaves have the same name, or `save` would refuse the tree.
    """
    return {name: unwrap(leaf) for name, (_, leaf) in names.flatten(tree)[0].items()}


def _checked(metadata: Mapping[str, str] | None, reserved: str | None) -> dict[str, str]:
    strings = dict(metadata or {})
    for pair in strings.items():
        if not all(isinstance(x, str) and names.is_text(x) for x in pair):
            text = f"metadata is not made of strings: expected a str name and value, got {pair!r}"
            raise errors.error(errors.OptionError, "metadata", text, [])
    for name in {formats.STRUCTURE, reserved} & strings.keys():
        text = f"metadata has the name {name!r}, which is reserved for `save`"
        raise errors.error(errors.OptionError, "metadata", text, [])
    return strings
