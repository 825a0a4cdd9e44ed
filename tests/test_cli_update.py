"""`lars-tree update` writes the results of `lars_update` to a file, by an atomic replacement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import need
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lars_tree
from lars_tree import Container, io, lars_update
from lars_tree.cli import main

bfloat16 = need("ml_dtypes").bfloat16
need("click")
need("rich")
need("safetensors")

DTYPES = [np.dtype(x) for x in ("f2", bfloat16, "f4", "f8", "c8")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lars_tree.__file__).parents[1])}


def random(shape, dtype, rng):
    return np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4), dtype)


def trees(rng, dtypes=DTYPES):
    """Weights and gradients with all kinds of nodes and leaves."""
    shapes = dict(zip("vwxyz", [(3, 4), (5,), (), (0, 2), (2, 1, 3)], strict=True))
    w = {
        "encoder": {key: random(shapes[key], rng.choice(dtypes), rng) for key in shapes},
        "list": [random((2, 2), "f4", rng), None, {"a.b": random((3,), "f8", rng)}],
        7: random((2, 3), "f4", rng),
        "kept": {"count": np.array(3), "w": np.ones(2)},
    }  # fmt: skip
    g = {
        "encoder": {key: random(x.shape, x.dtype, rng) for key, x in w["encoder"].items()},
        "list": [random((2, 1), "f8", rng), None, {"a.b": random((), "f4", rng)}],
        7: random((2, 3), "f8", rng),
        "kept": None,
    }
    return w, g


def assert_same_bits(a, b):
    a, b = Container(a), Container(b)
    assert a.paths() == b.paths()
    for x, y in zip(a.leaves(), b.leaves(), strict=True):
        if x is None:
            assert y is None
        else:
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert x.tobytes() == y.tobytes()


def run(*arguments):
    assert main([str(x) for x in ("update", *arguments)]) == 0


OPTIONS = {
    "decay_lambda": 0.01,
    "trust_coefficient": 0.5,
    "eps": 1e-3,
    "grad_scale": 8.0,
    "trust_clip": True,
}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    names=st.sets(st.sampled_from(list(OPTIONS))),
    suffixes=st.tuples(*[st.sampled_from([".safetensors", ".npz"])] * 3),
)
def test_a_file_is_updated_to_the_same_bits_as_its_tree(seed, names, suffixes, tmp_path):
    dtypes = DTYPES if ".npz" not in suffixes else [x for x in DTYPES if x != bfloat16]
    w, g = trees(np.random.default_rng(seed), dtypes)
    files = [tmp_path / (name + suffix) for name, suffix in zip("wgo", suffixes, strict=True)]
    io.save(w, files[0], metadata={"step": "9"})
    io.save(g, files[1])
    arguments = [*files[:2], "--lr", 0.3, "--broadcast", "-o", files[2]]
    for name in names:
        option = "--" + name.replace("_", "-")
        arguments += [option] if name == "trust_clip" else [option, OPTIONS[name]]
    run(*arguments)
    expected = lars_update(w, g, 0.3, **{name: OPTIONS[name] for name in names})
    assert_same_bits(io.load(files[2]), expected)
    assert io.metadata(files[2]) == {"step": "9"}
    assert_same_bits(io.load(files[0]), w)


def test_numpy_files_of_any_memory_order_and_byte_order(tmp_path):
    rng = np.random.default_rng(0)
    w = {"a": np.asfortranarray(random((40, 30), "f4", rng)), "b": random((9,), ">f4", rng)}
    g = {"a": np.asfortranarray(random((40, 30), "f4", rng)), "b": random((9,), ">f8", rng)}
    np.savez(tmp_path / "w.npz", **w)
    np.savez_compressed(tmp_path / "g.npz", **g)
    run(tmp_path / "w.npz", tmp_path / "g.npz", "--lr", 0.1, "-o", tmp_path / "o.safetensors")
    expected = lars_update(io.load(tmp_path / "w.npz"), io.load(tmp_path / "g.npz"), 0.1)
    found = io.load(tmp_path / "o.safetensors")
    assert np.array_equal(found.a, expected.a)
    assert np.array_equal(found.b, expected.b)
    assert np.count_nonzero(found.a != w["a"]) == w["a"].size


@pytest.fixture
def files(tmp_path, monkeypatch):
    """w.safetensors and g.safetensors in the working directory, and the trees in them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    w = Container(
        encoder={"kernel": random((3, 4), "f4", rng), "bias": random((4,), "f4", rng)},
        head={"kernel": random((4, 2), "f4", rng), "bias": random((2,), bfloat16, rng)},
    )
    g = w.map(lambda x: random(x.shape, x.dtype, rng))
    io.save(w, "w.safetensors")
    io.save(g, "g.safetensors")
    return w, g


FILES = ["w.safetensors", "g.safetensors"]


def test_in_place_replaces_the_weights(files):
    w, g = files
    os.chmod(FILES[0], 0o640)
    run(*FILES, "--lr", 0.1, "--in-place")
    assert_same_bits(io.load(FILES[0]), lars_update(w, g, 0.1))
    assert os.stat(FILES[0]).st_mode & 0o777 == 0o640
    assert sorted(os.listdir()) == sorted(FILES)


def test_json_describes_the_output(files, capsys):
    run(*FILES, "--lr", 0.1, "-o", "o.safetensors", "--json")
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "weights": FILES[0],
        "gradients": FILES[1],
        "out": "o.safetensors",
        "leaves": 4,
        "parameters": 26,
        "bytes": 26 * 4 - 4,
        "moved": ["encoder/kernel", "encoder/bias", "head/kernel", "head/bias"],
        "unchanged": [],
        "kept": [],
        "skipped": [],
    }


BAD_GRADIENTS = {
    "a misspelt key": (
        {"encoder": "bais"},
        "g.safetensors does not match w.safetensors (--keep-missing keeps weights that have no "
        "gradient): encoder/bias: expected a gradient, got none; "
        "encoder/bais: not in w.safetensors (did you mean 'encoder.bias'?)",
    ),
    "a missing node": ({"head": None}, "head/bias: expected a gradient, got none"),
    "a wrong shape": (np.ones((4, 3), "f4"), "encoder/kernel: expected shape (3, 4), got (4, 3)"),
    "a smaller shape": (
        np.ones(4, "f4"),
        "g.safetensors has gradients of another shape than w.saf",
    ),
    "integers": (np.ones((3, 4), "i4"), "g.safetensors is not floating point: encoder/kernel: exp"),
    "complex numbers": (
        np.ones((3, 4), "c8"),
        "g.safetensors and w.safetensors mix real and complex numbers: encoder/kernel: expected",
    ),
    "NaN": (
        np.full((3, 4), np.nan, "f4"),
        "g.safetensors would make weights that are not finite: encoder/kernel: expected finite",
    ),
}


@pytest.mark.parametrize("fault", BAD_GRADIENTS)
@pytest.mark.parametrize("where", [["-o", "o.safetensors"], ["--in-place"]])
def test_bad_gradients_change_nothing(fault, where, files, capsys):
    change, message = BAD_GRADIENTS[fault]
    g = files[1].to_dict()
    if fault == "a misspelt key":
        g["encoder"]["bais"] = g["encoder"].pop("bias")
    elif fault == "a missing node":
        del g["head"]
    else:
        g["encoder"]["kernel"] = change
    io.save(g, "g.safetensors")
    refused(["update", *FILES, "--lr", "0.1", *where], message, capsys)


BAD_OPTIONS = [
    (["--lr", "nan"], "lr: expected a finite number >= 0, got nan"),
    (["--lr", "-1"], "lr: expected a finite number >= 0, got -1.0"),
    (["--lr", "1", "--eps", "inf"], "eps: expected a finite number >= 0, got inf"),
    (["--lr", "1", "--grad-scale", "0"], "grad_scale: expected a finite number > 0, got 0.0"),
    (["--lr", "1", "--lr-for", "*=-1"], "*: expected a finite number >= 0, got -1.0"),
    (["--lr", "1", "--lr-for", "*=-1", "--lr-for", "**=1"], "expected a finite number >= 0"),
    (["--lr", "1", "--lr-for", "encoder"], "expected PATTERN=VALUE, got 'encoder'"),
    (["--lr", "1", "--lr-for", "*=x"], "expected PATTERN=VALUE, got '*=x'"),
    (["--lr", "1", "--decay-for", "*.bias=-1"], "decay_lambda has an invalid value: *.bias: exp"),
    (["--lr", "1", "--lr-for", "hed/bias=1"], "got 'hed/bias' (did you mean 'head/bias'?)"),
    (["--lr", "1", "--lr-for", "*.bais=1"], "got '*.bais' (did you mean '*.bias'?)"),
    (["--lr", "1", "--no-adapt", "h*.kernl"], "got 'h*.kernl' (did you mean 'h*.kernel'?)"),
    (
        ["--lr", "1", "--no-adapt", "bias"],
        "--no-adapt matches no leaf of w.safetensors: expected a"
        " pattern of paths or names, got 'bias' (did you mean '*/bias'?)",
    ),
    (["--lr", "1", "--decay-for", "x=1"], "--decay-for matches no leaf of w.safetensors: expected"),
    ([], "Missing option '--lr'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: " ".join(x)[:30])
def test_bad_options_change_nothing(options, message, files, capsys):
    refused(["update", *FILES, *options, "--in-place"], message, capsys)


BAD_FILES = [
    (["w.safetensors", "no.npz"], ["--in-place"], "no.npz: No such file or directory"),
    (FILES, ["-o", "no/o.safetensors"], "update: no/o.safetensors: No such file or directory"),
    (FILES, ["-o", "o.txt"], "expected a name that ends in .safetensors or .npz"),
    (FILES, ["-o", "o.npz"], "update: o.npz: tree has leaves that cannot be saved: head/bias: npz"),
    (FILES, ["-o", "o.npz", "--in-place"], "expected one of -o OUT and --in-place"),
    (FILES, [], "expected one of -o OUT and --in-place"),
    (["w.safetensors", "torn.safetensors"], ["--in-place"], "'torn.safetensors' cannot be read"),
    (["w.safetensors", "torn.npz"], ["-o", "o.safetensors"], "'torn.npz' cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("files_", "where", "message"), BAD_FILES)
def test_files_that_cannot_be_read_or_written_change_nothing(files_, where, message, files, capsys):
    for name, source in (("torn.safetensors", "g.safetensors"), ("torn.npz", "g.npz")):
        if source == "g.npz":
            np.savez(source, a=np.ones(9))
        Path(name).write_bytes(Path(source).read_bytes()[:-9])
    refused(["update", *files_, "--lr", "1", *where], message, capsys)


def test_a_corrupt_leaf_changes_nothing(files, capsys):
    """An array in an archive is checked only when it is read, after other leaves were written."""
    w = {"a": np.ones(9, "f4"), "b": np.ones(9, "f4")}
    io.save(w, "w.npz")
    io.save(w, "g.npz")
    data = bytearray(Path("w.npz").read_bytes())
    end = data.rindex(np.ones(9, "f4").tobytes())
    data[end] ^= 1
    Path("w.npz").write_bytes(data)
    for out in ("w.npz", "w.safetensors"):
        refused(["update", "w.npz", "g.npz", "--lr", "1", "-o", out], "b: Bad CRC-32", capsys)


def refused(arguments, message, capsys):
    """Check that the command exits with 2, prints one line of error and changes no file."""
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lars-tree update: ")
    assert err.count("\n") == 1
    assert message in err
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


def big_files(directory, leaves, size):
    """Write weights and gradients whose leaves have equal elements, and a small old output file."""
    for name, value in (("w", 2.0), ("g", 1.0)):
        x = np.full(size, value, "f4")
        io.save({f"l{i}": x for i in range(leaves)}, directory / f"{name}.safetensors")
    io.save({"old": np.ones(3)}, directory / "o.safetensors")


ARGUMENTS = ["update", *FILES, "--lr", "0.5", "-o", "o.safetensors"]
COMMAND = [sys.executable, "-m", "lars_tree", *ARGUMENTS]
# Processes in the background start with Ctrl-C ignored, but the tests must pass there too.
START = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
START += "runpy.run_module('lars_tree', run_name='__main__', alter_sys=True)"


def stopped(directory, number, fraction, delay=0.0):
    """Send a signal to an update `delay` seconds after it wrote a fraction of the file.

    Return the exit status, stdout and stderr of the update.
    """
    total = (directory / "w.safetensors").stat().st_size
    process = subprocess.Popen(
        [sys.executable, "-c", START, *ARGUMENTS],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    written = -1
    while process.poll() is None and written < fraction * total:
        time.sleep(0.0005)
        for stray in strays(directory):
            with suppress(FileNotFoundError):  # the file was just renamed
                written = stray.stat().st_size
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate()
    return process.returncode, out, err


def strays(directory):
    return list(directory.glob(".lars_tree-*.tmp"))


# Pairs (fraction, delay): during the copy of the weights; while the copy is updated, synced and
# renamed; after the end.
MOMENTS = [*((i / 4, 0.0) for i in range(4)), *((1, 0.03 * i) for i in range(6)), (2, 0.0)]


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    big_files(tmp_path, 32, 1 << 19)
    old = (tmp_path / "o.safetensors").read_bytes()
    size = (tmp_path / "w.safetensors").stat().st_size
    ends = set()
    for fraction, delay in MOMENTS:
        (tmp_path / "o.safetensors").write_bytes(old)
        status, out, _ = stopped(tmp_path, signal.SIGKILL, fraction, delay)
        found = io.load(tmp_path / "o.safetensors")
        if "old" in found:
            assert (tmp_path / "o.safetensors").read_bytes() == old
        else:
            assert len(found) == 32
            assert {float(x) for leaf in found.leaves() for x in (leaf.min(), leaf.max())} == {1.0}
        left = strays(tmp_path)
        assert len(left) <= 1  # the temporary file of the earlier kill was removed
        if "old" not in found:
            ends.add("new")
        elif left:
            ends.add("copying" if left[0].stat().st_size < size else "updating")
        assert (status, bool(out)) in ((-signal.SIGKILL, False), (-signal.SIGKILL, True), (0, True))
    assert ends >= {"copying", "updating", "new"}
    subprocess.run(COMMAND, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    assert strays(tmp_path) == []


@pytest.mark.parametrize("fraction", [0.5, 1])
def test_ctrl_c_exits_with_130_and_leaves_no_temporary_file(fraction, tmp_path):
    big_files(tmp_path, 64, 1 << 19)
    old = (tmp_path / "o.safetensors").read_bytes()
    status, out, err = stopped(tmp_path, signal.SIGINT, fraction)
    assert (status, out, err.strip()) == (130, "", "")
    assert (tmp_path / "o.safetensors").read_bytes() == old
    assert strays(tmp_path) == []


@pytest.mark.parametrize("native", ["0", "1"])
def test_memory_is_bounded_by_the_largest_leaf(native, tmp_path):
    """Files of 192 MiB with leaves of 4 MiB are updated with at most 112 MiB of memory for data."""
    code = """if 1:
        import json, re, resource
        from lars_tree.cli import main
        leaf, count = 1 << 22, 48
        spans = [[leaf * i, leaf * (i + 1)] for i in range(count)]
        header = {str(i): {"dtype": "F32", "shape": [leaf >> 2], "data_offsets": span}
                  for i, span in enumerate(spans)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        for name in ("w.safetensors", "g.safetensors"):
            with open(name, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + leaf * count)
        status = open("/proc/self/status").read()
        limit = (int(re.search(r"VmData:\\s+(\\d+)", status)[1]) << 10) + (112 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            bytearray(113 << 20)
        except MemoryError:
            pass
        else:
            raise SystemExit("the limit does not hold")
        assert main(["update", "w.safetensors", "g.safetensors", "--lr", "1", "--in-place"]) == 0"""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=ENVIRONMENT | {"LARS_TREE_NATIVE": native},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
