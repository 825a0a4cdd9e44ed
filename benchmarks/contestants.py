"""The steps that are compared. All start from the same weights and gradients.

If a package computes a different step, its `note` says so; the report prints the notes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.trees import Flat, small, weights_and_gradients
from lars_tree import Container, Lars

LR, DECAY, TRUST, MOMENTUM = 0.1, 1e-4, 1e-3, 0.9


@dataclass(frozen=True)
class Case:
    """A contestant on one tree: `step` returns the new weights, `read` converts them to Flat."""

    step: Callable[[], Any]
    read: Callable[[Any], Flat]


Build = Callable[[Flat, Flat, bool], Case]  # weights, gradients, whether to step in place


@dataclass(frozen=True)
class Contestant:
    """One implementation of the step."""

    name: str
    build: Build
    module: str
    out_of_place: bool = True
    allocates: bool = False  # the first step compiles code, or allocates state
    peer: bool = False  # whether it belongs to another package
    comparable: bool = True  # whether its step should equal the step by hand
    note: str = ""

    @property
    def ways(self) -> tuple[bool, ...]:
        """The values of `in_place` that are supported."""
        return (True, False) if self.out_of_place else (True,)

    @property
    def installed(self) -> bool:
        """Whether the module is installed; does not import it."""
        return importlib.util.find_spec(self.module) is not None


def as_torch(x: np.ndarray) -> Any:
    """A copy in memory allocated by torch."""
    import torch

    return torch.from_numpy(x).clone()


def _containers(convert: Callable[[np.ndarray], Any], *flats: Flat) -> list[Container]:
    return [Container.from_flat({path: convert(x) for path, x in flat.items()}) for flat in flats]


def _read(new: Any) -> Flat:
    return {path: np.asarray(x) for path, x in Container(new).to_flat().items()}


def _lars_tree(convert: Callable[[np.ndarray], Any], w: Flat, g: Flat, in_place: bool) -> Case:
    weights, gradients = _containers(convert, w, g)
    options = {"decay_lambda": DECAY, "trust_coefficient": TRUST}
    if in_place:
        options["out"] = weights
    return Case(lambda: weights.lars_update(gradients, LR, **options), _read)


def _functional(convert: Callable[[np.ndarray], Any], w: Flat, g: Flat, in_place: bool) -> Case:
    weights, gradients = _containers(convert, w, g)
    opt = Lars(LR, MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST)
    state = opt.init(weights)
    return Case(lambda: opt.update(weights, gradients, state, out=weights)[0], _read)


def _rate_by_hand(x: np.ndarray, dx: np.ndarray) -> float:
    x_norm, dx_norm = float(np.linalg.norm(x)), float(np.linalg.norm(dx))
    denominator = dx_norm + DECAY * x_norm
    return LR * TRUST * x_norm / denominator if x_norm and denominator else LR


def _by_hand(w: Flat, g: Flat, in_place: bool) -> Case:
    weights = {path: x.copy() for path, x in w.items()}

    def step_in_place() -> Flat:
        for path, x in weights.items():
            r = _rate_by_hand(x, g[path])
            np.multiply(x, 1 - r * DECAY, out=x)
            np.subtract(x, r * g[path], out=x)
        return weights

    def step() -> Flat:
        new = {}
        for path, x in weights.items():
            r = _rate_by_hand(x, g[path])
            new[path] = (1 - r * DECAY) * x
            new[path] -= r * g[path]
        return new

    return Case(step_in_place if in_place else step, dict)


def _optimizer(find: Callable[[], Any], **options: Any) -> Build:
    """Return a function that builds cases of a torch optimizer; `find` imports its class."""

    def build(w: Flat, g: Flat, in_place: bool) -> Case:
        parameters = {path: as_torch(x).requires_grad_() for path, x in w.items()}
        for path, x in g.items():
            parameters[path].grad = as_torch(x)
        opt = find()(parameters.values(), lr=LR, weight_decay=DECAY, **options)

        def step() -> dict[str, Any]:
            opt.step()
            return parameters

        return Case(step, lambda new: {path: x.detach().numpy() for path, x in new.items()})

    return build


def torch_lars() -> Any:
    """Import the optimizer of lars_tree for torch."""
    from lars_tree.torch import Lars

    return Lars


def sgd() -> Any:
    """Import the SGD of torch."""
    from torch.optim import SGD

    return SGD


def pytorch_lars() -> Any:
    """Import the LARS of pytorch_optimizer."""
    from pytorch_optimizer import LARS

    return LARS


def timm_lars() -> Any:
    """Import only the module of Lars: `import timm` imports all models, and torchvision."""
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
        jax.tree.map(lambda x: jax.numpy.array(x, copy=True, device=cpu), tree.to_dict())
        for tree in _containers(np.asarray, w, g)
    )
    optimizer = optax.chain(  # optax.lars without momentum, its last part
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

    return Case(step, _read)


def _ivy(w: Flat, g: Flat, in_place: bool) -> Case:
    with TemporaryDirectory() as folder, chdir(folder):  # ivy writes a log file on import
        import ivy

    ivy.set_backend("numpy")
    weights, gradients = (
        ivy.Container(tree) for tree in _containers(lambda x: ivy.array(x.copy()), w, g)
    )
    out = weights if in_place else None

    def step() -> Any:
        return weights.lars_update(gradients, LR, decay_lambda=DECAY, stop_gradients=False, out=out)

    def read(new: Any) -> Flat:
        flat = Container(new.cont_to_dict()).to_flat()
        return {path: np.asarray(x.data) for path, x in flat.items()}

    return Case(step, read)


def _by_name(*contestants: Contestant) -> dict[str, Contestant]:
    return {contestant.name: contestant for contestant in contestants}


_PYTORCH = {
    "module": "pytorch_optimizer",
    "out_of_place": False,
    "peer": True,
    "note": "overwrites the gradients; takes an SGD step without decay on one-dimensional leaves",
}
_TIMM = {"module": "timm", "out_of_place": False, "peer": True}
CONTESTANTS = _by_name(
    Contestant("lars_tree, numpy", partial(_lars_tree, np.copy), "lars_tree"),
    Contestant("lars_tree, torch", partial(_lars_tree, as_torch), "torch"),
    Contestant("numpy by hand", _by_hand, "numpy", note="computes norms in float32"),
    Contestant("pytorch_optimizer", _optimizer(pytorch_lars, momentum=0.0), **_PYTORCH),
    Contestant(
        "pytorch_optimizer, no foreach",
        _optimizer(pytorch_lars, momentum=0.0, foreach=False),
        **_PYTORCH,
    ),
    Contestant("timm", _optimizer(timm_lars, momentum=0.0, trust_coeff=TRUST), **_TIMM),
    Contestant(
        "timm, foreach",
        _optimizer(timm_lars, momentum=0.0, trust_coeff=TRUST, foreach=True),
        **_TIMM,
    ),
    Contestant(
        "optax, jitted",
        _optax,
        "optax",
        allocates=True,
        peer=True,
        note="uses the norm of g + decay w; has no momentum buffer; in place, donates its buffers",
    ),
    Contestant(
        "ivy",
        _ivy,
        "ivy",
        peer=True,
        comparable=False,
        note="has no trust coefficient; with decay, follows another rule",
    ),
)

_KEEPS = {"out_of_place": False, "allocates": True}  # keeps a velocity
OPTIMIZERS = _by_name(
    Contestant(
        "lars_tree.torch.Lars",
        _optimizer(torch_lars, momentum=MOMENTUM),
        "torch",
        **_KEEPS,
    ),
    Contestant("lars_tree.Lars, numpy", partial(_functional, np.copy), "lars_tree", **_KEEPS),
    Contestant("lars_tree.Lars, torch", partial(_functional, as_torch), "torch", **_KEEPS),
    Contestant(
        "torch SGD, fused",
        _optimizer(sgd, momentum=MOMENTUM, fused=True),
        "torch",
        comparable=False,
        note="computes no norms",
        **_KEEPS,
    ),
    Contestant(
        "pytorch_optimizer, momentum",
        _optimizer(pytorch_lars, momentum=MOMENTUM),
        **_PYTORCH | _KEEPS,
    ),
    Contestant(
        "pytorch_optimizer, momentum, no foreach",
        _optimizer(pytorch_lars, momentum=MOMENTUM, foreach=False),
        **_PYTORCH | _KEEPS,
    ),
    Contestant(
        "timm, momentum",
        _optimizer(timm_lars, momentum=MOMENTUM, trust_coeff=TRUST),
        **_TIMM | _KEEPS,
    ),
    Contestant(
        "timm, momentum, foreach",
        _optimizer(timm_lars, momentum=MOMENTUM, trust_coeff=TRUST, foreach=True),
        **_TIMM | _KEEPS,
    ),
)


def present(everyone: dict[str, Contestant], without: list[str]) -> dict[str, Contestant]:
    """The installed contestants, except peers whose names contain a word of `without`."""
    return {
        name: x
        for name, x in everyone.items()
        if x.installed and not (x.peer and any(word in name for word in without))
    }


def check(contestants: dict[str, Contestant], momentum: float = 0.0) -> None:
    """Check on two small leaves that each contestant computes the step.

    The step of the kernel must be within 1% of the step by hand, unless the contestant follows
    another rule. The new weights of lars_tree must agree within rounding errors, for the bias too.
    """
    w, g = weights_and_gradients(small(2))
    for name, contestant in contestants.items():
        # A second step tests the momentum; pytorch_optimizer has overwritten the gradients by then.
        steps = 2 if momentum and not name.startswith("pytorch_optimizer") else 1
        for in_place in contestant.ways:
            case = contestant.build(w, g, in_place)
            for _ in range(steps):
                result = case.step()
            new = case.read(result)
            assert new.keys() == w.keys(), name
            for path, x in new.items():
                expected = _expected(w[path], g[path], momentum, steps)
                error = np.linalg.norm(x - expected) / np.linalg.norm(expected - w[path])
                assert np.isfinite(x).all(), (name, path)
                assert (x != w[path]).any(), (name, path)
                if name.startswith("lars_tree"):
                    assert np.allclose(x, expected, rtol=1e-5, atol=0), (name, path)
                elif contestant.comparable and path.endswith("kernel"):
                    assert error < 0.01, (name, path, error)


def _expected(x: np.ndarray, dx: np.ndarray, momentum: float, steps: int) -> np.ndarray:
    """The weights after some steps, in float64."""
    x, dx = x.astype(float), dx.astype(float)
    velocity = np.zeros_like(x)
    for _ in range(steps):
        velocity = momentum * velocity + _rate_by_hand(x, dx) * (dx + DECAY * x)
        x = x - velocity
    return x
