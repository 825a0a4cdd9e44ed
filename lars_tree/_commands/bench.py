"""`lars-tree bench`: an update in place beside the limit that the memory of this machine sets.

The tree has the shapes of ResNet-50, in float32. The limit is what it takes to move the same bytes
and no more: weights and gradients are read once and the weights written once, by numpy's
`add(w, g, out=w)`, with the threads that the update may use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from statistics import median
from typing import Any

import numpy as np

from lars_tree._commands.output import Output, columns
from lars_tree._native import in_use
from lars_tree._native.threads import get_num_threads
from lars_tree.update import lars_update

Array = np.ndarray[Any, Any]

_REST = 0.02  # seconds before each run, in which the threads of the last one go to sleep


def bench(rounds: int) -> Output:
    """Time both in each round, in turns, and take the medians."""
    shapes = list(resnet50())
    count = sum(map(prod, shapes))
    rng = np.random.default_rng(0)
    w, g = (rng.standard_normal(count, np.float32) for _ in range(2))
    tree, gradients = _split(w, shapes), _split(g, shapes)
    threads = get_num_threads()
    parts = [np.array_split(x, threads) for x in (w, g)]
    with ThreadPoolExecutor(threads) as pool:
        contestants: dict[str, Callable[[], Any]] = {
            "update": lambda: lars_update(tree, gradients, 1e-3, decay_lambda=1e-4, out=tree),
            "limit": lambda: list(pool.map(np.add, *parts, parts[0])),
        }
        times = _times(contestants, rounds)
    size = 3 * w.nbytes
    update, limit = (median(times[name]) for name in ("update", "limit"))
    ratio = median(a / b for a, b in zip(times["update"], times["limit"], strict=True))
    kernel = in_use() is not None
    record = {
        "leaves": len(shapes),
        "parameters": count,
        "bytes": size,
        "rounds": rounds,
        "threads": threads,
        "kernel": kernel,
        "milliseconds": update * 1e3,
        "gigabytes_per_second": size / update / 1e9,
        "limit_milliseconds": limit * 1e3,
        "limit_gigabytes_per_second": size / limit / 1e9,
        "ratio": ratio,
    }
    lines = columns(
        [("lars_update in place", _speed(update, size)), ("limit", _speed(limit, size))]
    )
    return Output(
        f"ResNet-50 in float32: {len(shapes)} leaves, {count:,} parameters\n"
        + "\n".join(lines)
        + f"\n  ratio {ratio:.2f} (medians of {rounds} rounds; threads: {threads}, "
        + f"native kernel: {'on' if kernel else 'off'})",
        record,
    )


def _speed(seconds: float, size: int) -> str:
    return f"{seconds * 1e3:8.2f} ms  {size / seconds / 1e9:6.1f} GB/s"


def _times(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            time.sleep(_REST)
            start = time.perf_counter()
            run()
            if number:  # the first round is there to warm up
                times[name].append(time.perf_counter() - start)
    return times


def _split(x: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(x, ends), shapes, strict=True)]


def resnet50() -> Iterator[tuple[int, ...]]:
    """The shapes of the weights of ResNet-50, in order: 161 of them."""

    def convolution(inputs: int, outputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # with those of its norm

    yield from convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(channels, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(channels, 4 * width, 1)
            channels = 4 * width
    yield from [(1000, channels), (1000,)]
