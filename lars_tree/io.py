"""Trees in files: safetensors, and numpy's .npz without pickle.

Other programs can read the files: each array is stored under the keys of its path, joined by '.'.
Saving replaces a file atomically; loading runs no code and refuses malformed files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from lars_tree import errors
from lars_tree._backends.wrapper import unwrap
from lars_tree._files import arrays, formats, names, npz, safetensors
from lars_tree._files.replacing import Path, replacing
from lars_tree.container import Container

__all__ = ["from_state_dict", "load", "metadata", "open", "save", "to_state_dict"]


def __dir__() -> list[str]:
    return __all__


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

    An old file is replaced atomically: its path always leads to the complete old or new file, even
    after a crash or a kill. The new file is synced before it is renamed. No other user can open the
    temporary file; if the process is killed, the next save in the same directory removes the file.
    Permissions, owner, group, extended attributes and ACL are preserved if the system allows it.

    Leaves may be arrays of any library, on any device, in any memory order, or an `Array`. They are
    copied to contiguous CPU memory one at a time. Each leaf is written in full, so tied weights are
    loaded as two arrays. Lists, tuples, None, empty nodes, integer keys and keys that contain '.'
    cannot be restored from the names, so they are recorded in the metadata.

    Args:
        path: A name that ends in .safetensors or .npz. If it is a link, its target is replaced.
        tree: A Container or dict of arrays, dicts, lists and tuples. Other mappings are loaded as
            Containers.
        metadata: Strings by name, stored in the file.

    Raises:
        StructureError: two leaves have the same name; a key is neither str nor int; a node is not a
            mapping, list or tuple (a namedtuple, for example); the tree has more than 100 levels.
        LeafError, DtypeError: a leaf is not an array, or the format does not have its dtype:
            safetensors has no complex128, .npz no bfloat16.
        OptionError: a name or value in metadata is not a string.
        FileError: the name ends in neither .safetensors nor .npz.
        OSError: the file cannot be written. The old file is unchanged, unless the message says that
            the new file is in place but its directory could not be synced.
    """
    format_ = formats.find(path)
    leaves, structure = names.flatten(tree)
    entries = arrays.check(leaves)
    formats.check(format_, entries, {name: where for name, (where, _) in leaves.items()})
    strings = _checked(metadata)
    if structure is not None:
        strings[formats.STRUCTURE] = structure
    with replacing(path) as file:
        format_.write(file, entries, strings)


def load(path: Path, *, library: Literal["numpy", "torch", "jax"] = "numpy") -> Container:
    """Read a .safetensors or .npz file, written by any program.

    >>> save("w.npz", {"layers": [{"w": np.ones(2)}, {"w": np.zeros(2)}]})
    >>> load("w.npz").to_dict()
    {'layers': [{'w': array([1., 1.])}, {'w': array([0., 0.])}]}

    No code in the file is run. Sizes are checked before memory is allocated, so the memory used
    is at most the length of the file, or 1032 times that length for a compressed .npz.

    Args:
        path: A name that ends in .safetensors or .npz.
        library: The library of the arrays: "numpy" (with the bfloat16 and float8 of ml_dtypes),
            "torch" (in CPU memory) or "jax".

    Returns:
        A Container, in the order of the file. Names are split at '.', unless `save` recorded
        another structure: a saved state_dict keeps its flat names.

    Raises:
        FileError: the file is malformed, names collide (leaves 'a' and 'a.b'), the tree has more
            than 100 levels, or the library does not support the dtype of an array.
        OptionError: the library is unknown.
        OSError: the file cannot be opened.
    """
    if library not in _FROM_NUMPY:
        text = f"library is unknown: expected 'numpy', 'torch' or 'jax', got {library!r}"
        raise errors.error(errors.OptionError, "library", text, [])
    found = {}
    with formats.find(path).opened(path) as view:
        for name in view.names:
            with formats.file_errors(path, name):
                if library == "torch" and isinstance(view, safetensors.View):
                    size = view.records[name].size
                    found[name] = arrays.fill_torch(size, partial(view.read, name))
                else:
                    found[name] = _FROM_NUMPY[library](view.read(name))
        return formats.tree(path, found, view.metadata, Container)


def open(path: Path, mode: Literal["r", "r+"] = "r") -> Container:  # noqa: A001
    """Map a .safetensors file: a Container of `np.memmap` leaves. No elements are read yet.

    >>> save("w.safetensors", {"w": np.array([3.0, 4.0]), "step": np.array(0)})
    >>> w = open("w.safetensors", "r+")
    >>> _ = Container(w=w.w).lars_update({"w": np.array([0.0, 10.0])}, 0.1, out={"w": w.w})
    >>> load("w.safetensors").w                              # ratio 5 / 10: in the file
    array([3. , 3.5])

    `lars_update(w, g, lr, out=w)` updates the weights in the file, even if they are larger than
    memory. The process allocates no memory for the elements. The mapped pages belong to the
    file cache of the system. Tools may count these pages as resident memory (RssFile), but the
    system reclaims them when memory is short.

    Changes reach the disk when the system writes them back, or when `flush()` of any leaf is
    called, which flushes the whole file. The file is changed in place: unlike with `save`, after a
    crash of the machine only some of the changes may be on disk. Do not truncate a mapped file:
    reading it would then kill the process.

    Args:
        path: A name that ends in .safetensors.
        mode: "r": the leaves are read-only. "r+": writing to a leaf writes to the file.

    Raises:
        FileError: the file is malformed or not a .safetensors file, or neither numpy nor ml_dtypes
            has the dtype of an array.
        OptionError: the mode is unknown.
        OSError: the file cannot be opened.
    """
    if mode not in ("r", "r+"):
        text = f"mode is unknown: expected 'r' or 'r+', got {mode!r}"
        raise errors.error(errors.OptionError, "mode", text, [])
    if formats.find(path) is npz:
        raise errors.file_error(path, "expected a .safetensors file: an .npz cannot be mapped")
    return formats.tree(path, *safetensors.mapped(path, mode), Container)


def metadata(path: Path) -> dict[str, str]:
    """The metadata given to `save`, or written by another program.

    Raises:
        FileError: the file is malformed.
        OSError: the file cannot be opened.
    """
    with formats.find(path).opened(path) as view:
        strings = dict(view.metadata)
        with formats.file_errors(path):
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

    Items of lists are named by index, and `Array`s are unwrapped. None and empty nodes are omitted,
    as in torch.

    Raises:
        StructureError: two leaves have the same name, or `save` would refuse the tree.
    """
    return {name: unwrap(leaf) for name, (_, leaf) in names.flatten(tree)[0].items()}


def _checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    strings = dict(metadata or {})
    for pair in strings.items():
        if not all(isinstance(x, str) and names.is_text(x) for x in pair):
            text = f"metadata is not made of strings: expected a str name and value, got {pair!r}"
            raise errors.error(errors.OptionError, "metadata", text, [])
    if formats.STRUCTURE in strings:
        text = f"metadata has the name {formats.STRUCTURE!r}, which is reserved for `save`"
        raise errors.error(errors.OptionError, "metadata", text, [])
    return strings
