"""The plots of the performance page: SVG without a background, for light and dark themes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.sections import LIMIT, Results
from benchmarks.trees import TITLES

INK, OURS, PEER = "#808890", "#2f81f7", "#a0a8b0"
SERIES = [OURS, "#d2802a"]
STYLE = {
    "svg.fonttype": "none",  # text instead of paths, for small files
    "svg.hashsalt": "lars_tree",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK
    ),
}


def write(results: Results, folder: Path) -> None:
    """Write all plots."""
    folder.mkdir(parents=True, exist_ok=True)
    _peers(results, folder / "peers.svg")
    _growth(results, folder / "growth.svg")
    _threads(results, folder / "threads.svg")


@contextmanager
def figure(path: Path, panels: int, width: float, height: float) -> Iterator[Any]:
    """Yield the axes of a figure; save the figure at the end."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    with mpl.rc_context(STYLE):
        drawn, axes = pyplot.subplots(1, panels, figsize=(width, height), squeeze=False)
        yield axes[0]
        drawn.tight_layout()
        drawn.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(drawn)


def _peers(results: Results, path: Path) -> None:
    """Draw time / memory limit of each contestant as bars."""
    with figure(path, len(results.in_place), 10, 3) as axes:
        for axis, (tree, times) in zip(axes, results.in_place.items(), strict=True):
            names = [name for name in reversed(times) if name != LIMIT]
            ratios = [times[name] / times[LIMIT] for name in names]
            colors = [OURS if name.startswith("lars_tree") else PEER for name in names]
            bars = axis.barh(names, ratios, color=colors)
            axis.bar_label(bars, fmt=lambda x: f"{x:,.3g}" if x < 100 else f"{x:,.0f}", padding=3)
            axis.set_xscale("log")
            axis.set_xlim(1, 6 * max(ratios))
            axis.set_title(TITLES[tree])
            axis.set_xlabel("time / memory limit")
            if axis is not axes[0]:
                axis.set_yticklabels([])


def _growth(results: Results, path: Path) -> None:
    """Draw the time per leaf as lines."""
    with figure(path, 1, 5, 3) as (axis,):
        for (library, times), color in zip(results.growth.items(), SERIES, strict=True):
            axis.plot(*_microseconds(times), "o-", color=color, label=library)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("leaves of 16×16 and 16")
        axis.set_ylabel("µs for each leaf")
        axis.legend(frameon=False)


def _microseconds(times: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(times), [1e6 * seconds for seconds in times.values()]


def _threads(results: Results, path: Path) -> None:
    """Draw the speed-up over one thread, and the ideal speed-up, as lines."""
    with figure(path, 1, 5, 3) as (axis,):
        for (tree, times), color in zip(results.threads.items(), SERIES, strict=True):
            speedups = [times[1] / seconds for seconds in times.values()]
            axis.plot(list(times), speedups, "o-", color=color, label=TITLES[tree])
        numbers = list(next(iter(results.threads.values())))
        axis.plot(numbers, numbers, "--", color=INK, label="ideal")
        axis.set_xticks(numbers)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("threads")
        axis.set_ylabel("times faster than one")
        axis.legend(frameon=False)
