"""Helpers for the tests of trainers: a small model, its data, and the comparison of two runs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from lars_tree.torch import Lars, param_groups

DECAY, COEFFICIENT = 1e-3, 0.05


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    return torch.nn.Sequential(OrderedDict(backbone=backbone, head=torch.nn.Linear(8, 3)))


def optimizer(net: torch.nn.Module, **options: Any) -> Lars:
    groups = param_groups(net, named=True, weight_decay=DECAY)
    return Lars(groups, lr=1.0, trust_coefficient=COEFFICIENT, **options)


def schedule(opt: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 / (1 + i))


def dataset() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (16,), generator=generator))


def loader() -> torch.utils.data.DataLoader:
    """Four batches, always in the same order."""
    return torch.utils.data.DataLoader(dataset(), batch_size=4)


def loss_of(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(net(x), y)


def result(net: torch.nn.Module, opt: Lars) -> dict[str, Any]:
    """Copies of the weights and velocities by name, the rates, and the count of skipped steps."""
    names = {p: name for name, p in net.named_parameters()}
    velocities = {names[p]: x["momentum_buffer"].clone() for p, x in opt.state.items()}
    assert velocities
    rates = {names[p]: float(group["lr"]) for group in opt.param_groups for p in group["params"]}
    weights = {name: x.detach().clone() for name, x in net.state_dict().items()}
    return {"w": weights, "v": velocities, "lr": rates, "skipped": opt.skipped}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare all bits of two results."""
    for key in ("w", "v"):
        assert actual[key].keys() == expected[key].keys()
        differing = [
            name for name, x in expected[key].items() if not torch.equal(actual[key][name], x)
        ]
        assert differing == [], key
    assert actual["lr"] == expected["lr"]
    assert actual["skipped"] == expected["skipped"]
