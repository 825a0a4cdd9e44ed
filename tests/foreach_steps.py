"""Steps of the foreach engine, for tests."""

from __future__ import annotations

from conftest import need

torch = need("torch")

from lars_tree._backends.torch import foreach  # noqa: E402
from lars_tree._backends.torch.layers import Layer  # noqa: E402
from lars_tree._numerics.formula import Rule  # noqa: E402


def layer(w, g, velocity=None, out=None, **options):
    return Layer(
        w, g, w if out is None else out, velocity, Rule(**{"lr_before_momentum": 0.1} | options)
    )


def step(layers, unless=None):
    engine = foreach.Foreach(layers)
    engine.write(engine.norms(), unless)


def velocity_like(w):
    return torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
