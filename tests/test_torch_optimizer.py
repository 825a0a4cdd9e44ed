"""lars_tree.torch.Lars: the rule in torch's convention, for parameters of all kinds."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import reference
from conftest import need

import lars_tree

torch = need("torch")

from lars_tree.torch import Lars  # noqa: E402

W, G = [3.0, 4.0], [0.4, 0.3]


def parameter(values=W, grad=G, dtype=torch.float64):
    p = torch.nn.Parameter(torch.as_tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.as_tensor(grad, dtype=dtype)
    return p


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def train(net, opt, steps=4, scheduler=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, 5, generator=generator).to(next(net.parameters()).dtype)
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
        if scheduler:
            scheduler.step()
    return [p.detach().clone() for p in net.parameters()]


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# ---- The rule


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True},
        {"dampening": 0.25},
        {"weight_decay": 0.1, "eps": 0.01},
        {"adapt": False, "weight_decay": 0.1, "maximize": True},
        {"maximize": True, "weight_decay": 0.5, "nesterov": True},
        {"trust_clip": True, "trust_coefficient": 10.0},
        {"trust_clip": True, "dampening": 0.25},
        {"trust_clip": True, "momentum": 0.0},
        {"joint_norm": True, "weight_decay": 0.5, "dampening": 0.25},
        {"joint_norm": True, "weight_decay": 0.5, "maximize": True},
        {"joint_norm": True, "weight_decay": 3.0, "trust_coefficient": 0.5, "maximize": True},
    ],
    ids=str,
)
def test_each_step_against_the_exact_rule(options, engine):
    """The buffer does not contain the rate; each step multiplies the buffer by the rate."""
    defaults = {"trust_coefficient": 0.1, "momentum": 0.9, "eps": 0.0}
    options = {**defaults, **options}
    p = parameter()
    opt = Lars([p], lr=0.5, **engine, **options)
    rng = np.random.default_rng(0)
    w, v = W, [0.0, 0.0]
    sign = -1 if options.get("maximize") else 1
    names = {"trust_coefficient", "eps", "adapt", "trust_clip", "joint_norm"}
    rule = {name: value for name, value in options.items() if name in names}
    for i in range(4):
        g = rng.normal(size=2)
        p.grad = torch.as_tensor(g)
        opt.step()
        undampened = 1.0 - (options.get("dampening", 0.0) if i else 0.0)
        decay = options.get("weight_decay", 0.0)
        step = reference.lars(w, (sign * g).tolist(), 0.5, decay_lambda=decay, **rule)
        step = step._replace(u=[undampened * x / 0.5 for x in step.u])
        moved = reference.move(w, v, step, options["momentum"], "nesterov" in options, 0.5)
        w, v = ([float(x) for x in xs] for xs in (moved.w_new, moved.v_new))
        np.testing.assert_allclose(p.detach(), w, rtol=1e-14)
        if options["momentum"]:
            np.testing.assert_allclose(opt.state[p]["momentum_buffer"], v, rtol=1e-14)
        else:
            assert not opt.state[p]


@pytest.mark.parametrize("nesterov", [False, True])
def test_at_a_constant_rate_it_is_the_papers_rule(nesterov):
    net, w = model(dtype=torch.float64), model(dtype=torch.float64)
    opt = Lars(net.parameters(), 0.5, nesterov=nesterov, weight_decay=0.01)
    train(net, opt)
    ours = lars_tree.Lars(0.5, nesterov=nesterov, weight_decay=0.01)
    tree = lars_tree.Container(dict(w.named_parameters()))
    state = ours.init(tree)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        w.zero_grad()
        w(torch.randn(6, 5, generator=generator).double()).square().sum().backward()
        ours.update(tree, {k: x.grad for k, x in w.named_parameters()}, state, out=tree)
    for p, q in zip(net.parameters(), w.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


def test_all_optimizers_have_the_same_defaults():
    w, g = np.array([3.0, 4.0]), np.array([0.4, 0.3])
    p = torch.nn.Parameter(torch.tensor(w))
    p.grad = torch.tensor(g)
    Lars([p], lr=1.0).step()
    ours = lars_tree.Lars(1.0)
    new, _ = ours.update(w, g, ours.init(w))
    np.testing.assert_allclose(new, p.detach(), rtol=1e-15)
    assert new.round(4).tolist() == [2.996, 3.997]
    torch_options, tree_options = signature(Lars).parameters, signature(lars_tree.Lars).parameters
    shared = (torch_options.keys() & tree_options.keys()) - {"lr"}
    assert shared >= {"momentum", "nesterov", "weight_decay", "trust_coefficient", "eps"}
    for name in shared:
        assert torch_options[name].default == tree_options[name].default, name
    with pytest.raises(TypeError, match="it is 'weight_decay' here"):
        Lars([p], decay_lambda=0.1)
    with pytest.raises(TypeError, match=r"param_groups\[0\] .*it is 'trust_coefficient' here"):
        Lars([{"params": [p], "trust_coeff": 0.02}])


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_eps_keeps_steps_along_rounding_noise_small(eps):
    """The gradient of a bias before batch norm is 0 except for rounding errors."""
    p = torch.nn.Parameter(torch.ones(8))
    noise = torch.Generator().manual_seed(0)
    opt = Lars([p], lr=10.0, momentum=0.0, eps=eps)
    for _ in range(100):
        p.grad = 1e-9 * torch.randn(8, generator=noise)
        opt.step()
    moved = float((p.detach() - 1).norm() / 8**0.5)
    assert moved < 0.05 if eps else moved > 0.05


def test_without_adaptation_it_is_sgd():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    for extra in ({}, {"dampening": 0.5}, {"nesterov": True}, {"maximize": True}):
        nets = [model(dtype=torch.float64) for _ in range(2)]
        ours = train(nets[0], Lars(nets[0].parameters(), adapt=False, **options, **extra))
        theirs = train(nets[1], torch.optim.SGD(nets[1].parameters(), **options, **extra))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_new_rate_takes_effect_at_once():
    p = parameter()
    opt = Lars([p], lr=0.5, trust_coefficient=0.1)
    opt.step()
    buffer = opt.state[p]["momentum_buffer"].clone()
    before = p.detach().clone()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert torch.equal(p, before)
    assert not torch.equal(opt.state[p]["momentum_buffer"], buffer)


def test_groups_override_each_option(engine):
    options = [{"lr": 0.1}, {"weight_decay": 0.2}, {"momentum": 0.5}, {"momentum": 0.0}]
    options += [{"adapt": False}, {"nesterov": True}, {"maximize": True}, {"dampening": 0.1}]
    together = [parameter() for _ in options]
    groups = [{"params": [p], **each} for p, each in zip(together, options, strict=True)]
    opt = Lars(groups, lr=0.5, trust_coefficient=0.1, **engine)
    alone = [parameter() for _ in options]
    opts = [
        Lars([p], **{"lr": 0.5, "trust_coefficient": 0.1, **engine, **each})
        for p, each in zip(alone, options, strict=True)
    ]
    for _ in range(3):
        opt.step()
        for each in opts:
            each.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-15, atol=0)
    assert len({tuple(p.tolist()) for p in together}) == len(options)


def test_without_decay_an_infinite_weight_gives_no_nan(engine):
    """This also holds if another group has decay."""
    p, q = parameter([np.inf, 1.0]), parameter()
    groups = [{"params": [p]}, {"params": [q], "weight_decay": 0.1}]
    opt = Lars(groups, 0.5, adapt=False, **engine)
    opt.step()
    opt.step()
    assert opt.state[p]["momentum_buffer"].tolist() == pytest.approx([1.9 * g for g in G])
    assert p.tolist() == pytest.approx([np.inf, 1 - 0.5 * (1 + 1.9) * G[1]])


def test_stacked_layers_are_updated_like_separate_layers(engine):
    generator = torch.Generator().manual_seed(0)
    w, *gs = torch.randn(4, 3, 4, 5, generator=generator, dtype=torch.float64)
    stack = torch.nn.Parameter(w.clone())
    opt = Lars([stack], 0.5, layer_axis=1, trust_clip=True, **engine)
    rows = [torch.nn.Parameter(x.clone()) for x in w.unbind(1)]
    each = Lars(rows, 0.5, trust_clip=True)
    for g in gs:
        stack.grad = g
        for row, dx in zip(rows, g.unbind(1), strict=True):
            row.grad = dx.clone()
        opt.step()
        each.step()
    torch.testing.assert_close(stack, torch.stack(list(rows), 1), rtol=1e-13, atol=0)


# ---- Parameters of all kinds


def test_gradients_are_not_modified():
    net = model()
    opt = Lars(net.parameters(), 0.5, weight_decay=0.1, nesterov=True, maximize=True)
    net(torch.ones(2, 5)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    versions = [p.grad._version for p in net.parameters()]
    for foreach in (None, True):
        opt.param_groups[0]["foreach"] = foreach
        opt.step()
    assert same([p.grad for p in net.parameters()], before)
    assert [p.grad._version for p in net.parameters()] == versions


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_parameters_of_all_kinds(dtype, engine):
    """Compare 0-d, empty, non-contiguous and gradientless parameters with double precision."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    shapes = [(), (0, 3), (4, 6), (5,), (3, 2)]
    base = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    grads = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    params = [torch.nn.Parameter(x.clone()) for x in base]
    params[2] = torch.nn.Parameter(base[2].clone().t().contiguous().t())
    params.append(torch.nn.Parameter(torch.zeros(8, dtype=dtype)[::2]))
    base.append(params[-1].detach().clone())
    grads.append(torch.ones(4, dtype=dtype))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    precise = [torch.nn.Parameter(x.to(wide)) for x in base]
    ours, theirs = (
        Lars(xs, 0.5, weight_decay=0.1, trust_coefficient=0.1, **more)
        for xs, more in ((params, engine), (precise, {}))
    )
    for p, q, g in zip(params, precise, grads, strict=True):
        p.grad, q.grad = g.clone(), g.to(wide)
    params[4].grad = precise[4].grad = None
    ours.step()
    theirs.step()
    ours.step()
    theirs.step()
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-14}.get(dtype, 1e-6)
    for p, q in zip(params, precise, strict=True):
        torch.testing.assert_close(p.to(wide), q, rtol=tolerance, atol=tolerance)
    assert torch.equal(params[4], base[4])
    assert params[4] not in ours.state
    kept = torch.float32 if dtype.itemsize == 2 else dtype
    assert ours.state[params[0]]["momentum_buffer"].dtype == kept


def test_gradients_of_complex_parameters_descend():
    z = torch.nn.Parameter(torch.tensor([3 + 4j, 1 - 2j], dtype=torch.complex64))
    opt = Lars([z], lr=0.1, momentum=0.5, trust_coefficient=0.5)
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = z.abs().square().sum()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


def test_a_closure_is_called_with_gradients_enabled():
    p = parameter(grad=None)
    opt = Lars([p], 0.5)

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == 25.0
    assert p.grad.tolist() == [6.0, 8.0]
    assert p.tolist() != W


def test_autograd_sees_that_a_saved_parameter_is_stale():
    p = parameter()
    loss = (p**2).sum()
    Lars([p], 0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
