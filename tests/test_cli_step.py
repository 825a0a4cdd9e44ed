"""Which leaves `lars-tree update` moves, keeps and refuses: gradients by name, patterns, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import need
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli_update import assert_same_bits, refused, run

from lars_tree import Container, io, lars_update, report
from lars_tree._commands import step
from lars_tree.cli import main

need("click")
need("safetensors")

FILES = ["w.safetensors", "g.safetensors"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(w, g):
    io.save(w, FILES[0])
    io.save(g, FILES[1])


def record(capsys, *arguments, status=0):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def weights():
    return Container(
        encoder={"l0": {"kernel": np.full((2, 3), 2.0), "bias": np.ones(3)}, "count": np.array(7)},
        head={"kernel": np.ones((3, 2)), "bias": np.full(2, 0.5)},
    )


def gradients():
    w = weights()
    del w["encoder/count"]
    return w.map(lambda x: np.arange(1.0, x.size + 1).reshape(x.shape))


def expected(g, **options):
    return lars_update(weights(), {"encoder": {"count": None, **g.encoder}, "head": g.head}, 0.1,
                       **options)  # fmt: skip


# ---- A state_dict with buffers


def resnet(torch):
    """A small ResNet: convolutions, batch norm, a block with a shortcut, a linear head."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.downsample(x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.layer1, self.fc = nn.Sequential(Block()), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))

    torch.manual_seed(0)
    model = ResNet()
    for _ in range(2):  # the running statistics are not those of a new model
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(6, 3, 8, 8)), torch.arange(6) % 5
        )
        loss.backward()
    return model


@pytest.mark.parametrize("flat", [False, True])
def test_a_state_dict_is_updated_with_the_gradients_of_its_parameters(flat, capsys):
    torch = need("torch")
    torch_files = need("safetensors.torch")
    model = resnet(torch)
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch_files.save_file(model.state_dict(), FILES[0])
    if flat:  # `io.save` records that the names are keys
        io.save(grads, FILES[1])
    else:
        torch_files.save_file(grads, FILES[1])
    options = ["--lr", 0.1, "--decay-lambda", 1e-2]
    adapted = [*options, "--no-adapt", "*.bias", "--no-adapt", "*bn*", "--decay-for", "*bias=0"]
    refused(["update", *FILES, *map(str, adapted), "--in-place"],
            "(--keep-missing keeps weights that have no gradient): bn1/",
            capsys)  # fmt: skip
    found = record(capsys, "update", *FILES, *adapted, "--keep-missing", "-o", "o.safetensors")
    buffers = [name for name, _ in model.named_buffers()]
    assert sorted(found["kept"]) == sorted(name.replace(".", "/") for name in buffers)
    assert len(found["moved"]) == len(grads) == found["leaves"] - len(buffers)
    new = torch_files.load_file("o.safetensors")
    model.load_state_dict(new)  # all names and shapes are there
    old = torch_files.load_file(FILES[0])
    assert {name: x.dtype for name, x in new.items()} == {name: x.dtype for name, x in old.items()}
    assert all(torch.equal(new[name], old[name]) for name in buffers)
    assert new["bn1.num_batches_tracked"] == 2
    for name, g in grads.items():
        decay = 0 if name.endswith("bias") else 1e-2
        adapt = not (name.endswith("bias") or "bn" in name)
        wanted = lars_update(old[name], g, 0.1, decay_lambda=decay, adapt=adapt)
        assert torch.equal(new[name], wanted), name


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(removed=st.sets(st.sampled_from(gradients().paths()), max_size=3))
def test_weights_without_a_gradient_are_kept(removed, capsys):
    g = gradients().map(lambda path, x: None if path in removed else x, with_path=True)
    save(weights(), Container(g).filter(lambda path, x: x is not None))
    found = record(capsys, "update", *FILES, "--lr", 0.1, "--keep-missing", "-o", "o.safetensors")
    assert_same_bits(io.load("o.safetensors"), expected(g))
    assert {tuple(path.split("/")) for path in found["kept"]} == {("encoder", "count"), *removed}
    assert {tuple(path.split("/")) for path in found["moved"]} == {*gradients().paths()} - removed


def test_keep_missing_still_refuses_unknown_names_and_no_gradient_at_all(capsys):
    arguments = ["update", *FILES, "--lr", "0.1", "--keep-missing", "--in-place"]
    save(weights(), {"encoder": {"l0": {"kernl": np.ones((2, 3))}}})
    refused(arguments, "g.safetensors does not match w.safetensors: encoder/l0/kernl: not in "
            "w.safetensors (did you mean 'encoder.l0.kernel'?)", capsys)  # fmt: skip
    save(weights(), {"encoder": {"count": None}})
    refused(arguments, "expected at least one gradient, got none", capsys)
    save(weights(), {"encoder": {"count": np.array(1.0)}})
    refused(arguments, "w.safetensors is not floating point: encoder/count: expected", capsys)


def test_a_gradient_of_none_needs_no_option(capsys):
    g = gradients()
    g["encoder", "count"] = None
    save(weights(), {**g, "head": None})
    found = record(capsys, "update", *FILES, "--lr", 0.1, "-o", "o.safetensors")
    assert found["kept"] == ["encoder/count", "head/kernel", "head/bias"]
    assert_same_bits(io.load("o.safetensors"), expected(Container(g) | {"head": None}))


# ---- What moved


def test_the_summary_counts_what_moved(capsys):
    g = gradients()
    g["head", "bias"] = np.zeros(2)
    save(weights(), g)
    arguments = ["update", *FILES, "--lr", 0.1, "--keep-missing", "-o", "o.safetensors"]
    run(*arguments[1:])
    assert capsys.readouterr().out.endswith(
        "; 3 moved, 1 unchanged by the step, 1 kept without a gradient\n"
    )
    found = record(capsys, *arguments)
    assert (found["unchanged"], found["kept"]) == (["head/bias"], ["encoder/count"])
    assert record(capsys, *arguments, "--lr-for", "*=0")["moved"] == []


def test_a_single_element_far_inside_a_leaf_counts_as_moved(capsys):
    g = np.zeros(100_000, "f4")
    g[-1] = 1
    save({"w": np.ones(100_000, "f4")}, {"w": g})
    arguments = ["update", *FILES, "--lr", 0.1, "-o", "o.safetensors"]
    assert record(capsys, *arguments)["moved"] == ["w"]


# ---- nonfinite


@pytest.fixture(params=[1, 1000])
def _groups(request, monkeypatch):
    monkeypatch.setattr(step, "_MOST_LEAVES", request.param)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_new_weights_that_are_not_finite(suffix, _groups, capsys):  # noqa: PT019
    files = [f"{name}.{suffix}" for name in "wgo"]
    g = gradients()
    g["encoder", "l0", "bias"][1] = np.nan
    g["head", "kernel"][0, 0] = np.inf
    io.save(weights(), files[0], metadata={"step": "1"})
    io.save(g, files[1])
    arguments = ["update", *files[:2], "--lr", "0.1", "--keep-missing"]
    message = f"{files[1]} would make weights that are not finite: encoder/l0/bias: expected"
    for where in (["-o", files[2]], ["--in-place"], ["--in-place", "--nonfinite", "raise"]):
        refused([*arguments, *where], message, capsys)
        refused([*arguments, *where], "; head/kernel: expected finite numbers", capsys)
    found = record(capsys, *arguments, "-o", files[2], "--nonfinite", "skip")
    assert found["skipped"] == ["encoder/l0/bias", "head/kernel"]
    assert found["moved"] == []
    assert len(found["unchanged"]) == 4
    assert_same_bits(io.load(files[2]), weights())
    assert io.metadata(files[2]) == {"step": "1"}
    run(*arguments[1:], "-o", files[2], "--nonfinite", "propagate")
    with np.errstate(all="ignore"):
        assert_same_bits(io.load(files[2]), expected(g))
    assert np.isnan(io.load(files[2])["encoder/l0/bias"]).all()


def test_groups_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    w = {str(i): rng.standard_normal(i).astype(["f2", "f4", "f8"][i % 3]) for i in range(1, 30)}
    save(w, {key: rng.standard_normal(x.shape).astype(x.dtype) for key, x in w.items()})
    expected = lars_update(w, io.load(FILES[1]).to_dict(), 0.1, decay_lambda=0.1)
    for leaves, size in [(1000, 1 << 24), (3, 1 << 24), (1000, 100)]:
        monkeypatch.setattr(step, "_MOST_LEAVES", leaves)
        monkeypatch.setattr(step, "_MOST_BYTES", size)
        for out in ("o.safetensors", "o.npz"):
            run(*FILES, "--lr", 0.1, "--decay-lambda", 0.1, "-o", out)
            assert_same_bits(io.load(out), expected)


# ---- Shapes


def test_gradients_of_another_shape_need_an_option(capsys):
    w = {"a": {"x": np.ones((2, 3)), "y": np.ones((4, 3))}, "b": np.ones((2, 2))}
    arguments = ["update", *FILES, "--lr", "0.1", "-o", "o.safetensors"]
    save(w, {"a": np.arange(1.0, 4), "b": np.ones((2, 2))})
    refused(arguments, "a: expected a gradient for each leaf below it, got an array of shape (3,) "
            "(--broadcast)", capsys)  # fmt: skip
    g = {"a": {"x": np.arange(1.0, 4), "y": np.ones((4, 3))}, "b": np.array(2.0)}
    save(w, g)
    refused(arguments, "g.safetensors has gradients of another shape than w.safetensors "
            "(--broadcast repeats gradients of a smaller shape): a/x: expected shape (2, 3), got "
            "(3,); b: expected shape (2, 2), got ()", capsys)  # fmt: skip
    run(*arguments[1:], "--broadcast")
    assert_same_bits(io.load("o.safetensors"), lars_update(w, g, 0.1))
    save(w, g | {"b": np.ones((3, 2, 2))})
    capsys.readouterr()
    refused([*arguments, "--broadcast"], "g.safetensors does not broadcast to w.saf", capsys)


def test_a_gradient_of_a_node_applies_to_all_leaves_below():
    w = {"a": {"b": np.ones(3), "c": np.full(2, 2.0)}, "d": np.ones(2)}
    g = {"a": np.array(0.5), "d": np.ones(2)}
    save(w, g)
    run(*FILES, "--lr", 0.1, "--broadcast", "-o", "o.npz")
    assert_same_bits(io.load("o.npz"), lars_update(w, g, 0.1))


# ---- Patterns


def test_patterns_select_rates_and_adaptation():
    g = gradients()
    save(weights(), g)
    more = ["--lr-for", "*=0.5", "--lr-for", "enc*=0.25", "--lr-for", "*/k?rnel=2"]
    more += ["--no-adapt", "*/bias", "--keep-missing"]
    run(*FILES, "--lr", 0.1, *more, "-o", "o.safetensors")
    rates = {"kernel": 2.0, "bias": 0.25}
    rates = {"encoder": {"l0": rates, "count": 1}, "head": {"kernel": 2.0, "bias": 0.5}}
    adapt = weights().map(lambda path, _: path[-1] == "kernel", with_path=True)
    given = {"encoder": {**g.encoder, "count": None}, "head": g.head}
    assert_same_bits(io.load("o.safetensors"), lars_update(weights(), given, rates, adapt=adapt))


SELECTED = [
    (["encoder.l0", "encoder/l0", "encoder/l0/*", "encoder.l0.*", "*l0*"], ["kernel", "bias"]),
    (["*.l0.bias", "*/l0/bias", "*.encoder.l0.bias", "*/encoder/*/bias"], ["bias"]),
    (["enc*.kernel", "enc*/kernel", "encoder.?0.kernel", "e*[0-9]/kernel"], ["kernel"]),
]


@pytest.mark.parametrize(
    ("pattern", "keys"), [(text, keys) for texts, keys in SELECTED for text in texts]
)
@pytest.mark.parametrize("flat", [False, True])
def test_patterns_are_paths_or_names(pattern, keys, flat):
    """Names that `io.save` recorded as keys are selected by the same patterns."""
    g = gradients()
    if flat:
        save(weights().to_flat("."), g.to_flat("."))
    else:
        save(weights(), g)
    arguments = ["--lr", 0.1, "--decay-lambda", 0.5, "--keep-missing", "-o", "o.safetensors"]
    run(*FILES, *arguments, "--decay-for", f"{pattern}=0.25", "--no-adapt", pattern)
    decay = weights().map(lambda _: 0.5)
    adapt = weights().map(lambda _: True)
    for key in keys:
        decay["encoder", "l0", key], adapt["encoder", "l0", key] = 0.25, False
    wanted = expected(g, decay_lambda=decay, adapt=adapt)
    assert_same_bits(io.load("o.safetensors"), wanted.to_flat(".") if flat else wanted)


def test_a_name_with_brackets_selects_itself():
    w = {"a[0]": np.ones(2), "a0": np.ones(2), "b[x]": {"c": np.ones(2)}}
    save(w, w)
    rates = ["--lr-for", "a[0]=2", "--lr-for", "b[x]=4"]
    run(*FILES, "--lr", 0, *rates, "-o", "o.safetensors")
    rates = {"a[0]": 2.0, "a0": 0.0, "b[x]": 4.0}
    assert_same_bits(io.load("o.safetensors"), lars_update(Container(w), w, rates))


def test_the_last_pattern_counts_for_decay_as_for_rates():
    save(weights(), gradients())
    more = ["--decay-for", "*=0.5", "--decay-for", "head=0", "--decay-for", "head.bias=2"]
    run(*FILES, "--lr", 0.1, "--keep-missing", "-o", "o.safetensors", *more)
    decay = {"encoder": 0.5, "head": {"kernel": 0.0, "bias": 2.0}}
    assert_same_bits(io.load("o.safetensors"), expected(gradients(), decay_lambda=decay))


def test_show_measures_the_step_that_update_takes(_groups, capsys):  # noqa: PT019
    save(weights(), gradients())
    options = ["--lr", 0.1, "--keep-missing", "--decay-for", "*.kernel=0.5", "--no-adapt", "*bias"]
    found = record(capsys, "show", FILES[0], "--grads", FILES[1], *options)["layers"]
    kernel = weights().map(lambda path, _: path[-1] == "kernel", with_path=True)
    g = {"encoder": {**gradients().encoder, "count": None}, "head": gradients().head}
    adapt = weights().map(lambda path, _: path[-1] != "bias", with_path=True)
    wanted = report.layer_table(weights(), g, 0.1, decay_lambda=0.5 * kernel, adapt=adapt)
    assert found == json.loads(json.dumps(wanted.records))
    part = record(capsys, "show", FILES[0], "head.*", "--grads", FILES[1], *options)["layers"]
    assert part == found[-2:]
    assert main(["show", FILES[0], "--grads", FILES[1], "--depth", "1", "--keep-missing"]) == 2
    assert main(["show", FILES[0], "--grads", FILES[1]]) == 2
    assert "g.safetensors does not match w.safetensors" in capsys.readouterr().err
