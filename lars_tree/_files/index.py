"""The index of a sharded checkpoint: which shard holds which array, as Hugging Face writes it.

    {"metadata": {"total_size": 96}, "weight_map": {"a.b": "model-00001-of-00002.safetensors"}}

This module neither opens shards nor knows arrays. An index is refused if a shard could be outside
of its directory; `sharded.py` compares it with the shards.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from lars_tree import errors
from lars_tree._files import names, recognize

DEFAULT = "model.safetensors.index.json"  # in a directory
DEFAULT_SIZE = "5GB"

TOTAL_SIZE = "total_size"
LONGEST = recognize.LONGEST_HEADER  # the same limit for an index

_NAME = re.compile(r"(.+?)(?:\.safetensors)?\.index(\.[^.]+)?\.json", re.DOTALL)
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}\.safetensors\Z")
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d*)?)\s*([KMGT])(I?)B\s*", re.IGNORECASE)


class Index(NamedTuple):
    """The shard of each array, in the order of the index, and the metadata without total_size."""

    weight_map: dict[str, str]
    metadata: dict[str, str]


def is_index(path: str) -> bool:
    """Whether a file with this name is the index of .safetensors shards."""
    return _NAME.fullmatch(os.path.basename(path)) is not None and other_format(path) is None


def other_format(path: str) -> str | None:
    """What the shards of an index are, if their suffix is known and not .safetensors.

    An example is 'pytorch_model.bin.index.json'.
    """
    match = _NAME.fullmatch(os.path.basename(path))
    return recognize.suffix(match[1]) if match else None


def is_shard(name: str) -> bool:
    """Whether a file name has the form 'model-00001-of-00002.safetensors'."""
    return _SHARD.search(name) is not None


def stem(path: str) -> str:
    """The start of the names of the shards: 'model' for 'model.safetensors.index.json'."""
    match = _NAME.fullmatch(os.path.basename(path))
    assert match is not None
    return match[1] + (match[2] or "")


def shard_names(stem: str, count: int, token: str = "") -> list[str]:
    """The names that Hugging Face gives to shards; a token makes them differ from existing ones."""
    start = f"{stem}-{token}" if token else stem
    return [f"{start}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def read(file: BinaryIO) -> Index:
    """Read and check an index. Raises a ValueError, or a TwiceError for a repeated name."""
    size = os.fstat(file.fileno()).st_size
    if size > LONGEST:
        raise ValueError(f"expected at most {LONGEST:,} bytes, got {size:,}")
    found = names.parsed(file.read(size).decode())
    if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
        raise ValueError("expected an object with the object 'weight_map'")
    metadata = found.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError("expected 'metadata' to be an object")
    for name, shard in found["weight_map"].items():
        if not isinstance(shard, str):
            raise ValueError(f"expected the file name of {name!r}, got {json.dumps(shard)}")
        if not _is_file_name(shard):
            text = f"expected the name of a .safetensors file in its directory, got {shard!r}"
            raise ValueError(text)
    strings = {
        key: x if isinstance(x, str) else json.dumps(x)
        for key, x in metadata.items()
        if key != TOTAL_SIZE
    }
    return Index(found["weight_map"], strings)


def _is_file_name(shard: str) -> bool:
    """Whether a shard can only be in the directory of its index, on every system."""
    is_plain = not set(shard) & set("/\\:\0") and names.is_text(shard)
    return is_plain and shard.endswith(".safetensors")


def written(index: Index, total_size: int) -> bytes:
    """The text of an index."""
    metadata: dict[str, Any] = {TOTAL_SIZE: total_size, **index.metadata}
    return json.dumps({"metadata": metadata, "weight_map": index.weight_map}, indent=2).encode()


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The names of the arrays in each shard, as Hugging Face splits them.

    Arrays fill the shards in order. An array that is larger than `most` gets its own shard.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    total = 0
    for name, size in sizes.items():
        if size > most:
            shards.append([name])
            continue
        if total + size > most:
            shards.append(current)
            current, total = [], 0
        current.append(name)
        total += size
    return [*shards, current] if current else shards


def parsed_size(size: int | str) -> int:
    """A number of bytes, also given as '5GB' or '500 MiB'; an OptionError if it is invalid."""
    if not isinstance(size, str):
        return errors.whole_number("max_shard_size", size, 1)
    match = _SIZE.fullmatch(size)
    unit = 1024 if match and match[3] else 1000
    number = int(float(match[1]) * unit ** ("KMGT".index(match[2].upper()) + 1)) if match else 0
    if not number:
        text = f"max_shard_size: expected bytes, or a size such as '5GB' or '500MB', got {size!r}"
        raise errors.error(errors.OptionError, "max_shard_size", text, [])
    return number
