"""Recognize files that are easily taken for .safetensors or .npz, and say what to do.

Only the first bytes are read, and the directory of a zip archive. Nothing is unpickled.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from typing import Any

PICKLED = (
    "is pickled, so loading it could run code: convert it with torch, for example "
    "io.save(torch.load(path, weights_only=True), 'model.safetensors')"
)

_SUFFIXES = {
    (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"): PICKLED,
    (".h5", ".hdf5", ".keras"): "is HDF5: read it with h5py or keras",
    (".msgpack",): "is msgpack: read it with flax.serialization.msgpack_restore",
    (".gguf",): "is GGUF: read it with the package gguf",
    (".npy",): "is one array: read it with np.load",
}
_STARTS = {
    b"version https://git-lfs.github.com/spec/": (
        "is a Git LFS pointer, not the file itself: run 'git lfs pull'"
    ),
    b"/annex/objects/": "is a git-annex pointer, not the file itself: run 'git annex get'",
    b"\x1f\x8b": "is compressed with gzip: decompress it first",
    b"BZh": "is compressed with bzip2: decompress it first",
    b"\xfd7zXZ\0": "is compressed with xz: decompress it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: decompress it first",
    b"\x89HDF\r\n\x1a\n": _SUFFIXES[".h5", ".hdf5", ".keras"],
    b"GGUF": _SUFFIXES[(".gguf",)],
    b"\x93NUMPY": _SUFFIXES[(".npy",)],
}
_LENGTH = 512

LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors package


def suffix(path: str) -> str | None:
    """What a file with the suffix of this path is; None if the suffix is unknown."""
    end = os.path.splitext(path)[1].lower()
    found = [text for ends, text in _SUFFIXES.items() if end in ends]
    return found[0] if found else None


def content(path: str, *, is_text: bool = False) -> str | None:
    """What the file is, from its content; None if it cannot be read or recognized.

    With `is_text`, the file is expected to be a text, but not a web page or a pointer.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_LENGTH)
            if start[:4] == b"PK\x03\x04":
                found = _archive(file) or _misnamed(path, ".npz")
            elif _is_header(start):
                size = os.fstat(file.fileno()).st_size
                found = _header(start, size) or _misnamed(path, ".safetensors")
            else:
                found = _start(start, is_text)
    except OSError:
        return None
    return found and f"it {found}"


def _misnamed(path: str, suffix: str) -> str | None:
    """What to do with a file whose content belongs to another suffix."""
    return None if path.endswith(suffix) else f"is a file of the format {suffix}: rename it"


def _start(start: bytes, is_text: bool) -> str | None:
    if not start:
        return "is empty: download or save it again"
    for begin, text in _STARTS.items():
        if start.startswith(begin):
            return text
    if start[257:262] == b"ustar":
        return "is a tar archive: extract it first"
    if start[0] == 0x80 and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # protocols of pickle
        return PICKLED
    if 0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):  # a map
        return _SUFFIXES[(".msgpack",)]
    return _text(start, is_text)


def _text(start: bytes, is_text: bool) -> str | None:
    text = start.decode("utf-8", "ignore").strip()
    if not text.isprintable() and not all(x.isprintable() or x.isspace() for x in text):
        return None
    if text.lower().startswith(("<!doctype html", "<html", "<?xml")):
        return "is a web page, such as the error page of a failed download: download it again"
    if is_text:
        return None
    if '"weight_map"' in text:
        return "is the index of a sharded checkpoint: its name must end in .safetensors.index.json"
    line = text[:60] + ("..." if len(text) > 60 else "")
    return f"is a text: {line!r}" if text else None


def _is_header(start: bytes) -> bool:
    """Whether a .safetensors file may start like this: the length of a header, and the header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def _header(start: bytes, size: int) -> str | None:
    length = 8 + int.from_bytes(start[:8], "little")
    if length > size:
        return f"is cut off: its header ends at byte {length:,}, but it has {size:,} bytes"
    return None


def _archive(file: Any) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except MemoryError:
        raise
    except Exception:  # the parser raises errors of many kinds
        return "is a zip archive that is cut off or damaged: download it again"
    if any(os.path.basename(name) == "data.pkl" for name in members):
        return PICKLED
    return "is a zip archive of other files" if not _are_arrays(members) else None


def _are_arrays(members: Iterable[str]) -> bool:
    return all(name.endswith(".npy") for name in members)
