"""Runs on real images that all JAX clients train on: the loss falls, and a run can be continued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from conftest import need

OPTIONS = {"weight_decay": 1e-3, "trust_coefficient": 1.0, "nonfinite": "skip"}
RATE = 0.05
STEPS = 8


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of 64 images of 8 x 8 pixels, with their digits; the first is repeated."""
    x, y = need("sklearn.datasets").load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return [(x[i : i + 64], y[i : i + 64]) for i in (0, 64, 128, 192)] * (STEPS // 4)


def run(
    step: Callable[..., Any], state: Any, start: int = 0, stop: int = STEPS
) -> tuple[Any, list]:
    """The state after these steps, and their losses; `step` returns the new state and the loss."""
    losses = []
    for x, y in batches()[start:stop]:
        state, loss = step(state, x, y)
        losses.append(float(loss))
    return state, losses


def assert_trained(losses: list[float]) -> None:
    assert len(losses) == STEPS
    assert losses[-1] < 0.5 * losses[0]


def leaves(tree: Any) -> list[np.ndarray]:
    jax = need("jax")
    return [np.asarray(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


def assert_same(actual: Any, expected: Any) -> None:
    """The same arrays, bit for bit, in the same order."""
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    assert pairs
    for x, y in pairs:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_close(actual: Any, expected: Any) -> None:
    """The same arrays, up to rounding errors of gradients in differently compiled programs."""
    for x, y in zip(leaves(actual), leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
