"""lars_tree.torch.Lars with torch's saved states, schedulers, GradScaler and compilation."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
from conftest import need

import lars_tree

torch = need("torch")

from test_torch_optimizer import G, W, model, parameter, same, train  # noqa: E402

from lars_tree._backends.torch.traced import _WholeNorms  # noqa: E402
from lars_tree._numerics.formula import SCALES  # noqa: E402
from lars_tree.torch import Lars, param_groups  # noqa: E402

# ---- State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["state_dict", "saved", "deepcopy", "pickle"])
def test_training_goes_on_from_a_saved_state(way, dtype):
    net = model(dtype=dtype)
    opt = Lars(param_groups(net, weight_decay=0.01), 0.5)
    train(net, opt, 2)
    other = copy.deepcopy(net)
    if way == "deepcopy":
        other, again = copy.deepcopy((net, opt))
    elif way == "pickle":
        other, again = pickle.loads(pickle.dumps((net, opt)))
    else:
        again = Lars(param_groups(other), 0.1)
        state = opt.state_dict()
        if way == "saved":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again.load_state_dict(state)
    buffers = [opt.state[p]["momentum_buffer"] for p in net.parameters()]
    loaded = [again.state[p]["momentum_buffer"] for p in other.parameters()]
    assert {x.dtype for x in loaded} == {torch.float32}
    assert same(loaded, buffers)
    assert same(train(net, opt, 2), train(other, again, 2))
    # A shared buffer would have been updated twice.
    assert same([again.state[p]["momentum_buffer"] for p in other.parameters()], buffers)


def test_pre_hooks_may_change_what_is_loaded():
    net = model(dtype=torch.bfloat16)
    opt = Lars(net.parameters(), 0.5)
    train(net, opt, 1)

    def doubled(_, state):
        state = copy.deepcopy(state)
        for each in state["state"].values():
            each["momentum_buffer"] *= 2
        return state

    again = Lars(net.parameters(), 0.5)
    again.register_load_state_dict_pre_hook(doubled)
    again.load_state_dict(opt.state_dict())
    for p in net.parameters():
        assert torch.equal(again.state[p]["momentum_buffer"], 2 * opt.state[p]["momentum_buffer"])


def test_post_hooks_may_change_what_was_loaded():
    net = model(dtype=torch.bfloat16)
    opt = Lars(net.parameters(), 0.5)
    train(net, opt, 1)

    def cleared(optimizer):
        for each in optimizer.state.values():
            assert each["momentum_buffer"].dtype == torch.float32
            each["momentum_buffer"].zero_()
        optimizer.param_groups[0]["lr"] = 0.25

    again = Lars(net.parameters(), 0.5)
    again.register_load_state_dict_post_hook(cleared)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["lr"] == 0.25
    assert not any(x["momentum_buffer"].any() for x in again.state.values())
    assert all(x["momentum_buffer"].any() for x in opt.state.values())


def test_a_state_of_sgd_can_be_loaded():
    net = model(dtype=torch.bfloat16)
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, sgd, 2)
    opt = Lars(net.parameters(), 0.5, trust_coefficient=0.02)
    opt.load_state_dict(sgd.state_dict())
    assert opt.param_groups[0]["trust_coefficient"] == 0.02
    assert opt.param_groups[0]["lr"] == 0.1
    opt.step()
    assert all(x["momentum_buffer"].dtype == torch.float32 for x in opt.state.values())


def test_options_that_a_loaded_state_lacks_keep_their_values():
    net = model()
    sgd = torch.optim.SGD(param_groups(net), 0.1, momentum=0.9)
    sgd_groups = [{"params": group["params"]} for group in sgd.param_groups]
    sgd = torch.optim.SGD(sgd_groups, 0.1, momentum=0.9)
    opt = Lars(param_groups(net, weight_decay=0.2), 0.5, trust_coefficient=0.02)
    opt.param_groups[0]["trust_coefficient"] = 0.03
    opt.load_state_dict(sgd.state_dict())
    adapted, others = opt.param_groups
    assert (adapted["adapt"], others["adapt"]) == (True, False)
    assert (adapted["trust_coefficient"], others["trust_coefficient"]) == (0.03, 0.02)
    assert (adapted["lr"], adapted["weight_decay"]) == (0.1, 0.0)


def fused(opt):
    """Make the step unscale gradients as with fused=True, which torch forbids with foreach=True."""
    opt._step_supports_amp_scaling = True
    return opt


FUSED = pytest.mark.parametrize("prepare", [fused, lambda opt: opt], ids=["fused", "not fused"])


@FUSED
def test_the_first_step_taken_is_not_dampened(engine, prepare):
    """The first step that is taken may come after steps that were skipped or raised."""
    p = parameter()
    opt = prepare(Lars([p], 0.1, dampening=0.5, adapt=False, **engine))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    p.grad = torch.tensor([torch.inf, 0.0], dtype=torch.float64)
    scaler.step(opt)
    assert not opt.state[p]
    p.grad = torch.ones(2, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert not opt.state[p]
    p.grad = torch.tensor(G, dtype=torch.float64)
    opt.param_groups[0]["weight_decay"] = float("nan")
    with pytest.raises(ValueError, match=r"Invalid weight_decay: .* got nan"):
        opt.step()
    assert not opt.state[p]
    opt.param_groups[0]["weight_decay"] = 0.0
    opt.step()
    assert p.tolist() == pytest.approx([3 - 0.04, 4 - 0.03])


def test_parameters_can_be_added():
    p, q = parameter(), parameter()
    opt = Lars([p], 0.5, trust_coefficient=0.1)
    opt.step()
    opt.add_param_group({"params": [q], "lr": 0.25})
    opt.step()
    assert opt.param_groups[1]["trust_coefficient"] == 0.1
    assert q.tolist() == pytest.approx([3 - 0.25 * 0.4, 4 - 0.25 * 0.3])


# ---- Schedulers, GradScaler, compilation


@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_of_torch(tensor):
    net = model()
    lr = torch.tensor(0.5) if tensor else 0.5
    opt = Lars(net.parameters(), lr)
    schedule = lars_tree.schedules.Polynomial(1.0, 4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    rates = []
    opt.register_step_pre_hook(lambda o, *_: rates.append(float(o.param_groups[0]["lr"])))
    train(net, opt, 4, scheduler)
    assert rates == pytest.approx([0.5 * schedule(i) for i in range(4)])


def test_options_may_be_numbers_of_numpy(engine):
    p, q = parameter(), parameter()
    scheduled = Lars([p], 0.1, **engine)
    scheduled.param_groups[0].update(lr=np.float32(0.25), weight_decay=np.float64(0.5))
    scheduled.param_groups[0].update(momentum=np.array(0.9))
    scheduled.step()
    Lars([q], 0.25, weight_decay=0.5).step()
    assert p.tolist() == pytest.approx(q.tolist(), rel=1e-12)


@pytest.mark.parametrize("make", [np.int64, torch.tensor])
def test_an_axis_may_be_any_index(engine, make):
    results = []
    for axis in (-1, make(-1)):
        p = parameter([W, W], [G, W])
        Lars([p], 0.25, layer_axis=axis, **engine).step()
        results.append(p)
    assert same(results[:1], results[1:])


@FUSED
@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler_scales_are_divided_out_exactly(engine, prepare, unscales):
    """Scales are powers of two, so the steps have the same bits as without a scaler."""
    results = []
    for scaled in (False, True):
        net = model(dtype=torch.float64)
        opt = prepare(Lars(param_groups(net, weight_decay=0.01), 0.5, eps=1e-3, **engine))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2, enabled=scaled)
        for i in range(4):
            opt.zero_grad()
            loss = net(torch.full((2, 5), 0.1 * (i + 1), dtype=torch.float64)).square().sum()
            scaler.scale(loss).backward()
            if unscales:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append([p.detach() for p in net.parameters()])
    assert same(*results)


@FUSED
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_grad_scaler_skips_steps_with_infinite_gradients(engine, prepare, nonfinite):
    net = model()
    opt = prepare(Lars(net.parameters(), 0.5, nonfinite=nonfinite, **engine))
    train(net, opt, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    buffers = [opt.state[p]["momentum_buffer"] for p in net.parameters()]
    before = [x.detach().clone() for x in (*net.parameters(), *buffers)]
    opt.zero_grad()
    scaler.scale(net(torch.full((2, 5), 1e30)).square().sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert same([*(p.detach() for p in net.parameters()), *buffers], before)
    assert scaler.get_scale() == 2.0
    assert not hasattr(opt, "found_inf")
    assert opt.skipped == 0  # the scaler skipped the step, not the optimizer


def test_compiled_steps_are_whole_graphs_that_read_no_values():
    """With fullgraph=True, a step that reads the value of a tensor would raise."""
    results = []
    for compiled in (False, True):
        net = model()
        opt = Lars(
            param_groups(net, weight_decay=0.01), torch.tensor(0.5), nesterov=True, foreach=True
        )
        train(net, opt, 1)
        step = (
            torch.compile(opt.step, backend="aot_eager", fullgraph=True) if compiled else opt.step
        )
        for i in range(3):
            opt.param_groups[0]["lr"].fill_(0.1 * (i + 1))
            step()
        results.append([p.detach() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_compiled_steps_agree_for_every_kind_of_parameter():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        groups = [
            {"params": [torch.nn.Parameter(torch.randn(shape, dtype=dtype))], **options}
            for shape, dtype, options in (
                ((3, 4), torch.float64, {"layer_axis": -1, "weight_decay": 0.1, "nesterov": True}),
                ((3, 4), torch.float64, {"joint_norm": True, "weight_decay": 0.1, "layer_axis": 0}),
                ((5,), torch.complex128, {"trust_clip": True, "maximize": True, "momentum": 0.0}),
                ((0, 2), torch.float64, {"weight_decay": 0.1}),
                ((), torch.float64, {"adapt": False}),
            )
        ]
        params = [p for group in groups for p in group["params"]]
        opt = Lars(groups, 0.1, trust_coefficient=1.0, fused=True)
        step = torch.compile(opt.step, backend="eager", fullgraph=True) if compiled else opt.step
        for infinite in (False, False, True):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(float(infinite))
            before = [p.detach().clone() for p in params]
            step()
            is_kept = [torch.equal(p, x) for p, x in zip(params, before, strict=True)]
            assert is_kept == [infinite or not p.numel() for p in params]
        buffers = [x["momentum_buffer"] for x in opt.state.values() if x]
        results.append([x.detach() for x in params + buffers])
    assert len(results[0]) == len(results[1]) == 9
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm", [0.0, 1e-45, 1e-30, 1.0, 3e38, 1e42])
def test_norms_of_shards_fit_float32(norm):
    """Accelerators compute in float32; a norm over all shards may be out of its range."""
    row = (norm * torch.tensor(SCALES, dtype=torch.float64)).square()
    sums = torch.stack([row, row])[None]
    w = torch.ones(2, 3)
    for scaled, scale in _WholeNorms(sums).norms(w, w, None):
        assert {scaled.dtype, scale.dtype} == {torch.float32}
        assert torch.isfinite(scaled)
        assert 0 < scale < torch.inf
        assert float(scaled) * float(scale) == pytest.approx(norm, rel=1e-6)


def test_a_step_that_reads_values_is_not_compiled():
    p = parameter(dtype=torch.float32)
    opt = Lars([p], 0.5, nonfinite="skip")
    step = torch.compile(opt.step, backend="eager")
    step()
    assert p.tolist() != W
    before = p.detach().clone()
    p.grad[0] = torch.nan
    step()
    assert torch.equal(p, before)
    assert opt.skipped == 1


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cuda_agrees_with_the_cpu_and_never_waits(dtype):
    results = []
    for device in ("cpu", "cuda"):
        net = model(dtype=dtype).to(device)
        opt = Lars(param_groups(net, weight_decay=0.01), 0.5, nesterov=True)
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
        opt.step()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().cpu().double() for p in net.parameters()])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}.get(dtype, 1e-13)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@CUDA
def test_a_cuda_graph_replays_steps():
    p = torch.nn.Parameter(torch.tensor(W, device="cuda"))
    q = torch.nn.Parameter(torch.tensor(W, device="cuda"))
    p.grad, q.grad = (torch.tensor([0.4, 0.3], device="cuda") for _ in range(2))
    opts = [Lars([x], torch.tensor(0.5, device="cuda")) for x in (p, q)]
    for opt in opts:
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opts[0].step()
    for _ in range(3):
        graph.replay()
        opts[1].step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


@CUDA
@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_compiled_cuda_steps_agree(rate):
    nets = [model().to("cuda") for _ in range(2)]
    opts = [Lars(net.parameters(), rate, momentum=0.9) for net in nets]
    for params in zip(*(net.parameters() for net in nets), strict=True):
        g = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(0)).to("cuda")
        for p in params:
            p.grad = g.clone()
    step = torch.compile(opts[0].step)
    for _ in range(3):
        step()
        opts[1].step()
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
