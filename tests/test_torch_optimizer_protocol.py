"""lars_tree.torch.Lars does what trainers and torch's own tools expect of an optimizer.

The tests make the calls of Lightning, Accelerate and timm; tests/clients trains with them.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from conftest import need

torch = need("torch")

from test_torch_optimizer import W, model, parameter, same, train  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402

# ---- Fused or not


def handles_unscaling(opt):
    """The check by which Lightning and Fabric decide to refuse gradient clipping."""
    return getattr(opt, "_step_supports_amp_scaling", False)


def copies(opt):
    return [opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]


@pytest.mark.parametrize("fused", [None, False, True])
def test_only_a_fused_optimizer_unscales_gradients_itself_as_sgd_does(fused):
    sgd = torch.optim.SGD([parameter()], fused=fused)
    for opt in copies(Lars([parameter()], fused=fused)):
        assert handles_unscaling(opt) is handles_unscaling(sgd) is bool(fused)
        assert opt.param_groups[0]["fused"] is sgd.param_groups[0]["fused"] is fused


def test_fused_and_foreach_exclude_each_other_as_in_sgd():
    for optimizer in (Lars, torch.optim.SGD):
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            optimizer([parameter()], fused=True, foreach=True)


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_calls_step_as_for_sgd(fused):
    """Accelerate skips the scheduler's step if the scaler did not call `step`."""
    called = []
    for optimizer in (Lars, torch.optim.SGD):
        p = parameter(dtype=torch.float32)
        opt = optimizer([p], 0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        opt.register_step_pre_hook(lambda opt, *_: called.append(type(opt)))
        for largest in (1.0, float("inf"), 1.0):
            before = p.detach().clone()
            scaler.scale((p * torch.tensor([largest, 1.0])).sum()).backward()
            scaler.step(opt)
            scaler.update()
            assert torch.equal(p, before) is (largest > 1)
            opt.zero_grad()
    assert called.count(Lars) == called.count(torch.optim.SGD) == (3 if fused else 2)


def test_gradients_are_clipped_before_a_step_and_divided_by_the_scale_once():
    results = []
    for scaled in (False, True):
        net = model(dtype=torch.float64)
        opt = Lars(net.parameters(), 0.5, adapt=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        scaler.scale(net(torch.ones(2, 5, dtype=torch.float64)).square().sum()).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        results.append([p.detach() for p in net.parameters()])
    assert same(*results)


def test_fused_does_not_change_steps_on_the_cpu():
    nets = [model(dtype=torch.bfloat16) for _ in range(2)]
    pair = zip(nets, (None, True), strict=True)
    assert same(*(train(net, Lars(net.parameters(), 0.5, fused=fused)) for net, fused in pair))


# ---- Rates of schedulers


@pytest.mark.parametrize(("foreach", "momentum"), [(None, 0.0), (True, 0.9)])
@pytest.mark.parametrize("make", [float, torch.tensor, np.float64])
def test_a_rate_that_is_negative_by_rounding_is_0(foreach, make, momentum):
    """The last rate of LinearLR can be negative."""
    p = parameter()
    opt = Lars([p], make(0.1), momentum, foreach=foreach)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, end_factor=0.0, total_iters=10)
    for _ in range(10):
        opt.step()
        before = p.detach().clone()
        scheduler.step()
    assert -1e-16 < float(opt.param_groups[0]["lr"]) < 0
    opt.step()
    assert torch.equal(p, before)
    # Without a scheduler, the rounding error is relative to the optimizer's own rate.
    opt = Lars([parameter()], make(30.0), momentum, foreach=foreach)
    for rate, fits in {-2e-11: True, -3.1e-11: False}.items():
        opt.param_groups[0]["lr"] = make(rate)
        if fits:
            opt.step()
            continue
        with pytest.raises(ValueError, match=r"param_groups\[0\]: Invalid lr: .* got .*-3"):
            opt.step()
    assert [p.tolist() for p in opt.param_groups[0]["params"]] == [W]


# ---- States


@pytest.mark.parametrize("optimizer", [Lars, torch.optim.SGD])
@pytest.mark.parametrize("way", ["load", "deepcopy", "pickle"])
def test_no_key_is_added_to_groups_or_defaults(optimizer, way):
    net = model()
    opt = optimizer(net.parameters(), 0.5)
    train(net, opt, 1)
    before = copy.deepcopy(opt.state_dict()["param_groups"]), dict(opt.defaults)
    if way == "load":
        opt.load_state_dict(opt.state_dict())
    else:
        opt = copies(opt)[1 if way == "deepcopy" else 2]
    assert (opt.state_dict()["param_groups"], opt.defaults) == before
    opt.add_param_group({"params": [parameter()]})
    assert opt.param_groups[0].keys() == opt.param_groups[1].keys()


def test_a_pickle_of_an_older_version_gets_new_options():
    net = model()
    opt = Lars(net.parameters(), 0.5)
    train(net, opt, 1)
    state = opt.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for name in ("nonfinite", "fused"):
            del options[name]
    del state["skipped"]
    old = Lars.__new__(Lars)
    old.__setstate__(state)
    old.step()
    assert old.skipped == 0
    assert old.defaults == Lars(net.parameters(), 0.5).defaults


def test_unknown_keys_of_a_saved_group_are_kept():
    net = model()
    opt = Lars([{"params": list(net.parameters()), "differentiable": False, "name": "all"}])
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["differentiable"] is False
    assert opt.param_groups[0]["name"] == "all"
    assert "differentiable" not in opt.defaults


def test_a_failed_step_leaves_no_empty_states():
    p, q = parameter(), parameter()
    q.grad = q.grad.to_sparse()
    opt = Lars([p, q])
    with pytest.raises(
        RuntimeError, match=r"make the gradient of param_groups\[0\]\['params'\]\[1\] dense"
    ):
        opt.step()
    assert dict(opt.state) == {}


# ---- Groups that frameworks make


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_adapt_decayed_adapts_only_groups_with_decay(engine, make):
    """As in timm, weight_decay=0 also turns adaptation off in a group."""
    options = {"lr": 0.5, "trust_coefficient": 0.1, **engine}
    results = []
    for default, others in (({"adapt": "decayed"}, {}), ({}, {"adapt": False})):
        params = [parameter() for _ in range(4)]
        groups = [
            {"params": params[:1], "weight_decay": make(0.1)},
            {"params": params[1:2], "weight_decay": make(0.0), **others},
            {"params": params[2:3], "weight_decay": make(0.0), "adapt": True},
            {"params": params[3:], "weight_decay": make(0.1), "adapt": False},
        ]
        opt = Lars(groups, **options, **default)
        opt.step()
        opt.step()
        results.append([p.detach() for p in params])
        assert len({tuple(p.tolist()) for p in params}) == 4
    assert same(*results)


def test_adapt_decayed_follows_a_change_of_decay():
    p, q = parameter(), parameter()
    opt = Lars([{"params": [p], "adapt": "decayed"}, {"params": [q]}], 0.1, weight_decay=0.1)
    opt.step()
    assert torch.equal(p, q)
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    opt.param_groups[1]["adapt"] = False
    opt.step()
    assert torch.equal(p, q)


def test_options_may_be_tensors_of_one_element(engine):
    names = ("lr", "momentum", "dampening", "weight_decay", "trust_coefficient", "eps")
    values = dict(zip(names, (0.5, 0.875, 0.25, 0.125, 0.5, 0.25), strict=True))
    results = []
    for make in (float, torch.tensor, lambda x: torch.tensor([[x]])):
        p = parameter()
        opt = Lars([p], **engine, **{name: make(x) for name, x in values.items()})
        opt.step()
        opt.step()
        results.append(p.detach())
    assert same(results[:1], results[1:2])
    assert same(results[1:2], results[2:])


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(("foreach", "momentum"), [(None, 0.9), (True, 0.9), (True, 0.0)])
def test_a_gradient_of_another_shape_is_refused(foreach, momentum, steps):
    """torch checks the shape of a gradient only when the gradient is assigned."""
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    opt = Lars([p], momentum=momentum, foreach=foreach)
    for _ in range(steps):
        opt.step()
    p.data = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"expected .*\(3, 4\).*, got .*\(4,\)"):
        opt.step()
    assert p.unique().tolist() == [1]


# ---- Tools of torch around the optimizer


def test_gradients_may_be_set_to_zero_instead_of_none():
    results = []
    for to_none in (True, False):
        net = model()
        opt = Lars(param_groups(net, weight_decay=0.1), 0.5)
        for _ in range(3):
            opt.zero_grad(set_to_none=to_none)
            net(torch.ones(2, 5)).square().sum().backward()
            opt.step()
        results.append([p.detach() for p in net.parameters()])
    assert same(*results)


def test_averages_of_weights_follow_the_steps():
    net = model(dtype=torch.float64)
    opt = Lars(net.parameters(), 0.5)
    swa, ema = (
        torch.optim.swa_utils.AveragedModel(net, **options)
        for options in ({}, {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)})
    )
    seen = []
    for _ in range(3):
        seen.append(train(net, opt, 1))
        swa.update_parameters(net)
        ema.update_parameters(net)
    assert not same(seen[0], seen[1])
    for average, factors in ((swa, (1 / 3, 1 / 3, 1 / 3)), (ema, (0.25, 0.25, 0.5))):
        for p, *xs in zip(average.module.parameters(), *seen, strict=True):
            torch.testing.assert_close(
                p.detach(), sum(f * x for f, x in zip(factors, xs, strict=True))
            )


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_plateau_reduces_the_rate_and_swa_anneals_it(make):
    net = model()
    opt = Lars(net.parameters(), make(0.5))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        train(net, opt, 1)
        plateau.step(loss)
    assert float(opt.param_groups[0]["lr"]) == 0.25
    train(net, opt, 2, torch.optim.swa_utils.SWALR(opt, 0.125, anneal_epochs=1))
    assert float(opt.param_groups[0]["lr"]) == 0.125


def test_steps_in_the_backward_pass_equal_steps_after_it():
    nets = [model() for _ in range(2)]
    after = Lars(nets[0].parameters(), 0.5)
    each = {p: Lars([p], 0.5) for p in nets[1].parameters()}

    def step(p):
        each[p].step()
        p.grad = None

    for p in each:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        after.zero_grad()
        for net in nets:
            net(torch.ones(2, 5)).square().sum().backward()
        after.step()
    assert same(*(net.parameters() for net in nets))


@pytest.mark.parametrize("flatten", [False, True])
def test_states_of_distributed_checkpoints(flatten):
    """They have names, and tensor options; torch makes the state to load by a step with lr 0."""
    tools = need("torch.distributed.checkpoint.state_dict")
    options = tools.StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = model()
    opt = Lars(param_groups(net, weight_decay=0.1), torch.tensor(0.5), torch.tensor(0.5))
    train(net, opt, 2)
    weights, state = copy.deepcopy(tools.get_state_dict(net, opt, options=options))
    other = model(1)
    again = Lars(param_groups(other), torch.tensor(0.1), torch.tensor(0.9))
    tools.set_state_dict(
        other, again, model_state_dict=weights, optim_state_dict=state, options=options
    )
    assert again.param_groups[0]["momentum"] == 0.5
    assert same(train(net, opt, 2), train(other, again, 2))
