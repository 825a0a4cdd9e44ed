"""The text, JSON and exit status of `lars-tree show` and `lars-tree diff`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf, nan

import numpy as np
import pytest
from conftest import need

from lars_tree import Container, io, lars_update, report
from lars_tree.cli import main

bfloat16 = need("ml_dtypes").bfloat16
for library in ("click", "rich", "safetensors"):
    need(library)

from lars_tree._commands.diff import compared  # noqa: E402


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


W = Container(
    encoder={"kernel": np.full((3, 4), 2, "f4"), "bias": np.zeros(4, bfloat16)},
    blocks=[{"w": np.array([3.0, 4.0])}, None],
)


def printed(capsys, *arguments, status=0):
    assert main([str(x) for x in arguments]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys, *arguments, status=0):
    """The printed document, which must be strictly valid JSON, without NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    out = printed(capsys, *arguments, "--json", status=status)
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=refuse)


def test_show_lists_the_leaves_and_the_metadata(capsys):
    metadata = {"step": "1", "a\tb": "x" * 300}
    io.save(W, "w.safetensors", metadata=metadata)
    assert printed(capsys, "show", "w.safetensors") == (
        "w.safetensors: 3 leaves, 18 parameters, 72 bytes\n"
        "  encoder/kernel  float32 (3, 4)\n"
        "  encoder/bias    bfloat16 (4,)\n"
        "  blocks/0/w      float64 (2,)\n"
        "  blocks/1        None\n"
        "metadata:\n"
        "  step    1\n"
        f"  'a\\tb'  {'x' * 100}...{'x' * 100}\n"
    )
    found = as_json(capsys, "show", "w.safetensors")
    assert found["metadata"] == metadata
    assert (found["leaves"], found["parameters"], found["bytes"]) == (3, 18, 72)
    assert found["tree"][1:] == [
        {"path": "encoder/bias", "shape": [4], "dtype": "bfloat16", "parameters": 4, "bytes": 8},
        {"path": "blocks/0/w", "shape": [2], "dtype": "float64", "parameters": 2, "bytes": 16},
        {"path": "blocks/1", "shape": None, "dtype": None, "parameters": 0, "bytes": 0},
    ]


@pytest.mark.parametrize("patterns", [["blocks", "*.kernel"], ["*/kernel", "blocks.*", "*w"]])
def test_show_lists_the_leaves_that_match(patterns, capsys):
    io.save(W, "w.safetensors")
    assert printed(capsys, "show", "w.safetensors", *patterns) == (
        "w.safetensors: 3 leaves, 18 parameters, 72 bytes; "
        "shown: 2 leaves, 14 parameters, 64 bytes\n"
        "  encoder/kernel  float32 (3, 4)\n"
        "  blocks/0/w      float64 (2,)\n"
        "  blocks/1        None\n"
    )
    found = as_json(capsys, "show", "w.safetensors", *patterns)
    assert found["shown"] == {"leaves": 2, "parameters": 14, "bytes": 64}
    assert found["leaves"] == 3
    assert len(found["tree"]) == 3


def test_show_sums_up_the_leaves_below_a_depth(capsys):
    io.save(
        {"a": {"x": np.ones(2), "y": {"z": np.ones(3), "u": np.ones(1)}}, "b": np.ones(4)}, "w.npz"
    )
    header = "w.npz: 4 leaves, 10 parameters, 80 bytes\n"
    assert printed(capsys, "show", "w.npz", "--depth", 1) == (
        f"{header}  a/*  3 leaves, 6 parameters, 48 bytes\n  b    float64 (4,)\n"
    )
    assert printed(capsys, "show", "w.npz", "--depth", 2) == (
        f"{header}  a/x    float64 (2,)\n"
        "  a/y/*  2 leaves, 4 parameters, 32 bytes\n  b      float64 (4,)\n"
    )
    assert printed(capsys, "show", "w.npz", "--depth", 3) == printed(capsys, "show", "w.npz")
    found = as_json(capsys, "show", "w.npz", "--depth", 1)
    assert found["tree"][0] == {"path": "a/*", "leaves": 3, "parameters": 6, "bytes": 48}
    part = printed(capsys, "show", "w.npz", "a/*", "--depth", 1)
    assert part.splitlines()[1:] == ["  a/*  3 leaves, 6 parameters, 48 bytes"]


def test_show_reads_no_elements(capsys):
    """The file is sparse and 1 TiB long."""
    text = b'{"w":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}'
    with open("w.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 40))
    assert "  w  float32 (274877906944,)\n" in printed(capsys, "show", "w.safetensors")


def test_show_lists_all_leaves_of_a_large_tree(capsys):
    io.save({str(i): np.ones(1) for i in range(500)}, "w.npz")
    lines = printed(capsys, "show", "w.npz").splitlines()
    assert len(lines) == 501
    lines = printed(capsys, "show", "w.npz", "--grads", "w.npz").splitlines()
    assert len(lines) == 502
    assert lines[-1].split()[0] == "499"


@pytest.mark.parametrize("grads", ["g.npz", "g.safetensors"])
def test_show_with_gradients_prints_the_layer_table(grads, capsys):
    w = {"encoder": W.encoder.to_dict(), "head": np.array([3.0, 4.0]), "kept": np.ones(2, "f4")}
    g = {"encoder": {"kernel": np.ones((3, 4)), "bias": np.full(4, 2.0)}, "head": 1e-3 * np.ones(2)}
    g["kept"] = None
    io.save(w, "w.safetensors")
    io.save(g, grads)
    options = ["--lr", 0.3, "--decay-lambda", 0.1, "--trust-clip", "--lr-for", "head=2"]
    arguments = ["show", "w.safetensors", "--grads", grads, *options, "--no-adapt", "*/kernel"]
    rates = {"encoder": 0.3, "head": 2.0, "kept": 0.3}
    adapt = {"encoder": {"kernel": False, "bias": True}, "head": True, "kept": True}
    with pytest.warns(report.TrustRatioWarning):
        expected = report.layer_table(w, g, rates, decay_lambda=0.1, trust_clip=True, adapt=adapt)
    assert printed(capsys, *arguments) == f"{expected!r}\n"
    found = as_json(capsys, *arguments)["layers"]
    assert [x["path"] for x in found] == ["encoder/kernel", "encoder/bias", "head", "kept"]
    assert found[1]["relative_step"] == "Infinity"
    assert found[2]["clipped"]
    numbers = ("w_norm", "g_norm", "ratio")
    assert [[x[name] for name in numbers] for x in found] == [
        [x[name] for name in numbers] for x in expected
    ]


def test_show_checks_patterns(capsys):
    io.save({"a": np.ones(2)}, "w.npz")
    assert main(["show", "w.npz", "--grads", "w.npz", "--lr-for", "b=1"]) == 2
    assert capsys.readouterr().err.startswith("lars-tree show: --lr-for matches no leaf of w.npz")
    assert main(["show", "w.npz", "b"]) == 2
    assert capsys.readouterr().err.startswith("lars-tree show: PATTERN matches no leaf of w.npz")


def test_keys_that_a_terminal_cannot_encode():
    io.save({"ключ": np.ones(2), "a/b\nc": np.ones(2)}, "w.npz")
    command = [sys.executable, "-m", "lars_tree", "show", "w.npz"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert done.stdout.decode("ascii").splitlines()[1:] == [
        f"  {name}  float64 (2,)" for name in (r"\u043a\u043b\u044e\u0447    ", r"'a/b\nc'")
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_equal_files_do_not_differ(suffix, capsys):
    w = {"a": np.array([nan, 0.0, inf]), "b": {"c": np.ones((2, 3), "f4"), "d": np.zeros((0, 2))}}
    io.save(w, f"a{suffix}", metadata={"step": "1"})
    io.save({"b": dict(reversed(w["b"].items())), "a": w["a"] * [1, -1, 1]}, "b.safetensors")
    assert printed(capsys, "diff", f"a{suffix}", "b.safetensors") == ""
    found = as_json(capsys, "diff", f"a{suffix}", "b.safetensors")
    assert found["equal"]
    assert [leaf["changed"] for leaf in found["leaves"]] == [0, 0, 0]


def test_diff_reports_how_much_each_leaf_changed(capsys):
    w = {"a": np.array([1.0, 2, 2]), "b": {"c": np.ones((2, 3), "f4"), "d": np.zeros(4, bfloat16)}}
    new = {"a": np.array([1.0, 2.5, 2]), "b": {"c": w["b"]["c"], "d": np.array([0, 4, 3, 0], "f4")}}
    w["e"], new["e"] = np.array([nan, 1, 2, 3, nan]), np.array([0, nan, 2, nan, nan])
    io.save(w, "a.safetensors")
    io.save(new, "b.npz")
    assert printed(capsys, "diff", "a.safetensors", "b.npz", status=1) == (
        "3 of 4 leaves that both have differ\n"
        "  a    1 of 3 elements differ, |b - a| / |a| = 0.1667\n"
        "  b/d  bfloat16 (4,) in A, float32 (4,) in B; "
        "2 of 4 elements differ, |b - a| = 5, |a| = 0\n"
        "  e    1 NaN in A only; 2 NaN in B only\n"
    )
    found = as_json(capsys, "diff", "a.safetensors", "b.npz", status=1)
    assert not found["equal"]
    leaves = {leaf["path"]: leaf for leaf in found["leaves"]}
    assert [leaves[x]["relative_change"] for x in ("a", "b/c", "b/d", "e")] == [
        pytest.approx(1 / 6), 0, "Infinity", 0
    ]  # fmt: skip
    numbers = ("changed", "change_norm", "a_norm", "nan_in_a_only", "nan_in_b_only")
    assert [leaves["b/d"][name] for name in numbers] == [2, 5, 0, 0, 0]
    assert [leaves["e"][name] for name in numbers[:2]] == [0, 0]
    assert [leaves["e"][name] for name in numbers[3:]] == [1, 2]


def test_files_with_nothing_in_common(capsys):
    io.save({"encoder": {"w": np.ones(2)}}, "a.npz")
    io.save({"model": {"encoder": {"w": np.ones(2)}}}, "b.npz")
    out = printed(capsys, "diff", "a.npz", "b.npz", status=1)
    assert out.startswith("a.npz and b.npz have no leaf in common\n  /  missing 'encoder'; unexp")


@pytest.mark.parametrize("collide", [False, True])
def test_diff_compares_names_whatever_the_structure(collide, capsys):
    """A file of `io.save` records that the names of a state_dict are keys; others do not."""
    from safetensors.numpy import save_file

    flat = {"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2), "1.0.w": np.full(3, 2.0)}
    if collide:
        flat["0"] = np.ones(1)
        io.save(flat, "a.safetensors")
    else:
        save_file(flat, "a.safetensors")
    io.save(flat, "b.safetensors")
    assert printed(capsys, "diff", "a.safetensors", "b.safetensors") == ""
    io.save(flat | {"1.0.w": np.full(3, 3.0)}, "b.safetensors")
    out = printed(capsys, "diff", "a.safetensors", "b.safetensors", status=1)
    assert "3 of 3 elements differ, |b - a| / |a| = 0.5\n" in out


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"a": {"bias": 0, "kernel": 1}, "c": 2}, "/  missing 'b'; unexpected 'c'"),
        ({"a": {"bais": 0, "kernel": 1}, "b": 2}, "a  missing 'bias'; unexpected 'bais' (did you"),
        ({"a": 0, "b": 2}, "a  expected a dict with keys 'bias', 'kernel', got an array of shape"),
        ({"a": {"bias": 0, "kernel": 1}, "b": [2, 2]}, "b  expected an array of shape (2,), got a"),
        ({"a": {"bias": 0, "kernel": 1}, "b": None}, "b  float64 (2,) in A, None in B"),
        ({"a": {"bias": 2, "kernel": 1}, "b": 2}, "a/bias  float64 (0,) in A, float64 (2,) in B"),
        ({"a": {"bias": 0, "kernel": np.ones(1, "f4")}, "b": 2}, "float64 (1,) in A, float32 (1,)"),
    ],
)
def test_diff_reports_where_the_structure_differs(other, line, capsys):
    def filled(node):
        return Container(node).map(lambda n: np.ones(n) if isinstance(n, int) else n)

    io.save(filled({"a": {"bias": 0, "kernel": 1}, "b": 2}), "a.npz")
    io.save(filled(other), "b.npz")
    assert line in printed(capsys, "diff", "a.npz", "b.npz", status=1)
    assert not as_json(capsys, "diff", "a.npz", "b.npz", status=1)["equal"]


def test_diff_of_a_missing_file_is_an_error(capsys):
    io.save({"a": np.ones(1)}, "a.npz")
    assert main(["diff", "a.npz", "b.npz"]) == 2
    assert capsys.readouterr() == ("", "lars-tree diff: b.npz: No such file or directory\n")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (np.array([1.0, nan]), np.array([1.0, 2.0]), (0, 0, (1, 0))),
        (np.array([nan, 1.0, 1.0]), np.array([nan, 1.0, nan]), (0, 0, (0, 1))),
        (np.array([nan, 3.0, 4.0]), np.array([nan, 3.0, 9.0]), (1, 1, (0, 0))),
        (np.array([0.0, 1.0]), np.array([3.0, 5.0]), (2, 5, (0, 0))),
        (np.array([0.0, 0.0]), np.array([-0.0, 1.0]), (1, inf, (0, 0))),
        (np.array([3e300, 4e300]), np.array([3e300, 9e300]), (1, 1, (0, 0))),
        (np.array([3e-310, 4e-310]), np.array([3e-310, 9e-310]), (1, 1, (0, 0))),
        (np.array([1.0, 1.0]), np.array([inf, 1.0]), (1, inf, (0, 0))),
        (np.array([inf, 1.0]), np.array([inf, 2.0]), (1, 0, (0, 0))),
        (np.array([inf, 1.0]), np.array([-inf, 1.0]), (1, nan, (0, 0))),
        (np.array([3 + 4j, 0]), np.array([3 + 4j, 10]), (1, 2, (0, 0))),
        (np.array([True, False]), np.array([False, False]), (1, 1, (0, 0))),
        (np.array([200], "u1"), np.array([100], "u1"), (1, 0.5, (0, 0))),
        (np.array([2**62], "i8"), np.array([2**62 + 1], "i8"), (1, 0, (0, 0))),
        (np.array([1, 2], "f4"), np.array([1, 2]), (0, 0, (0, 0))),
        (np.array([0, 2], bfloat16), np.array([0, 3], "f2"), (1, 0.5, (0, 0))),
        (np.zeros((0, 2)), np.zeros((0, 2)), (0, 0, (0, 0))),
    ],
)
def test_relative_changes(a, b, expected):
    change = compared(a, b)
    assert (change.changed, change.nan) == expected[::2]
    assert change.relative == pytest.approx(expected[1], nan_ok=True, rel=1e-15)
    assert bool(change.text(a.size)) == bool(change.changed or any(change.nan))


def test_changes_are_summed_over_all_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((7, 9))
    b = np.where(rng.random(a.shape) < 0.5, a, rng.standard_normal(a.shape))
    monkeypatch.setattr("lars_tree._commands.diff._BLOCK", 4)
    change = compared(a, b)
    assert change.changed == np.sum(a != b)
    assert change.size == pytest.approx(np.linalg.norm(b - a), rel=1e-14)
    assert change.norm == pytest.approx(np.linalg.norm(a), rel=1e-14)


@pytest.mark.parametrize("arguments", [["diff"], ["update", "--lr=1", "-o", "o.safetensors"]])
def test_dtypes_that_numpy_does_not_have_are_refused(arguments, capsys):
    text = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    with open("w.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"\0")
    assert "  w  F4 (2,)\n" in printed(capsys, "show", "w.safetensors")
    assert main([*arguments, "w.safetensors", "w.safetensors"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "path 'w.safetensors' cannot be read: w: " in err
    assert not os.path.exists("o.safetensors")


def test_names_of_which_one_is_the_beginning_of_another(capsys):
    from safetensors.numpy import save_file

    w, g = ({"a": x, "a.b": 2 * x} for x in (np.ones(2), np.array([0.0, 1.0])))
    save_file(w, "w.safetensors")
    save_file(g, "g.safetensors")
    arguments = ["w.safetensors", "g.safetensors", "--lr", 0.1, "--lr-for", "a.b=0.5"]
    printed(capsys, "update", *arguments, "-o", "o.safetensors")
    new = lars_update(w, g, {"a": 0.1, "a.b": 0.5})
    assert io.load("o.safetensors", flat=True) == new
    layers = as_json(capsys, "show", "w.safetensors", "--grads", "g.safetensors")["layers"]
    assert [layer["path"] for layer in layers] == ["a", "a.b"]
    changed = as_json(capsys, "diff", "w.safetensors", "o.safetensors", status=1)["leaves"]
    assert [(leaf["path"], leaf["changed"]) for leaf in changed] == [("a", 1), ("a.b", 1)]
