"""Pictures of trust ratios, by matplotlib, without the global state of pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, Any]

MOST_LINES = 12
_MOST_LABELS = 40

# Okabe and Ito (2008), which the colour-blind tell apart; without yellow, too pale for a line.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_DASHES = ["-", "--"]


def draw(steps: Array, ratios: dict[str, Array], ax: Axes | None) -> Axes:
    """Lines for a few layers, a heat map for many; values that a logarithm has not are left out."""
    from matplotlib.ticker import MaxNLocator

    shown = {
        name: np.where(np.isfinite(column) & (column > 0), column, np.nan)
        for name, column in ratios.items()
    }
    is_map = len(shown) > MOST_LINES
    if ax is None:
        height = min(9.0, max(4.0, 1.2 + 0.2 * len(shown))) if is_map else 4.0
        ax = _new_axes(8.0, height)
    (_heat_map if is_map else _lines)(ax, steps, shown)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_title("Trust ratios", loc="left")
    return ax


def _new_axes(width: float, height: float) -> Axes:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def _lines(ax: Axes, steps: Array, ratios: dict[str, Array]) -> None:
    marker = "o" if len(steps) < 3 else None  # a line through one point cannot be seen
    for i, (name, column) in enumerate(ratios.items()):
        color = _COLORS[i % len(_COLORS)]
        dashes = _DASHES[i // len(_COLORS) % len(_DASHES)]
        ax.plot(
            steps, column, dashes, color=color, marker=marker, linewidth=1.5, label=_label(name)
        )
    ax.set_yscale("log")
    ax.set_ylabel("ratio")
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if ratios:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _heat_map(ax: Axes, steps: Array, ratios: dict[str, Array]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    table = np.array(list(ratios.values()))
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.1, 1.0)
    if low == high:  # one colour: that of the middle
        low, high = low / 2, high * 2
    colors = colormaps["viridis"].with_extremes(bad="0.85")
    edges = _edges(steps)
    image = ax.pcolormesh(
        edges,
        np.arange(len(table) + 1) - 0.5,
        np.ma.masked_invalid(table),
        norm=LogNorm(low, high),
        cmap=colors,
        rasterized=True,
    )
    ax.set_ylim(len(table) - 0.5, -0.5)  # the first layer is at the top
    stride = -(-len(table) // _MOST_LABELS)
    places = range(0, len(table), stride)
    names = list(ratios)
    ax.set_yticks(list(places), [_label(names[i]) for i in places], fontsize="small")
    ax.figure.colorbar(image, ax=ax, label="ratio", pad=0.02)
    if known.size < table.size:
        patch = Patch(color="0.85", label="none, 0 or not finite")
        ax.legend(
            handles=[patch],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            frameon=False,
            fontsize="small",
        )


def _edges(steps: Array) -> Array:
    """Where the cells of a row begin and end: half way between its steps."""
    centers = np.asarray(steps, float)
    if len(centers) < 2:
        return np.concatenate([centers - 0.5, centers + 0.5])
    middles = (centers[1:] + centers[:-1]) / 2
    ends = [2 * centers[0] - middles[0]], [2 * centers[-1] - middles[-1]]
    return np.concatenate([ends[0], middles, ends[1]])


def _label(name: str, most: int = 40) -> str:
    """The end of a name says most; '$' would begin a formula."""
    name = name if len(name) <= most else f"...{name[3 - most :]}"
    return name.replace("$", r"\$")
