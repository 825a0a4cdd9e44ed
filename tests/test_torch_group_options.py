"""Options of lars_tree.torch.param_groups by name, and the rate of excluded parameters."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need

from lars_tree import LarsTreeError, StructureError

torch = need("torch")

from test_torch_groups import module  # noqa: E402
from test_torch_optimizer import model, train  # noqa: E402
from torch import nn  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402


def test_the_rate_of_excluded_parameters_makes_the_trust_coefficient_irrelevant():
    """LARS with coefficients of 1 and 1/1024 takes the same steps, bit for bit."""

    def trained(trust_coefficient, lr):
        net = model()
        groups = param_groups(net, weight_decay=0.1, excluded_lr=lr * trust_coefficient)
        train(net, Lars(groups, lr, trust_coefficient=trust_coefficient, eps=0.0))
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(trained(1.0, 2**-6), trained(2**-10, 2**4))
    assert not torch.equal(trained(1.0, 2**-6), trained(2**-10, 2**3))


@pytest.mark.parametrize("optimizer", [Lars, torch.optim.SGD, torch.optim.Adam])
def test_schedulers_keep_the_ratio_of_both_rates(optimizer):
    def made():
        opt = optimizer(param_groups(model(), excluded_lr=0.5), lr=2.0)
        assert [g["lr"] for g in opt.param_groups] == [2.0, 0.5]
        return opt

    def rates(opt, schedule):
        found = []
        for _ in range(4):
            opt.step()
            schedule.step()
            found.append(tuple(g["lr"] for g in opt.param_groups))
        return found

    schedulers = torch.optim.lr_scheduler
    for scheduler in (
        lambda opt: schedulers.LambdaLR(opt, lambda step: (step + 1) / 5),
        lambda opt: schedulers.StepLR(opt, 2),
        lambda opt: schedulers.LinearLR(opt, total_iters=3),
        lambda opt: schedulers.CosineAnnealingLR(opt, 5),
        lambda opt: schedulers.OneCycleLR(
            opt, [g["lr"] for g in opt.param_groups], total_steps=6, cycle_momentum=False
        ),
    ):
        opt = made()
        found = rates(opt, scheduler(opt))
        assert len({rate for rate, _ in found}) > 1
        assert all(excluded == pytest.approx(rate / 4) for rate, excluded in found)


def test_the_rate_of_excluded_parameters_is_saved_and_checked():
    opt = Lars(param_groups(model(), excluded_lr=0.5), lr=2.0)
    again = Lars(param_groups(model()), lr=1.0)
    again.load_state_dict(opt.state_dict())
    assert [g["lr"] for g in again.param_groups] == [2.0, 0.5]
    with pytest.raises(ValueError, match=r"param_groups\[1\]: Invalid lr"):
        Lars(param_groups(model(), excluded_lr=-1.0))
    (only,) = param_groups(model(), exclude=lambda name, p: False, lr=2.0, excluded_lr=0.5)
    assert only["lr"] == 2.0


def values(net, option, **options):
    """The value of an option for each parameter, by name."""
    groups = param_groups(net, named=True, **options)
    return {name: group[option] for group in groups for name, _ in group["params"]}


def test_options_by_name():
    net = model()  # 0: Linear, 1: LayerNorm, 2: Linear
    biased = {"0.bias": 2.0, "1.bias": 2.0, "2.bias": 2.0}
    for given, expected in (
        ({"0": 2.0, "*": 1.0}, {"0.weight": 2.0, "0.bias": 2.0}),
        ({"*.bias": 2.0, "*": 1.0}, biased),
        ({"[01].weight": 2.0, "*": 1.0}, {"0.weight": 2.0, "1.weight": 2.0}),
        ({"0": {"bias": 2.0, "*": 1.0}, "*": 1.0}, {"0.bias": 2.0}),
        (lambda name, p: 2.0 if name.endswith("bias") else 1.0, biased),
        (lambda name, p: 2.0 if p.shape == (3, 4) else 1.0, {"2.weight": 2.0}),
    ):
        wanted = {name: expected.get(name, 1.0) for name, _ in net.named_parameters()}
        assert values(net, "lr", lr=given) == wanted
        assert values(net, "momentum", momentum=given) == wanted
    decays = values(net, "weight_decay", weight_decay={"0": 0.2, "*": 0.1})
    assert decays == {**dict.fromkeys(wanted, 0.0), "0.weight": 0.2, "2.weight": 0.1}
    rates = values(net, "lr", lr={"0": 2.0, "*": 1.0}, excluded_lr={"0": 0.2, "*": 0.1})
    assert rates == {
        **dict.fromkeys(wanted, 0.1),
        "0.weight": 2.0,
        "0.bias": 0.2,
        "2.weight": 1.0,
    }


def test_rates_of_excluded_parameters_need_no_values_for_others():
    """The names of other parameters match nothing: the rate would have no effect."""
    net = model()
    rates = values(net, "lr", lr=1.0, excluded_lr={"*.bias": 0.5, "1.weight": 0.25})
    biases = {"0.bias": 0.5, "1.bias": 0.5, "2.bias": 0.5}
    assert rates == {"0.weight": 1.0, "2.weight": 1.0, "1.weight": 0.25, **biases}
    with pytest.raises(StructureError, match="does not match the excluded parameters") as caught:
        param_groups(net, excluded_lr={"0.weight": 0.5, "*": 0.1})
    assert (caught.value.argument, caught.value.paths) == ("excluded_lr", (("0.weight",),))
    asked = []
    param_groups(net, excluded_lr=lambda name, p: asked.append(name))
    assert sorted(asked) == sorted([*biases, "1.weight"])


def test_equal_numbers_of_numpy_share_a_group():
    for number in (np.float32, np.float64):
        assert len(param_groups(model(), lr=lambda name, p, number=number: number(0.5))) == 2


def test_groups_of_equal_values():
    """One group for each combination of values, adapted parameters first."""
    net = model()
    lr, rate = torch.tensor(0.5), torch.tensor(0.5)
    groups = param_groups(
        net,
        named=True,
        momentum=lambda name, p: 0.5 if name.startswith("0") else 1 / 2,
        lr=lambda name, p: lr if name.startswith("0") else rate,
    )
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names == [["0.weight"], ["2.weight"], ["0.bias"], ["1.weight", "1.bias", "2.bias"]]
    assert [group["lr"] is lr for group in groups] == [True, False, True, False]
    opt = Lars(groups)
    train(net, opt)
    assert [group["adapt"] for group in opt.param_groups] == [True, True, False, False]


def test_stacked_layers_by_name():
    net = nn.ModuleDict({"blocks": module(w=(2, 3, 3), v=(2, 3)), "head": module(w=(2, 3))})
    axes = {"blocks": 0, "*": None}
    expected = {"blocks.w": 0, "blocks.v": None, "head.w": None}
    assert values(net, "layer_axis", layer_axis=axes) == expected
    assert values(net, "weight_decay", layer_axis=axes, weight_decay=0.1)["head.w"] == 0.1
    assert values(net, "weight_decay", layer_axis=axes, weight_decay=0.1)["blocks.v"] == 0


def test_names_of_frozen_parameters_match():
    net = model()
    net[0].requires_grad_(False)
    assert values(net, "lr", lr={"0": 2.0, "*": 1.0}) == {
        "2.weight": 1.0,
        "1.weight": 1.0,
        "1.bias": 1.0,
        "2.bias": 1.0,
    }


@pytest.mark.parametrize(
    ("options", "says", "paths"),
    [
        ({"lr": {"0": 1.0}}, r"^lr does not match the parameters\n  1.weight: no key", 4),
        ({"lr": {"*.bais": 1.0, "*": 2.0}}, r"\*.bais: this key matches no leaf", 1),
        ({"excluded_lr": {"*.bais": 1.0, "*": 2.0}}, "^excluded_lr does not match", 1),
        ({"weight_decay": {"*.bias": 0.2, "*": 0.1}}, r"0.bias: excluded, so it has 0.0", 3),
        ({"adapt": {"1": True, "*": False}}, "1.bias: excluded, so it has False", 2),
        ({"layer_axis": {"0.bias": 0, "*": None}}, "0.bias: excluded, so it has None", 1),
    ],
)
def test_values_that_match_nothing_or_are_ignored_are_refused(options, says, paths):
    with pytest.raises(LarsTreeError, match=says) as caught:
        param_groups(model(), **options)
    assert caught.value.argument == next(iter(options))
    assert len(caught.value.paths) == paths


def test_values_that_excluded_parameters_share_are_not_refused():
    norms = nn.LayerNorm([2, 3])
    assert values(norms, "weight_decay", weight_decay={"*": 0.1}) == {"weight": 0.0, "bias": 0.0}
    decays = values(model(), "weight_decay", weight_decay={"*.bias": 0.0, "*": 0.1})
    assert sorted(set(decays.values())) == [0.0, 0.1]
    same = values(model(), "weight_decay", weight_decay=lambda name, p: 0.1)
    assert sorted(set(same.values())) == [0.0, 0.1]
    adapts = values(model(), "adapt", adapt=lambda name, p: name != "0.weight")
    assert [name for name, adapt in adapts.items() if adapt] == ["2.weight"]


def test_an_error_in_a_function_names_the_parameter():
    with pytest.raises(ZeroDivisionError) as caught:
        param_groups(model(), lr=lambda name, p: 1 / (name != "1.weight"))
    assert caught.value.__notes__ == ["lr at 1.weight"]
