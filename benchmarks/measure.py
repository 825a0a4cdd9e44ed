"""Times: in turns, each contestant once a round, in another order each round; medians of rounds."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

REST = 0.02  # seconds before each turn: threads of others that wait for work have gone to sleep
TURN = 0.01  # seconds: a quick step is repeated to last about that long
WARM = 0.3  # seconds: a quicker step has a turn first that is not timed, to raise the clock and
# to fill the cache, which hold what the rest and the others left
PATIENCE = 3.0  # seconds: a slower step is called as seldom as can be
BUDGET = 10.0  # seconds: who has used more stays out of the rounds that are left


def medians(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """The median time of a call of each step, in seconds; `before` is called ahead of each turn."""
    gc.collect()
    gc.freeze()  # the weights of others are nothing for a step to search for garbage
    calls = {}
    for name, step in steps.items():
        before(name)
        first = _time(step, 1)  # loads, compiles, starts threads
        calls[name] = max(1, round(TURN / (_time(step, 1) if first < PATIENCE else first)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(steps)).tolist():
            if sum(times[name]) * calls[name] < BUDGET:
                before(name)
                sleep(REST)
                if median(times[name] or [0.0]) < WARM:
                    _time(steps[name], calls[name])
                times[name].append(_time(steps[name], calls[name]))
    gc.unfreeze()
    return {name: median(samples) for name, samples in times.items()}


def _time(step: Callable[[], Any], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        step()
    return (perf_counter() - start) / calls


def stream() -> tuple[Callable[[], Any], int]:
    """The memory limit: `a.add_(b)` by torch, on all its threads, and the bytes that it moves."""
    import torch

    size = 30_000_000
    a, b = torch.zeros(size), torch.ones(size)
    return lambda: a.add_(b), 3 * a.nbytes


def import_time(rounds: int) -> float:
    """How much longer `import lars_tree` takes than `import numpy`, each in a fresh interpreter."""
    differences = []
    for turn in range(rounds):
        order = ["numpy", "lars_tree"][:: 1 if turn % 2 else -1]
        times = {module: _import(module) for module in order}
        differences.append(times["lars_tree"] - times["numpy"])
    return median(differences)


def _import(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(child("-c", code))


def child(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
