"""Which files `lars-tree update` reads, writes and refuses."""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import need
from test_cli_step import FILES, _here, expected, gradients, record, save, weights
from test_cli_update import assert_same_bits, refused, run

from lars_tree import io
from lars_tree._files import formats
from lars_tree.cli import main

need("click")
need("safetensors")

__all__ = ["_here"]


def linked(how, name):
    getattr(os, how)(name, "link.safetensors")
    return "link.safetensors"


@pytest.mark.parametrize("how", [None, "link", "symlink"])
def test_out_may_be_the_weights_but_no_other_input(how, capsys):
    g = gradients()
    g["encoder", "count"] = None
    save(weights(), g)
    out = FILES[1] if how is None else linked(how, FILES[1])
    arguments = ["update", *FILES, "--lr", "0.1", "-o"]
    refused([*arguments, out], f"got {out}", capsys)
    refused([*arguments, os.path.abspath(out)], "out is an input: expected another file", capsys)
    if how is not None:
        os.unlink(out)
    out = FILES[0] if how is None else linked(how, FILES[0])
    run(*arguments[1:], out)
    assert_same_bits(io.load(out), expected(g))


def test_weights_that_are_their_own_gradients_are_not_replaced(capsys):
    io.save(gradients(), FILES[0])
    refused(["update", FILES[0], FILES[0], "--lr", "1", "--in-place"], "out is an input", capsys)
    run(FILES[0], FILES[0], "--lr", 0.5, "-o", "o.safetensors")
    assert_same_bits(io.load("o.safetensors"), gradients() * 0.5)


def test_sharded_checkpoints_are_read_like_files_and_not_written(capsys):
    os.mkdir("w")
    os.mkdir("g")
    for tree, folder in ((weights(), "w"), (gradients(), "g")):
        io.save(tree, f"{folder}/model.safetensors.index.json", max_shard_size=80)
    arguments = ["--lr", "0.1", "--keep-missing"]
    for files in [("w", "g"), ("w/model.safetensors.index.json", "g/model.safetensors.index.json")]:
        run(*files, *arguments, "-o", "o.safetensors")
        assert_same_bits(io.load("o.safetensors"), expected(gradients()))
        found = record(capsys, "show", files[0], "--grads", files[1], *arguments)["layers"]
        assert len(found) == 5
        assert record(capsys, "diff", files[0], "o.safetensors", status=1)["structure"] == []
        for folder in ("w", "g"):
            shard = sorted(x for x in os.listdir(folder) if x.endswith("s"))[0]
            assert "-of-" in shard
            link = linked("link", f"{folder}/{shard}")
            for out in (f"{folder}/{shard}", link):
                assert main(["update", *files, *arguments, "-o", out]) == 2
                assert "out is an input" in capsys.readouterr().err
            os.unlink(link)
        assert main(["update", *files, *arguments, "--in-place"]) == 2
        assert "expected a single file, got a sharded checkpoint" in capsys.readouterr().err


def test_the_metadata_that_all_shards_have_is_kept(capsys):
    """Older versions of transformers refuse a file that does not name its format."""
    os.mkdir("w")
    io.save(weights(), "w", max_shard_size=80, metadata={"step": "7"})
    io.save(gradients(), FILES[1])
    run("w", FILES[1], "--lr", 0.1, "--keep-missing", "-o", "o.safetensors")
    assert io.metadata("o.safetensors") == {"format": "pt", "step": "7"}
    assert record(capsys, "show", "w")["metadata"] == io.metadata("o.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_weights_that_another_program_replaces_meanwhile_are_not_mixed(suffix, monkeypatch):
    file = f"w.{suffix}"
    old, new = weights(), weights().map(lambda x: x + 1)
    io.save(old, file)
    io.save(gradients(), FILES[1])
    opened = formats.opened

    @contextmanager
    def replaced(*arguments, **options):
        with opened(*arguments, **options) as stored:
            io.save(new, file)
            yield stored

    monkeypatch.setattr(formats, "opened", replaced)
    run(file, FILES[1], "--lr", 0.1, "--keep-missing", "-o", "o.npz")
    assert_same_bits(io.load("o.npz"), expected(gradients()))


def test_a_full_disk_changes_nothing_and_the_error_names_the_file(capsys):
    """A limit of the file size stands for the disk."""
    resource = pytest.importorskip("resource", reason="needs limits of processes")
    save({"w": np.ones(1 << 16)}, {"w": np.ones(1 << 16)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        arguments = ["update", *FILES, "--lr", "0.1", "-o", "o.safetensors"]
        refused(arguments, "update: o.safetensors: File too large", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir()) == sorted(FILES)
