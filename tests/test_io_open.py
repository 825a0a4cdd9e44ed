"""Mapped files are updated in place, and never loaded as a whole."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars
from test_io import assert_same

from lars_tree import Container, FileError, OutError, io, lars_update

ml_dtypes = need("ml_dtypes")
need("safetensors")


def test_updates_are_written_to_the_mapped_file(tmp_path):
    path = tmp_path / "w.safetensors"
    w = Container(a=np.array([3.0, 4.0]), n=[np.ones((2, 3), np.float32)], z=np.empty((0, 2)))
    w["b"] = np.array([1, 2, 3], ml_dtypes.bfloat16)
    io.save(w, path, metadata={"kept": "yes"})
    mapped = io.open(path, "r+")
    assert {type(x) for x in mapped.leaves() if x.size} == {np.memmap}
    g = w.map(np.ones_like)
    expected = lars_update(w, g, 0.25)
    lars_update(mapped, g, 0.25, out=mapped)
    mapped.a.flush()
    assert_same(io.load(path), expected)
    assert io.metadata(path) == {"kept": "yes"}


def test_counters_are_mapped_too(tmp_path):
    path = tmp_path / "s.safetensors"
    w, opt = Container(a=np.array([3.0, 4.0])), Lars(0.1)
    io.save({"w": w, "state": opt.init(w)}, path)
    mapped = io.open(path, "r+")
    for _ in range(2):
        opt.update(mapped.w, {"a": np.ones(2)}, mapped.state, out=mapped.w)
    assert int(io.load(path).state.step) == 2


def test_a_file_opened_for_reading_is_read_only(tmp_path):
    path = tmp_path / "w.safetensors"
    io.save({"a": {"b": np.ones(2)}}, path)
    before = path.read_bytes()
    path.chmod(0o444)
    mapped = io.open(path)
    with pytest.raises(OutError, match=r"a/b: .*read-only"):
        lars_update(mapped, 1.0, 0.1, out=mapped)
    assert path.read_bytes() == before
    io.save(mapped, path.with_suffix(".npz"))
    with pytest.raises(FileError, match=r"an .npz cannot be mapped"):
        io.open(path.with_suffix(".npz"))


def test_a_mapped_file_is_updated_without_memory_for_its_leaves(tmp_path):
    """4 leaves of 32 MiB need at most 8 MiB of memory and 32 MiB of new address space."""
    code = """if 1:
        import json, re, resource, sys
        import numpy as np
        from lars_tree import io, lars_update
        def kib(name):
            return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        path, leaf, count = sys.argv[1], 1 << 25, 4
        spans = [[leaf * i, leaf * (i + 1)] for i in range(count)]
        header = {str(i): {"dtype": "F32", "shape": [leaf >> 2], "data_offsets": span}
                  for i, span in enumerate(spans)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + leaf * count)
        w = io.open(path, "r+")
        x = np.memmap(path + ".g", np.float32, "w+", shape=leaf >> 2)
        x[:] = 1
        g = dict.fromkeys(w, x)
        part = x[: 1 << 20]
        lars_update(part.copy(), part, 0.5)                          # start the threads
        limit, before = kib("VmSize") + (32 << 10), kib("RssAnon")
        resource.setrlimit(resource.RLIMIT_AS, (limit << 10,) * 2)
        try:
            bytearray(120 << 20)
        except MemoryError:
            pass
        else:
            raise SystemExit("the limit does not hold")
        lars_update(w, g, 0.5, out=w)
        print(kib("RssAnon") - before, w["0"][7], w["3"][-1])"""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "big.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    grown, first, last = result.stdout.split()
    assert int(grown) < 8 << 10
    assert (float(first), float(last)) == (-0.5, -0.5)  # where |w| is 0, ratio is 1


def test_unaligned_arrays_are_updated(tmp_path):
    """In files written by other programs, arrays may have any offset."""
    path = tmp_path / "w.safetensors"
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    text += b'"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    data = b"\x07" + np.array([3, 4], "<f4").tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    w = io.open(path, "r+")
    assert not w.w.flags.aligned
    lars_update({"w": w.w}, {"w": np.array([0, 10], "f4")}, 0.1, out={"w": w.w})
    assert_same(io.load(path), Container(a=np.array([7], "u1"), w=np.array([3, 3.5], "f4")))


def test_a_mapped_file_may_be_replaced(tmp_path):
    """The mapped leaves still show the old file."""
    path = tmp_path / "w.safetensors"
    io.save({"a": np.ones(3)}, path)
    old = io.open(path, "r+")
    io.save({"a": np.zeros(3)}, path)
    old.a[...] = 5
    assert io.load(path) == Container(a=np.zeros(3))
    assert np.array_equal(old.a, [5, 5, 5])


def test_saved_arrays_are_aligned(tmp_path):
    path = tmp_path / "w.safetensors"
    w = Container(a=np.ones(3, "u1"), b=np.ones(5), c=np.ones(3, "f2"), d=np.ones(1, "f4"))
    io.save(w, path)
    assert all(x.flags.aligned for x in io.open(path).leaves())
    assert_same(io.load(path), w)  # in the order of the tree
