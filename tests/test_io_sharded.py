"""Sharded checkpoints: read and mapped like one file, and written as Hugging Face writes them."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from conftest import need, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from test_io import assert_same, trees

from lars_tree import (
    Container,
    FileError,
    LarsTreeError,
    OptionError,
    StructureError,
    io,
    lars_update,
)
from lars_tree._files import index
from lars_tree.cli import main

need("ml_dtypes")
package = need("safetensors.numpy")

INDEX = "model.safetensors.index.json"
W = Container(a={"b": np.arange(6.0).reshape(2, 3), "c": np.ones(3, "f4")}, d=np.arange(4))


def weight_map(directory, name=INDEX):
    return json.loads((directory / name).read_text())["weight_map"]


def shards(directory):
    return sorted(x for x in os.listdir(directory) if x.endswith(".safetensors"))


@pytest.mark.parametrize("where", ["", INDEX, "x.fp16.safetensors.index.json", "y.index.json"])
@given(
    tree=trees,
    most=st.integers(1, 60),
    metadata=st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
)
def test_a_tree_comes_back_from_shards(where, tree, most, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / where
    try:
        io.save(tree, path, max_shard_size=most, metadata=metadata)
    except (StructureError, OptionError) as error:
        with pytest.raises(type(error)):
            io.save(tree, path.parent / "x.safetensors", metadata=metadata)
        assert not [x for x in os.listdir(path if path.is_dir() else path.parent) if "-of-" in x]
        return
    assert_same(io.load(path), Container(tree))
    assert_same(io.open(path).map(lambda x: x if x is None else np.array(x)), Container(tree))
    assert io.metadata(path) == metadata
    assert_same(io.load(path, flat=True), Container(io.to_state_dict(tree)))


sizes = st.dictionaries(st.text(max_size=3), st.integers(0, 12), max_size=12)


@given(sizes=sizes, most=st.integers(1, 20))
def test_the_split_is_that_of_hugging_face(sizes, most):
    hub = need("huggingface_hub")
    theirs = hub.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )
    ours = index.split(sizes, most)
    assert ours == list(theirs.filename_to_tensors.values())
    if len(ours) > 1:
        assert index.shard_names("model", len(ours)) == list(theirs.filename_to_tensors)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(["KB", "MB", "GB", "TB", "gb"]))
def test_sizes_are_read_as_hugging_face_reads_them(number, unit):
    hub = need("huggingface_hub.serialization._base")
    for text in (f"{number}{unit}", f" {number} {unit} ", f"{number / 8}{unit}"):
        assert index.parsed_size(text) == hub.parse_size_to_int(text)


def test_binary_units():
    assert [index.parsed_size(f"2{x}") for x in ("KiB", "MiB", "GiB")] == [2**11, 2**21, 2**31]


SIZES = [0, -1, True, 1.5, "", "5", "5XB", "GB", "0GB", "-1GB", "nan GB", "9" * 400 + "GB"]


@pytest.mark.parametrize("size", SIZES)
def test_other_sizes_are_refused(size, tmp_path):
    with pytest.raises(OptionError, match="max_shard_size: expected") as caught:
        io.save(W, tmp_path, max_shard_size=size)
    assert caught.value.argument == "max_shard_size"
    assert os.listdir(tmp_path) == []


def test_a_size_is_only_for_shards(tmp_path):
    with pytest.raises(OptionError, match="max_shard_size is for an index or a directory"):
        io.save(W, tmp_path / "w.safetensors", max_shard_size="5GB")
    assert os.listdir(tmp_path) == []


def test_the_default_size_makes_one_shard(tmp_path):
    io.save(W, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model-00001-of-00001.safetensors", INDEX]


def test_an_empty_tree_has_no_shards(tmp_path):
    io.save({}, tmp_path)
    assert os.listdir(tmp_path) == [INDEX]
    assert io.load(tmp_path) == Container()


def test_shards_are_files_that_other_programs_load(tmp_path):
    io.save(W, tmp_path, max_shard_size=48, metadata={"step": "7"})
    content = json.loads((tmp_path / INDEX).read_text())
    assert content == {
        "metadata": {"total_size": 92, "step": "7"},
        "weight_map": {
            "a.b": "model-00001-of-00002.safetensors",
            "a.c": "model-00002-of-00002.safetensors",
            "d": "model-00002-of-00002.safetensors",
        },
    }
    found = {}
    for name in shards(tmp_path):
        found |= package.load_file(tmp_path / name)
        with need("safetensors").safe_open(tmp_path / name, "np") as file:
            assert file.metadata() == {"format": "pt"}  # transformers 4 needs it
    assert_same(
        Container({name: found[name] for name in ("a.b", "a.c", "d")}),
        Container(io.to_state_dict(W)),
    )


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_shards_are_loaded_for_a_library(name, tmp_path):
    need(name)
    w = Container(a={"b": np.ones((2, 3), "f4")}, n=np.array(3, "i4"), e=np.empty((0, 2), "f2"))
    io.save(w, tmp_path, max_shard_size=8)
    loaded = io.load(tmp_path, library=name)
    assert {type(x).__name__ for x in loaded.leaves()} == {
        "Tensor" if name == "torch" else "ArrayImpl"
    }
    assert_same(loaded.map(to_numpy), w)


def test_updates_in_place_are_written_to_the_shards(tmp_path):
    w = Container(a=np.array([3.0, 4.0]), b={"c": np.ones(3, "f4")}, d=np.empty(0))
    io.save(w, tmp_path, max_shard_size=16, metadata={"kept": "yes"})
    before = (tmp_path / INDEX).read_bytes()
    mapped = io.open(tmp_path, "r+")
    assert (
        len(
            {id(x.base.base if x.base.base is not None else x.base) for x in (mapped.a, mapped.b.c)}
        )
        == 2
    )
    g = w.map(np.ones_like)
    lars_update(mapped, g, 0.25, out=mapped)
    mapped.a.flush()
    assert_same(io.load(tmp_path), lars_update(w, g, 0.25))
    assert (tmp_path / INDEX).read_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        io.open(tmp_path).a[0] = 1


def test_a_replaced_set_takes_other_names_and_the_old_shards_are_removed(tmp_path):
    """A reader that has the old set open still sees the old set."""
    other = tmp_path / "model-notes.safetensors"
    other.write_bytes(b"mine")
    readers = []
    for value in range(4):
        new = W * value
        io.save(new, tmp_path, max_shard_size=48)
        names = sorted(set(weight_map(tmp_path).values()))
        assert shards(tmp_path) == sorted([*names, other.name])
        for name in names:
            assert re.fullmatch(r"model(-[0-9a-f]{8})?-0000[12]-of-00002\.safetensors", name)
        assert len(os.listdir(tmp_path)) == 4
        readers.append((new, io.open(tmp_path, "r+")))
        for expected, mapped in readers:
            assert_same(mapped.map(np.array), expected)
        assert_same(io.load(tmp_path), new)
    assert other.read_bytes() == b"mine"


def test_shards_of_others_are_not_removed(tmp_path):
    """A stray shard, and a shard that another index refers to, whoever wrote it."""
    io.save(W, tmp_path, max_shard_size=48)
    os.rename(tmp_path / INDEX, tmp_path / "backup.safetensors.index.json")
    stray = tmp_path / "model-00007-of-00009.safetensors"
    stray.write_bytes(b"of another program")
    kept = shards(tmp_path)
    for value in (2, 3, 4):
        io.save(W * value, tmp_path, max_shard_size=48)
        assert set(kept) < set(shards(tmp_path))
        assert len(shards(tmp_path)) == len(kept) + 2
    assert io.load(tmp_path / "backup.safetensors.index.json") == W
    os.link(tmp_path / INDEX, tmp_path / "copy.safetensors.index.json")
    kept = shards(tmp_path)
    io.save(W, tmp_path, max_shard_size=48)
    assert set(kept) < set(shards(tmp_path))
    assert io.load(tmp_path / "copy.safetensors.index.json") == W * 4


def test_a_shard_that_another_index_refers_to_through_a_link_is_not_removed(tmp_path):
    """As after `ln -s model-00001-of-00002.safetensors ema-00001-of-00002.safetensors`."""
    io.save(W, tmp_path, max_shard_size=48)
    text = (tmp_path / INDEX).read_text().replace("model-", "ema-")
    (tmp_path / "ema.safetensors.index.json").write_text(text)
    for name in shards(tmp_path):
        (tmp_path / name.replace("model-", "ema-")).symlink_to(name)
    io.save(W * 2, tmp_path, max_shard_size=48)
    assert io.load(tmp_path / "ema.safetensors.index.json") == W
    assert io.load(tmp_path) == W * 2


def test_an_index_of_files_of_another_format_does_not_keep_old_shards(tmp_path):
    text = json.dumps({"weight_map": {"a": "tf_model-00001-of-00001.h5"}})
    for name in ("tf_model.h5.index.json", "flax_model.msgpack.index.json"):
        (tmp_path / name).write_text(text)
    for value in range(3):
        io.save(W * value, tmp_path, max_shard_size=48)
        assert len(shards(tmp_path)) == 2
    assert io.load(tmp_path) == W * 2


def test_an_old_index_cannot_make_us_remove_other_files(tmp_path):
    precious = ["other.safetensors", "x-00001-of-00002.safetensors", "model-x.safetensors"]
    for name in precious:
        package.save_file({name: np.ones(1)}, tmp_path / name)
    listed = {name: name for name in precious} | {"up": "../model-00001-of-00001.safetensors"}
    up = tmp_path.parent / "model-00001-of-00001.safetensors"
    up.write_bytes(b"up")
    for names in ([precious[0]], [precious[1]], [precious[2]], precious, listed):
        text = json.dumps({"weight_map": {name: name for name in names}})
        (tmp_path / INDEX).write_text(text)
        io.save(W, tmp_path)
        assert set(precious) < set(os.listdir(tmp_path))
    assert up.exists()


def test_which_index_of_a_directory_is_read(tmp_path):
    def refused(text):
        with pytest.raises(FileError, match=text) as caught:
            io.load(tmp_path)
        assert str(tmp_path) in str(caught.value)

    refused(r"it is a directory without an index \(\*\.safetensors\.index\.json\)$")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    refused("'pytorch_model.bin.index.json' is pickled, so loading it could run code: convert it")
    io.save({"x": np.ones(1)}, tmp_path / "w.safetensors")
    refused("give the path of a file in it, such as 'w.safetensors'")
    io.save({"a": np.ones(1)}, tmp_path / "a.safetensors.index.json")
    assert list(io.load(tmp_path)) == ["a"]
    io.save({"b": np.ones(1)}, tmp_path / "b.safetensors.index.json")
    refused(r"several indexes, a\.safetensors\.index\.json, b\.safetensors\.index\.json: give the")
    io.save({"m": np.ones(1)}, tmp_path)
    assert list(io.load(tmp_path)) == list(io.open(tmp_path)) == ["m"]
    io.save({"single": np.ones(1)}, tmp_path / "model.safetensors")
    refused("it has both 'model.safetensors' and 'model.safetensors.index.json': give the path")
    assert list(io.load(tmp_path / INDEX)) == ["m"]


def test_a_set_that_others_would_not_load_is_refused(tmp_path):
    io.save(W, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"still load 'model\.safetensors', which .*: remove it"):
        io.save(W, tmp_path)
    with pytest.raises(FileError, match="expected a name that ends in"):
        io.save(W, tmp_path / "nowhere")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        with pytest.raises(FileError, match="expected a name that ends in"):
            io.save(W, tmp_path / f"{name}.index.json")
    with pytest.raises(FileNotFoundError):
        io.save(W, tmp_path / "nowhere" / INDEX)
    with pytest.raises(OptionError, match="'total_size', which is reserved"):
        io.save(W, tmp_path / "x.safetensors.index.json", metadata={"total_size": "1"})
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_links(tmp_path):
    """A link to a directory and a link within one lead to a set; shards are next to the index."""
    real, elsewhere = tmp_path / "real", tmp_path / "elsewhere"
    real.mkdir()
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(real)
    io.save(W, tmp_path / "link", max_shard_size=48)
    assert len(os.listdir(real)) == 3
    (real / "other.safetensors.index.json").symlink_to(INDEX)
    io.save(W * 2, real / "other.safetensors.index.json", max_shard_size=48)
    assert (real / "other.safetensors.index.json").is_symlink()
    assert io.load(real) == io.load(real / "other.safetensors.index.json") == W * 2
    # Each file of a set in the cache of Hugging Face is a link to a file of another name.
    for i, name in enumerate([INDEX, *shards(real)]):
        os.rename(real / name, tmp_path / f"blob{i}")
        (elsewhere / name).symlink_to(tmp_path / f"blob{i}")
    assert io.load(elsewhere) == W * 2
    before = sorted(os.listdir(elsewhere))
    with pytest.raises(
        FileError, match="it is a link to another directory, but shards are next to"
    ):
        io.save(W, elsewhere)
    assert sorted(os.listdir(elsewhere)) == before
    assert io.load(elsewhere) == W * 2


def test_metadata_of_other_programs(tmp_path):
    io.save(W, tmp_path)
    content = json.loads((tmp_path / INDEX).read_text())
    for metadata in ({}, {"total_size": 1.5}, {"total_size": None}):
        (tmp_path / INDEX).write_text(json.dumps(content | {"metadata": metadata, "more": [1]}))
        assert io.metadata(tmp_path) == {}
        assert io.load(tmp_path) == W
    metadata = {"total_parameters": 13, "total_size": 92, "tied": {"a": None}, "text": "x"}
    (tmp_path / INDEX).write_text(json.dumps(content | {"metadata": metadata}))
    found = {"total_parameters": "13", "tied": '{"a": null}', "text": "x"}
    assert io.metadata(tmp_path) == found
    del content["metadata"]
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert io.load(tmp_path) == W


def test_show_lists_a_checkpoint(tmp_path, capsys):
    need("click")
    io.save(W, tmp_path, max_shard_size=48, metadata={"step": "7"})
    assert main(["show", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["leaves"], found["parameters"], found["bytes"]) == (3, 13, 92)
    assert found["metadata"] == {"format": "pt", "step": "7"}
    io.save(W, tmp_path / "w.safetensors")
    assert main(["diff", str(tmp_path), str(tmp_path / "w.safetensors")]) == 0


def test_errors_of_shards_have_argument_and_paths(tmp_path):
    io.save(W, tmp_path, max_shard_size=48)
    (tmp_path / shards(tmp_path)[0]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LarsTreeError, match="is a Git LFS pointer") as caught:
        io.load(tmp_path)
    assert shards(tmp_path)[0] in str(caught.value)
    assert (caught.value.argument, caught.value.paths) == ("path", ((),))


def test_a_directory_that_is_removed_during_a_save(tmp_path, monkeypatch):
    directory, check = tmp_path / "checkpoint", io.arrays.check
    directory.mkdir()
    monkeypatch.setattr(io.arrays, "check", lambda leaves: directory.rmdir() or check(leaves))
    with pytest.raises(FileNotFoundError) as caught:
        io.save({"a": np.ones(1)}, directory)
    assert caught.value.filename == str(directory / "model.safetensors.index.json")
