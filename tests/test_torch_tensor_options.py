"""Numbers of lars_tree.torch.Lars that are tensors: eager, compiled, saved and refused."""

from __future__ import annotations

import copy
import io

import pytest
from conftest import need

torch = need("torch")

from test_torch_optimizer import W, model, parameter, same, train  # noqa: E402

from lars_tree.torch import Lars, options  # noqa: E402

NUMBERS = {
    "lr": 0.5,
    "momentum": 0.875,
    "dampening": 0.25,
    "weight_decay": 0.125,
    "trust_coefficient": 0.5,
    "eps": 0.25,
}


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def set_number(group, name, value):
    """Change a number as torch's schedulers change a rate."""
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    "kind", [{}, {"nesterov": True}, {"joint_norm": True}, {"trust_clip": True}]
)
@pytest.mark.parametrize("make", [torch.tensor, lambda x: torch.tensor([[x]])])
def test_new_values_of_tensors_are_used_without_compiling_again(make, kind):
    results = []
    for compiled in (False, True):
        p = parameter()
        numbers = NUMBERS | ({"dampening": 0.0} if "nesterov" in kind else {})
        opt = Lars([p], **{name: make(x) for name, x in numbers.items()}, **kind)
        compiling = {"backend": "eager", "fullgraph": True, "dynamic": False}
        step = torch.compile(opt.step, **compiling) if compiled else opt.step
        for i in range(8):
            for name, x in numbers.items():
                set_number(opt.param_groups[0], name, x * (1 - i / 16))
            step()
        results.append([p.detach(), opt.state[p]["momentum_buffer"]])
    assert graphs() == 2  # the first makes the buffers
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def one_cycle(keep):
    """Take 8 compiled steps. `keep`: keep the momentum a tensor, as in docs/recipes.md."""
    p = parameter(dtype=torch.float32)
    momentum = torch.tensor(0.95)
    opt = Lars([p], torch.tensor(0.1), momentum, trust_coefficient=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=20)
    step = torch.compile(opt.step, backend="eager", dynamic=False)
    momenta = []
    for _ in range(8):
        for group in opt.param_groups if keep else ():
            group["momentum"] = momentum.fill_(group["momentum"])
        step()
        scheduler.step()
        momenta.append(float(opt.param_groups[0]["momentum"]))
    assert len(set(momenta)) > 4
    return p.detach()


def test_one_cycle_with_a_tensor_as_momentum_does_not_compile_again():
    kept = one_cycle(keep=True)
    assert graphs() == 2
    torch._dynamo.reset()
    other = one_cycle(keep=False)
    assert graphs() == 2 + 8
    torch.testing.assert_close(kept, other, rtol=1e-6, atol=0)


def test_one_cycle_with_floats_compiles_once_more_by_default():
    p = parameter()
    opt = Lars([p], 0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=20)
    opt.step()
    step = torch.compile(opt.step, backend="eager")
    for _ in range(8):
        step()
        scheduler.step()
    assert graphs() == 2


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_tensor_of_0_is_a_momentum_of_0_with_a_buffer(engine, dampening):
    p, q = parameter(), parameter()
    opt = Lars([p], 0.5, torch.tensor(0.0), dampening, trust_coefficient=0.5, **engine)
    plain = Lars([q], 0.5, 0.0, trust_coefficient=0.5, **engine)
    for first in (True, False):
        plain.param_groups[0]["lr"] = 0.5 * (1.0 if first else 1 - dampening)
        opt.step()
        plain.step()
        torch.testing.assert_close(p, q, rtol=1e-13, atol=0)
    assert opt.state[p]["momentum_buffer"].any()
    assert not plain.state[q]


def test_a_tensor_as_momentum_is_saved_and_loaded(engine):
    net = model(dtype=torch.float64)
    opt = Lars(net.parameters(), torch.tensor(0.5), torch.tensor(0.75), **engine)
    train(net, opt, 2)
    opt.param_groups[0]["momentum"].fill_(0.5)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = copy.deepcopy(net)
    again = Lars(other.parameters(), **engine)
    again.load_state_dict(state)
    momentum = again.param_groups[0]["momentum"]
    assert momentum.item() == 0.5
    assert same(train(net, opt, 2), train(other, again, 2))
    state["param_groups"][0]["momentum"].fill_(0.25)
    assert momentum.item() == 0.5  # not shared with the state


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tensor_of_another_shape_is_refused(name, compiled):
    p = parameter()
    opt = Lars([p])
    step = torch.compile(opt.step, backend="eager") if compiled else opt.step
    step()
    before = p.detach().clone()
    opt.param_groups[0][name] = torch.tensor([0.5, 0.5])
    says = rf"param_groups\[0\]: Tensor {name} must be 1-element, got shape \(2,\)"
    with pytest.raises(ValueError, match=says):
        step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_tensor_with_an_invalid_value_is_refused(name, value):
    says = f"Invalid {name}: expected a finite number >= 0, got tensor"
    with pytest.raises(ValueError, match=says):
        Lars([parameter()], **{name: torch.tensor(value)})
    p = parameter()
    opt = Lars([p], **{name: torch.tensor(NUMBERS[name])})
    opt.param_groups[0][name].fill_(value)
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: {says}"):
        opt.step()
    assert p.tolist() == W


def test_numbers_on_a_device_are_not_read():
    """Reading the value of a fake tensor raises an error; of a GPU's, it would wait."""
    fake_tensor = need("torch._subclasses.fake_tensor")
    with fake_tensor.FakeTensorMode():
        numbers = {name: torch.empty((1,), device="cuda") for name in NUMBERS}
        for nesterov in (False, True):
            group = Lars([parameter()], nesterov=nesterov).param_groups[0] | numbers
            options.check(group, waits=False)
            rule = options.rule(group, None, is_first=False)
            assert {rule.momentum.shape, rule.dampening.shape} == {()}
            assert options.rule(group, None, is_first=True).dampening == 0


def test_a_choice_by_a_tensor_is_not_compiled():
    """adapt="decayed" depends on the value of the decay."""
    results = []
    for compiled in (False, True):
        p = parameter()
        opt = Lars([p], 0.5, weight_decay=torch.tensor(0.0), adapt="decayed")
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for decay in (0.0, 0.125):
            opt.param_groups[0]["weight_decay"].fill_(decay)
            step()
        results.append(p.detach())
    assert torch.equal(*results)
