"""The tables of steps: the weights that each package computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from jax import numpy as jnp
from pytorch_optimizer import LARS

import lars_tree as lt
from benchmarks.contestants import timm_lars
from lars_tree.torch import Lars
from tests.clients.peers import ivy_with_numpy

jax.config.update("jax_enable_x64", True)
Timm, ivy = timm_lars(), ivy_with_numpy()
NONE = "\N{EN DASH}"

Table = list[list[str]]  # rows of cells; the first is the head


class Case(NamedTuple):
    """Some steps from w with the same gradient; one rate for each step."""

    w: tuple[float, ...] = (3.0, 4.0)
    g: tuple[float, ...] = (0.4, 0.3)
    rates: tuple[float, ...] = (0.1,)
    decay: float = 0.0
    dtype: str = "float64"
    joint: bool = False


class Result(NamedTuple):
    w: np.ndarray
    gradient_changed: bool = False


Run = Callable[[Case], Result | None]  # None: the package cannot take these steps


def torch_run(optimizer: Any, **options: Any) -> Run:
    """The weights have two axes, because pytorch_optimizer adapts only these."""

    def run(case: Case) -> Result | None:
        chosen = options
        if case.joint:
            if optimizer is not Lars:
                return None
            chosen = {**options, "joint_norm": True}
        p = torch.nn.Parameter(torch.tensor([case.w], dtype=getattr(torch, case.dtype)))
        opt = optimizer([p], lr=case.rates[0], momentum=0.9, weight_decay=case.decay, **chosen)
        for rate in case.rates:
            p.grad = torch.tensor([case.g], dtype=p.dtype)
            before = p.grad.clone()
            opt.param_groups[0]["lr"] = rate
            opt.step()
        changed = not torch.equal(p.grad.nan_to_num(), before.nan_to_num())
        return Result(p.detach()[0].numpy(), changed)

    return run


def optax_run(case: Case) -> Result:
    w, g = jnp.array([case.w], case.dtype), jnp.array([case.g], case.dtype)
    rates = jnp.array(case.rates)
    opt = optax.lars(lambda i: rates[i].astype(case.dtype), case.decay, trust_coefficient=1.0)
    state = opt.init(w)
    for _ in case.rates:
        updates, state = opt.update(g, state, w)
        w = optax.apply_updates(w, updates)
    return Result(np.asarray(w)[0])


def our_run(case: Case) -> Result:
    w, g = np.array(case.w, case.dtype), np.array(case.g, case.dtype)
    options = {"weight_decay": case.decay, "joint_norm": case.joint}
    opt = lt.Lars(lambda i: case.rates[i], trust_coefficient=1.0, eps=0.0, **options)
    state = opt.init(w)
    before = g.copy()
    for _ in case.rates:
        w, state = opt.update(w, g, state)
    return Result(w, not np.array_equal(before, g, equal_nan=True))


def ivy_run(case: Case) -> Result | None:
    if len(case.rates) > 1 or case.joint:  # ivy has no momentum
        return None
    w, g = (ivy.array(np.array(x, case.dtype)) for x in (case.w, case.g))
    before = np.array(g)
    w = ivy.lars_update(w, g, case.rates[0], decay_lambda=case.decay)
    return Result(np.array(w), not np.array_equal(before, np.array(g), equal_nan=True))


RUNS: dict[str, Run] = {
    "here": our_run,
    "torch.Lars": torch_run(Lars, trust_coefficient=1.0, eps=0.0),
    "timm": torch_run(Timm, trust_coeff=1.0, eps=0),
    "timm, a.": torch_run(Timm, trust_coeff=1.0, eps=0, always_adapt=True),
    "optax": optax_run,
    "pytorch_optimizer": torch_run(LARS, trust_coefficient=1.0),
    "SGD": torch_run(torch.optim.SGD),
    "ivy": ivy_run,
}

STEPS = {
    "one step": Case(),
    "… decay 0.1": Case(decay=0.1),
    "three steps": Case(rates=(0.1,) * 3),
    "… with decay 0.1": Case(rates=(0.1,) * 3, decay=0.1),
    "… rates 0.1, 0.1, 0, `torch.Lars`": Case(rates=(0.1, 0.1, 0.0), decay=0.1),
    "… the same, `lt.Lars`": Case(rates=(0.1, 0.1, 0.0), decay=0.1),
    "w = 0, g = [3, 4]": Case(w=(0.0, 0.0), g=[3.0, 4.0]),
    "g = 0, decay 0.01": Case(g=[0.0, 0.0], decay=0.01),
    "decay 0.1, `joint_norm`": Case(decay=0.1, joint=True),
    "w = [3e20, 4e20], decay 0.1, float32": Case(w=[3e20, 4e20], decay=0.1, dtype="float32"),
    "g = [4e-25, 3e-25], float32": Case(g=[4e-25, 3e-25], dtype="float32"),
    "g = [4e-6, 3e-6], float16": Case(g=[4e-6, 3e-6], dtype="float16"),
    "g = [0.4, NaN], decay 0.1": Case(g=[0.4, np.nan], decay=0.1),
}
# In these conventions of momentum, the rows with several rates compare different packages.
IN_TORCH = {"torch.Lars", "timm", "timm, a.", "pytorch_optimizer", "SGD"}


def number(x: float) -> str:
    text = f"{x:.4g}".replace("nan", "NaN")
    return text.replace("e+", "e").replace("e-0", "e-")


def cell(result: Result | None) -> str:
    """The weights; a single number if both are that same NaN or infinity."""
    if result is None:
        return NONE
    texts = [number(float(x)) for x in result.w]
    same = not np.isfinite(result.w.astype(float)).any() and len({*texts}) == 1
    return texts[0] if same else f"[{', '.join(texts)}]"


def steps() -> Table:
    columns = [name for name in RUNS if name != "torch.Lars"]
    rows = [["", *columns]]
    for label, case in STEPS.items():
        ours = "torch.Lars" if "torch.Lars" in label else "here"
        expected = cell(RUNS[ours](case))
        assert ours != "here" or len({*case.rates}) > 1 or same_in_torch(case)
        row = [label, expected]
        for column in columns[1:]:
            text = cell(RUNS[column](case))
            if len({*case.rates}) > 1 and text != NONE:
                text = text if (column in IN_TORCH) == (ours in IN_TORCH) else ""
            row.append("=" if text == expected else text)
        rows.append(row)
    return rows


def same_in_torch(case: Case) -> bool:
    """At a constant rate, our two optimizers take the same steps."""
    return cell(RUNS["torch.Lars"](case)) == cell(RUNS["here"](case))


RULE_STEPS = {
    "no decay": Case(),
    "decay 0.1": Case(decay=0.1),
    "decay 0.01": Case(decay=0.01),
    "w = 0, g = [0.3, 0.4]": Case(w=(0.0, 0.0), g=[0.3, 0.4]),
    "g = 0, decay 0.01": Case(g=[0.0, 0.0], decay=0.01),
}


def rule() -> Table:
    columns = {"this package": "here", "ivy": "ivy", "optax `lars`": "optax", "timm `Lars`": "timm"}
    rows = [["", *columns]]
    for label, case in RULE_STEPS.items():
        rows.append([label, *(cell(RUNS[name](case)) for name in columns.values())])
    return rows
