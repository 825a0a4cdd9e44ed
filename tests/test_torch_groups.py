"""lars_tree.torch.param_groups, and the refusal of flattened or partitioned parameters."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
from conftest import need

from lars_tree import LarsTreeError

torch = need("torch")

from test_torch_optimizer import model  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402


def module(**parameters):
    """A module with parameters of these shapes."""
    made = nn.Module()
    for name, shape in parameters.items():
        made.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return made


def renamed(name, base=nn.Module, **parameters):
    """A module whose class has this name, with parameters of these shapes."""
    made = module(**parameters)
    made.__class__ = type(name, (base,), {})
    return made


def excluded(net, **options):
    """The names of the excluded parameters; all others are adapted and decayed."""
    groups = param_groups(net, named=True, weight_decay=0.1, **options)
    assert all((g["weight_decay"] == 0.1) == g.get("adapt", True) for g in groups)
    every = [name for name, p in net.named_parameters() if p.requires_grad]
    assert sorted(name for g in groups for name, _ in g["params"]) == sorted(every)
    return [name for g in groups if not g.get("adapt", True) for name, _ in g["params"]]


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def tied():
    """A model in which a kernel is also the scale of a norm layer."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm([3, 4], bias=False))
    net[1].weight = net[0].weight
    return net


def listing(names, inside=False, method="no_weight_decay"):
    net = module(token=(1, 1, 4), kernel=(4, 4))
    setattr(net, method, lambda: names)
    return nn.ModuleDict({"backbone": net}) if inside else net


class Vit(nn.Module):
    """Lists parameters as timm's vision transformers do, with one that the model does not have."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 4))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.dist_token = None
        self.blocks = nn.Sequential(nn.Linear(4, 4, bias=False))

    def forward(self, x):
        return self.blocks(x)

    @torch.jit.ignore
    def no_weight_decay(self):
        return {"pos_embed", "cls_token", "dist_token"}


class Fourier(nn.Module):
    """Lists parameters by a pattern, as timm's Xcit does; a part of the model lists one more."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Conv2d(4, 4, 1, bias=False)
        self.pos_embedding = nn.Parameter(torch.ones(4, 4))
        self.blocks = nn.Sequential(listing({"token"}))

    def no_weight_decay(self):
        return {"pos_embed.*"}


def marked(net, name):
    """Mark a parameter as Mamba does."""
    net.get_parameter(name)._no_weight_decay = True
    return net


CASES = {
    "LayerNorm": (nn.LayerNorm([3, 8, 8]), ["weight", "bias"]),
    "RMSNorm": (nn.RMSNorm([3, 8]), ["weight"]),
    "GroupNorm": (nn.GroupNorm(2, 4), ["weight", "bias"]),
    "InstanceNorm": (nn.InstanceNorm2d(4, affine=True), ["weight", "bias"]),
    "SyncBatchNorm": (nn.SyncBatchNorm(4), ["weight", "bias"]),
    "own class": (renamed("LlamaRMSNorm", weight=(4, 4)), ["weight"]),
    "own class, 2d": (renamed("ScaleNorm2d", gain=(1, 4, 1, 1)), ["gain"]),
    "own class, with activation": (renamed("EvoNorm2dAct", v=(1, 4, 1, 1)), ["v"]),
    "own class, derived": (renamed("Scale", type("RMSNorm", (nn.Module,), {}), g=(4, 4)), ["g"]),
    "scripted": (scripted(nn.LayerNorm([2, 3])), ["weight", "bias"]),
    "compiled": (
        torch.compile(nn.LayerNorm([2, 3]), backend="eager"),
        ["_orig_mod.weight", "_orig_mod.bias"],
    ),
    "a kernel in spite of its name": (renamed("LinearNorm", nn.Linear, weight=(4, 4)), []),
    "normal": (renamed("Normal", weight=(4, 4)), []),
    "Attention": (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"],
    ),
    "LSTM": (
        nn.LSTM(3, 4, bidirectional=True),
        [f"bias_{x}_l0{way}" for way in ("", "_reverse") for x in ("ih", "hh")],
    ),
    "biases of all shapes": (
        module(bias=(2, 2), q_bias=(2, 2), bias_table=(2, 2), unbiased=(2, 2)),
        ["bias", "q_bias", "bias_table"],
    ),
    "PReLU": (nn.PReLU(4), ["weight"]),
    "Embedding": (nn.Embedding(3, 4), []),
    "Conv2d": (nn.Conv2d(3, 1, 1), ["bias"]),
    "weight_norm": (
        parametrizations.weight_norm(nn.Conv2d(3, 4, 2)),
        ["bias", "parametrizations.weight.original0"],
    ),
    "weight_norm, inside": (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4, bias=False))),
        ["0.parametrizations.weight.original0"],
    ),
    "weight_norm, old": (module(weight_g=(4, 1, 1), weight_v=(4, 3, 2)), ["weight_g"]),
    "no weight_norm": (module(weight_g=(2, 2)), []),
    "spectral_norm": (parametrizations.spectral_norm(nn.Linear(3, 4)), ["bias"]),
    "parametrized bias": (
        parametrize.register_parametrization(module(bias=(2, 2), w=(2, 2)), "bias", Halved()),
        ["parametrizations.bias.original"],
    ),
    "parametrized norm": (
        nn.Sequential(
            parametrize.register_parametrization(nn.LayerNorm([3, 4]), "weight", Halved())
        ),
        ["0.bias", "0.parametrizations.weight.original"],
    ),
    "tied": (tied(), ["0.weight"]),
    "listed by the model": (listing({"token"}), ["token"]),
    "listed by a part": (listing({"token"}, inside=True), ["backbone.token"]),
    "a vision transformer": (Vit(), ["pos_embed", "cls_token"]),
    "a vision transformer, inside": (nn.Sequential(Vit()), ["0.pos_embed", "0.cls_token"]),
    "a vision transformer, scripted": (scripted(Vit()), ["pos_embed", "cls_token"]),
    "a vision transformer, compiled": (
        torch.compile(Vit(), backend="eager"),
        ["_orig_mod.pos_embed", "_orig_mod.cls_token"],
    ),
    "listed by a pattern": (Fourier(), ["pos_embed.weight", "blocks.0.token"]),
    "listed by a pattern, inside": (
        nn.Sequential(Fourier()),
        ["0.pos_embed.weight", "0.blocks.0.token"],
    ),
    "listed by nobody": (listing({}), []),
    "listed by a keyword": (
        listing({"oke"}, inside=True, method="no_weight_decay_keywords"),
        ["backbone.token"],
    ),
    "marked": (marked(module(token=(1, 1, 4), kernel=(4, 4)), "token"), ["token"]),
    "not listed": (module(token=(1, 1, 4)), []),
    "by axes": (module(a=(), b=(4,), c=(1, 4)), ["a", "b"]),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_excluded_from_adaptation_and_decay(case):
    net, expected = CASES[case]
    assert excluded(net) == expected


@pytest.mark.parametrize("returned", ["token", None, [b"token"]])
def test_a_list_that_is_no_list_of_names_is_refused(returned):
    with pytest.raises(LarsTreeError, match="expected a collection of names, got") as caught:
        param_groups(listing(returned, inside=True))
    assert caught.value.argument == "model"
    assert caught.value.paths == (("backbone", "no_weight_decay"),)


def test_stacked_layers_have_one_axis_more():
    net = module(kernel=(2, 3, 3), shift=(2, 3), scale=())
    net.act = nn.PReLU(3)
    assert excluded(net, layer_axis=0) == ["shift", "scale", "act.weight"]
    groups = param_groups(net, layer_axis=0, weight_decay=0.1)
    opt = Lars(groups, 0.1)
    sum(p.sum() for p in net.parameters()).backward()
    opt.step()
    assert net.scale.item() == pytest.approx(0.9)  # `scale` is excluded, so SGD updates it


def test_a_predicate_replaces_the_usual_rules():
    net = nn.Sequential(nn.LayerNorm([2, 3]), nn.Linear(3, 3))
    assert excluded(net, exclude=lambda name, p: name == "1.weight") == ["1.weight"]
    (only,) = param_groups(net, exclude=lambda name, p: True)
    assert len(only["params"]) == 4


def test_groups_hold_parameters_or_pairs_with_their_names():
    net = model()
    net[0].weight.requires_grad_(False)
    adapted, others = groups = param_groups(net, weight_decay=0.1, trust_clip=True)
    assert [id(p) for p in adapted["params"]] == [id(net[2].weight)]
    assert [id(p) for p in others["params"]] == [
        id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[2].bias)
    ]
    assert (adapted["weight_decay"], others["weight_decay"], others["adapt"]) == (0.1, 0.0, False)
    assert adapted["trust_clip"]
    assert others["trust_clip"]
    for optimizer in (Lars, torch.optim.SGD):
        opt = optimizer(groups, lr=0.1)
        net[0].weight.requires_grad_()
        opt.add_param_group({"params": net[0].weight})  # as frameworks that unfreeze layers do
        net[0].weight.requires_grad_(False)
        assert "param_names" not in opt.param_groups[0]
    names = [[name for name, _ in g["params"]] for g in param_groups(net, named=True)]
    assert names == [["2.weight"], ["0.bias", "1.weight", "1.bias", "2.bias"]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda net: net.parameters(), "needs the model itself, .* got a generator"),
        (lambda net: net.named_parameters(), "got a generator"),
        (lambda net: list(net.parameters()), "got a list of 6 items"),
        (lambda net: net.state_dict(), "got an OrderedDict with keys '0.weight', '0.bias'"),
        (lambda net: net[0].weight, r"got an array of shape \(4, 5\)"),
        (lambda net: nn.Linear, "got a type"),
    ],
)
def test_anything_but_a_model_is_refused(given, says):
    with pytest.raises(TypeError, match=says):
        param_groups(given(model()))


def test_unknown_options_and_lazy_parameters_are_refused():
    with pytest.raises(TypeError, match=r"'trust_coeff'.*it is 'trust_coefficient' here"):
        param_groups(model(), trust_coeff=1e-3)
    with pytest.raises(ValueError, match=r"^0.weight has no shape yet"):
        param_groups(nn.Sequential(nn.LazyLinear(3)))
    known = param_groups(model(), lr=1.0, nonfinite="skip", fused=True, foreach=None)
    assert len(Lars(known, fused=True).param_groups) == 2


# ---- Flattened and partitioned parameters


@pytest.fixture(scope="module")
def group():
    """A fake process group of size 2 that does not communicate; this process is the only one."""
    need("torch.distributed.fsdp")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def flatten(net, group, use_orig_params):
    """Flatten the parameters as FSDP1 does; FSDP1 itself would require an accelerator."""
    from torch.distributed.fsdp import _flat_param as flat

    strategy = flat.HandleShardingStrategy.FULL_SHARD
    rest = (torch.device("cpu"), strategy, False, None, None, False, group, use_orig_params)
    handle = flat.FlatParamHandle(list(net.parameters()), net, *rest)
    handle.shard()
    if use_orig_params:
        handle._use_sharded_views()
    else:
        net.register_parameter("_flat_param", handle.flat_param)
    return net


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_of_fsdp1_are_refused(group, use_orig_params):
    net = flatten(model(), group, use_orig_params)
    assert all(p.ndim == 1 for p in net.parameters())
    count = 6 if use_orig_params else 1
    opt = Lars([nn.Parameter(torch.ones(2))])
    for make in (
        lambda: param_groups(net),
        lambda: Lars(net.parameters()),
        lambda: opt.add_param_group({"params": net.parameters()}),
    ):
        with pytest.raises(LarsTreeError, match=r"flattened by FSDP1: use FSDP2 \(fully") as caught:
            make()
        assert len(caught.value.paths) == count
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_fsdp1_flattens_later_are_refused(group, momentum):
    net = model()
    opt = Lars(net.parameters(), momentum=momentum)
    flatten(net, group, use_orig_params=True)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(LarsTreeError, match="flattened by FSDP1"):
        opt.step()
    assert not opt.state


def test_partitions_of_deepspeed_are_refused(monkeypatch):
    """DeepSpeed's ZeRO-3 marks parameters; ZeRO-1 and ZeRO-2 flatten each group into one tensor."""
    net = model()
    net[0].weight.ds_id = 0
    with pytest.raises(LarsTreeError, match=r"0.weight: partitioned by DeepSpeed's ZeRO-3"):
        param_groups(net)
    net = model()
    opt = Lars(param_groups(net, named=True), 0.1)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    for each in opt.param_groups:
        flat = torch.cat([p.detach().reshape(-1) for p in each["params"]]).requires_grad_()
        flat.grad = torch.ones_like(flat)
        each["params"] = [flat]
    before = opt.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(LarsTreeError, match="flattened by DeepSpeed's ZeRO"):
        opt.step()
    assert torch.equal(opt.param_groups[0]["params"][0], before)
    opt.param_groups[0]["adapt"] = False  # SGD does not need the layers
    opt.step()
    assert not torch.equal(opt.param_groups[0]["params"][0], before)
