"""The steps that are compared: of the same kind, from the same weights and gradients.

What a package does differently is in its note, which the report prints.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Collection
from contextlib import chdir
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.trees import Flat, small, weights_and_gradients
from lars_tree import Container

LR, DECAY, TRUST = 0.1, 1e-4, 1e-3


@dataclass(frozen=True)
class Case:
    """One contestant on one tree: `step` returns the new weights, `read` makes them a flat dict."""

    step: Callable[[], Any]
    read: Callable[[Any], Flat]


@dataclass(frozen=True)
class Contestant:
    """A way to take the step; `build` gets weights, gradients and whether to step in place."""

    name: str
    build: Callable[[Flat, Flat, bool], Case]
    module: str
    out_of_place: bool = True
    allocates: bool = False  # in its first step: what it compiles, or keeps for all steps
    note: str = ""

    @property
    def ways(self) -> tuple[bool, ...]:
        """In place, and out of place where it can."""
        return (True, False) if self.out_of_place else (True,)

    @property
    def installed(self) -> bool:
        """Whether it can be imported; it is not imported for that."""
        return importlib.util.find_spec(self.module) is not None


def _lars_tree(convert: Callable[[np.ndarray], Any]) -> Callable[[Flat, Flat, bool], Case]:
    def build(w: Flat, g: Flat, in_place: bool) -> Case:
        weights, gradients = (
            Container.from_flat({path: convert(x) for path, x in flat.items()}) for flat in (w, g)
        )
        out = weights if in_place else None

        def step() -> Container:
            return weights.lars_update(
                gradients, LR, decay_lambda=DECAY, trust_coefficient=TRUST, out=out
            )

        return Case(step, lambda new: {path: np.asarray(x) for path, x in new.to_flat().items()})

    return build


def as_torch(x: np.ndarray) -> Any:
    """A copy in memory of torch's own."""
    import torch

    return torch.from_numpy(x).clone()


def rate_by_hand(x: np.ndarray, dx: np.ndarray) -> float:
    """The local rate of one leaf."""
    x_norm, dx_norm = float(np.linalg.norm(x)), float(np.linalg.norm(dx))
    denominator = dx_norm + DECAY * x_norm
    return LR * TRUST * x_norm / denominator if x_norm and denominator else LR


def _by_hand(w: Flat, g: Flat, in_place: bool) -> Case:
    weights = {path: x.copy() for path, x in w.items()}

    def step_in_place() -> Flat:
        for path, x in weights.items():
            r = rate_by_hand(x, g[path])
            np.multiply(x, 1 - r * DECAY, out=x)
            np.subtract(x, r * g[path], out=x)
        return weights

    def step() -> Flat:
        new = {}
        for path, x in weights.items():
            r = rate_by_hand(x, g[path])
            new[path] = (1 - r * DECAY) * x
            new[path] -= r * g[path]
        return new

    return Case(step_in_place if in_place else step, dict)


def optimizer(lars: Callable[[], Any], **options: Any) -> Callable[[Flat, Flat, bool], Case]:
    """Builds cases of a class of torch optimizers, given as a function that imports it."""

    def build(w: Flat, g: Flat, in_place: bool) -> Case:
        parameters = {path: as_torch(x).requires_grad_() for path, x in w.items()}
        for path, x in g.items():
            parameters[path].grad = as_torch(x)
        opt = lars()(parameters.values(), lr=LR, weight_decay=DECAY, **options)

        def step() -> dict[str, Any]:
            opt.step()
            return parameters

        return Case(step, lambda new: {path: x.detach().numpy() for path, x in new.items()})

    return build


def pytorch_lars() -> Any:
    """The class of pytorch_optimizer."""
    from pytorch_optimizer import LARS

    return LARS


def timm_lars() -> Any:
    """The class of timm, from its module alone: `import timm` loads all models, and torchvision."""
    for name in ("timm", "timm.optim"):
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None, name
            sys.modules[name] = importlib.util.module_from_spec(spec)  # not executed
    return importlib.import_module("timm.optim.lars").Lars


def _optax(w: Flat, g: Flat, in_place: bool) -> Case:
    import jax
    import optax

    cpu = jax.devices("cpu")[0]
    weights, gradients = (
        jax.tree.map(
            lambda x: jax.numpy.array(x, copy=True, device=cpu), Container.from_flat(flat).to_dict()
        )
        for flat in (w, g)
    )
    optimizer = optax.chain(  # optax.lars less its last part, which keeps the momentum
        optax.add_decayed_weights(DECAY),
        optax.scale_by_trust_ratio(trust_coefficient=TRUST),
        optax.scale_by_learning_rate(LR),
    )
    state = optimizer.init(weights)

    def update(w: Any, g: Any) -> Any:
        return optax.apply_updates(w, optimizer.update(g, state, w)[0])

    compiled = jax.jit(update, donate_argnums=0 if in_place else ())

    def step() -> Any:
        nonlocal weights
        new = jax.block_until_ready(compiled(weights, gradients))
        if in_place:
            weights = new
        return new

    return Case(
        step, lambda new: {path: np.asarray(x) for path, x in Container(new).to_flat().items()}
    )


def _ivy(w: Flat, g: Flat, in_place: bool) -> Case:
    with TemporaryDirectory() as folder, chdir(folder):  # it opens a log where it is imported
        import ivy

    ivy.set_backend("numpy")
    weights, gradients = (
        ivy.Container(Container.from_flat({k: ivy.array(x.copy()) for k, x in flat.items()}))
        for flat in (w, g)
    )
    out = weights if in_place else None

    def step() -> Any:
        return weights.lars_update(gradients, LR, decay_lambda=DECAY, stop_gradients=False, out=out)

    def read(new: Any) -> Flat:
        flat = Container(new.cont_to_dict()).to_flat()
        return {path: np.asarray(x.data) for path, x in flat.items()}

    return Case(step, read)


OVERWRITES = "overwrites the gradients"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in [
        Contestant("lars_tree, numpy", _lars_tree(np.copy), "lars_tree"),
        Contestant("lars_tree, torch", _lars_tree(as_torch), "torch"),
        Contestant("numpy by hand", _by_hand, "numpy", note="norms in float32"),
    ]
}
PEERS = {
    contestant.name: contestant
    for contestant in [
        Contestant(
            "pytorch_optimizer",
            optimizer(pytorch_lars, momentum=0.0),
            "pytorch_optimizer",
            out_of_place=False,
            note=f"{OVERWRITES}; one-dimensional leaves take plain SGD without norms or decay",
        ),
        Contestant(
            "pytorch_optimizer, no foreach",
            optimizer(pytorch_lars, momentum=0.0, foreach=False),
            "pytorch_optimizer",
            out_of_place=False,
            note="the same",
        ),
        Contestant(
            "timm",
            optimizer(timm_lars, momentum=0.0, trust_coeff=TRUST),
            "timm",
            out_of_place=False,
        ),
        Contestant(
            "timm, foreach",
            optimizer(timm_lars, momentum=0.0, trust_coeff=TRUST, foreach=True),
            "timm",
            out_of_place=False,
        ),
        Contestant(
            "optax, jitted",
            _optax,
            "optax",
            allocates=True,
            note="the norm of g + decay w; in place: donated; without its momentum buffer",
        ),
        Contestant("ivy", _ivy, "ivy", note="no trust coefficient; with decay another step"),
    ]
}
CONTESTANTS |= PEERS


def present(
    everyone: dict[str, Contestant], peers: Collection[str], without: list[str]
) -> dict[str, Contestant]:
    """Those that are installed, less the peers that a word of `without` names."""
    return {
        name: contestant
        for name, contestant in everyone.items()
        if contestant.installed and not (name in peers and any(word in name for word in without))
    }


def check(contestants: dict[str, Contestant]) -> None:
    """Refuse to time a contestant that does not take the step, tried on two small leaves.

    All results are finite and differ from the old weights. Steps along the kernel agree within 1%
    (optax takes another norm; ivy another step), those of lars_tree and by hand for the bias too.
    """
    w, g = weights_and_gradients(small(2))
    hand = _by_hand(w, g, False).step()
    for name, contestant in contestants.items():
        ours = name.startswith("lars_tree")
        for in_place in contestant.ways:
            case = contestant.build(w, g, in_place)
            new = case.read(case.step())
            assert new.keys() == w.keys(), name
            for path, x in new.items():
                assert np.isfinite(x).all(), (name, path)
                assert (x != w[path]).any(), (name, path)
                exact = hand[path] - w[path]
                error = np.linalg.norm(x - w[path] - exact) / np.linalg.norm(exact)
                comparable = ours or (path.endswith("kernel") and name != "ivy")
                assert error < 0.01 or not comparable, (name, path, error)
                assert not ours or np.allclose(x, hand[path], rtol=1e-5, atol=0), (name, path)
