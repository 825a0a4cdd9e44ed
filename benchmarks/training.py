"""`python -m benchmarks.training`: does LARS train, and keep its accuracy at large batch sizes?

LARS, SGD and Adam train on real images with equal epochs and the same schedule. Rates are tuned in
the same way on validation images; the reported accuracy is measured on test images. Each finished
run is saved to a file, which `--resume` reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product, takewhile
from pathlib import Path
from statistics import fmean, stdev, variance
from tempfile import mkdtemp
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import lars_tree
from benchmarks import plots, report
from lars_tree.schedules import Polynomial
from lars_tree.torch import Lars, param_groups

TRAIN, TEST = 1024, 400  # images; the other 373 are for validation
MOMENTUM, DECAY, WARMUP = 0.9, 5e-4, 0.1
KEPT = 1.0  # the largest drop, in points, at which an accuracy counts as kept
PACKAGES = ["numpy", "torch", "scikit-learn"]

Part = tuple[Tensor, Tensor]  # images of 8 x 8 pixels in [0, 1], and their labels
Make = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]  # takes groups and a rate


@dataclass(frozen=True)
class Contestant:
    """An optimizer, the exponent of its central rate, and its line style in the plot."""

    make: Make
    centre: int
    color: str  # Okabe and Ito's palette, for colour-blind readers
    line: str


def _lars(trust: float) -> Make:
    return lambda groups, rate: Lars(groups, rate, MOMENTUM, trust_coefficient=trust)


CONTESTANTS = {
    "LARS, trust 0.001": Contestant(_lars(0.001), 2, "#0072b2", "o-"),
    "LARS, trust 1": Contestant(_lars(1.0), -3, "#56b4e9", "s--"),
    "SGD": Contestant(lambda groups, rate: SGD(groups, rate, MOMENTUM), -1, "#d55e00", "^-"),
    "Adam": Contestant(Adam, -4, "#009e73", "D-"),
}


@dataclass(frozen=True)
class Plan:
    """The settings of the experiment."""

    epochs: int = 20
    batches: tuple[int, ...] = (32, 128, 512, TRAIN)
    seeds: tuple[int, ...] = (0, 1, 2)
    candidates: int = 5  # rates
    extra: int = 4  # the most further rates, tried while the best rate is at the edge
    further: tuple[int, ...] = tuple(range(10, 30))  # further seeds, at the largest batch size


class Data(NamedTuple):
    """The three parts of the images."""

    train: Part
    validation: Part
    test: Part


class Run(NamedTuple):
    """The accuracies of one run, and its size."""

    validation: float
    test: float
    images: int
    steps: int
    seconds: float  # of processor time


Runs = dict[int, list[Run]]  # exponent of the rate: one run for each seed


class Results(NamedTuple):
    """The runs of each optimizer at each batch size, and its runs with further seeds."""

    plan: Plan
    cells: dict[tuple[str, int], Runs]
    further: dict[str, list[Run]]


def load() -> Data:
    """The digits of scikit-learn, split in a fixed way."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split as split

    rows, labels = load_digits(return_X_y=True)
    images = torch.tensor(rows / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    indices = range(len(labels))
    rest, test = split(indices, test_size=TEST, stratify=labels, random_state=0)
    train, validation = split(rest, train_size=TRAIN, stratify=labels[rest], random_state=0)
    return Data(*((images[x], labels[x]) for x in (train, validation, test)))


def network() -> nn.Sequential:
    """Three convolutions with batch norm, global average pooling, a linear head."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [(1, 16, 1), (16, 32, 2), (32, 32, 1)]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def fit(
    part: Part, name: str, rate: float, *, batch: int, seed: int, epochs: int
) -> tuple[nn.Sequential, int, int]:
    """Train a model; return it with the number of images and of steps."""
    images, labels = part
    seen, steps, total = 0, 0, epochs * math.ceil(len(labels) / batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        # SGD and Adam ignore the other options of the groups.
        optimizer = CONTESTANTS[name].make(param_groups(model, weight_decay=DECAY), rate)
        schedule = LambdaLR(optimizer, Polynomial(1.0, total, max(1, round(WARMUP * total))))
        for _ in range(epochs):
            for picked in torch.randperm(len(labels)).split(batch):
                optimizer.zero_grad()
                cross_entropy(model(images[picked]), labels[picked]).backward()
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
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches; here there is one
    model.train()(images)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Sequential, part: Part) -> float:
    """The fraction of the images that are classified correctly."""
    images, labels = part
    return float((model(images).argmax(dim=1) == labels).double().mean())


def train(data: Data, name: str, rate: float, **how: int) -> Run:
    """One run, with the arguments of `fit`."""
    start = process_time()
    model, images, steps = fit(data.train, name, rate, **how)
    settle(model, data.train[0])
    found = accuracy(model, data.validation), accuracy(model, data.test)
    return Run(*found, images, steps, process_time() - start)


def rate_of(exponent: int) -> float:
    """1, 3, 10, 30, ...: about sqrt(10) ** exponent."""
    return float(f"{3 if exponent % 2 else 1}e{exponent // 2}")


def choose(runs: Runs) -> int:
    """The exponent with the best mean validation accuracy; the smallest such exponent."""
    return max(sorted(runs), key=lambda x: fmean(run.validation for run in runs[x]))


def at_edge(runs: Runs) -> bool:
    """Whether the best rate is the smallest or the largest one tried."""
    return choose(runs) in (min(runs), max(runs))


def tune(trained: Callable[[int, int], Run], centre: int, plan: Plan) -> Runs:
    """Try the rates around the centre, then further rates while the best is at the edge."""
    runs: Runs = {}
    low = centre - plan.candidates // 2
    wanted = list(range(low, low + plan.candidates))
    while wanted:
        runs |= {x: [trained(x, seed) for seed in plan.seeds] for x in wanted}
        wanted = []
        if at_edge(runs) and len(runs) < plan.candidates + plan.extra:
            wanted = [min(runs) - 1 if choose(runs) == min(runs) else max(runs) + 1]
    return runs


class Log:
    """A file that maps descriptions to finished runs."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))  # as read from a file
        self._path = path
        self._content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.exists():
            self._content = json.loads(path.read_text())
            if self._content["settings"] != settings:
                raise ValueError(f"{path}: made with {self._content['settings']}, not {settings}")

    def run(self, what: str, compute: Callable[[], Run]) -> Run:
        """Return the logged run; if there is none, make the run and log it."""
        runs = self._content["runs"]
        if what not in runs:
            runs[what] = compute()
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(self._content, indent=1))
            new.replace(self._path)  # atomic
        return Run(*runs[what])


def experiment(data: Data, plan: Plan, log: Log) -> Results:
    """Run every optimizer at every batch size, and with further seeds at the largest."""
    results = Results(plan, {}, {})
    for batch, name in product(plan.batches, CONTESTANTS):

        def trained(exponent: int, seed: int, name: str = name, batch: int = batch) -> Run:
            rate, how = rate_of(exponent), {"batch": batch, "seed": seed, "epochs": plan.epochs}
            what = f"{name}, batch {batch}, rate {rate:g}, seed {seed}"
            return log.run(what, lambda: train(data, name, rate, **how))

        runs = results.cells[name, batch] = tune(trained, CONTESTANTS[name].centre, plan)
        _say(f"{name}, batch {batch}: {_cell(runs)}")
        if batch == max(plan.batches):
            results.further[name] = [trained(choose(runs), seed) for seed in plan.further]
    return results


def scores(runs: Runs) -> list[float]:
    """The test accuracies at the chosen rate in percent, one for each seed."""
    return [100 * run.test for run in runs[choose(runs)]]


def _cell(runs: Runs) -> str:
    found = scores(runs)
    return f"{fmean(found):.2f} ± {(max(found) - min(found)) / 2:.2f} ({rate_of(choose(runs)):g})"


def table(results: Results) -> list[report.Row]:
    """A row for each optimizer, a column for each batch size, and one for the further seeds."""
    batches = results.plan.batches
    rows = [["", *(f"batch {x:,}" for x in batches), f"{batches[-1]:,}, further seeds"]]
    for name in CONTESTANTS:
        found = [100 * run.test for run in results.further[name]]
        cells = (_cell(results.cells[name, batch]) for batch in batches)
        rows.append([name, *cells, f"{fmean(found):.2f} ± {stdev(found):.2f}"])
    return rows


def by_rate(results: Results) -> list[report.Row]:
    """The validation accuracy at the largest batch size, by rate."""
    rows = [["", "rate: accuracy"]]
    for name in CONTESTANTS:
        runs = sorted(results.cells[name, results.plan.batches[-1]].items())
        means = ((rate_of(x), 100 * fmean(run.validation for run in each)) for x, each in runs)
        rows.append([name, "; ".join(f"{rate:g}: {mean:.1f}" for rate, mean in means)])
    return rows


def findings(results: Results) -> list[str]:
    """The findings, as sentences."""
    first, *_, last = batches = results.plan.batches
    mean = {key: fmean(scores(runs)) for key, runs in results.cells.items()}
    kept, lines = {}, []
    for name in CONTESTANTS:
        lost = {batch: mean[name, first] - mean[name, batch] for batch in batches}
        # The tolerance is for rounding: a loss of exactly KEPT counts as kept.
        kept[name] = list(takewhile(lambda x: lost[x] <= KEPT + 1e-9, batches))[-1]  # noqa: B023
        lines.append(
            f"**{name}**: {mean[name, first]:.2f}% at batch {first:,}, {mean[name, last]:.2f}% at "
            f"batch {last:,} ({-lost[last]:+.2f} points); kept up to batch {kept[name]:,}."
        )
    for name in (name for name in CONTESTANTS if name.startswith("LARS")):
        (above, beside_sgd), (_, beside_adam) = (compare(results, name, x) for x in ("SGD", "Adam"))
        against = [f"its accuracy is kept only up to batch {kept[name]:,}"] * (kept[name] != last)
        against += ["SGD keeps its accuracy too"] * (kept["SGD"] == last)
        against += ["it is not above SGD"] * (not above)
        lines.append(
            f"At batch {last:,}, with further seeds, **{name}** is {beside_sgd}; {beside_adam}. "
            "The claim that it keeps its accuracy where SGD does not is "
            + (f"not confirmed: {'; '.join(against)}." if against else "confirmed.")
        )
    return lines


def compare(results: Results, name: str, other: str) -> tuple[bool, str]:
    """Whether `name` exceeds `other` by over two standard errors, and a description."""
    a, b = ([100 * run.test for run in results.further[x]] for x in (name, other))
    difference = fmean(a) - fmean(b)
    margin = 2 * math.sqrt(variance(a) / len(a) + variance(b) / len(b))
    points = f"{abs(difference):.2f} ± {margin:.2f} points"
    if abs(difference) <= margin:
        return False, f"not distinguishable from {other} ({points})"
    return difference > 0, f"{points} {'above' if difference > 0 else 'below'} {other}"


def extensions(results: Results) -> list[str]:
    """List the cells that needed more rates, and say whether the best rate is still at the edge."""
    return [
        f"{name} at batch {batch:,}, {len(runs)} rates" + " (the best at the edge)" * at_edge(runs)
        for (name, batch), runs in results.cells.items()
        if len(runs) > results.plan.candidates or at_edge(runs)
    ]


def page(results: Results, command: str) -> str:
    """The text of docs/training.md: the filled-in template."""
    versions = report.environment() | {name: version(name) for name in PACKAGES}
    named = ["processor", "system", "Python", "lars_tree", "native kernel", *PACKAGES]
    runs = [run for cell in results.cells.values() for each in cell.values() for run in each]
    runs += [run for each in results.further.values() for run in each]
    plan = results.plan
    steps = (f"{plan.epochs * math.ceil(TRAIN / x):,} at batch {x:,}" for x in plan.batches)
    parts = {
        **asdict(plan),
        "seeds": len(plan.seeds),
        "further": len(plan.further),
        "runs": len(runs),
        "minutes": f"{sum(run.seconds for run in runs) / 60:.0f}",
        "steps": ", ".join(steps),
        "table": report.markdown(table(results)),
        "by_rate": report.markdown(by_rate(results)),
        "findings": "\n* ".join(findings(results)),
        "extensions": "; ".join(extensions(results)) or "none",
        "versions": report.markdown([["", ""], *([name, versions[name]] for name in named)]),
    }
    return report.fill("training.md.in", {**parts, "command": command})


def plot(results: Results, path: Path) -> None:
    """Draw the accuracy by batch size, with bars from the worst to the best seed."""
    batches = results.plan.batches
    with plots.figure(path, 1, 6, 3.6) as (axis,):
        for index, (name, x) in enumerate(CONTESTANTS.items()):
            found = [scores(results.cells[name, batch]) for batch in batches]
            means = [fmean(values) for values in found]
            bars = [[fmean(y) - min(y) for y in found], [max(y) - fmean(y) for y in found]]
            beside = [x * 1.05 ** (index - 1.5) for x in batches]  # bars do not overlap
            style = {"color": x.color, "capsize": 3, "markersize": 5, "label": name}
            axis.errorbar(beside, means, bars, fmt=x.line, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axis.set_xlabel("batch size, at equal epochs")
        axis.set_ylabel("test accuracy, %")
        axis.legend(frameon=False, loc="lower left")


def main(arguments: list[str]) -> None:
    """Parse the command line, train, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few epochs, rates and seeds")
    parser.add_argument("--write", action="store_true", help="write docs/training.md and its plot")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="continue from these runs")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    lars_tree.set_num_threads(1)
    plan = Plan(2, seeds=(0,), candidates=3, extra=0, further=(1, 2)) if options.quick else Plan()
    path = options.resume or Path(mkdtemp(prefix="lars_tree_training_")) / "runs.json"
    _say(f"Runs are kept in {path}")
    settings = {**asdict(plan), "versions": {name: version(name) for name in PACKAGES}}
    results = experiment(load(), plan, Log(path, settings))
    tables = [report.columns(rows) for rows in (table(results), by_rate(results))]
    sys.stdout.write("\n".join([*tables, *findings(results), *extensions(results)]) + "\n")
    if options.write:
        plot(results, report.DOCS / "images" / "training.svg")
        command = f"python -m benchmarks.training{' --quick' * options.quick} --write"
        (report.DOCS / "training.md").write_text(page(results, command))


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
