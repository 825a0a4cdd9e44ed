"""The sections of the benchmark; each measures one part of the results."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import lars_tree
from benchmarks import measure, memory, odd
from benchmarks.contestants import DECAY, LR, TRUST, Contestant, as_torch
from benchmarks.trees import TREES, Flat, least_traffic, small, weights_and_gradients
from lars_tree import Container

DTYPES = ["float32", "bfloat16", "float16", "float64"]
LIBRARIES = ["numpy", "torch"]
LEAVES = [10, 100, 1000, 10_000, 100_000]
THREADS = [1, 2, 4, 8]
LIMIT = "memory limit"

Seconds = dict[str, float]


@dataclass
class Results:
    """Medians in seconds by tree and contestant; memory in bytes, in or out of place."""

    in_place: dict[str, Seconds] = field(default_factory=dict)
    out_of_place: dict[str, Seconds] = field(default_factory=dict)
    momentum: dict[str, Seconds] = field(default_factory=dict)
    dtypes: dict[str, Seconds] = field(default_factory=dict)
    growth: dict[str, dict[int, float]] = field(default_factory=dict)
    threads: dict[str, dict[int, float]] = field(default_factory=dict)
    odd: dict[str, Seconds] = field(default_factory=dict)
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
            f"{library} {dtype}": _in_place(*(_tree(flat, library, dtype) for flat in flats))
            for library in LIBRARIES
            for dtype in DTYPES
        }
        results.dtypes[tree] = measure.medians(steps, plan.few)


def growth(plan: Plan, results: Results) -> None:
    """The time per leaf, by number of leaves."""
    for library in LIBRARIES:
        steps = {
            str(leaves): _in_place(
                *(_tree(flat, library) for flat in weights_and_gradients(small(leaves)))
            )
            for leaves in LEAVES
        }
        times = measure.medians(steps, plan.few)
        results.growth[library] = {int(n): seconds / int(n) for n, seconds in times.items()}


def threads(plan: Plan, results: Results) -> None:
    """The time by number of threads, up to the number of cores."""
    default = lars_tree.get_num_threads()
    for tree in ("resnet", "gpt2"):
        step = _in_place(*(_tree(flat) for flat in weights_and_gradients(TREES[tree]())))

        def before(name: str, step: Callable[[], Any] = step) -> None:
            lars_tree.set_num_threads(int(name))
            step()  # starts the threads

        steps = {str(n): step for n in THREADS if n <= cores()}
        times = measure.medians(steps, plan.few, before)
        results.threads[tree] = {int(n): seconds for n, seconds in times.items()}
    lars_tree.set_num_threads(default)


def odd_leaves(plan: Plan, results: Results) -> None:
    """Leaves that the kernel does not support, and options that need all norms."""
    for group in odd.GROUPS:
        results.odd[group.title] = group.measured(plan.rounds)


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
    "growth": growth,
    "threads": threads,
    "odd": odd_leaves,
    "memory": peak_memory,
    "import": importing,
    "repr": display,
}


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tree(flat: dict[str, Any], library: str = "numpy", dtype: str = "float32") -> Container:
    if library == "torch":
        import torch

        as_dtype = getattr(torch, dtype)
        return Container.from_flat({path: as_torch(x).to(as_dtype) for path, x in flat.items()})
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return Container.from_flat({path: x.astype(dtype) for path, x in flat.items()})


def _in_place(w: Container, g: Container) -> Callable[[], Any]:
    return lambda: w.lars_update(g, LR, decay_lambda=DECAY, trust_coefficient=TRUST, out=w)
