"""Small sharded checkpoints of one value, for tests in this process and in others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from lars_tree import _files, io

INDEX = "model.safetensors.index.json"
FILES = str(Path(_files.__file__).parent)


def used(directory):
    """The files of the set in a directory."""
    content = json.loads((Path(directory) / INDEX).read_text())
    return sorted({INDEX, *content["weight_map"].values()})


def listed(directory):
    return sorted(os.listdir(directory))


def tree(value):
    return {"a": np.full(3, value), "b": {"c": np.full(3, value)}, "d": np.full(3, value)}


def save(directory, value):
    """Save a set; numbers of 3, 2 and 1 shards take turns."""
    io.save(tree(value), directory, max_shard_size=24 * (1 + int(value) % 3))


def found(directory):
    """The value of all elements of a set; fails if it is a mixture."""
    (value,) = {float(x) for leaf in io.load(directory).leaves() for x in leaf}
    return value
