"""`python -m benchmarks.training`: does it train, and does it keep its accuracy at large batches?

LARS beside SGD and Adam on real images: equal epochs, one schedule, rates tuned alike on validation
images, accuracy reported on test images. Every run goes to a file at once: `--resume` reads it.
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
from statistics import fmean
from string import Template
from tempfile import mkdtemp
from time import perf_counter
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

DOCS = Path(__file__).parent.parent / "docs"
TEMPLATE = Path(__file__).with_name("training.md.in")
TRAIN, TEST = 1024, 400  # images; 373 are left to choose by
MOMENTUM, DECAY, WARMUP = 0.9, 5e-4, 0.1
KEPT = 0.01  # an accuracy counts as kept where no more than this is lost
PACKAGES = ["numpy", "torch", "scikit-learn"]


@dataclass(frozen=True)
class Contestant:
    """An optimizer, the exponent of the middle of its rates, and how it is drawn."""

    make: Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]
    centre: int
    color: str  # of Okabe and Ito, who chose them for colour-blind readers
    line: str


def _lars(trust: float) -> Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]:
    return lambda groups, rate: Lars(groups, rate, MOMENTUM, trust_coefficient=trust)


CONTESTANTS = {
    "LARS, trust 0.001": Contestant(_lars(0.001), 2, "#0072b2", "o-"),
    "LARS, trust 1": Contestant(_lars(1.0), -3, "#56b4e9", "s--"),
    "SGD": Contestant(lambda groups, rate: SGD(groups, rate, MOMENTUM), -1, "#d55e00", "^-"),
    "Adam": Contestant(Adam, -4, "#009e73", "D-"),
}


@dataclass(frozen=True)
class Plan:
    """How much is tried; `extra` rates at most where the best of the candidates is at the edge."""

    epochs: int = 20
    batches: tuple[int, ...] = (32, 128, 512, TRAIN)
    seeds: tuple[int, ...] = (0, 1, 2)
    candidates: int = 5
    extra: int = 4


class Part(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], and the digits they show."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """To train on, to choose the rate by, and to report."""

    train: Part
    validation: Part
    test: Part


class Run(NamedTuple):
    """What one run came to."""

    validation: float
    test: float
    images: int
    steps: int
    seconds: float


Runs = dict[float, list[Run]]  # by rate, a run for each seed
Cells = dict[tuple[str, int], Runs]  # by optimizer and batch


def load() -> Data:
    """The digits that scikit-learn ships, split once for all."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rows, labels = load_digits(return_X_y=True)
    images = torch.tensor(rows / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    places = range(len(labels))
    rest, test = train_test_split(places, test_size=TEST, stratify=labels, random_state=0)
    train, validation = train_test_split(
        rest, train_size=TRAIN, stratify=labels[rest], random_state=0
    )
    return Data(*(Part(images[x], labels[x]) for x in (train, validation, test)))


def network() -> nn.Sequential:
    """Three convolutions with batch norm, the mean over the pixels, a linear head."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [(1, 16, 1), (16, 32, 2), (32, 32, 1)]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def fit(
    part: Part, name: str, rate: float, *, batch: int, seed: int, epochs: int
) -> tuple[nn.Sequential, int, int]:
    """The model, and how many images and steps it was trained on.

    Args:
        part: What to train on.
        name: Of the optimizer.
        rate: The highest, at the end of the warm-up.
        batch: Images a step.
        seed: Of the first weights and of the order of the images.
        epochs: Passes over all images.
    """
    count, images, steps = len(part.labels), 0, 0
    total = epochs * math.ceil(count / batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        # All decay the same parameters; SGD and Adam pass over what else the groups say.
        optimizer = CONTESTANTS[name].make(param_groups(model, weight_decay=DECAY), rate)
        shape = Polynomial(1.0, total, warmup_steps=max(1, round(WARMUP * total)))
        schedule = LambdaLR(optimizer, shape)
        for _ in range(epochs):
            for picked in torch.randperm(count).split(batch):
                optimizer.zero_grad()
                cross_entropy(model(part.images[picked]), part.labels[picked]).backward()
                optimizer.step()
                schedule.step()
                images, steps = images + len(picked), steps + 1
    return model, images, steps


@torch.no_grad()
def settle(model: nn.Sequential, images: Tensor) -> None:
    """Give batch norm the statistics of these images under the weights as they are now.

    Its running means lag: after few steps they would say more of the first weights than of the
    last, and large batches would seem worse than they are, whatever the optimizer.
    """
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over what it sees: here, all at once
    model.train()(images)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Sequential, part: Part) -> float:
    """The fraction of the images that are read right."""
    return float((model(part.images).argmax(dim=1) == part.labels).double().mean())


def train(data: Data, name: str, rate: float, **how: int) -> Run:
    """One run, from the weights and on the batches that the seed gives; see `fit`."""
    start = perf_counter()
    model, images, steps = fit(data.train, name, rate, **how)
    settle(model, data.train.images)
    found = accuracy(model, data.validation), accuracy(model, data.test)
    return Run(*found, images, steps, perf_counter() - start)


def rate_of(exponent: int) -> float:
    """1, 3, 10, 30, ...: about sqrt(10) ** exponent, in numbers that read well."""
    return float(f"{3 if exponent % 2 else 1}e{exponent // 2}")


def choose(runs: Runs) -> float:
    """The rate of the best mean accuracy on validation images; of equals the smallest."""
    return max(sorted(runs), key=lambda rate: fmean(run.validation for run in runs[rate]))


def at_edge(runs: Runs) -> bool:
    """Whether a rate beyond those tried might be better still."""
    return choose(runs) in (min(runs), max(runs))


def tune(trained: Callable[[float, int], Run], centre: int, plan: Plan) -> Runs:
    """Try the rates around the centre, then one more as long as the best is at the edge."""
    low = centre - plan.candidates // 2
    high = low + plan.candidates - 1
    runs: Runs = {}
    wanted = list(range(low, high + 1))
    while wanted:
        for exponent in wanted:
            rate = rate_of(exponent)
            runs[rate] = [trained(rate, seed) for seed in plan.seeds]
        wanted = []
        if at_edge(runs) and len(runs) < plan.candidates + plan.extra:
            down = choose(runs) == rate_of(low)
            low, high = low - down, high + (not down)
            wanted = [low if down else high]
    return runs


class Log:
    """Runs by what was run, in a file that each is added to at once.

    Raises:
        ValueError: The file is of another experiment.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))  # as it reads from a file
        self._path = path
        self._content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.exists():
            self._content = json.loads(path.read_text())
            if self._content["settings"] != settings:
                raise ValueError(f"{path}: made with {self._content['settings']}, not {settings}")

    def run(self, what: str, compute: Callable[[], Run]) -> Run:
        """The run as it was logged, or computed now."""
        runs = self._content["runs"]
        if what not in runs:
            runs[what] = compute()
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(self._content, indent=1))
            new.replace(self._path)  # at no moment is there half a file
        return Run(*runs[what])


def experiment(data: Data, plan: Plan, log: Log) -> Cells:
    """Every optimizer at every batch."""
    cells: Cells = {}
    for batch, name in product(plan.batches, CONTESTANTS):

        def trained(rate: float, seed: int, name: str = name, batch: int = batch) -> Run:
            how = {"batch": batch, "seed": seed, "epochs": plan.epochs}
            what = f"{name}, batch {batch}, rate {rate:g}, seed {seed}"
            return log.run(what, lambda: train(data, name, rate, **how))

        cells[name, batch] = tune(trained, CONTESTANTS[name].centre, plan)
        _say(f"{name}, batch {batch}: {_cell(cells[name, batch])}")
    return cells


def tests(runs: Runs) -> list[float]:
    """The accuracies on test images at the chosen rate, one for each seed."""
    return [run.test for run in runs[choose(runs)]]


def _cell(runs: Runs) -> str:
    found = tests(runs)
    half = (max(found) - min(found)) / 2
    return f"{100 * fmean(found):.2f} ± {100 * half:.2f} ({choose(runs):g})"


def table(cells: Cells) -> list[report.Row]:
    """A row for each optimizer, a column for each batch."""
    batches = dict.fromkeys(batch for _, batch in cells)
    rows = [["", *(f"batch {batch:,}" for batch in batches)]]
    rows += [[name, *(_cell(cells[name, batch]) for batch in batches)] for name in CONTESTANTS]
    return rows


def findings(cells: Cells) -> list[str]:
    """What the numbers show, and what they do not, in sentences."""
    batches = sorted({batch for _, batch in cells})
    first, last = batches[0], batches[-1]
    found = {key: tests(runs) for key, runs in cells.items()}
    mean = {key: fmean(values) for key, values in found.items()}
    lines = []
    for name in CONTESTANTS:
        lost = {batch: mean[name, first] - mean[name, batch] for batch in batches}
        held = list(takewhile(lambda batch: lost[batch] <= KEPT + 1e-9, batches))  # noqa: B023
        lines.append(
            f"**{name}**: {100 * mean[name, first]:.2f}% at batch {first:,}, "
            f"{100 * mean[name, last]:.2f}% at batch {last:,}. "
            + ("Kept at all batches." if held == batches else f"Kept up to batch {held[-1]:,}.")
        )
    for ours in (name for name in CONTESTANTS if name.startswith("LARS")):
        a = found[ours, last]
        words: dict[str, list[str]] = {}
        for name in ("SGD", "Adam"):
            b = found[name, last]
            above, below = min(a) > max(b), max(a) < min(b)
            word = "better than" if above else "worse than" if below else "not told apart from"
            words.setdefault(word, []).append(name)
        verdicts = "; ".join(f"{word} {' and '.join(names)}" for word, names in words.items())
        lines.append(f"At batch {last:,} **{ours}** is {verdicts}.")
    return lines


def extensions(cells: Cells, plan: Plan) -> list[str]:
    """Where more rates were tried than the candidates, and where the best is still at the edge."""
    lines = []
    for (name, batch), runs in cells.items():
        added = len(runs) - plan.candidates
        if added or at_edge(runs):
            edge = "; the best is still at the edge" if at_edge(runs) else ""
            lines.append(f"{name}, batch {batch:,}: {added} more, to {len(runs)} rates{edge}.")
    return lines


def page(cells: Cells, plan: Plan, command: str) -> str:
    """docs/training.md: the template, filled in."""
    versions = report.environment() | {name: version(name) for name in PACKAGES}
    named = ["processor", "system", "Python", "lars_tree", "native kernel", *PACKAGES]
    runs = [run for by_rate in cells.values() for each in by_rate.values() for run in each]
    steps = {batch: next(iter(by_rate.values()))[0].steps for (_, batch), by_rate in cells.items()}
    middles = (f"{rate_of(x.centre):g} for {name}" for name, x in CONTESTANTS.items())
    return Template(TEMPLATE.read_text()).substitute(
        command=command,
        epochs=plan.epochs,
        seeds=len(plan.seeds),
        candidates=plan.candidates,
        middles="; ".join(middles),
        runs=len(runs),
        minutes=f"{sum(run.seconds for run in runs) / 60:.0f}",
        steps=", ".join(f"{count:,} at batch {batch:,}" for batch, count in steps.items()),
        table=report._markdown(table(cells)),
        findings=_bullets(findings(cells)),
        extensions=_bullets(extensions(cells, plan)) or "None was needed.",
        versions=report._markdown([["", ""], *([name, versions[name]] for name in named)]),
    )


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def plot(cells: Cells, path: Path) -> None:
    """Lines: the accuracy against the batch, from the worst to the best seed."""
    batches = sorted({batch for _, batch in cells})
    path.parent.mkdir(parents=True, exist_ok=True)
    with plots._figure(path, 1, 6, 3.6) as (axis,):
        for place, (name, x) in enumerate(CONTESTANTS.items()):
            found = [[100 * value for value in tests(cells[name, batch])] for batch in batches]
            means = [fmean(values) for values in found]
            below = [mean - min(values) for mean, values in zip(means, found, strict=True)]
            above = [max(values) - mean for mean, values in zip(means, found, strict=True)]
            beside = [batch * 1.05 ** (place - 1.5) for batch in batches]  # bars do not cover bars
            style = {"color": x.color, "capsize": 3, "markersize": 5, "label": name}
            axis.errorbar(beside, means, [below, above], fmt=x.line, **style)
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
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from the runs in there")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    lars_tree.set_num_threads(1)
    plan = Plan(epochs=2, seeds=(0,), candidates=3, extra=0) if options.quick else Plan()
    path = options.resume or Path(mkdtemp(prefix="lars_tree_training_")) / "runs.json"
    _say(f"Runs are kept in {path}")
    settings = {**asdict(plan), "versions": {name: version(name) for name in PACKAGES}}
    cells = experiment(load(), plan, Log(path, settings))
    lines = [report._columns(table(cells)), *findings(cells), *extensions(cells, plan)]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.write:
        plot(cells, DOCS / "images" / "training.svg")
        command = f"python -m benchmarks.training{' --quick' * options.quick} --write"
        (DOCS / "training.md").write_text(page(cells, plan, command))


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
