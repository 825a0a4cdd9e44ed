"""A valid file or index with a few changed bytes is loaded, or raises FileError."""

from __future__ import annotations

import io as memory
import os
import zipfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_io_hostile import archive, safetensors

from lars_tree import FileError, io


def valid(path):
    tree = {
        "a": {"b": np.arange(6.0).reshape(2, 3), "c": np.array([True, False])},
        "d": [np.array(7, np.int64), None, np.ones((2, 2), np.float16, order="F")],
        "e": np.empty((0, 3), np.uint8),
    }
    io.save(tree, path, metadata={"step": "1"})
    return path.read_bytes()


tokens = [b"0", b"9", b'"', b"[", b"]", b",", b"-", b"1e9", b"\xff" * 8, b"true", b"[],"]
mutations = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "insert", "delete", "copy", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(tokens)),
        st.integers(1, 16),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content, changes):
    for kind, place, data, length in changes:
        i = int(place * len(content))
        if kind == "set":
            content = content[:i] + data + content[i + len(data) :]
        elif kind == "insert":
            content = content[:i] + data + content[i:]
        elif kind == "delete":
            content = content[:i] + content[i + length :]
        elif kind == "copy":
            content = content[: i + length] + content[i:]
        else:
            content = content[:i]
    return content


def mutated_inside(content, changes, suffix):
    """Mutate a file, but keep the length of the header or the checksums of the entries correct."""
    if suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        return safetensors(mutated(content[8:end], changes), content[end:])
    with zipfile.ZipFile(memory.BytesIO(content)) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    which = int(changes[0][1] * len(members))
    name, inside = members[which]
    members[which] = name, mutated(inside, changes)
    return archive(*members)


@pytest.mark.parametrize("where", ["anywhere", "inside"])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of numpy and zipfile
def test_a_mutated_file_loads_or_is_refused(suffix, where, tmp_path):
    path = tmp_path / f"w{suffix}"
    content = valid(path)
    outcomes = set()

    @example(changes=[("set", 0.0, b"", 1)])  # no change: the file loads
    @given(changes=mutations)
    def check(changes):
        inside = where == "inside"
        new = mutated_inside(content, changes, suffix) if inside else mutated(content, changes)
        path.write_bytes(new)
        for read in (io.load, io.metadata, *([io.open] if suffix == ".safetensors" else [])):
            try:
                found = read(path)
            except FileError:
                outcomes.add("refused")
            else:
                outcomes.add("loaded")
                assert read is io.metadata or found.num_bytes() <= len(new)

    check()
    assert outcomes == {"loaded", "refused"}


@pytest.mark.parametrize("where", ["index", "header of a shard"])
def test_a_mutated_sharded_checkpoint_loads_or_is_refused(where, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    valid(index)
    assert len(os.listdir(tmp_path)) == 2
    shard = tmp_path / "model-00001-of-00001.safetensors"
    io.save({"f": {"g": np.ones(3)}}, tmp_path / "a.safetensors")
    path = index if where == "index" else shard
    content, outcomes = path.read_bytes(), set()

    @example(changes=[("set", 0.0, b"", 1)])
    @given(changes=mutations)
    def check(changes):
        if where == "index":
            path.write_bytes(mutated(content, changes))
        else:
            path.write_bytes(mutated_inside(content, changes, ".safetensors"))
        size = sum(os.stat(file).st_size for file in tmp_path.iterdir())
        for read in (io.load, io.metadata, io.open):
            try:
                found = read(index)
            except FileError as error:
                outcomes.add("refused" if str(tmp_path) in str(error) else error)
            else:
                outcomes.add("loaded")
                assert read is io.metadata or found.num_bytes() <= size

    check()
    assert outcomes == {"loaded", "refused"}
