"""Measure times: each round runs every contestant once, in random order; take the medians."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

# All in seconds.
REST = 0.02  # the pause before each turn; threads of other contestants then go to sleep
LONG_REST = 0.1
TURN = 0.01  # a faster step is repeated until it takes about this long
WARM = 0.3  # a faster step has an untimed turn first, to raise the clock and to fill the cache
PATIENCE = 3.0  # a slower step is called only once before it is timed
BUDGET = 10.0  # a contestant that has used more time skips the remaining rounds


def medians(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """The median seconds of one call of each step; `before` is called before each turn."""
    gc.collect()
    gc.freeze()  # collections during a step then do not scan the contestants' weights
    calls = {}
    for name, step in steps.items():
        before(name)
        first = per_call(step, 1)  # imports, compiles, starts threads
        calls[name] = max(1, round(TURN / (per_call(step, 1) if first < PATIENCE else first)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(steps)).tolist():
            if sum(times[name]) * calls[name] < BUDGET:
                before(name)
                sleep(REST)
                if median(times[name] or [0.0]) < WARM:
                    per_call(steps[name], calls[name])
                times[name].append(per_call(steps[name], calls[name]))
    gc.unfreeze()
    return {name: median(samples) for name, samples in times.items()}


def medians_after(
    work: Mapping[str, Callable[[], Any]], steps: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """The median seconds of one call of each step right after its work, which is not timed.

    Before the work there is a long pause, as the idle threads of OpenBLAS keep a core busy for more
    than 30 ms, and an untimed call of the step.
    """
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(steps)).tolist():
            sleep(LONG_REST)
            steps[name]()
            work[name]()
            times[name].append(per_call(steps[name], 1))
    gc.unfreeze()
    return {name: median(samples) for name, samples in times.items()}


def per_call(step: Callable[[], Any], calls: int) -> float:
    """The seconds of one call, when it is repeated so many times."""
    start = perf_counter()
    for _ in range(calls):
        step()
    return (perf_counter() - start) / calls


def stream() -> tuple[Callable[[], Any], int]:
    """A function that calls torch's `a.add_(b)` on all threads, and the bytes that it moves."""
    import torch

    size = 30_000_000
    a, b = torch.zeros(size), torch.ones(size)
    return lambda: a.add_(b), 3 * a.nbytes


def import_time(rounds: int) -> float:
    """Seconds of `import lars_tree` beyond `import numpy`, each in a fresh interpreter."""
    differences = []
    for turn in range(rounds):
        order = ["numpy", "lars_tree"][:: 1 if turn % 2 else -1]
        times = {module: _import(module) for module in order}
        differences.append(times["lars_tree"] - times["numpy"])
    return median(differences)


def _import(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(child("-c", code))


def child(*arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """The output of a fresh interpreter, with these environment variables; "" removes one."""
    environment = {name: x for name, x in (os.environ | dict(variables or {})).items() if x}
    command = [sys.executable, *arguments]
    return subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
