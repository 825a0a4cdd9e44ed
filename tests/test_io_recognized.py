"""Files that are easily taken for .safetensors or .npz are named in the error, with what to do."""

from __future__ import annotations

import gzip
import io as memory
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st
from test_io_hostile import archive, entry, npy, safetensors

from lars_tree import Container, FileError, LeafError, io
from lars_tree._files import recognize
from lars_tree.cli import main

need("ml_dtypes")
need("safetensors")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
W = {"a": np.ones(3), "b": np.zeros(2)}


def saved(suffix, tmp_path):
    io.save(W, tmp_path / f"saved{suffix}")
    return (tmp_path / f"saved{suffix}").read_bytes()


def torch_file(**options):
    torch = need("torch")
    stream = memory.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, **options)
    return stream.getvalue()


def tar():
    stream = memory.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.safetensors"))
    return stream.getvalue()


def zipped(*members):
    stream = memory.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in members:
            file.writestr(name, b"x")
    return stream.getvalue()


def hdf5():
    return b"\x89HDF\r\n\x1a\n" + b"\0" * 100


def msgpack():
    serialization = need("flax.serialization")
    return serialization.msgpack_serialize({"params": {"kernel": np.ones((2, 2))}})


PICKLED = "is pickled, so loading it could run code: convert it with torch, for example io.save("
CONTENTS = {
    "Git LFS pointer": (lambda: POINTER, "is a Git LFS pointer, not the file itself: run 'git lfs"),
    "git-annex": (
        lambda: b"/annex/objects/SHA256E-s12--ab",
        "is a git-annex pointer, .* run 'git annex get'",
    ),
    "torch zip": (torch_file, PICKLED),
    "torch legacy": (lambda: torch_file(_use_new_zipfile_serialization=False), PICKLED),
    "pickle 2": (lambda: pickle.dumps(W, 2), PICKLED),
    "pickle 5": (lambda: pickle.dumps(W, 5), PICKLED),
    "gzip": (lambda: gzip.compress(b"x" * 99), "is compressed with gzip: decompress it first"),
    "bzip2": (lambda: b"BZh91AY&SY" + b"\0" * 9, "is compressed with bzip2"),
    "xz": (lambda: b"\xfd7zXZ\0\0\4" + b"\0" * 9, "is compressed with xz"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + b"\0" * 9, "is compressed with zstd"),
    "tar": (tar, "is a tar archive: extract it first"),
    "zip": (lambda: zipped("config.json"), "is a zip archive of other files"),
    "HDF5": (hdf5, "is HDF5: read it with h5py or keras"),
    "msgpack": (msgpack, r"is msgpack: read it with flax\.serialization\.msgpack_restore"),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + b"\0" * 99, "is GGUF"),
    "npy": (npy, r"is one array: read it with np\.load"),
    "page": (
        lambda: b"\n<!DOCTYPE html>\n<html><title>404</title>",
        "is a web page, such as the e",
    ),
    "page in capitals": (lambda: b"<HTML><BODY>Sign in", "is a web page"),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied', "is a web page"),
    "text": (lambda: b"Entry not found", "is a text: 'Entry not found'"),
    "JSON": (lambda: b'{"error":"Unauthorized"}', 'is a text: \'{"error":"Unauthorized"}\''),
    "index": (
        lambda: b'{"weight_map": {}}',
        r"is the index of a .* its name must end in \.safetensors\.index\.json",
    ),
    "empty": (lambda: b"", "is empty: download or save it again"),
}
SUFFIXES = [".safetensors", ".npz", ".bin"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", CONTENTS)
def test_other_contents_are_named(case, suffix, tmp_path):
    make, text = CONTENTS[case]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(make())
    text = text.replace("(", r"\(") if text is PICKLED else text
    for read in (io.load, io.metadata, io.open):
        if read is io.open and suffix == ".npz":
            continue
        with pytest.raises(FileError, match=f"\n  path: it {text}") as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert (caught.value.argument, caught.value.paths) == ("path", ((),))
        assert str(caught.value).count("it is") == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_format_under_the_suffix_of_the_other(suffix, tmp_path):
    other = ".npz" if suffix == ".safetensors" else ".safetensors"
    path = tmp_path / f"w{suffix}"
    path.write_bytes(saved(other, tmp_path))
    with pytest.raises(FileError, match=rf"it is a file of the format \{other}: rename it"):
        io.load(path)
    path = tmp_path / "w.bin"
    path.write_bytes(saved(other, tmp_path))
    with pytest.raises(FileError, match=rf"it is a file of the format \{other}: rename it"):
        io.load(path)


def test_the_suffix_tells_what_a_file_is_if_its_content_does_not(tmp_path):
    names = {
        "pytorch_model.bin": "is pickled",
        "m.pt": "is pickled",
        "M.PTH": "is pickled",
        "m.ckpt": "is pickled",
        "m.pkl": "is pickled",
        "m.h5": "is HDF5",
        "m.keras": "is HDF5",
        "m.msgpack": "is msgpack",
        "m.gguf": "is GGUF",
        "m.npy": "is one array",
        "pytorch_model.bin.index.json": "it lists files whose content is pickled",
        "tf_model.h5.index.json": "it lists files whose content is HDF5",
        "flax_model.msgpack.index.json": "it lists files whose content is msgpack",
        "m.txt": "expected a name that ends in .safetensors or .npz, or for a sharded checkpoint",
        "m": "expected a name that ends in .safetensors or .npz, or for a sharded checkpoint",
    }
    for name, text in names.items():
        for content in (None, b"\0" * 100):
            if content:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(FileError) as caught:
                io.load(tmp_path / name)
            assert text in str(caught.value)


def test_what_the_message_says_about_pickled_files_works(tmp_path):
    torch = need("torch")
    path = tmp_path / "w.bin"
    path.write_bytes(torch_file())
    io.save(torch.load(path, weights_only=True), tmp_path / "model.safetensors")
    assert io.load(tmp_path / "model.safetensors") == Container(a=np.ones(2, "f4"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_file_that_is_cut_off_anywhere(suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    content = saved(suffix, tmp_path)
    for length in range(9, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"it is (a zip archive that is )?cut off") as caught:
            io.load(path)
        if suffix == ".safetensors":
            assert f"but it has {length:,} bytes" in str(caught.value)
    path.write_bytes(content + b"1234")
    if suffix == ".safetensors":
        with pytest.raises(FileError, match="it has 4 bytes after its arrays"):
            io.load(path)


@given(content=st.binary(max_size=600), suffix=st.sampled_from([".safetensors", ".npz", ".x"]))
def test_any_bytes_are_refused(content, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with pytest.raises(FileError):
        io.load(path)
    assert len(recognize.content(str(path)) or "") < 300


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.load(tmp_path / "w.safetensors")
    assert recognize.content(str(tmp_path / "nowhere")) is None


# Dtypes that numpy does not have


def mixed(*dtypes):
    """A file with 'ok' of float32, and one array of eight elements for each of the dtypes."""
    header, start = {"ok": entry()}, 4
    for i, (dtype, bits) in enumerate(dtypes):
        header[f"t.{i}"] = entry(dtype, [2, 4], [start, start + bits])
        start += bits
    return safetensors(header, b"\0" * start)


SMALL = [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "map"])
def test_one_message_names_all_arrays_of_unsupported_dtypes(library, tmp_path):
    need(library) if library in ("torch", "jax") else None
    path = tmp_path / "w.safetensors"
    path.write_bytes(mixed(*SMALL, ("F8_E4M3", 8)))
    with pytest.raises(FileError) as caught:
        io.open(path) if library == "map" else io.load(path, library=library)
    hint = "read it with safetensors.safe_open"
    assert str(caught.value) == f"path {str(path)!r} cannot be read" + "".join(
        f"\n  t.{i}: numpy and ml_dtypes have no {name}: {hint}"
        for i, (name, _) in enumerate(SMALL)
    )
    assert caught.value.paths == (("t.0",), ("t.1",), ("t.2",))
    assert io.metadata(path) == {}


def test_all_arrays_that_a_library_cannot_hold_are_named(tmp_path):
    need("jax")
    io.save({"a": np.ones(1), "b": np.ones(1, "f4"), "c": np.ones(1, "i8")}, tmp_path / "w.npz")
    with pytest.raises(
        FileError, match=r"\n  a: float64 is disabled.*\n  c: int64 is dis"
    ) as caught:
        io.load(tmp_path / "w.npz", library="jax")
    assert caught.value.paths == (("a",), ("c",))


def test_show_lists_unsupported_dtypes(tmp_path, capsys):
    need("click")
    path = tmp_path / "w.safetensors"
    path.write_bytes(mixed(*SMALL))
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path}: 4 leaves, 25 parameters, 20 bytes\n"
        "  ok   float32 (1,)\n"
        "  t/0  F4 (2, 4)\n"
        "  t/1  F6_E2M3 (2, 4)\n"
        "  t/2  F6_E3M2 (2, 4)\n"
    )
    assert main(["show", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"path": "t/0", "shape": [2, 4], "dtype": "F4", "parameters": 8, "bytes": 4}
    assert found["tree"][1] == expected
    assert main(["diff", str(path), str(path)]) == 2
    assert "t.0: numpy and ml_dtypes have no F4" in capsys.readouterr().err


# Names that collide


COLLIDING = [("a", "a.b"), ("a.b", "a"), ("a.b.c", "x", "a.b"), (".", ""), ("a..b", "a.")]


@pytest.mark.parametrize("names", COLLIDING)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".safetensors.index.json"])
def test_flat_loads_names_that_collide(names, suffix, tmp_path, capsys):
    path = tmp_path / f"w{suffix}"
    io.save({name: np.full(1, float(i)) for i, name in enumerate(names)}, path, metadata={"x": "y"})
    forget_structure(path)
    with pytest.raises(FileError, match=r"collides with another name.* Load it with flat=True"):
        io.load(path)
    for read in [io.load] if suffix == ".npz" else [io.load, io.open]:
        w = read(path, flat=True)
        assert type(w) is Container
        assert {name: float(x[0]) for name, x in w.items()} == {x: i for i, x in enumerate(names)}
    need("click")
    assert main(["show", str(path)]) == 0
    assert f"{len(names)} leaves" in capsys.readouterr().out


def forget_structure(path):
    """Remove the recorded structure from a file, as other programs do not record one."""
    content = path.read_bytes()
    assert content.count(b"lars_tree.structure") == 1 or path.suffix == ".npz"
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as file:
            members = [(x, file.read(x)) for x in file.namelist() if "__metadata__" not in x]
        path.write_bytes(archive(*members))
    else:
        path.write_bytes(content.replace(b"lars_tree.structure", b"something.structure"))


def test_flat_does_not_limit_the_levels(tmp_path):
    path = tmp_path / "w.safetensors"
    name = ".".join("a" * 500)
    path.write_bytes(safetensors({name: entry()}))
    with pytest.raises(FileError, match="more than 100 levels"):
        io.load(path)
    assert list(io.load(path, flat=True)) == list(io.open(path, flat=True)) == [name]


# The order of arguments


@pytest.mark.parametrize("path", ["w.safetensors", b"w.safetensors", "w.npz", "checkpoint", "Path"])
@pytest.mark.parametrize("tree", [{"a": np.ones(1)}, Container(a=np.ones(1)), [np.ones(1)], None])
def test_the_old_order_of_arguments_is_refused(path, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "w.npz" if path == "Path" else path
    with pytest.raises(
        LeafError, match=r"save\(tree, path\): the arguments are in the old order"
    ) as x:
        io.save(given, tree)
    assert (x.value.argument, x.value.paths) == ("tree", ((),))
    assert isinstance(x.value, TypeError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 3, {"a": 1}])
def test_a_path_that_is_not_a_path_is_refused(path):
    with pytest.raises(LeafError, match="path is not the name of a file") as caught:
        io.save(W, path)
    assert caught.value.argument == "path"


@pytest.mark.parametrize("name", [b"w.safetensors", b"w.npz", b"w.safetensors.index.json", b"."])
def test_paths_of_bytes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (1.0, 2.0):
        io.save({"a": np.full(2, value)}, name, metadata={"k": "v"})
        assert list(io.load(name).a) == [value, value]
        assert io.metadata(name) == {"k": "v"}
        if name != b"w.npz":
            assert list(io.open(name).a) == [value, value]


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path):
    io.save(W, tmp_path / "w.safetensors")
    code = """if 1:
        import sys
        sys.modules["safetensors"] = None
        from lars_tree import io
        try:
            io.load(sys.argv[1])
        except ModuleNotFoundError as error:
            print(error)"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "w.safetensors"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "lars_tree.io needs safetensors: pip install 'lars-tree[io]'\n"
