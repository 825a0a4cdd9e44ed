"""Allocations: each allocation of a step fails in turn, and nothing is torn.

A library that is loaded before all others counts the calls of malloc, calloc, realloc, memalign,
mmap and pthread_create, of Python and of every library, and makes some fail: one, or 1,000 in a
row. The call raises an error, which is a MemoryError unless CPython or a library raise another
one, or succeeds. Then weights, velocities and counters must belong to one step, the next step must
be right, and no lock may be held. A file must be the old one or the new one, and no file may
stay open.

What does not survive: in about 1 of 50 attempts numpy or CPython crashes, because it does not check
one of its own allocations. Then the weights, velocities and counters of an update in place are read
while the process ends: they belong to one step too. If no allocation ever succeeds again, CPython
3.11 may raise one MemoryError after another, forever. glibc ends the process if it cannot allocate
the thread-local data that a thread needs for its first C++ exception; where the kernel is imported,
they are allocated in advance, but not those of JAX's threads. Left out are the cases in which a
step may stay incomplete: see [Errors](errors.md#interrupted-updates).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.reliability.attack import ROOT, Attempts, attack

FAILING = Path(__file__).parent / "failing.c"
NEVER = 2**62
MANY = 1000  # allocations in a row that fail
BATCH = 100  # requests at a time

NUMPY = (
    "numpy, in place",
    "numpy, new arrays",
    "numpy, momentum in place",
    "numpy, momentum into new arrays",
    "numpy, raise, joint norm",
    "numpy, patterns and schedules",
    "numpy, four threads",
    "numpy, strided",
    "numpy, strided into new arrays",
    "numpy, skip",
    "numpy, skipped",
    "numpy, a rate per element",
    "numpy, overlaps",
)
TORCH = (
    "torch, in place",
    "torch, new tensors",
    "torch, momentum in place",
    "torch, momentum into new tensors",
    "torch and numpy, momentum in place",
)
OPTIMIZER = (
    "torch.Lars, first step",
    "torch.Lars",
    "torch.Lars, skip",
    "torch.Lars, nesterov",
)
JAX = ("jax, new arrays", "jax, momentum into new arrays")
FILES = ("save, npz", "save, safetensors")

CLAIM = "Without memory, an update is made completely or not at all"


def failing(rng: np.random.Generator, cases: tuple[str, ...], *modules: str) -> Attempts:
    """Fail each allocation of these cases of steps.py, in any order."""
    with TemporaryDirectory() as folder:
        library = str(Path(folder) / "failing.so")
        path = os.pathsep.join([str(ROOT), *sys.path])
        compile_ = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, str(FAILING)]
        subprocess.run([*compile_, "-ldl"], check=True)
        with subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.no_memory", *modules],
            env={**os.environ, "LD_PRELOAD": library, "PYTHONMALLOC": "malloc", "PYTHONPATH": path},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield from _attempts(rng, cases, process)
            finally:
                process.stdin.close()


def _attempts(
    rng: np.random.Generator, cases: tuple[str, ...], process: subprocess.Popen[str]
) -> Attempts:
    def ask(requests: list[tuple[str, int, int]]) -> list[tuple[int, str | None]]:
        print(json.dumps(requests), file=process.stdin, flush=True)
        lines = list(islice(process.stdout, len(requests)))
        if len(lines) < len(requests):
            raise RuntimeError(f"no answer to {requests[len(lines)]}")
        return [json.loads(line) for line in lines]

    counts = {name: ask([(name, NEVER, 0)])[0][0] for name in cases}
    requests = [
        (name, start, start + more)
        for name, count in counts.items()
        for start in range(count + 1)
        for more in (0, MANY - 1)
    ]
    order = rng.permutation(len(requests))
    for start in range(0, len(order), BATCH):
        batch = [requests[i] for i in order[start : start + BATCH]]
        for (name, first, last), (_, failure) in zip(batch, ask(batch), strict=True):
            yield failure and f"{name}, allocations {first} to {last}: {failure}"


@attack(CLAIM, "failing allocations, numpy", count=50_000, short=100, seconds=60, plain=True)
def of_numpy(rng: np.random.Generator) -> Attempts:
    yield from failing(rng, NUMPY)


@attack(CLAIM, "failing allocations, torch", count=20_000, short=100, seconds=120, needs=("torch",))
def of_torch(rng: np.random.Generator) -> Attempts:
    yield from failing(rng, TORCH, "torch")


@attack(
    "Without memory, a step of `torch.Lars` is made completely or not at all",
    "failing allocations",
    count=5_000,
    short=30,
    seconds=120,
    needs=("torch",),
)
def of_optimizer(rng: np.random.Generator) -> Attempts:
    yield from failing(rng, OPTIMIZER, "lars_tree.torch")


@attack(CLAIM, "failing allocations, JAX", count=2_000, short=5, seconds=100, needs=("jax",))
def of_jax(rng: np.random.Generator) -> Attempts:
    yield from failing(rng, JAX, "jax")


@attack(
    "Without memory, a file is replaced or stays as it was",
    "failing allocations",
    count=10_000,
    short=50,
    seconds=100,
)
def of_files(rng: np.random.Generator) -> Attempts:
    yield from failing(rng, FILES, "lars_tree.io")
