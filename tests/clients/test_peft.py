"""lars_tree.torch.Lars for adapters of peft: LoRA, whose base weights are frozen."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from conftest import need

torch = need("torch")
peft = need("peft")

from runs import assert_same, loader, loss_of, network, result  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about a model without a config


def adapted():
    torch.manual_seed(2)
    targets = {"target_modules": ["backbone.0", "head"], "r": 2, "lora_dropout": 0.0}
    return peft.get_peft_model(network(), peft.LoraConfig(**targets, use_dora=True))


def optimizer(model):
    groups = param_groups(model, named=True, weight_decay=1e-3)
    return Lars(groups, 0.5, trust_coefficient=0.1)


def train(model, opt, epochs):
    model.train()
    for _ in range(epochs):
        for batch in loader():
            opt.zero_grad()
            loss_of(model, *batch).backward()
            opt.step()
    return result(model, opt)


def test_only_adapters_are_trained():
    model = adapted()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    opt = optimizer(model)
    train(model, opt, 1)
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    weights = {name for name, _ in model.named_parameters()}
    assert moved & weights == {name for name in weights if ".lora_" in name}
    assert len(opt.state) == len(moved & weights) == 6
    # Matrices are adapted; the magnitudes of DoRA have one axis.
    ratios = opt.trust_ratios()
    assert {name for name, x in ratios.items() if x == 1} == {
        name for name in ratios if "magnitude" in name
    }


def test_the_first_step_of_zeros_is_not_adapted():
    """LoRA's B starts at zero, so it takes an SGD step at the full rate: docs/recipes.md."""
    model = adapted()
    opt = optimizer(model)
    loss_of(model, *next(iter(loader()))).backward()
    ratios = opt.trust_ratios()
    zeros = {name for name, p in model.named_parameters() if p.requires_grad and not p.any()}
    assert zeros == {name for name in ratios if "lora_B" in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step()
    for name, p in model.named_parameters():
        if name in zeros:
            assert torch.equal(p, before[name] - 0.5 * p.grad)
    after = opt.trust_ratios()
    assert all(ratios[name] == 1 and after[name] != 1 for name in zeros)


def test_a_resumed_run_has_the_bits_of_a_whole_run(tmp_path):
    model = adapted()
    expected = train(model, optimizer(model), 4)

    model = adapted()
    opt = optimizer(model)
    train(model, opt, 2)
    model.save_pretrained(tmp_path)
    buffers = {name: x for name, x in model.named_buffers() if x is not None}
    torch.save({"optimizer": opt.state_dict(), "buffers": buffers}, tmp_path / "state.pt")

    model = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(state["buffers"], strict=False)  # of the batch norm
    opt = optimizer(model)
    opt.load_state_dict(state["optimizer"])
    assert_same(train(model, opt, 2), expected)


def test_frozen_parameters_may_be_given():
    """Without `param_groups`: parameters without gradients are left alone."""
    results = []
    for give_all in (False, True):
        model = adapted()
        params = [(name, p) for name, p in model.named_parameters() if give_all or p.requires_grad]
        results.append(train(model, Lars(params, 0.5, trust_coefficient=0.1, momentum=0.5), 1))
    del results[0]["lr"], results[1]["lr"]
    for key in ("w", "v"):
        names = results[0][key].keys()
        assert names == results[1][key].keys()
        assert all(torch.equal(results[0][key][name], results[1][key][name]) for name in names)
