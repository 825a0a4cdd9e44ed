"""Each malformed index, and each set whose index and shards differ, raises FileError."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest
from conftest import need
from test_io_hostile import entry, safetensors

from lars_tree import FileError, StructureError, io
from lars_tree._files import index, sharded

need("ml_dtypes")
need("safetensors")

INDEX = "model.safetensors.index.json"
ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
GOOD = {"a.b": ONE, "c": ONE, "d": TWO}


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with a valid set: 'a.b' and 'c' in the first shard, 'd' in the second."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    w = {"a": {"b": np.ones(2)}, "c": np.zeros(1), "d": np.ones(3)}
    io.save(w, path, max_shard_size=24)
    assert json.loads((path / INDEX).read_text())["weight_map"] == GOOD
    return path


def refused(checkpoint, content):
    """The message for an index with this content, which must name the index."""
    (checkpoint / INDEX).write_bytes(content)
    texts = set()
    for read in (io.load, io.open, io.metadata):
        for path in (checkpoint, checkpoint / INDEX):
            with pytest.raises(FileError) as caught:
                read(path)
            assert str(checkpoint / INDEX) in str(caught.value)
            assert caught.value.argument == "path"
            assert caught.value.paths
            texts.add(str(caught.value))
    (text,) = texts
    return text


def mapping(weight_map, **more):
    return json.dumps({"weight_map": weight_map, **more}).encode()


def with_shard(shard):
    return mapping(GOOD | {"d": shard})


MALFORMED = {
    "empty": (b"", "it is empty"),
    "not JSON": (b"{'a': 1}", "its index cannot be read"),
    "not UTF-8": (b'{"\xff": {}}', "its index cannot be read"),
    "two objects": (mapping({}) * 2, "its index cannot be read: Extra data"),
    "cut off": (mapping(GOOD)[:-9], "its index cannot be read"),
    "list": (b"[]", "expected an object with the object 'weight_map'"),
    "null": (b"null", "expected an object with the object 'weight_map'"),
    "no weight_map": (b"{}", "expected an object with the object 'weight_map'"),
    "weight_map a list": (mapping([ONE]), "expected an object with the object 'weight_map'"),
    "weight_map null": (mapping(None), "expected an object with the object 'weight_map'"),
    "metadata a list": (mapping(GOOD, metadata=[]), "expected 'metadata' to be an object"),
    "metadata null": (mapping(GOOD, metadata=None), "expected 'metadata' to be an object"),
    "deep": (b'{"weight_map": ' + b"[" * 100_000, "nested too deeply"),
    "deep metadata": (b'{"weight_map": {}, "metadata": ' + b'{"a":' * 100_000, "nested too deeply"),
    "a name twice": (
        b'{"weight_map": {"a": "' + b'", "a": "'.join([b"x"] * 2) + b'"}}',
        "\n  a: the",
    ),
    "weight_map twice": (b'{"weight_map": {}, "weight_map": {}}', "the index has this name twice"),
    "a leaf and a node": (mapping(GOOD | {"a": ONE}), "\n  a: the index says that it is in"),
    "number": (with_shard(1), "expected the file name of 'd', got 1"),
    "null name": (with_shard(None), "expected the file name of 'd', got null"),
    "list of names": (with_shard([ONE]), "expected the file name of 'd'"),
    "object of names": (with_shard({"file": ONE}), "expected the file name of 'd'"),
    "a missing shard": (
        with_shard("x.safetensors"),
        "'x.safetensors' is missing: download or copy",
    ),
    "a missing array": (mapping(GOOD | {"e": TWO}), f"e: the index says that it is in '{TWO}'"),
    "the wrong shard": (
        with_shard(ONE),
        f"d: the index says that it is in '{ONE}', which does not",
    ),
    "metadata as an array": (mapping(GOOD | {"__metadata__": ONE}), "__metadata__: the index says"),
    "an array that is not listed": (
        mapping({"a.b": ONE, "d": TWO}),
        f"\n  c: '{ONE}' has it, but the index does not say so",
    ),
    "number as index": (b"0", "expected an object with the object 'weight_map'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_index(case, checkpoint):
    content, text = MALFORMED[case]
    tracemalloc.start()
    try:
        assert text in refused(checkpoint, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


OUTSIDE = [
    "../model-00001-of-00002.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
    "sub/model.safetensors",
    "./" + ONE,
    "..\\model.safetensors",
    "sub\\model.safetensors",
    "C:model.safetensors",
    "\\\\server\\model.safetensors",
    "model.safetensors:stream.safetensors",
    "a\0.safetensors",
    "\ud800.safetensors",
    "model.bin",
    INDEX,
    ".safetensors/../x.safetensors",
    "%2e%2e/x.safetensors",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_shard_is_a_safetensors_file_in_the_directory_of_the_index(
    shard, checkpoint, monkeypatch
):
    """No other file is opened, not even to look whether it exists."""
    outside = checkpoint.parent / ONE
    outside.write_bytes((checkpoint / ONE).read_bytes())
    looked = []
    monkeypatch.setattr(sharded, "_check_file", lambda *paths: looked.append(paths))
    text = refused(checkpoint, with_shard(shard))
    assert "expected the name of a .safetensors file in its directory, got" in text
    assert looked == []


def test_a_shard_that_is_not_a_file_is_refused(checkpoint):
    """Opening a pipe would wait forever."""
    os.mkfifo(checkpoint / "pipe.safetensors")
    (checkpoint / "folder.safetensors").mkdir()
    (checkpoint / "device.safetensors").symlink_to(os.devnull)
    (checkpoint / "dangling.safetensors").symlink_to("nowhere")
    (checkpoint / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("pipe", "folder", "device"):
        text = refused(checkpoint, with_shard(f"{name}.safetensors"))
        assert f"the shard '{name}.safetensors' is not a file" in text
    text = refused(checkpoint, with_shard("dangling.safetensors"))
    assert "the shard 'dangling.safetensors' is missing" in text
    for name, reason in (("loop", "Too many levels of symb"), ("x" * 300, "File name too long")):
        text = refused(checkpoint, with_shard(f"{name}.safetensors"))
        assert f"the shard '{name}.safetensors' cannot be opened: {reason}" in text


def test_two_shards_with_the_same_array_are_refused(checkpoint):
    io.save({"d": np.ones(3), "c": np.zeros(1)}, checkpoint / TWO)
    text = refused(checkpoint, mapping(GOOD))
    assert f"\n  c: '{TWO}' has it, but the index does not say so" in text


def test_all_differences_are_named(checkpoint):
    text = refused(checkpoint, mapping({"x": ONE, "y": TWO, "a.b": ONE}))
    assert [line[2] for line in text.splitlines()[1:]] == ["x", "y"]


def test_a_malformed_shard_is_named(checkpoint):
    shard = checkpoint / TWO
    content = shard.read_bytes()
    cases = {
        "it is cut off: its arrays end at byte": content[:-1],
        "bytes after its arrays": content + b"x",
        "it is empty": b"",
        "its header ends at byte": b"\xff\xff\0\0\0\0\0\0" + content[8:],
        "invalid offset": safetensors({"d": entry(offsets=[4, 8])}, b"1" * 8),
        "twice": safetensors(b'{"d": %b, "d": %b}' % ((json.dumps(entry()).encode(),) * 2)),
    }
    for text, data in cases.items():
        shard.write_bytes(data)
        for read in (io.load, io.open, io.metadata):
            with pytest.raises(FileError, match=f"(?i){text}") as caught:
                read(checkpoint)
            assert str(shard) in str(caught.value)
    shard.write_bytes(safetensors({"d": entry("BOOL", [4])}))
    with pytest.raises(FileError, match="d: expected bools of 0 or 1") as caught:
        io.load(checkpoint)
    assert str(shard) in str(caught.value)


def test_a_structure_that_does_not_match_is_refused(checkpoint):
    content = mapping(GOOD, metadata={"lars_tree.structure": '["dict"]'})
    (checkpoint / INDEX).write_bytes(content)
    for read in (io.load, io.open):
        with pytest.raises(FileError, match=r"the structure lacks 'a\.b', 'c', 'd'") as caught:
            read(checkpoint)
        assert INDEX in str(caught.value)
    assert list(io.load(checkpoint, flat=True)) == ["a.b", "c", "d"]


def test_a_wrong_total_size_is_ignored(checkpoint):
    """Programs that convert a checkpoint often leave the old total_size."""
    for size in (0, -1, 1e300, "many", None):
        (checkpoint / INDEX).write_bytes(mapping(GOOD, metadata={"total_size": size}))
        assert io.load(checkpoint).num_leaves() == 3


def test_a_huge_index_is_refused_before_it_is_read(checkpoint):
    with open(checkpoint / INDEX, "wb") as file:
        file.truncate(index.LONGEST + 1)
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match="expected at most 100,000,000 bytes, got 100,000,001"):
            io.load(checkpoint)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_tree_with_too_many_names_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LONGEST", 1000)
    with pytest.raises(
        StructureError, match="tree has too many names\n  tree: expected an index"
    ) as x:
        io.save({f"{i}": np.ones(1) for i in range(30)}, tmp_path)
    assert (x.value.argument, x.value.paths) == ("tree", ((),))
    assert os.listdir(tmp_path) == []


def test_a_set_that_is_replaced_while_it_is_opened(checkpoint, monkeypatch):
    """At each moment between two steps of the reader, the set that it opens is complete."""
    opened = sharded.safetensors.opened
    for number in range(1, 4):
        io.save({"x": np.zeros(2), "y": np.zeros(2)}, checkpoint, max_shard_size=16)
        calls = []

        def replaced_first(*arguments, number=number, calls=calls):
            calls.append(arguments)
            if len(calls) == number:
                io.save({"y": np.ones(2), "x": np.ones(2)}, checkpoint, max_shard_size=16)
                # Once more, so that the shards have the first names again.
                io.save({"x": np.full(2, 2), "y": np.full(2, 2)}, checkpoint, max_shard_size=16)
            return opened(*arguments)

        monkeypatch.setattr(sharded.safetensors, "opened", replaced_first)
        found = io.load(checkpoint)
        monkeypatch.undo()
        value = 2 if number < 3 else 0
        assert {float(v) for x in found.leaves() for v in x} == {value}
