"""Sharded checkpoints are exchanged with transformers and huggingface_hub in both directions."""

from __future__ import annotations

import json
import os

import pytest
from conftest import need

from lars_tree import io, lars_update

torch = need("torch")
transformers = need("transformers")
hub = need("huggingface_hub")
need("safetensors")
need("ml_dtypes")

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    return transformers.BertModel(config).eval()


def assert_equal(actual, expected):
    """Assert that two state_dicts have the same names and bits."""
    assert set(actual) == set(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype
        assert torch.equal(actual[name], x), name


def weight_map(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def test_what_transformers_saves_is_loaded_mapped_and_updated(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(set(weight_map(tmp_path).values())) == 3
    expected = model.state_dict()
    assert_equal(io.load(tmp_path, library="torch", flat=True), expected)
    assert_equal(io.to_state_dict(io.load(tmp_path, library="torch")), expected)
    assert io.metadata(tmp_path)["total_parameters"] == str(model.num_parameters())
    mapped = io.open(tmp_path, "r+", flat=True)
    ones = mapped.map(lambda x: x * 0 + 1)
    lars_update(mapped, ones, 0.25, out=mapped)
    new = lars_update(dict(expected), {k: torch.ones_like(x) for k, x in expected.items()}, 0.25)
    assert_equal(transformers.BertModel.from_pretrained(tmp_path).state_dict(), new)


def test_transformers_loads_what_is_saved_again_and_again(model, tmp_path):
    """The first shards have the names of transformers; later sets have other names."""
    model.config.save_pretrained(tmp_path)
    for scale in (1.0, 2.0, 3.0):
        new = {name: x * scale for name, x in model.state_dict().items()}
        io.save(new, tmp_path, max_shard_size="10KB")
        loaded = transformers.BertModel.from_pretrained(tmp_path)
        assert_equal(loaded.state_dict(), new)
        other = transformers.BertModel(model.config)
        assert not any(hub.load_torch_model(other, tmp_path, strict=True))
        assert_equal(other.state_dict(), new)


def test_the_first_set_has_the_shards_of_transformers(model, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    hub.save_torch_state_dict(model.state_dict(), tmp_path / "theirs", max_shard_size="10KB")
    io.save(model.state_dict(), tmp_path / "ours", max_shard_size="10KB")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert weight_map(tmp_path / "ours") == weight_map(tmp_path / "theirs")
    theirs, ours = (
        json.loads((tmp_path / x / INDEX).read_text())["metadata"] for x in ("theirs", "ours")
    )
    assert ours["total_size"] == theirs["total_size"]


def test_transformers_and_lars_tree_replace_each_others_sets(model, tmp_path):
    io.save(model.state_dict(), tmp_path, max_shard_size="10KB")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_equal(io.load(tmp_path, library="torch", flat=True), model.state_dict())
    io.save(model.state_dict(), tmp_path, max_shard_size="15KB")
    used = {INDEX, "config.json", *weight_map(tmp_path).values()}
    assert set(os.listdir(tmp_path)) == used
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert set(os.listdir(tmp_path)) == {INDEX, "config.json", *weight_map(tmp_path).values()}


def test_a_set_in_the_cache_of_the_hub_is_loaded(model, tmp_path):
    """There, each file is a link to a file whose name is a hash."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    model.save_pretrained(snapshot, max_shard_size="10KB")
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(f"../../blobs/{i}")
    assert_equal(io.load(snapshot, library="torch", flat=True), model.state_dict())
    assert io.open(snapshot).num_leaves() == len(model.state_dict())
