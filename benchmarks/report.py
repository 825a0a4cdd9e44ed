"""Format the medians and ratios as text for the terminal and as Markdown for the page."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

import lars_tree
from benchmarks.contestants import CONTESTANTS, OPTIMIZERS
from benchmarks.sections import (
    DTYPES,
    GROUPS,
    LIBRARIES,
    LIMIT,
    OPTIMIZER,
    THREADS,
    Results,
    Seconds,
    cores,
)
from benchmarks.targets import MIB, OURS, OURS_LARS, targets
from benchmarks.trees import TITLES

Row = list[str]
Table = tuple[str, list[Row]]  # a title, and rows; the first row is the heading

PACKAGES = ["numpy", "torch", "ml_dtypes", "pytorch_optimizer", "timm", "jax", "optax", "ivy"]
_GROUP_TITLES = {
    "odd": "Unsupported leaves, and options that need all norms",
    "after": "Right after other work",
    "frameworks": "Traced, sharded, lazy and differentiable steps",
}
DOCS = Path(__file__).parent.parent / "docs"


def tables(results: Results) -> Iterator[tuple[str, Table]]:
    """The tables of the results, each with its name in the template."""
    yield "in_place", ("In place, float32", _peers(results.in_place, OURS))
    yield "out_of_place", ("Out of place, float32", _peers(results.out_of_place, OURS))
    yield "momentum", ("With momentum, in place, float32", _peers(results.momentum, OPTIMIZER))
    yield "dtypes", ("Dtypes, in place: ms, and ratio to float32", _dtypes(results))
    title = "With momentum, ResNet-50, in place: ms, and ratio to float32"
    yield "momentum_dtypes", (title, _momentum_dtypes(results))
    yield "growth", ("Small leaves: µs per leaf", _growth(results))
    yield "threads", ("Threads: ms, and speed-up", _threads(results))
    for name, title in _GROUP_TITLES.items():
        yield name, (title, _groups(results, name))
    yield "memory", ("ResNet-50: peak extra MiB of a step", _memory(results))
    yield "versions", ("Measured with", [["", ""], *map(list, environment().items())])
    yield "targets", ("Targets", _targets(results))


def environment() -> dict[str, str]:
    """The machine, versions and settings that the times depend on."""
    found = {
        "processor": _processor(),
        "cores": str(cores()),
        "system": platform.system(),
        "Python": platform.python_version(),
        "lars_tree": lars_tree.__version__,
        "native kernel": "yes" if lars_tree.native_available() else "no",
        "threads": str(lars_tree.get_num_threads()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    settings = [name for name in sorted(os.environ) if name.startswith(("OMP_", "OPENBLAS", "MKL"))]
    if settings:
        found["set in the environment"] = ", ".join(f"{x}={os.environ[x]}" for x in settings)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def text(results: Results) -> str:
    """All tables, for the terminal."""
    return "\n".join(
        f"\n{title}\n{'-' * len(title)}\n{columns(rows)}"
        for _, (title, rows) in tables(results)
        if len(rows) > 1
    )


def columns(rows: list[Row]) -> str:
    """A table as text for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(line for line in lines if line)


def page(results: Results, command: str) -> str:
    """The text of docs/performance.md: the filled-in template."""
    parts = {name: markdown(rows) for name, (_, rows) in tables(results)}
    verdicts = [target.verdict for target in targets(results) if target.measured is not None]
    parts["summary"] = f"{verdicts.count('met')} of {len(verdicts)} targets are met."
    parts["notes"] = _notes()
    left_out = [str(n) for n in THREADS if n > cores()]
    parts["threads_remark"] = (
        f"{' and '.join(left_out)} threads were not measured: the machine has {cores()} cores."
        if left_out
        else ""
    )
    bandwidth = "not measured" if results.bandwidth is None else f"{results.bandwidth / 1e9:.1f}"
    return fill("performance.md.in", {**parts, "command": command, "bandwidth": bandwidth})


def fill(template: str, parts: dict[str, object]) -> str:
    """A template of this folder with its fields filled in."""
    return Template(Path(__file__).with_name(template).read_text()).substitute(parts)


def _notes() -> str:
    """How contestants differ: each note once, with the names of its contestants."""
    names: dict[str, list[str]] = {}
    for name, x in (CONTESTANTS | OPTIMIZERS).items():
        note = x.note if x.installed else "not installed"
        if note:
            names.setdefault(note, []).append(f"**{name}**")
    return "\n".join(f"* {', '.join(who)}: {note}." for note, who in names.items())


def markdown(rows: list[Row]) -> str:
    """A Markdown table."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _targets(results: Results) -> list[Row]:
    rows = [
        [x.what, x.aim, x.show(x.measured), x.verdict]
        for x in targets(results)
        if x.measured is not None
    ]
    return [["ratio of times, unless a unit is given", "aim", "measured", ""], *rows]


def _peers(times: dict[str, Seconds], ours: str) -> list[Row]:
    """A row for each contestant: milliseconds, and the ratio to `ours`."""
    names = dict.fromkeys(name for seconds in times.values() for name in seconds)
    everyone = OPTIMIZERS if ours in OPTIMIZERS else CONTESTANTS
    names |= {name: None for name, x in everyone.items() if not x.installed and times}
    rows = [["", *(heading for tree in times for heading in (f"{TITLES[tree]}, ms", "ratio"))]]
    for name in sorted(names, key=lambda name: name != LIMIT):
        row = [name]
        for seconds in times.values():
            if name in seconds:
                row += [_ms(seconds[name]), f"{seconds[name] / seconds[ours]:.2f}"]
            else:
                row += ["not installed", ""]
        rows.append(row)
    return rows if len(rows) > 1 else []


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _dtypes(results: Results) -> list[Row]:
    return _by_dtype(
        {
            f"{TITLES[tree]}, {library}": (times, library)
            for tree, times in results.dtypes.items()
            for library in LIBRARIES
        }
    )


def _momentum_dtypes(results: Results) -> list[Row]:
    times = results.momentum_dtypes
    return _by_dtype({name: (times, name) for name in (OPTIMIZER, OURS_LARS)} if times else {})


def _by_dtype(columns: dict[str, tuple[Seconds, str]]) -> list[Row]:
    """A row for each dtype; a column has times by "name dtype", and the name."""
    rows = [["", *columns]]
    for dtype in DTYPES:
        pairs = ((x[f"{name} {dtype}"], x[f"{name} float32"]) for x, name in columns.values())
        rows.append([dtype, *(f"{_ms(time)} ({time / base:.2f})" for time, base in pairs)])
    return rows if columns else []


def _by_number(
    series: dict[str, dict[int, float]], title: Callable[[str], str], cell: Callable[..., str]
) -> list[Row]:
    numbers = next(iter(series.values()), {})
    rows = [["", *map(title, series)]]
    rows += [[f"{n:,}", *(cell(values, n) for values in series.values())] for n in numbers]
    return rows if series else []


def _growth(results: Results) -> list[Row]:
    return _by_number(results.growth, str, lambda values, n: f"{1e6 * values[n]:.3g}")


def _threads(results: Results) -> list[Row]:
    def cell(values: dict[int, float], n: int) -> str:
        return f"{_ms(values[n])} ({values[1] / values[n]:.2f})"

    return _by_number(results.threads, TITLES.__getitem__, cell)


def _groups(results: Results, section: str) -> list[Row]:
    """A row for each step: milliseconds, and the ratio to the first step of its group."""
    rows = [["", "ms", "ratio"]]
    for title in (group.title for group in GROUPS[section] if group.title in results.groups):
        times = results.groups[title]
        base = next(iter(times.values()), 0.0)
        rows += [[f"{title}: {name}", _ms(x), f"{x / base:.2f}"] for name, x in times.items()]
        rows += [] if times else [[title, "not installed", ""]]
    return rows


def _memory(results: Results) -> list[Row]:
    ways = results.memory
    rows = [["", *ways]]
    for name in ways.get("in place", {}):
        cells = (f"{ways[way][name] / MIB:.1f}" if name in ways[way] else "" for way in ways)
        rows.append([name, *cells])
    return rows if ways else []
