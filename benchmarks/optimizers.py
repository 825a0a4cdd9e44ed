"""Steps with momentum that are compared: optimizers, from the same weights and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestants import (
    DECAY,
    LR,
    OVERWRITES,
    TRUST,
    Case,
    Contestant,
    as_torch,
    optimizer,
    pytorch_lars,
    rate_by_hand,
    timm_lars,
)
from benchmarks.trees import Flat, small, weights_and_gradients
from lars_tree import Container, Lars

MOMENTUM = 0.9


def _functional(convert: Callable[[np.ndarray], Any]) -> Callable[[Flat, Flat, bool], Case]:
    def build(w: Flat, g: Flat, in_place: bool) -> Case:
        weights, gradients = (
            Container.from_flat({path: convert(x) for path, x in flat.items()}) for flat in (w, g)
        )
        opt = Lars(LR, MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST)
        state = opt.init(weights)
        return Case(
            lambda: opt.update(weights, gradients, state, out=weights)[0],
            lambda new: {path: np.asarray(x) for path, x in new.to_flat().items()},
        )

    return build


def _torch_lars() -> Any:
    from lars_tree.torch import Lars

    return Lars


def _sgd() -> Any:
    from torch.optim import SGD

    return SGD


def _contestant(
    name: str, module: str, build: Callable[[Flat, Flat, bool], Case], note: str = ""
) -> Contestant:
    return Contestant(name, build, module, out_of_place=False, allocates=True, note=note)


_NO_VECTORS = f"{OVERWRITES}; one-dimensional leaves take plain SGD without norms or decay"
OPTIMIZERS = {
    contestant.name: contestant
    for contestant in [
        _contestant("lars_tree.torch.Lars", "torch", optimizer(_torch_lars, momentum=MOMENTUM)),
        _contestant("lars_tree.Lars, numpy", "lars_tree", _functional(np.copy)),
        _contestant("lars_tree.Lars, torch", "torch", _functional(as_torch)),
        _contestant(
            "torch SGD, fused",
            "torch",
            optimizer(_sgd, momentum=MOMENTUM, fused=True),
            "takes no norms",
        ),
        _contestant(
            "pytorch_optimizer, momentum",
            "pytorch_optimizer",
            optimizer(pytorch_lars, momentum=MOMENTUM),
            _NO_VECTORS,
        ),
        _contestant(
            "pytorch_optimizer, momentum, no foreach",
            "pytorch_optimizer",
            optimizer(pytorch_lars, momentum=MOMENTUM, foreach=False),
            "the same",
        ),
        _contestant(
            "timm, momentum",
            "timm",
            optimizer(timm_lars, momentum=MOMENTUM, trust_coeff=TRUST),
        ),
        _contestant(
            "timm, momentum, foreach",
            "timm",
            optimizer(timm_lars, momentum=MOMENTUM, trust_coeff=TRUST, foreach=True),
        ),
    ]
}
PEERS = {name for name in OPTIMIZERS if name.startswith(("timm", "pytorch_optimizer"))}


def check(contestants: dict[str, Contestant]) -> None:
    """Refuse to time an optimizer that does not take two steps with momentum as by hand.

    Within 1% along a kernel, those of lars_tree within rounding for the bias too. SGD is another.
    """
    w, g = weights_and_gradients(small(2))
    hand = {path: _by_hand(x.astype(float), g[path].astype(float)) for path, x in w.items()}
    for name, contestant in contestants.items():
        if name.startswith("torch SGD"):
            continue
        case = contestant.build(w, {path: x.copy() for path, x in g.items()}, True)
        case.step()
        if name.startswith("pytorch_optimizer"):  # it overwrites the gradients: one step is enough
            case = contestant.build(w, g, True)
            expected = {path: two[0] for path, two in hand.items()}
        else:
            expected = {path: two[1] for path, two in hand.items()}
        new = case.read(case.step())
        for path, x in new.items():
            exact = expected[path] - w[path]
            error = np.linalg.norm(x - w[path] - exact) / np.linalg.norm(exact)
            assert error < 0.01 or not path.endswith("kernel"), (name, path, error)
            if name.startswith("lars_tree"):
                assert np.allclose(x, expected[path], rtol=1e-5, atol=0), (name, path)


def _by_hand(x: np.ndarray, dx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights after one step and after two."""
    first = rate_by_hand(x, dx) * (dx + DECAY * x)
    once = x - first
    second = MOMENTUM * first + rate_by_hand(once, dx) * (dx + DECAY * once)
    return once, once - second
