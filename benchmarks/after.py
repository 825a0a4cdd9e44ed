"""Steps right after other work, whose threads may still be busy, and whose data fill the cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.contestants import CONTESTANTS, OPTIMIZERS
from benchmarks.groups import Group, Step, Steps
from benchmarks.trees import TREES, weights_and_gradients

BACK_TO_BACK = "back to back"
TORCH, MATMUL = "after a torch operation", "after a numpy matmul"


def _step(name: str, tree: str) -> Step:
    contestant = (CONTESTANTS | OPTIMIZERS)[name]
    return contestant.build(*weights_and_gradients(TREES[tree]()), True).step


def _twice(name: str, after: str) -> Steps:
    """One step under two names, so that both use the same memory."""
    return dict.fromkeys((BACK_TO_BACK, after), _step(name, "resnet"))


def _nothing() -> None:
    """The step before, on the same memory, is all the work."""


def _torch_operation() -> Steps:
    import torch

    a, b = torch.zeros(30_000_000), torch.ones(30_000_000)
    return {BACK_TO_BACK: _nothing, TORCH: lambda: a.add_(b)}


def _matmul() -> Steps:
    a = np.random.default_rng(0).standard_normal((1500, 1500), dtype=np.float32)
    return {BACK_TO_BACK: _nothing, MATMUL: lambda: a @ a}


SMALL = ("pytorch_optimizer", "lars_tree, numpy")


def _pass_over_memory() -> Steps:
    c: np.ndarray[Any, Any] = np.ones(16_000_000, np.float32)
    return dict.fromkeys(SMALL, lambda: np.add(c, 1, out=c))


def _torch_group(name: str) -> Group:
    build = partial(_twice, name, TORCH)
    title = f"ResNet-50, {name}"
    return Group(title, build, BACK_TO_BACK, {TORCH: 1.05}, "torch", work=_torch_operation)


def _matmul_group(title: str, timeout: str, bounds: dict[str, float]) -> Group:
    build = partial(_twice, "lars_tree, numpy", MATMUL)
    variables = {"OPENBLAS_THREAD_TIMEOUT": timeout}
    return Group(title, build, BACK_TO_BACK, bounds, work=_matmul, variables=variables)


GROUPS = [
    _torch_group("lars_tree, numpy"),
    _torch_group("lars_tree, torch"),
    _torch_group("lars_tree.torch.Lars"),
    _matmul_group("ResNet-50, OPENBLAS_THREAD_TIMEOUT=20", "20", {MATMUL: 1.05}),
    _matmul_group("ResNet-50, OPENBLAS_THREAD_TIMEOUT not set", "", {}),
    Group(
        "1,000 leaves, after a pass over 64 MB",
        lambda: {name: _step(name, "small") for name in SMALL},
        SMALL[0],
        {SMALL[1]: 0.2},
        "pytorch_optimizer",
        work=_pass_over_memory,
    ),
]
