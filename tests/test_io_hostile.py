"""Each malformed file raises FileError, without allocating memory for the sizes it declares."""

from __future__ import annotations

import errno
import io as memory
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import need

from lars_tree import Container, FileError, io
from lars_tree._files import formats

need("ml_dtypes")
need("safetensors")

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def safetensors(header, body=b"1234", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def structured(structure, names=("a.0",)):
    header = {name: entry(shape=[0], offsets=[0, 0]) for name in names}
    return safetensors({"__metadata__": {"lars_tree.structure": structure}} | header, b"")


ONE = json.dumps(F32).encode()
ONE_AT = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %b]}}'
DEEP = b"[" * 100_000

SAFETENSORS = {
    "empty": b"",
    "short": b"1234567",
    "no header": safetensors(b""),
    "header longer than the file": safetensors({"a": F32}, length=1 << 20),
    "header of 2**63 bytes": safetensors({"a": F32}, length=1 << 63),
    "header of 2**64 - 1 bytes": safetensors({"a": F32}, length=(1 << 64) - 1),
    "header above the limit": safetensors(b"{}", b"", length=100_000_001),
    "not JSON": safetensors(b"{'a': 1}", b""),
    "not UTF-8": safetensors(b'{"\xff": ' + ONE + b"}"),
    "lone surrogate": safetensors(b'{"\\ud800": ' + ONE + b"}"),
    "list": safetensors(b"[]", b""),
    "number": safetensors(b"1", b""),
    "null": safetensors(b"null", b""),
    "NaN": safetensors(b'{"a": NaN}'),
    "two objects": safetensors(b"{}{}", b""),
    "nested": safetensors(b'{"a": ' + DEEP + b"}"),
    "nested metadata": safetensors(b'{"__metadata__": {"a": ' + DEEP + b"}}"),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}, b""),
    "metadata a list": safetensors({"__metadata__": []}, b""),
    "metadata null": safetensors({"__metadata__": None}, b""),
    "metadata null, then arrays": safetensors({"__metadata__": None, "a": F32}),
    "no dtype": safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}),
    "unknown dtype": safetensors({"a": entry("F33")}),
    "dtype a number": safetensors({"a": entry(1)}),
    "wrong dtype": safetensors({"a": entry("F64")}),
    "wrong shape": safetensors({"a": entry(shape=[2])}),
    "negative shape": safetensors({"a": entry(shape=[-1])}),
    "two negative": safetensors({"a": entry(shape=[-1, -1])}),
    "fractional shape": safetensors({"a": entry(shape=[1.0])}),
    "huge shape": safetensors({"a": entry(shape=[2**60], offsets=[0, 2**62])}),
    "overflowing shape": safetensors({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
    "overflowing to 4": safetensors({"a": entry(shape=[2**62 + 1], offsets=[0, 4])}),
    "shape above 2**64": safetensors({"a": entry(shape=[2**64 + 1])}),
    "huge but empty": safetensors({"a": entry(shape=[2**62, 0], offsets=[0, 0])}, b""),
    "80 axes": safetensors({"a": entry(shape=[1] * 80)}),
    "negative offset": safetensors({"a": entry(offsets=[-4, 0])}),
    "backward offsets": safetensors({"a": entry(offsets=[4, 0])}),
    "infinite offset": safetensors(ONE_AT % b"1e400"),
    "beyond the end": safetensors({"a": entry(offsets=[4, 8])}),
    "hole": safetensors({"a": F32, "b": entry(offsets=[8, 12])}, b"1" * 12),
    "hole at the start": safetensors({"a": entry(offsets=[4, 8])}, b"1" * 8),
    "overlap": safetensors({"a": F32, "b": entry(offsets=[2, 6])}, b"1" * 6),
    "the same bytes": safetensors({"a": F32, "b": F32}),
    "truncated": safetensors({"a": F32}, b"123"),
    "trailing": safetensors({"a": F32}, b"12345"),
    "twice": safetensors(b'{"a": ' + ONE + b', "a": ' + ONE + b"}"),
    "twice, apart": safetensors(
        b'{"a": ' + ONE + b', "a": ' + json.dumps(entry(offsets=[4, 8])).encode() + b"}", b"1" * 8
    ),
    "two dtypes": safetensors(b'{"a": {"dtype": "F32", ' + ONE[1:] + b"}"),
    "metadata twice": safetensors(b'{"__metadata__": {"a": "1", "a": "2"}}', b""),
    "not 0 or 1": safetensors({"a": entry("BOOL", [4])}),
    "half bytes": safetensors({"a": entry("F4", [8])}),
    "a leaf and a node": safetensors({"a": F32, "a.b": entry(offsets=[4, 8])}, b"1" * 8),
    "a node and a leaf": safetensors({"a.b": F32, "a": entry(offsets=[4, 8])}, b"1" * 8),
    "structure not JSON": structured("{"),
    "structure nested": structured("[" * 100_000),
    "structure a leaf": structured("true"),
    "structure a list": structured('["list",["list",true]]'),
    "structure of another kind": structured('["set",["a",true]]'),
    "structure empty": structured("[]"),
    "structure with null key": structured('["dict",[null,["list",true]]]'),
    "structure with bool key": structured('["dict",[true,["list",true]]]'),
    "structure with long pair": structured('["dict",["a",["list",true],1]]'),
    "structure without a leaf": structured('["dict",["b",["list",true]]]'),
    "structure with too few": structured('["dict",["a",["list"]]]'),
    "structure with too many": structured('["dict",["a",["list",true,true]]]'),
    "structure with 1 for true": structured('["dict",["a",["list",1]]]'),
    "structure with a key twice": structured('["dict",["a",["list"]],["a",["list",true]]]'),
    "structure with a name twice": structured('["dict",["a.0",true],["a",["list",true]]]'),
    "a pickle": pickle.dumps({"a": np.ones(2)}),
}


@pytest.fixture
def bounded():
    """Fail if memory is allocated for a size that is declared but not in the file."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def refused(path, content, library="numpy"):
    path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        io.load(path, library=library)
    assert str(path) in str(caught.value)
    assert caught.value.argument == "path"
    return str(caught.value)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("case", SAFETENSORS)
def test_malformed_safetensors(case, tmp_path):
    path = tmp_path / "w.safetensors"
    refused(path, SAFETENSORS[case])
    if case != "not 0 or 1":  # io.open does not read elements
        with pytest.raises(FileError):
            io.open(path)


def test_the_error_names_the_entry(tmp_path):
    path = tmp_path / "w.safetensors"
    assert "\n  x.y: the header has this name twice" in refused(
        path, safetensors(b'{"x.y": ' + ONE + b', "x.y": ' + ONE + b"}")
    )
    assert "\n  x: expected bools" in refused(
        path, SAFETENSORS["not 0 or 1"].replace(b'"a"', b'"x"')
    )
    text = refused(path, SAFETENSORS["structure not JSON"])
    assert "\n  path: the structure cannot be read: Expecting" in text
    assert "\n  a: numpy and ml_dtypes have no F4" in refused(path, SAFETENSORS["half bytes"])


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("case", ["huge but empty", "twice", "half bytes", "not 0 or 1", "80 axes"])
def test_malformed_for_other_libraries(case, library, tmp_path):
    need(library)
    refused(tmp_path / "w.safetensors", SAFETENSORS[case], library)


def test_unusual_but_valid_files(tmp_path):
    path = tmp_path / "w.safetensors"
    odd = "../../é\n\0/'\""
    path.write_bytes(
        safetensors({odd: entry(extra=entry(dtype=1)), "e": entry(shape=[0], offsets=[4, 4])})
    )
    assert list(io.load(path)) == ["", "e"]
    path.write_bytes(safetensors(b"{}", b""))
    assert io.load(path) == io.open(path) == Container()


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """safetensors opens the path itself, and must check the same file that is read."""
    path, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    io.save({"a": np.zeros(9)}, path)
    io.save({"b": np.ones(2)}, other)
    check = formats.safetensors._check

    def replaced_first(name):
        if other.exists():
            other.rename(path)
        check(name)

    monkeypatch.setattr(formats.safetensors, "_check", replaced_first)
    assert io.load(path) == Container(b=np.ones(2))


CHANGED = ["beyond the end", "huge shape", "negative shape", "fractional shape", "two negative"]
CHANGED += ["backward offsets", "negative offset", "not JSON", "unknown dtype", "no dtype"]


@pytest.mark.parametrize("case", CHANGED)
def test_a_file_that_is_overwritten_while_it_is_opened(case, tmp_path, monkeypatch):
    """After safetensors has checked it, and before its header is read."""
    content = SAFETENSORS[case]
    monkeypatch.setattr(formats.safetensors, "_check", lambda path: None)
    path = tmp_path / "w.safetensors"
    refused(path, content)
    with pytest.raises(FileError):
        io.open(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that cannot be mapped")
def test_the_error_for_a_file_that_cannot_be_mapped_names_it(tmp_path):
    path = tmp_path / "w.safetensors"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="No such device") as caught:
        io.load(path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, str(path))


# .npz


def npy(x=None, header=None, body=b"1" * 8, magic=b"\x93NUMPY\x01\x00"):
    if header is None:
        stream = memory.BytesIO()
        np.lib.format.write_array(stream, np.ones(1) if x is None else x, allow_pickle=True)
        return stream.getvalue()
    text = header if isinstance(header, bytes) else repr(header).encode()
    return magic + struct.pack("<H", len(text)) + text + body


def archive(*members, method=zipfile.ZIP_STORED):
    stream = memory.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content, method)
    return stream.getvalue()


def head(shape=(1,), descr="<f8", order=False):
    return {"descr": descr, "fortran_order": order, "shape": shape}


def patched(content, old, new):
    assert content.count(old) >= 1
    return content.replace(old, new)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in a file was run",))


def bombs():
    yield "object array", npy(np.array([Bomb()], object))
    yield "pickle as an entry", pickle.dumps(Bomb())
    yield "object dtype declared", npy(header=head(descr="|O"))
    yield "structured", npy(np.zeros(1, "f4,i4"))
    yield "structured object", npy(header=head(descr=[("a", "|O")]))
    yield "dates", npy(np.zeros(1, "M8[s]"))
    yield "2**24 elements", npy(header=head((2**24,)))
    yield "2**60 elements", npy(header=head((2**60,)))
    yield "2**70 elements", npy(header=head((2**70,)))
    yield "overflowing", npy(header=head((2**32, 2**32)))
    yield "overflowing to 8", npy(header=head((2**61 + 1,)))
    yield "huge but empty", npy(header=head((2**62, 0)), body=b"")
    yield "negative", npy(header=head((-1,)))
    yield "two negative", npy(header=head((-1, -1)))
    yield "80 axes", npy(header=head((1,) * 80))
    yield "shape of floats", npy(header=head((1.0,)))
    yield "shape a list", npy(header=head([1]))
    yield "shape of bools", npy(header=head((True, "1")))
    yield "unknown dtype", npy(header=head(descr="<f3"))
    yield "dtype a number", npy(header=head(descr=5))
    yield "dtype without size", npy(header=head(descr="<U0"), body=b"")
    yield "string of 2**31", npy(header=head(descr="<U2147483647"))
    yield "subarray", npy(header=head(descr=("<f8", (2**40,))))
    yield "order a number", npy(header=head(order=1))
    yield "order missing", npy(header={"descr": "<f8", "shape": (1,)})
    yield "not a dict", npy(header=b"[]")
    yield "code", npy(header=b"__import__('os').abort()")
    yield "nested", npy(header=b"(" * 9000)
    yield "operators", npy(header=b"-" * 9000 + b"1")
    yield "null", npy(header=b"{'\0': 1}")
    yield "not latin", npy(header=b"\xff\xfe")
    yield "long header", npy(header=repr(head()).encode() + b" " * 20_000)
    yield "truncated header", npy()[:30]
    yield "magic alone", npy()[:6]
    yield "no magic", b"x" * 100
    yield "version 9", npy(header=head(), magic=b"\x93NUMPY\x09\x00")
    yield "truncated", npy()[:-1]
    yield "trailing", npy() + b"1"
    yield "not 0 or 1", npy(header=head((8,), "|b1"), body=b"12345678")
    yield "nothing", b""


NPZ = {name: archive(("a.npy", content)) for name, content in bombs()}
NPZ |= {f"deflated {k}": archive(("a.npy", x), method=8) for k, x in bombs() if len(x) > 5}
NO_TEXT = npy(np.array('{"a":"x"}')).replace("x".encode("utf-32-le"), b"\xff\xff\xff\0")
GOOD = archive(("a.npy", npy()), ("b.npy", npy()))
NPZ |= {
    "empty file": b"",
    "no archive": b"PK\x05\x06",
    "no .npy": archive(("a.txt", b"")),
    "the same name twice": patched(GOOD, b"b.npy", b"a.npy"),
    "truncated archive": GOOD[:-10],
    "without its start": GOOD[20:],
    "checksum": patched(GOOD, np.ones(1).tobytes(), np.zeros(1).tobytes()),
    "encrypted": patched(
        GOOD, b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
    ),
    "bzip2": archive(("a.npy", npy()), method=zipfile.ZIP_BZIP2),
    "lzma": archive(("a.npy", npy()), method=zipfile.ZIP_LZMA),
    "other name inside": GOOD.replace(b"a.npy", b"c.npy", 1),
    "metadata no JSON": archive(("__metadata__.npy", npy(np.array("{")))),
    "metadata of numbers": archive(("__metadata__.npy", npy(np.array('{"a": 1}')))),
    "metadata a list": archive(("__metadata__.npy", npy(np.array("[]")))),
    "metadata nested": archive(("__metadata__.npy", npy(np.array("[" * 100_000)))),
    "metadata an array": archive(("__metadata__.npy", npy())),
    "metadata twice": archive(("__metadata__.npy", npy(np.array('{"a": "1", "a": "2"}')))),
    "metadata of no characters": archive(("__metadata__.npy", NO_TEXT)),
    "text": archive(("a.npy", npy(np.array("text")))),
    "a leaf and a node": archive(("a.npy", npy()), ("a.b.npy", npy())),
}


def declared(size, compressed=None):
    """An archive whose header and directory both declare an entry of `size` bytes."""
    start = npy(header=head((size // 8,)), body=b"")
    content = bytearray(archive(("a.npy", start + b"1" * 8)))
    directory = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, directory + 24, len(start) + size)
    if compressed is not None:
        struct.pack_into("<I", content, directory + 20, compressed)
    return bytes(content)


NPZ |= {
    "declares 4 GB": declared(4_000_000_000),
    "declares 4 GB compressed": declared(4_000_000_000, 4_000_000_000),
    "declares 1 GB": declared(1_000_000_000, 100_000_000),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("case", NPZ)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # a numpy warning about old headers
def test_malformed_npz(case, tmp_path):
    refused(tmp_path / "w.npz", NPZ[case])


def test_entries_that_overlap(tmp_path):
    """Many entries share the same bytes, so that a small file has large arrays."""
    content = npy(np.zeros(1 << 16))
    stream = memory.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.npy", content)
        first = file.infolist()[0]
        for i in range(1000):
            other = zipfile.ZipInfo(f"{i}.npy")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(other, name, getattr(first, name))
            file.filelist.append(other)
            file.NameToInfo[other.filename] = other
    assert "its entries overlap" in refused(tmp_path / "w.npz", stream.getvalue())


def test_numpy_and_lars_tree_read_the_files_of_each_other(tmp_path):
    path = tmp_path / "w.npz"
    w = {"a.b": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "c": np.ones(3, ">f4")}
    for save in (np.savez, np.savez_compressed):
        save(path, **w)
        loaded = io.load(path)
        assert np.array_equal(loaded.a.b, w["a.b"])
        assert np.array_equal(loaded.c, w["c"])
    io.save(w, path, metadata={"x": "y"})
    with np.load(path) as theirs:
        assert np.array_equal(theirs["a.b"], w["a.b"])
        assert json.loads(str(theirs["__metadata__"]))["x"] == "y"
