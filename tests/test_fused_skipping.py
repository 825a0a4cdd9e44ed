"""lars_tree.torch.Lars with the fused engine: loss scales, and steps that are not applied."""

from __future__ import annotations

import pytest
from conftest import need, need_triton

from lars_tree import NonFiniteError

torch = need("torch")
need_triton()

from test_fused import DEVICE  # noqa: E402
from test_fused_optimizer import lars, parameters, values  # noqa: E402
from test_torch_optimizer import same  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_with_found_inf_keeps_the_old_values(steps):
    params = parameters()
    opt = lars(params)
    for _ in range(steps):
        opt.step()
    before = values(params)
    opt.found_inf = torch.tensor(1.0, device=DEVICE)
    opt.grad_scale = torch.tensor(4.0, device=DEVICE)
    params[1].grad[2] = torch.inf
    opt.step()
    assert same(values(params), before)
    params[1].grad[2] = 1
    opt.found_inf.zero_()
    opt.step()
    assert not any(map(torch.equal, values(params), before))
    assert opt.skipped == 0


def test_the_loss_scale_is_divided_out_on_the_device():
    results = []
    for scale in (None, 2.0**10):
        params = parameters()
        opt = lars(params, eps=0.1, weight_decay=0.1)
        if scale:
            opt.grad_scale = torch.tensor(scale, device=DEVICE)
            opt.found_inf = torch.tensor(0.0, device=DEVICE)
            for p in params:
                p.grad *= scale
        opt.step()
        results.append(values(params, opt))
    assert same(*results)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_grad_scaler_skips_steps_with_infinite_gradients(nonfinite):
    params = parameters()
    opt = lars(params, nonfinite=nonfinite)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    taken = []
    for largest in (1.0, torch.inf, 1.0):
        before = values(params)
        opt.zero_grad()
        scaler.scale(sum((p * largest).sum() for p in params)).backward()
        scaler.step(opt)
        scaler.update()
        taken.append(not same(values(params), before))
    assert taken == [True, False, True]
    assert scaler.get_scale() == 2.0
    assert opt.skipped == 0  # the scaler skipped the step, not the optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_step_that_is_not_finite_is_skipped_and_counted(dtype):
    params = parameters(dtype=dtype)
    opt = lars(params, nonfinite="skip")
    opt.step()
    assert opt.skipped == 0
    before = values(params, opt)
    params[1].grad[-1] = torch.nan
    opt.step()
    opt.step()
    assert same(values(params, opt), before)
    assert opt.skipped == 2
    params[1].grad[-1] = 1
    opt.step()
    assert opt.skipped == 2
    assert not any(map(torch.equal, values(params, opt), before))


def test_all_groups_skip_if_one_asks_for_it():
    for spoiled, skips in ((0, True), (2, False)):
        params = parameters()
        groups = [{"params": params[:2], "nonfinite": "skip"}, {"params": params[2:]}]
        opt = lars(groups)
        before = values(params)
        params[spoiled].grad[0] = torch.inf
        opt.step()
        assert same(values(params), before) is skips
        assert opt.skipped == skips


@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_that_is_not_finite_is_refused(steps):
    params = parameters()
    opt = lars(params, nonfinite="raise")
    for _ in range(steps):
        opt.step()
    before = values(params)
    params[1].grad[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"\n  param_groups\[0\]\['params'\]\[1\]: expected"):
        opt.step()
    assert same(values(params), before)
    assert bool(opt.state) is bool(steps)
    assert opt.skipped == 0


def test_each_tensor_goes_to_the_fastest_engine_that_supports_it():
    """One odd gradient does not keep other tensors from the kernels; all skip together."""
    results = []
    for options in ({"fused": True}, {"fused": None}):
        params = parameters(2)
        odd = torch.nn.Parameter(torch.arange(1.0, 7, device=DEVICE).view(2, 3))
        odd.grad = torch.arange(1.0, 7, device=DEVICE).view(3, 2).t()
        params.append(odd)
        opt = lars(params, nonfinite="skip", weight_decay=0.1, **options)
        opt.step()
        opt.step()
        assert opt.skipped == 0
        before = values(params, opt)
        for i in (0, 2):
            old = params[i].grad.clone()
            params[i].grad[0] = torch.nan
            opt.step()
            assert same(values(params, opt), before)
            params[i].grad.copy_(old)
        assert opt.skipped == 2
        opt.step()
        assert not any(map(torch.equal, values(params, opt), before))
        results.append(values(params, opt))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
