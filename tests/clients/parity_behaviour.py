"""The tables of names, defaults and behaviour of each package."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import torch
from jax import numpy as jnp
from pytorch_optimizer import LARS

import lars_tree as lt
from lars_tree.torch import Lars
from tests.clients.parity_steps import NONE, RUNS, Case, Table, Timm, ivy, number


def shared_memory(optimizer: Any) -> str:
    """Two parameters with the same memory: how many steps their weights take."""
    x = torch.tensor([[3.0, 4.0]])
    parameters = [torch.nn.Parameter(x), torch.nn.Parameter(x)]
    for p in parameters:
        p.grad = torch.tensor([[0.4, 0.3]])
    try:
        optimizer(parameters, lr=0.1, momentum=0.9).step()
    except lt.OutError:
        return "`OutError`"
    single = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    single.grad = torch.tensor([[0.4, 0.3]])
    optimizer([single], lr=0.1, momentum=0.9).step()
    return "one step" if torch.equal(single.data, x) else "two steps"


def ivy_shared_memory() -> str:
    w = ivy.Container(a=ivy.array([3.0, 4.0]))
    w.b = w.a
    g = ivy.Container(a=ivy.array([0.4, 0.3]), b=ivy.array([0.4, 0.3]))
    w.lars_update(g, 0.1, out=w)
    return "one step" if np.allclose(np.array(w.a), [2.6, 3.7]) else "two steps"


def other_layers(optimizer: Any) -> str:
    """What the second layer does if the gradient of the first has a NaN."""
    p, q = (torch.nn.Parameter(torch.tensor([[3.0, 4.0]])) for _ in range(2))
    p.grad, q.grad = torch.tensor([[torch.nan, 0.3]]), torch.tensor([[0.4, 0.3]])
    optimizer([p, q], lr=0.1, momentum=0.9).step()
    return "no step" if torch.equal(q.data, torch.tensor([[3.0, 4.0]])) else "step"


def our_other_layers() -> str:
    w, g = {"a": np.array([3.0, 4.0]), "b": np.ones(1)}, {"a": np.array([np.nan, 1]), "b": 1.0}
    moved, kept = (lt.lars_update(w, g, 0.1, nonfinite=way) for way in ("propagate", "skip"))
    assert kept["b"] == 1.0
    return "no step" if moved["b"] == 1.0 else 'step; with `nonfinite="skip"` none'


def optax_other_layers() -> str:
    w = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}
    opt = optax.lars(0.1)
    updates, _ = opt.update({"a": jnp.array([jnp.nan, 1]), "b": jnp.ones(1)}, opt.init(w), w)
    return "step" if updates["b"] != 0 else "no step"


def ivy_other_layers() -> str:
    w = ivy.Container(a=ivy.array([3.0, 4.0]), b=ivy.array([1.0]))
    new = w.lars_update(ivy.Container(a=ivy.array([np.nan, 1]), b=ivy.array([1.0])), 0.1)
    return "step" if np.array(new.b) != 1 else "no step"


def velocity(optimizer: Any) -> str:
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    opt = optimizer([p], lr=0.1, momentum=0.9)
    opt.step()
    return str(opt.state[p]["momentum_buffer"].dtype).removeprefix("torch.")


def optax_velocity() -> str:
    trace = optax.tree.get(optax.lars(0.1).init({"a": jnp.ones(2, jnp.bfloat16)}), "trace")
    return str(trace["a"].dtype)


def misspelt(step: Callable[[Any, Any], Any], make: Callable[[Any], Any]) -> str:
    """Whether a misspelt key in the gradients is an error, and whether that names the path."""
    w, g = ({"kernel": 1.0, key: 1.0} for key in ("bias", "bais"))
    try:
        step(*({"encoder": {k: make(x) for k, x in tree.items()}} for tree in (w, g)))
    except Exception as error:  # whatever the package raises
        return f"error with{'' if 'encoder' in str(error) else 'out'} {{}} path"
    return "no error"


def behaviour() -> Table:
    ours, timm, pytorch = RUNS["here"], RUNS["timm"], RUNS["pytorch_optimizer"]
    columns = ["here", "timm", "optax", "pytorch_optimizer", "SGD", "ivy"]
    runs = [ours, timm, RUNS["optax"], pytorch, RUNS["SGD"], RUNS["ivy"]]
    changed = [run(Case(decay=0.1)) for run in runs]
    # JAX arrays are immutable.
    reads = [
        "overwritten" if found and found.gradient_changed else "only read" for found in changed
    ]

    def optax_step(w: Any, g: Any) -> Any:
        opt = optax.lars(0.1)
        return opt.update(g, opt.init(w), w)

    def ivy_step(w: Any, g: Any) -> Any:
        return ivy.Container(w).lars_update(ivy.Container(g), 0.1)

    keys = [
        misspelt(lambda w, g: lt.lars_update(w, g, 0.1), np.array),
        NONE,
        misspelt(optax_step, jnp.array),
        NONE,
        NONE,
        misspelt(ivy_step, lambda x: ivy.array([x])),
    ]
    keys = [text.replace("with {}", "with its").replace("without {}", "without") for text in keys]
    sgd = torch.optim.SGD
    return [
        ["", *columns],
        ["gradients", *reads],
        [
            "two weights that share memory, in place",
            *(shared_memory(Lars), shared_memory(Timm), NONE, shared_memory(LARS)),
            *(shared_memory(sgd), ivy_shared_memory()),
        ],
        [
            "NaN in one layer: the other layers",
            *(our_other_layers(), other_layers(Timm), optax_other_layers(), other_layers(LARS)),
            *(other_layers(sgd), ivy_other_layers()),
        ],
        [
            "velocity of bfloat16 weights",
            *(velocity(Lars), velocity(Timm), optax_velocity(), velocity(LARS)),
            *(velocity(sgd), NONE),
        ],
        ["a misspelt key in a tree", *keys],
    ]


# Names and defaults

NO_DEFAULT = inspect.Parameter.empty


def parameters(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in found.items()}


# What the signature does not say, by our option and package; the name that the package uses for it.
NOTES = {
    (
        "adapt",
        "timm",
    ): 'only with decay (as `adapt="decayed"` in `torch.Lars`), unless `always_adapt`',
    ("adapt", "optax"): "`trust_ratio_mask`",
    ("adapt", "pytorch_optimizer"): "with two or more axes",
    ("dampening", "pytorch_optimizer"): "of the first step too",
    **{("grad_scale", package): "`GradScaler`" for package in ("timm", "pytorch_optimizer", "SGD")},
    ("joint_norm", "optax"): "always",
    ("nonfinite", "optax"): "`apply_if_finite`",
}
NAMES = {"trust_coefficient": "trust_coeff", "lr": "learning_rate"}


def shown(value: Any) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return f'"{text}"' if isinstance(value, str) else text


def names() -> Table:
    update, functional, in_torch = map(parameters, (lt.lars_update, lt.Lars, Lars))
    others = {
        "timm": parameters(Timm),
        "optax": parameters(optax.lars),
        "pytorch_optimizer": parameters(LARS),
        "SGD": parameters(torch.optim.SGD),
    }
    heads = ["`lars_update`", "`lt.Lars`, `torch.Lars`", "timm `Lars`", "`optax.lars`"]
    rows = [[*heads, "pytorch_optimizer `LARS`", "torch `SGD`"]]
    for option in (
        *("lr", "weight_decay", "trust_coefficient", "momentum", "nesterov", "dampening", "eps"),
        *("adapt", "trust_clip", "joint_norm", "maximize", "layer_axis", "grad_scale", "nonfinite"),
    ):
        rows.append([of_update(option, update), of_ours(option, functional, in_torch)])
        rows[-1] += [
            NOTES.get((option, package)) or of_other(option, known, functional, in_torch)
            for package, known in others.items()
        ]
    return rows


def of_update(option: str, known: dict[str, Any]) -> str:
    option = "decay_lambda" if option == "weight_decay" else option
    if option not in known:
        return NONE
    return described(option, known[option])


def described(name: str, default: Any) -> str:
    return f"`{name}`, no default" if default is NO_DEFAULT else f"`{name}` {shown(default)}"


def of_ours(option: str, functional: dict[str, Any], in_torch: dict[str, Any]) -> str:
    defaults = {**parameters(lt.lars_update), **functional}
    if option == "grad_scale":
        return "1 (`lt.Lars`), `GradScaler`"
    if option not in functional and option in in_torch and option not in defaults:
        return f"{described(option, in_torch[option])} (`torch.Lars`)"
    text = described(option, defaults[option])
    if option in in_torch and defaults[option] != in_torch[option]:
        text += f" (`torch.Lars`: {shown(in_torch[option])})"
    return text


def of_other(
    option: str, known: dict[str, Any], functional: dict[str, Any], in_torch: dict[str, Any]
) -> str:
    """Empty where name and default are ours."""
    name = option if option in known else NAMES.get(option, "")
    if name not in known:
        return NONE
    ours = functional.get(option, in_torch.get(option))
    parts = [f"`{name}`"] if name != option else []
    if known[name] is NO_DEFAULT:
        parts += ["no default"] if parts else []
    elif known[name] != ours:
        parts.append(shown(known[name]))
    return ", ".join(parts)
