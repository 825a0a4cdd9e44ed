"""lars_tree.torch.Lars with the fused engine: which engine is used, launches, tables."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections import Counter

import pytest
from conftest import need, need_triton

torch = need("torch")
need_triton()

from test_fused import DEVICE  # noqa: E402
from test_torch_optimizer import same  # noqa: E402

from lars_tree._backends.torch import fused, kernels, transfers  # noqa: E402
from lars_tree.torch import Lars  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")

CPU_ONLY = pytest.mark.skipif(DEVICE.type != "cpu", reason="about Triton's interpreter")


def parameters(count=3, dtype=torch.float32, size=5):
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(count):
        w, g = (torch.randn(size, generator=generator).to(DEVICE, dtype) for _ in range(2))
        params.append(torch.nn.Parameter(w))
        params[-1].grad = g
    return params


def lars(params, **options):
    return Lars(params, **{"lr": 0.5, "trust_coefficient": 0.1, "fused": True, **options})


def values(params, opt=None):
    found = [p.detach().clone() for p in params]
    states = [] if opt is None else [opt.state[p]["momentum_buffer"].clone() for p in params]
    return found + states


# ---- Which engine


@CPU_ONLY
def test_the_variable_is_read_at_each_step(monkeypatch):
    params = parameters()
    opt = lars(params)
    assert opt.engine == "fused"
    assert lars(params, fused=None).engine == "native"
    assert lars([*params, torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]).engine == (
        "fused"
    )
    results = []
    for value in ("1", "0", None):
        monkeypatch.delenv("TRITON_INTERPRET")
        if value:
            monkeypatch.setenv("TRITON_INTERPRET", value)
        params = parameters()
        opt = lars(params)
        assert opt.engine == ("fused" if value == "1" else "native")
        opt.step()
        results.append(values(params, opt))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert same(results[0], results[1])
    assert same(results[1], results[2])


@CPU_ONLY
def test_the_variable_has_no_effect_if_triton_was_imported_without_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code = """if 1:
        import os, torch, triton.language
        os.environ["TRITON_INTERPRET"] = "1"
        from lars_tree.torch import Lars
        p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        p.grad = torch.tensor([0.0, 10.0])
        opt = Lars([p], 0.1, trust_coefficient=1.0, fused=True)
        opt.step()
        print(opt.engine, p.tolist())"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("native [3.0, 3.5]\n", "")


# ---- Launches and tables


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, name, counts):
        self.name, self.counts, self.kernel = name, counts, getattr(kernels, name)

    def __getitem__(self, grid):
        self.counts[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    assert lars(parameters()).engine == "fused"  # the first use of a GPU launches the kernels
    counts = Counter()
    for name in ("sum_squares", "add_sums", "find_coefficients", "apply"):
        monkeypatch.setattr(kernels, name, Counted(name, counts))
    return counts


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_step_has_two_launches_over_the_data_for_any_number_of_tensors(count, launches):
    params = parameters(count)
    groups = [{"params": params[:1]}, {"params": params[1:], "adapt": False}][: min(count, 2)]
    opt = lars(groups, weight_decay=0.1)
    for _ in range(2):
        launches.clear()
        opt.step()
        once = dict.fromkeys(("sum_squares", "add_sums", "find_coefficients", "apply"), 1)
        assert launches == once


def test_each_combination_of_formats_has_its_own_launches(launches):
    params = parameters(2) + parameters(3, torch.bfloat16) + parameters(2, torch.float64)
    lars(params).step()
    assert launches == {"sum_squares": 3, "add_sums": 1, "find_coefficients": 1, "apply": 3}


def test_layers_that_do_not_adapt_are_not_read_for_their_norms(launches):
    lars(parameters(), adapt=False).step()
    assert launches["sum_squares"] == 0
    assert launches["apply"] == 1


@pytest.fixture
def tables(monkeypatch):
    """Counts the tables that are sent to the device."""
    counts = Counter()
    monkeypatch.setattr(fused, "_TABLES", {})
    monkeypatch.setattr(fused, "_NUMBERS", {})
    original = fused.sent

    def counted(host, device):
        counts["layers" if host.dtype == torch.int64 else "rules"] += 1
        return original(host, device)

    monkeypatch.setattr(fused, "sent", counted)
    return counts


def test_tables_are_reused_until_an_address_changes(tables):
    params = parameters()
    opt = lars(params)
    for _ in range(3):
        opt.step()
    assert tables == {"layers": 1, "rules": 1}
    opt.param_groups[0]["lr"] = 0.25
    opt.step()
    assert tables == {"layers": 1, "rules": 2}
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert tables == {"layers": 1, "rules": 2}
    old = params[1].grad
    params[1].grad = old.clone()
    opt.step()
    assert tables == {"layers": 2, "rules": 2}
    params[1].grad = old
    opt.step()
    assert tables == {"layers": 2, "rules": 2}


def test_a_new_rate_or_flag_or_gradient_acts_at_once():
    """The same changes give the same steps as in new optimizers and in the native engine."""

    def changes(opt, params):
        yield
        yield
        yield opt.param_groups[0].update(lr=0.25, weight_decay=0.5)
        yield opt.param_groups[0].update(joint_norm=True)
        yield opt.param_groups[0].update(nesterov=True, maximize=True)
        yield opt.param_groups[0].update(adapt=False)
        params[0].grad = params[0].grad * 2
        yield
        params[1].grad.neg_()
        yield
        params[2].grad = None
        yield

    results = []
    for engine in ("fused", "native"):
        params = parameters()
        if engine == "native":
            params = [torch.nn.Parameter(p.detach().cpu()) for p in params]
            for p, q in zip(params, parameters(), strict=True):
                p.grad = q.grad.cpu()
        opt = lars(params, fused=engine == "fused" or None)
        assert opt.engine == engine
        found = []
        for _ in changes(opt, params):
            opt.step()
            found.append([x.cpu() for x in values(params, opt)])
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        assert same(ours, theirs)
    assert len({tuple(x[0].tolist()) for x in results[0]}) == len(results[0])


def test_only_a_few_tables_are_kept(tables):
    every = [parameters(1) for _ in range(transfers.MAX_KEPT + 2)]
    for i, params in enumerate(every):
        lars(params, lr=0.1 * (i + 1), momentum=0.0).step()
    assert tables == {"layers": len(every), "rules": len(every)}
    assert len(fused._TABLES) == len(fused._NUMBERS) == transfers.MAX_KEPT


# ---- Steps


def test_repeated_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        params = parameters(4, size=37)
        opt = lars(params, weight_decay=0.01, nesterov=True)
        opt.step()
        opt.step()
        results.append(values(params, opt))
    assert same(*results)


def test_version_counters_are_incremented():
    params = parameters()
    opt = lars(params)
    opt.step()
    tensors = [*params, *(opt.state[p]["momentum_buffer"] for p in params)]
    before = [x._version for x in tensors]
    gradients = [p.grad._version for p in params]
    opt.step()
    assert all(x._version > version for x, version in zip(tensors, before, strict=True))
    assert [p.grad._version for p in params] == gradients
    loss = (params[0] ** 2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_keeps_no_tensors_alive():
    [p] = parameters(1)
    opt = lars([p])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        gradient = weakref.ref(p.grad)
        opt.step()
        opt.zero_grad()
        assert gradient() is None
    buffer = weakref.ref(opt.state[p]["momentum_buffer"])
    opt.state.clear()
    assert buffer() is None


@CPU_ONLY
@pytest.mark.parametrize("shared", ["parameter", "buffer"])
def test_gradients_may_share_memory_with_what_is_written(shared):
    """Such gradients are copied, by each step."""
    results = []
    for options in ({"fused": None}, {}):
        params = parameters(2)
        opt = lars(params, **options)
        for step in range(4):
            if step == 1:
                buffer = opt.state[params[0]]["momentum_buffer"]
                params[1].grad = buffer if shared == "buffer" else params[0].data
            opt.step()
        results.append(values(params, opt))
    assert same(*results)


def test_a_repeated_step_increments_the_versions_of_new_parameters():
    """They may be at the same address as the parameters of the step before."""
    [p] = parameters(1)
    opt = lars([p])
    for _ in range(2):
        opt.step()
    new = opt.param_groups[0]["params"][0] = torch.nn.Parameter(p.data)
    new.grad, opt.state[new] = p.grad, opt.state.pop(p)
    before = new._version
    opt.step()
    assert new._version == before + 1


@pytest.mark.parametrize("make", [torch.tensor, lambda x: torch.tensor(x, device=DEVICE)])
def test_options_may_be_tensors_of_one_element(make):
    names = {"lr": 0.5, "momentum": 0.875, "weight_decay": 0.125, "eps": 0.25}
    results = []
    for convert in (float, make):
        params = parameters()
        opt = lars(params, **{name: convert(x) for name, x in names.items()})
        opt.step()
        opt.param_groups[0]["lr"] = convert(0.25)
        opt.step()
        results.append(values(params, opt))
    assert same(*results)


def test_groups_of_all_engines_step_together(launches):
    params, alone = parameters(3), parameters(3)
    groups = [{"params": [params[0]]}, {"params": [params[1]], "fused": None, "foreach": True}]
    groups.append({"params": [params[2]], "fused": False})
    opt = lars(groups, weight_decay=0.1)
    native = {"native"} if DEVICE.type == "cpu" else set()
    assert set(opt.engine.split(", ")) == {"foreach", "fused", *native}
    other = lars(alone, weight_decay=0.1, fused=None)
    launches.clear()
    for each in (opt, other):
        each.step()
        each.step()
    for a, b in zip(values(params, opt), values(alone, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert launches["apply"] == 2 or not native
