"""The cost of a leaf that the kernel does not support, or of an option that needs all norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.contestants import DECAY, LR, MOMENTUM, TRUST, as_torch
from benchmarks.groups import Group, Step, Steps
from benchmarks.trees import Flat, resnet50, weights_and_gradients
from lars_tree import Array, Container, Lars, lars_update
from lars_tree.report import trust_ratios

SHAPE, LEAVES = (16, 16), [f"layer{n}" for n in range(1000)]
ODD = LEAVES[3]
RULE = {"decay_lambda": DECAY, "trust_coefficient": TRUST}
OPTIONS = {"weight_decay": DECAY, "trust_coefficient": TRUST}

ORDINARY = "ordinary step"
ODD_LEAVES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "one Array": lambda x, dx: (Array(x), dx),
    "one strided weight": lambda x, dx: (np.repeat(x, 2, axis=1)[:, ::2], dx),
    "one Fortran-ordered weight": lambda x, dx: (np.asfortranarray(x), dx),
    "one Fortran-ordered gradient": lambda x, dx: (x, np.asfortranarray(dx)),
    "one scalar gradient": lambda x, _: (x, 0.01),
    "one complex leaf": lambda x, dx: (x.astype("complex64"), dx.astype("complex64")),
    "one integer leaf without gradient": lambda x, _: (x.astype(int), None),
}
ODD_OPTIONS: dict[str, dict[str, Any]] = {
    "one rate with a shape": {"lr": dict.fromkeys(LEAVES, LR) | {ODD: np.full(SHAPE, LR)}},
    "layer_axis of one leaf": {"layer_axis": dict.fromkeys(LEAVES) | {ODD: 0}},
}
SKIP = "nonfinite='skip'"
NONFINITE = {f"nonfinite={x!r}": {"nonfinite": x} for x in ("skip", "raise")}
ODD_PARAMETERS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    ORDINARY: lambda x, dx: (x, dx),
    "one gradient in another memory order": lambda x, dx: (x, dx.t().contiguous().t()),
    "one complex parameter": lambda x, dx: (x.cfloat(), dx.cfloat()),
}


def _small() -> tuple[Flat, Flat]:
    return weights_and_gradients(dict.fromkeys(LEAVES, SHAPE))


def _in_place(w: Flat, g: Flat, lr: Any = LR, **options: Any) -> Step:
    weights, gradients = Container(w), Container(g)
    return lambda: lars_update(weights, gradients, lr, out=weights, **RULE, **options)


def _out_of_place(w: Flat, g: Flat) -> Step:
    return partial(lars_update, Container(w), Container(g), LR, **RULE)


def _numpy_in_place() -> Steps:
    w, g = _small()
    steps = {ORDINARY: _in_place(w, g)}
    for name, change in ODD_LEAVES.items():
        x, dx = change(w[ODD], g[ODD])
        steps[name] = _in_place(w | {ODD: x}, g | {ODD: dx})
    options = ODD_OPTIONS | NONFINITE
    return steps | {name: _in_place(w, g, **given) for name, given in options.items()}


def _numpy_out_of_place() -> Steps:
    w, g = _small()
    return {ORDINARY: _out_of_place(w, g), "one None gradient": _out_of_place(w, g | {ODD: None})}


def _resnet() -> Steps:
    w, g = weights_and_gradients(resnet50())
    return {
        ORDINARY: _in_place(w, g),
        **{name: _in_place(w, g, **given) for name, given in NONFINITE.items()},
        "trust_ratios": partial(trust_ratios, Container(w), Container(g), LR, **RULE),
    }


def _optimizer() -> Steps:
    def update(**options: Any) -> Step:
        w, g = map(Container, _small())
        lars = Lars(LR, MOMENTUM, **OPTIONS, **options)
        state = lars.init(w)
        return lambda: lars.update(w, g, state, out=w)

    return {ORDINARY: update(), SKIP: update(nonfinite="skip")}


def _jax() -> Steps:
    """Steps of JAX arrays, which are immutable; the base only creates the new arrays."""
    import jax
    import jax.numpy as jnp

    w, g = ({path: jnp.asarray(x) for path, x in flat.items()} for flat in _small())
    values, step = list(_small()[0].values()), _out_of_place(w, g)
    return {
        "creating the arrays": lambda: jax.block_until_ready([jnp.asarray(x) for x in values]),
        "eager step": lambda: jax.block_until_ready(list(step().values())),
    }


def _torch() -> Steps:
    from lars_tree.torch import Lars

    def step(change: Callable[[Any, Any], tuple[Any, Any]]) -> Step:
        w, g = ({path: as_torch(x) for path, x in flat.items()} for flat in _small())
        w[ODD], g[ODD] = change(w[ODD], g[ODD])
        for path, x in w.items():
            x.requires_grad_().grad = g[path]
        return Lars(w.values(), LR, MOMENTUM, **OPTIONS).step

    return {name: step(change) for name, change in ODD_PARAMETERS.items()}


_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

# The bounds allow 0.15 ms of overhead for a step of 0.40 ms, and 0.3 ms for a torch step of 2.1 ms.
GROUPS = [
    Group(
        "1,000 leaves, in place",
        _numpy_in_place,
        ORDINARY,
        dict.fromkeys(ODD_LEAVES | ODD_OPTIONS, 1.4) | dict.fromkeys(NONFINITE, 2.5),
    ),
    Group("1,000 leaves, out of place", _numpy_out_of_place, ORDINARY, {"one None gradient": 1.15}),
    Group("1,000 leaves, Lars.update", _optimizer, ORDINARY, {SKIP: 2.1}),
    Group(
        "ResNet-50, in place",
        _resnet,
        ORDINARY,
        dict.fromkeys(NONFINITE, 1.8) | {"trust_ratios": 0.7},
    ),
    Group("1,000 JAX arrays", _jax, "creating the arrays", {"eager step": 1.5}, "jax"),
    Group(
        "1,000 parameters, torch.Lars",
        _torch,
        ORDINARY,
        {name: 1.14 for name in ODD_PARAMETERS if name != ORDINARY},
        "torch",
    ),
    Group(
        "FSDP2, 2 processes",
        None,
        "torch SGD",
        {"lars_tree.torch.Lars": 2.45},
        "torch",
        arguments=(*_TORCHRUN, "-m", "benchmarks.shards"),
    ),
]
