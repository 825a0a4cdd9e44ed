"""The results of `training.py`: tables, findings that follow from them, the page, its plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev, variance

from benchmarks import plots, report
from benchmarks.training import (
    CONTESTANTS,
    FACTORS,
    PACKAGES,
    TRAIN,
    Cell,
    Results,
    Run,
    Runs,
    at_edge,
    cells,
    choose,
    rate_of,
)

NEAR_CHANCE = 20.0  # percent; guessing has 10
KEPT = 1.0  # the largest drop, in points, at which an accuracy counts as kept
RECIPE = "LARS 1"  # the contestant that is compared with all others
STYLES = {  # Okabe and Ito's palette, for colour-blind readers
    "LARS 1": ("#0072b2", "o-"),
    "LARS 0.001": ("#56b4e9", "s--"),
    "LARS 1, joint norm": ("#cc79a7", "P:"),
    "LARC 0.02": ("#e69f00", "v:"),
    "SGD": ("#d55e00", "^-"),
    "Adam": ("#009e73", "D-"),
}
NORMS = {False: "without batch norm", True: "with batch norm"}


def scores(runs: Sequence[Run]) -> list[float]:
    """The test accuracies in percent, one for each seed."""
    return [100 * run.test for run in runs]


def table(results: Results, norm: bool) -> list[report.Row]:
    """A row for each optimizer, a column for each batch size."""
    batches = results.plan.batches
    rows = [[NORMS[norm], *(f"batch {batch:,}" for batch in batches)]]
    for name in CONTESTANTS:
        row = [name]
        for batch in batches:
            cell = Cell(name, norm, batch)
            if cell in results.scored:
                found, rate = scores(results.scored[cell]), rate_of(choose(results.tuning[cell]))
                row.append(f"{fmean(found):.1f} ± {stdev(found):.1f} ({rate:g})")
            else:
                row.append("")
        rows.append(row)
    return rows


def by_rate(results: Results) -> list[report.Row]:
    """The validation accuracy at the largest batch size, by rate."""
    rows = [["", "rate: accuracy"]]
    for norm, title in NORMS.items():
        for name in CONTESTANTS:
            runs = results.tuning[Cell(name, norm, max(results.plan.batches))]
            means = ", ".join(f"{rate_of(x):g}: {_validation(runs[x]):.1f}" for x in sorted(runs))
            rows.append([f"{name}, {title}", means])
    return rows


def by_factor(results: Results) -> list[report.Row]:
    """The validation accuracy by the rate of excluded parameters, relative to all others."""
    rows = [["", "rate of the others", *(f"× {factor:g}" for factor in FACTORS)]]
    for cell, runs in results.by_factor.items():
        rate = 1000 * rate_of(choose(results.tuning[cell._replace(name=RECIPE)]))
        means = (f"{_validation(runs[factor]):.1f}" for factor in FACTORS)
        rows.append([f"{NORMS[cell.norm]}, batch {cell.batch:,}", f"{rate:g}", *means])
    return rows


def findings(results: Results) -> list[str]:
    """The findings, as sentences."""
    return [line for norm in NORMS for line in _findings(results, norm)]


def _findings(results: Results, norm: bool) -> list[str]:
    batches = results.plan.batches
    first, last = batches[0], batches[-1]
    mean = {x: fmean(scores(runs)) for x, runs in results.scored.items() if x.norm == norm}

    def lost(name: str, batch: int = last) -> float:
        return mean[Cell(name, norm, first)] - mean[Cell(name, norm, batch)]

    losses = (
        f"{name} {lost(name):.1f} (to {mean[Cell(name, norm, last)]:.1f}%)"
        for name in sorted((x for x in CONTESTANTS if CONTESTANTS[x].at_all_batches), key=lost)
    )
    title = NORMS[norm].capitalize()
    lines = [f"{title}, points lost from batch {first:,} to {last:,}: {', '.join(losses)}."]
    compared = [compare(results, norm, name) for name in CONTESTANTS if name != RECIPE]
    lines.append(f"{title}, at batch {last:,}, **{RECIPE}** is {'; '.join(compared)}.")
    # The tolerance is for rounding: a loss of exactly KEPT counts as kept.
    kept = {
        name: list(takewhile(lambda x: lost(name, x) <= KEPT + 1e-9, batches))[-1]  # noqa: B023
        for name in (RECIPE, "SGD")
    }
    verdict = "confirmed" if kept[RECIPE] > kept["SGD"] else "not confirmed"
    lines.append(
        f"{title}, of the batch sizes tried, **{RECIPE}** keeps the accuracy of batch {first:,} up "
        f"to {kept[RECIPE]:,}, SGD up to {kept['SGD']:,}. The claim of the paper in this strict "
        f"sense, that LARS keeps the accuracy where SGD loses it, is {verdict}."
    )
    return lines


def compare(results: Results, norm: bool, other: str) -> str:
    """How the recipe compares with another optimizer at the largest batch size."""
    batch = max(results.plan.batches)
    a, b = (scores(results.scored[Cell(name, norm, batch)]) for name in (RECIPE, other))
    difference = fmean(a) - fmean(b)
    margin = 2 * math.sqrt(variance(a) / len(a) + variance(b) / len(b))
    points = f"{abs(difference):.1f} ± {margin:.1f} points"
    if abs(difference) <= margin:
        return f"not distinguishable from {other} ({points})"
    chance = " (near chance)" * is_near_chance(results.tuning[Cell(other, norm, batch)])
    return f"{points} {'above' if difference > 0 else 'below'} {other}{chance}"


def is_near_chance(runs: Runs) -> bool:
    """Whether no rate is far above the accuracy of guessing, so that the choice means little."""
    return _validation(runs[choose(runs)]) < NEAR_CHANCE


def about_factors(results: Results) -> str:
    """What the rate of excluded parameters changes, as a sentence."""
    means = [[_validation(runs[x]) for x in FACTORS] for runs in results.by_factor.values()]
    below = (
        f"× {factor:g}: {max(max(row) - row[i] for row in means):.1f}"
        for i, factor in enumerate(FACTORS)
    )
    return f"Points below the best factor of the row, at most: {', '.join(below)}."


def tuned_badly(results: Results, badly: Callable[[Runs], bool]) -> str:
    """The cells for whose tuning runs `badly` is true."""
    found = [
        f"{cell.name} {NORMS[cell.norm]} at batch {cell.batch:,}"
        for cell, runs in results.tuning.items()
        if badly(runs)
    ]
    return "; ".join(found) or "none"


def text(results: Results) -> str:
    """Tables and findings, for the terminal."""
    tables = [*(table(results, norm) for norm in NORMS), by_rate(results), by_factor(results)]
    lines = [*map(report.columns, tables), *findings(results), about_factors(results)]
    lines += [f"At the edge: {tuned_badly(results, at_edge)}"]
    lines += [f"Near chance: {tuned_badly(results, is_near_chance)}"]
    return "\n".join(lines) + "\n"


def page(results: Results, command: str) -> str:
    """The text of docs/training.md: the filled-in template."""
    versions = report.environment() | {name: version(name) for name in PACKAGES}
    named = ["processor", "system", "Python", "lars_tree", "native kernel", *PACKAGES]
    runs = {id(run): run for run in _all_runs(results)}.values()
    plan = results.plan
    steps = (f"{plan.epochs * math.ceil(TRAIN / x):,} at batch {x:,}" for x in plan.batches)
    parts = {
        **asdict(plan),
        "tuning": len(plan.tuning),
        "seeds": len(plan.seeds),
        "further": len(plan.seeds) + len(plan.further),
        "largest": f"{max(plan.batches):,}",
        "large": " and ".join(f"{x:,}" for x in plan.large),
        "runs": len(runs),
        "minutes": f"{sum(run.seconds for run in runs) / 60:.0f}",
        "steps": ", ".join(steps),
        "without_norm": report.markdown(table(results, norm=False)),
        "with_norm": report.markdown(table(results, norm=True)),
        "by_rate": report.markdown(by_rate(results)),
        "by_factor": report.markdown(by_factor(results)),
        "about_factors": about_factors(results),
        "findings": "\n* ".join(findings(results)),
        "at_edge": tuned_badly(results, at_edge),
        "near_chance": tuned_badly(results, is_near_chance),
        "versions": report.markdown([["", ""], *([name, versions[name]] for name in named)]),
    }
    return report.fill("training.md.in", {**parts, "command": command})


def plot(results: Results, path: Path) -> None:
    """Draw the accuracy by batch size, with bars of one standard deviation."""
    batches = results.plan.batches
    with plots.figure(path, len(NORMS), 9, 3.8) as axes:
        for axis, (norm, title) in zip(axes, NORMS.items(), strict=True):
            for index, (name, (color, line)) in enumerate(STYLES.items()):
                mine = [x for x in cells(results.plan) if x.name == name and x.norm == norm]
                mine.sort(key=lambda cell: cell.batch)
                found = [scores(results.scored[cell]) for cell in mine]
                beside = [cell.batch * 1.04 ** (index - 2.5) for cell in mine]  # no overlaps
                style = {"color": color, "capsize": 2, "markersize": 4, "label": name}
                deviations = list(map(stdev, found))
                axis.errorbar(beside, list(map(fmean, found)), deviations, fmt=line, **style)
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
            axis.set_xlabel("batch size, at equal epochs")
            axis.set_title(title)
        axes[0].set_ylabel("test accuracy, %")
        axes[0].legend(frameon=False, loc="lower left")


def write(results: Results, command: str) -> None:
    """Write docs/training.md and its plot."""
    plot(results, report.DOCS / "images" / "training.svg")
    (report.DOCS / "training.md").write_text(page(results, command))


def _validation(runs: Sequence[Run]) -> float:
    return 100 * fmean(run.validation for run in runs)


def _all_runs(results: Results) -> list[Run]:
    by_key = [*results.tuning.values(), *results.by_factor.values()]
    groups = [runs for each in by_key for runs in each.values()]
    return [run for runs in [*groups, *results.scored.values()] for run in runs]
