"""The sections of the benchmark; each measures one part of the results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import lars_tree
from benchmarks import after, frameworks, measure, memory, odd
from benchmarks.contestants import DECAY, LR, MOMENTUM, TRUST, Contestant, as_torch
from benchmarks.groups import Group
from benchmarks.trees import TREES, Flat, least_traffic, weights_and_gradients
from lars_tree import Container, Lars

DTYPES = ["float32", "bfloat16", "float16", "float64"]
LIBRARIES = ["numpy", "torch"]
LEAVES = [10, 100, 1000, 10_000, 100_000]
THREADS = [1, 2, 4, 8]
LIMIT = "memory limit"
OPTIMIZER = "lars_tree.torch.Lars"
GROUPS = {"odd": odd.GROUPS, "after": after.GROUPS, "frameworks": frameworks.GROUPS}

Seconds = dict[str, float]


@dataclass
class Results:
    """Medians in seconds by tree and contestant; memory in bytes, in or out of place."""

    in_place: dict[str, Seconds] = field(default_factory=dict)
    out_of_place: dict[str, Seconds] = field(default_factory=dict)
    momentum: dict[str, Seconds] = field(default_factory=dict)
    dtypes: dict[str, Seconds] = field(default_factory=dict)
    momentum_dtypes: Seconds = field(default_factory=dict)
    growth: dict[str, dict[int, float]] = field(default_factory=dict)
    threads: dict[str, dict[int, float]] = field(default_factory=dict)
    groups: dict[str, Seconds] = field(default_factory=dict)
    memory: dict[str, Seconds] = field(default_factory=dict)
    import_time: float | None = None
    repr_time: float | None = None
    bandwidth: float | None = None


@dataclass(frozen=True)
class Plan:
    """The contestants, and how many rounds: `rounds` for small trees, `few` for large ones."""

    contestants: dict[str, Contestant]
    optimizers: dict[str, Contestant]
    rounds: int
    few: int


def peers(tree: str) -> Callable[[Plan, Results], None]:
    """All contestants on one tree: in place and out of place."""

    def section(plan: Plan, results: Results) -> None:
        shapes = TREES[tree]()
        flats = weights_and_gradients(shapes)
        rounds = plan.few if tree == "gpt2" else plan.rounds
        in_place = _steps(plan.contestants, flats, True)
        times, results.bandwidth = _beside_the_limit(in_place, rounds, least_traffic(shapes))
        results.in_place[tree] = times
        out_of_place = _steps(plan.contestants, flats, False)
        results.out_of_place[tree] = measure.medians(out_of_place, rounds)

    return section


def _steps(
    contestants: dict[str, Contestant], flats: tuple[Flat, Flat], in_place: bool
) -> dict[str, Callable[[], Any]]:
    return {
        name: contestant.build(*flats, in_place).step
        for name, contestant in contestants.items()
        if in_place in contestant.ways
    }


def _beside_the_limit(
    steps: dict[str, Callable[[], Any]], rounds: int, least: int
) -> tuple[Seconds, float]:
    """The medians, including the memory limit for `least` bytes, and the bandwidth."""
    stream, traffic = measure.stream()
    times = measure.medians(steps | {LIMIT: stream}, rounds)
    bandwidth = traffic / times[LIMIT]
    return times | {LIMIT: least / bandwidth}, bandwidth


def momentum(plan: Plan, results: Results) -> None:
    """Optimizers with momentum on two trees."""
    for tree in ("resnet", "small"):
        shapes = TREES[tree]()
        steps = _steps(plan.optimizers, weights_and_gradients(shapes), True)
        least = least_traffic(shapes, velocity=True)
        results.momentum[tree], _ = _beside_the_limit(steps, plan.rounds, least)


def dtypes(plan: Plan, results: Results) -> None:
    """Every dtype in numpy and torch, in place."""
    for tree in ("resnet", "gpt2"):
        flats = weights_and_gradients(TREES[tree]())
        steps = {
            f"{library} {dtype}": in_place_step(
                *(container(flat, library, dtype) for flat in flats)
            )
            for library in LIBRARIES
            for dtype in DTYPES
        }
        results.dtypes[tree] = measure.medians(steps, plan.few)


def momentum_dtypes(plan: Plan, results: Results) -> None:
    """The optimizers with momentum on ResNet-50, by dtype."""
    from lars_tree.torch import Lars as TorchLars

    flats = weights_and_gradients(TREES["resnet"]())
    steps: dict[str, Callable[[], Any]] = {}
    for dtype in DTYPES:
        w, g = (container(flat, "numpy", dtype) for flat in flats)
        opt = Lars(LR, MOMENTUM, **odd.OPTIONS)
        steps[f"lars_tree.Lars, numpy {dtype}"] = partial(opt.update, w, g, opt.init(w), out=w)
        w, g = (container(flat, "torch", dtype) for flat in flats)
        for x, dx in zip(w.leaves(), g.leaves(), strict=True):
            x.requires_grad_().grad = dx
        steps[f"{OPTIMIZER} {dtype}"] = TorchLars(w.leaves(), LR, MOMENTUM, **odd.OPTIONS).step
    results.momentum_dtypes = measure.medians(steps, plan.few)


def growth(plan: Plan, results: Results) -> None:
    """The time per leaf, by number of leaves; each number in a fresh process."""
    for library in LIBRARIES:
        results.growth[library] = {
            n: float(measure.child("-m", "benchmarks.growth", library, str(n), str(plan.few))) / n
            for n in LEAVES
        }


def threads(plan: Plan, results: Results) -> None:
    """The time by number of threads, up to the number of cores."""
    default = lars_tree.get_num_threads()
    for tree in ("resnet", "gpt2"):
        step = in_place_step(*(container(flat) for flat in weights_and_gradients(TREES[tree]())))

        def before(name: str, step: Callable[[], Any] = step) -> None:
            lars_tree.set_num_threads(int(name))
            step()  # starts the threads

        steps = {str(n): step for n in THREADS if n <= cores()}
        times = measure.medians(steps, plan.few, before)
        results.threads[tree] = {int(n): seconds for n, seconds in times.items()}
    lars_tree.set_num_threads(default)


def groups(chosen: list[Group]) -> Callable[[Plan, Results], None]:
    """Some groups of steps, each relative to the base of its group."""

    def section(plan: Plan, results: Results) -> None:
        for group in chosen:
            results.groups[group.title] = group.measured(plan.rounds)

    return section


def peak_memory(plan: Plan, results: Results) -> None:
    """Peak extra memory of one step on ResNet-50."""
    if memory.AVAILABLE:
        for in_place in (True, False):
            contestants = plan.contestants | (plan.optimizers if in_place else {})
            results.memory["in place" if in_place else "out of place"] = {
                name: memory.peak(name, in_place, 3 if name.startswith("lars_tree") else 1)
                for name, contestant in contestants.items()
                if in_place in contestant.ways
            }


def importing(plan: Plan, results: Results) -> None:
    """The time of `import lars_tree`."""
    results.import_time = measure.import_time(21)


def display(plan: Plan, results: Results) -> None:
    """The time of `repr` for 100,000 leaves."""
    w = Container({f"l{i}": {f"k{j}": np.ones(4) for j in range(100)} for i in range(1000)})
    results.repr_time = measure.medians({"repr": lambda: repr(w)}, plan.few)["repr"]


SECTIONS = {
    "resnet": peers("resnet"),
    "gpt2": peers("gpt2"),
    "small": peers("small"),
    "momentum": momentum,
    "dtypes": dtypes,
    "momentum dtypes": momentum_dtypes,
    "growth": growth,
    "threads": threads,
    **{name: groups(chosen) for name, chosen in GROUPS.items()},
    "memory": peak_memory,
    "import": importing,
    "repr": display,
}


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def container(flat: dict[str, Any], library: str = "numpy", dtype: str = "float32") -> Container:
    """A tree of arrays of this library and dtype."""
    if library == "torch":
        import torch

        as_dtype = getattr(torch, dtype)
        return Container.from_flat({path: as_torch(x).to(as_dtype) for path, x in flat.items()})
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return Container.from_flat({path: x.astype(dtype) for path, x in flat.items()})


def in_place_step(w: Container, g: Container) -> Callable[[], Any]:
    """A function that updates w."""
    return lambda: w.lars_update(g, LR, decay_lambda=DECAY, trust_coefficient=TRUST, out=w)
