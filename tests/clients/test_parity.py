"""What the documentation says of other packages is what these packages compute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import need, need_installed

import lars_tree as lt

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_that_the_packages_give():
    need_installed("ivy", "jax", "optax", "pytorch_optimizer", "timm", "torch")
    command = [sys.executable, "-m", "tests.clients.parity"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("coming-from.md", "rule.md"))
    assert found.stdout.splitlines() == pages.splitlines()


@pytest.fixture
def torch():
    return need("torch")


@pytest.fixture
def timm_lars():
    need_installed("timm")
    from benchmarks.contestants import timm_lars

    return timm_lars()


def step_sizes(torch, optimizer, gradient, **options):
    """The norm of the first step from [3, 4]."""
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    p.grad = torch.tensor([gradient], dtype=torch.float64)
    before = p.detach().clone()
    optimizer([p], lr=0.1, **options).step()
    return float(torch.linalg.vector_norm(p.detach() - before))


def test_the_eps_of_timm_shortens_steps_at_small_gradients(torch, timm_lars):
    """docs/coming-from.md: at |g| = 5e-10, the step is 21 times shorter than with eps 0."""
    options = {"trust_coeff": 1.0, "always_adapt": True}
    short, full = (
        step_sizes(torch, timm_lars, [4e-10, 3e-10], eps=eps, **options) for eps in (1e-8, 0)
    )
    assert full / short == pytest.approx(21)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_trust_clip_is_the_larc_of_timm(torch, timm_lars, scale):
    """The examples of docs/coming-from.md, at a ratio below and above the rate."""
    w, g = np.array([3.0, 4.0]) * scale, np.array([0.4, 0.3])
    p = torch.nn.Parameter(torch.tensor(w))
    p.grad = torch.tensor(g)
    timm_lars([p], lr=0.1, trust_coeff=0.02, always_adapt=True, trust_clip=True, eps=0).step()
    ours = lt.lars_update(w, g, 0.1, trust_coefficient=0.02, trust_clip=True)
    np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-15)
    assert not np.allclose(ours, lt.lars_update(w, g, 0.1, trust_coefficient=0.02))
