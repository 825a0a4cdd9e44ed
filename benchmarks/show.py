"""`python -m benchmarks.show`: how long it takes to show 100,000 leaves, and to report on layers.

The target is 50 ms for `repr` of 100,000 leaves. Medians and best times are of the same rounds.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from lars_tree import Container, lars_update
from lars_tree.report import layer_table, trust_ratios

ROUNDS = 15


def main() -> None:
    """Measure, and print a line for each."""
    for name, make in _makers().items():
        w = Container({f"l{i}": {f"k{j}": make(2, 2) for j in range(100)} for i in range(1000)})
        _say(f"{name}, 100,000 leaves: repr", lambda w=w: repr(w))
        _say(f"{name}, 100,000 leaves: HTML", lambda w=w: w._repr_html_())
        w = Container({f"k{i}": make(256, 256) for i in range(100)})
        g = w.map(lambda x: x + 1)
        _say(f"{name}, 100 leaves of 65,536: lars_update", lambda w=w, g=g: lars_update(w, g, 0.1))
        _say(f"{name}, the same: trust_ratios", lambda w=w, g=g: trust_ratios(w, g, 0.1))
        _say(f"{name}, the same: layer_table", lambda w=w, g=g: layer_table(w, g, 0.1))


def _makers() -> dict[str, Callable[[int, int], Any]]:
    makers: dict[str, Callable[[int, int], Any]] = {"numpy": lambda *n: np.ones(n, np.float32)}
    if importlib.util.find_spec("torch") is not None:
        import torch

        makers["torch"] = torch.ones
    return makers


def _say(what: str, call: Callable[[], Any]) -> None:
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        call()
        times.append(1000 * (perf_counter() - start))
    sys.stdout.write(f"{what}: {median(times):.1f} ms, at best {min(times):.1f} ms\n")


if __name__ == "__main__":
    main()
