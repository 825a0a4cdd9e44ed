"""Reports that read lars_tree.torch.Lars: its parameters, with the options of their groups."""

from __future__ import annotations

import math

import pytest
from conftest import need

from lars_tree import LarsTreeError, LeafError, OptionError, report

torch = need("torch")

from test_torch_optimizer import model, parameter, same, train  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402

OPTIONS = [
    {},
    {"momentum": 0.0, "weight_decay": 0.125},
    {"nesterov": True},
    {"dampening": 0.5},
    {"maximize": True, "joint_norm": True, "weight_decay": 0.125},
    {"trust_clip": True, "trust_coefficient": 10.0},
    {"trust_clip": True, "trust_coefficient": 0.125},
    {"adapt": "decayed"},
    {"adapt": "decayed", "weight_decay": 0.125},
    {"lr": torch.tensor([0.25]), "momentum": torch.tensor(0.5), "eps": torch.tensor(0.5)},
]


def with_gradients(net, scale=1.0):
    for i, p in enumerate(net.parameters()):
        generator = torch.Generator().manual_seed(i)
        p.grad = scale * torch.randn(p.shape, dtype=p.dtype, generator=generator)


@pytest.mark.filterwarnings("ignore::lars_tree.report.TrustRatioWarning")  # clipped ratios
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_first_step_moves_each_parameter_by_its_ratio(options, scale, engine):
    """|p_new - p| = lr * ratio * |g + weight_decay * p|, also for parameters without adaptation."""
    net = model(dtype=torch.float64)
    with_gradients(net, scale)
    opt = Lars(param_groups(net, named=True, **{"lr": 0.5, **engine, **options}))
    ratios = opt.trust_ratios(grad_scale=scale)
    records = {x["path"]: x for x in report.layer_table(opt, grad_scale=scale)}
    by_function = report.trust_ratios(opt, grad_scale=scale)
    assert list(ratios) == list(records) == list(by_function)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert same(before.values(), net.parameters())
    with_gradients(net)
    opt.step()
    groups = {name: group for group in opt.param_groups for name in group["param_names"]}
    for name, p in net.named_parameters():
        group, record, ratio = groups[name], records[name], ratios[name].item()
        assert ratio == by_function[name].item()
        assert record["ratio"] == pytest.approx(ratio, rel=1e-12)
        sign = -1 if group["maximize"] else 1
        d = sign * p.grad + float(group["weight_decay"]) * before[name]
        moved = (p.detach() - before[name]).norm().item()
        # Nesterov's first step is u + momentum * u.
        factor = 1 + group["momentum"] if group["nesterov"] else 1.0
        expected = float(group["lr"]) * ratio * d.norm().item()
        assert moved == pytest.approx(factor * expected, rel=1e-9)
        norm = before[name].norm().item()
        assert record["relative_step"] == pytest.approx(
            expected / norm if norm else math.inf, rel=1e-9
        )


def test_parameters_that_are_not_adapted_have_the_ratio_1_and_are_marked():
    net = model()
    with_gradients(net)
    net[2].bias.data.fill_(1e6)  # by itself, lars_update would move it by 1e6 * lr
    opt = Lars(param_groups(net, named=True, weight_decay=1e-4), 0.1)
    ratios = opt.trust_ratios()
    table = report.layer_table(opt)
    adapted = {x["path"]: x["adapted"] for x in table}
    assert adapted == {name: name in ("0.weight", "2.weight") for name in ratios}
    assert all((ratios[name] == 1) is not is_adapted for name, is_adapted in adapted.items())
    lines = {line.split()[0]: line for line in repr(table).splitlines()[2:]}
    assert {name: "1 (SGD)" in line for name, line in lines.items()} == {
        name: not is_adapted for name, is_adapted in adapted.items()
    }
    assert table.to_markdown().count("1 (SGD)") == 4


def test_a_parameter_without_a_gradient_has_no_ratio():
    net = model()
    with_gradients(net)
    net[0].weight.grad = None
    net[2].bias.requires_grad_(False).grad = None
    opt = Lars(net.named_parameters(), 0.1)
    ratios = opt.trust_ratios()
    assert {name for name, x in ratios.items() if x is None} == {"0.weight", "2.bias"}
    rows = {x["path"]: x["ratio"] for x in report.layer_table(opt)}
    assert {name for name, x in rows.items() if x is None} == {"0.weight", "2.bias"}


@pytest.mark.parametrize("read", [Lars.trust_ratios, report.trust_ratios, report.layer_table])
@pytest.mark.parametrize("named", [True, False])
def test_before_the_first_backward_an_error_says_what_to_do(read, named):
    net = model()
    opt = Lars(param_groups(net, named=named), 0.1)
    with pytest.raises(LeafError, match=r"no parameter has a gradient: call backward\(\)") as error:
        read(opt)
    assert error.value.argument == "p.grad"
    assert len(error.value.paths) == 6
    assert (("0.weight",) in error.value.paths) is named
    train(net, opt, 1)
    opt.zero_grad()
    with pytest.raises(LeafError, match=r"zero_grad\(\) after"):
        read(opt)


def test_stacked_layers_have_a_vector_of_ratios_and_a_row_each():
    p = parameter([[3.0, 4.0], [6.0, 8.0]], [[0.4, 0.3], [4.0, 3.0]])
    opt = Lars([("stack", p)], 0.1, layer_axis=0, trust_coefficient=1.0, eps=0.0)
    assert opt.trust_ratios()["stack"].tolist() == pytest.approx([10, 2])
    assert [x["path"] for x in report.layer_table(opt)] == ["stack[0]", "stack[1]"]


def test_names_that_two_groups_share_are_replaced_by_positions():
    nets = [model(), model(1)]
    for net in nets:
        with_gradients(net)
    opt = Lars([{"params": list(net.named_parameters())} for net in nets], 0.1)
    ratios = opt.trust_ratios()
    assert len(ratios) == 12
    assert "0.weight" in ratios
    assert "param_groups[1]['params'][0]" in ratios


def test_histories_and_writers_take_the_ratios():
    net = model()
    opt = Lars(param_groups(net, named=True), 0.1, trust_coefficient=1.0)
    net[2].bias.requires_grad_(False)
    history, written = report.TrustHistory(), []

    class Writer:
        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

    log = report.ScalarCallback(Writer(), every=2)
    found = []
    for step in range(3):
        opt.zero_grad()
        net(torch.ones(2, 5)).square().sum().backward()
        ratios = opt.trust_ratios()
        history.record(ratios)
        log(ratios, step)
        found.append(ratios["0.weight"].item())
        opt.step()
    assert history.ratios["0.weight"].tolist() == found
    assert history.ratios["0.bias"].tolist() == [1, 1, 1]
    assert len(written) == 2 * 5
    assert ("trust_ratio/0.weight", found[2], 2) in written


def test_reading_ratios_changes_nothing():
    results = []
    for reads in (False, True):
        net = model()
        opt = Lars(param_groups(net, weight_decay=0.1), 0.5)
        for _ in range(3):
            with_gradients(net)
            if reads:
                opt.trust_ratios()
                report.layer_table(opt)
                assert len(opt.state) in (0, 6)
            opt.step()
        results.append([*net.parameters(), *(x["momentum_buffer"] for x in opt.state.values())])
    assert same(*results)


def test_errors_have_the_terms_of_torch():
    p, q = parameter(), parameter()
    opt = Lars([("p", p), ("q", q)], 0.1)
    q.grad = q.grad.to_sparse()
    with pytest.raises(
        LarsTreeError, match=r"sparse gradients\n  q: make the gradient .*dense"
    ) as error:
        opt.trust_ratios()
    assert (error.value.argument, error.value.paths) == ("p.grad", (("q",),))
    q.grad = None
    opt.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[0\]: Invalid eps"):
        opt.trust_ratios()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), True, "2", torch.ones(2)])
def test_an_invalid_scale_is_refused(scale):
    opt = Lars([parameter()], 0.1)
    for read in (Lars.trust_ratios, report.trust_ratios, report.layer_table):
        with pytest.raises(OptionError, match=r"grad_scale: expected a .*number") as error:
            read(opt, grad_scale=scale)
        assert error.value.argument == "grad_scale"


@pytest.mark.parametrize("read", [report.trust_ratios, report.layer_table])
def test_other_arguments_than_an_optimizer_are_refused(read):
    opt = Lars([parameter()], 0.1)
    for rest, options in (((None, 0.1), {}), ((1.0,), {}), ((), {"adapt": False})):
        with pytest.raises(TypeError, match="no other arguments with an optimizer, except grad_"):
            read(opt, *rest, **options)
    for given in ((parameter(),), (parameter(), 1.0), (torch.optim.SGD([parameter()]),)):
        with pytest.raises(TypeError, match=r"needs w, dcdw and lr, or a lars_tree\.torch\.Lars"):
            read(*given)
