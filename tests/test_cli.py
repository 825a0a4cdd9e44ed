"""The lars-tree command and its demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import need

from lars_tree import Container, __version__
from lars_tree._commands import demo
from lars_tree.cli import main


@pytest.fixture
def libraries():
    """Require the libraries of the demo."""
    need("click")
    need("sklearn")


def cost(w, digits):
    """The mean cross-entropy, computed independently of `demo.gradients`."""
    logits = demo.forward(w, digits.images)[-1]
    chosen = logits[np.arange(len(logits)), digits.labels]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_classifies_95_percent_of_the_held_out_digits(seed, libraries, capsys):
    assert main(["demo", "--seed", str(seed)]) == 0
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(LARS|SGD, \w+ rate) .* ([01]\.\d{4})$", out, re.MULTILINE))
    lars, same, best = map(float, rows.values())
    assert 0.95 <= lars <= 1
    assert same < best  # SGD at the rate of LARS and at its own best rate


def test_the_output_of_the_demo_depends_on_the_seed_alone(libraries, capsys):
    def printed(seed):
        main(["demo", "--epochs", "1", "--seed", seed])
        return capsys.readouterr().out

    assert printed("3") == printed("3") != printed("4")


def test_the_demo_lists_each_layer_once_in_at_most_80_columns(libraries, capsys):
    main(["demo", "--epochs", "1"])
    out, err = capsys.readouterr()
    paths = [f"{layer}/{name}" for layer in demo.SIZES for name in ("kernel", "bias")]
    assert re.findall(r"\w+/\w+", out) == paths
    assert max(map(len, (out + err).splitlines())) <= 80


def test_the_demo_with_a_rate_that_ends_in_nan_and_a_batch_larger_than_the_data(libraries, capsys):
    assert main(["demo", "--epochs", "2", "--rate", "1e300", "--batch", "9999"]) == 0
    assert "batch 1437" in capsys.readouterr().out


def test_gradients_agree_with_numerical_derivatives():
    rng = np.random.default_rng(0)
    w = demo.initial_weights(rng)
    digits = demo.Digits(rng.random((7, 64)), rng.integers(10, size=7))
    g = demo.gradients(w, digits)
    for path in w.paths():
        along = w.map(np.zeros_like)
        along[path] = rng.standard_normal(w[path].shape)
        h = 1e-6
        expected = (cost(w + h * along, digits) - cost(w - h * along, digits)) / (2 * h)
        assert np.sum(g[path] * along[path]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lars", [True, False])
def test_the_trust_ratios_of_the_demo_belong_to_its_last_step(lars, monkeypatch):
    steps = []

    def spy(w, g, lr, *, decay_lambda, out, **options):
        assert out is w
        old = w.map(np.copy)
        original(w, g, lr, decay_lambda=decay_lambda, out=out, **options)
        steps.append((lr, old, w.map(np.copy), g + decay_lambda * old))
        return w

    original = Container.lars_update
    monkeypatch.setattr(Container, "lars_update", spy)
    rng = np.random.default_rng(0)
    digits = demo.Digits(rng.random((20, 64)), rng.integers(10, size=20))
    trained = demo.train(digits, digits, lars=lars, rate=0.1, seed=0, epochs=2, batch=8)
    assert len(steps) == 2 * 3
    lr, old, new, direction = steps[-1]
    assert {layer["path"] for layer in trained.layers if layer["ratio"] != 1} == (
        {f"{name}/kernel" for name in demo.SIZES} if lars else set()
    )
    for layer in trained.layers:
        path, step = layer["path"], lr * layer["ratio"] * direction[layer["path"]]
        np.testing.assert_allclose(old[path] - new[path], step, rtol=1e-9)
        assert layer["w_norm"] == pytest.approx(np.linalg.norm(old[path]), rel=1e-15)


def test_a_missing_library_is_an_error_that_says_how_to_install_it(libraries, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 2
    expected = "lars-tree demo: sklearn is not installed: pip install 'lars-tree[demo]'\n"
    assert capsys.readouterr() == ("", expected)


def test_the_command_imports_no_library_before_it_needs_it():
    code = """if 1:
        import sys, lars_tree.cli, lars_tree._commands.demo
        print({'click', 'rich', 'safetensors', 'sklearn'} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_without_click_the_error_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["demo"]) == 2
    expected = "lars-tree: click is not installed: pip install 'lars-tree[cli]'\n"
    assert capsys.readouterr() == ("", expected)


OUT_OF_RANGE = {
    "--seed": ["-1", "x", str(2**32)],
    "--epochs": ["0"],
    "--batch": ["1.5"],
    "--rate": ["0", "nan", "inf"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OUT_OF_RANGE.items() for value in values],
    ids=str,
)
def test_values_out_of_range_exit_with_2_and_one_line(name, value, libraries, capsys):
    assert main(["demo", name, value]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        rf"lars-tree demo: (Invalid value for '{name}'|lr .* expected a finite number).*\n", err
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["shw"], r"lars-tree: .*'shw'.*"),
        (["--what"], r"lars-tree: .*--what.*"),
        (["demo", "--what"], r"lars-tree demo: .*--what.*"),
        (["demo", "what"], r"lars-tree demo: .*what.*"),
        (["update", "w.npz"], r"lars-tree update: Missing argument 'GRADS'\."),
        (["show", "w.npz", "--lr", "x"], r"lars-tree show: .*'x' is not a valid float\."),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, expected, capsys):
    need("click")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(expected + "\n", err)


@pytest.mark.parametrize("module", ["lars_tree", "lars_tree.cli"])
def test_version(module):
    need("click")
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"lars-tree {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_subcommands_and_explains_completion(arguments, monkeypatch, capsys):
    need("click")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert set(re.findall(r"^  (\w+)  +[A-Z].*[A-Za-z]\.$", out, re.MULTILINE)) == {
        "demo", "diff", "show", "update"
    }  # fmt: skip
    assert "_LARS_TREE_COMPLETE=bash_source" in out
    monkeypatch.setattr(sys, "argv", ["lars-tree", *arguments])
    assert main() == 0
    assert capsys.readouterr() == (out, "")


@pytest.mark.parametrize("command", ["demo", "diff", "show", "update"])
def test_the_help_of_each_subcommand(command, capsys):
    need("click")
    assert main([command, "-h"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: lars-tree {command} [OPTIONS]")
    assert "--json " in out
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out == out


def test_completion():
    need("click")
    command = [sys.executable, "-m", "lars_tree"]

    def printed(what, **more):
        environment = os.environ | {"_LARS_TREE_COMPLETE": f"bash_{what}"} | more
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert "_LARS_TREE_COMPLETE" in printed("source")
    words = {"COMP_WORDS": "lars-tree up", "COMP_CWORD": "1"}
    assert "update" in printed("complete", **words)
    assert "show" not in printed("complete", **words)


def test_the_demo_as_json_has_the_same_numbers(libraries, capsys):
    main(["demo", "--epochs", "1"])
    text = capsys.readouterr().out
    main(["demo", "--epochs", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert f"{found['parameters']:,} weights" in text
    assert f"{found['lars']['held_out_accuracy']:.4f}\n" in text
    assert [run["rate"] for run in found["sgd"]] == [0.1, *demo.SGD_RATES]
    for layer in found["lars"]["layers"]:
        assert re.search(rf"{layer['path']} .* {layer['ratio']:.4g} ", text)
