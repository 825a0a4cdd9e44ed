"""Plots of trust ratios with matplotlib, without the global state of pyplot."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = np.ndarray[Any, Any]

_MOST_LINES = 12
_MOST_LABELS = 40

# Okabe and Ito (2008): distinct for colour-blind readers. Yellow is left out, because it is too
# pale for a line.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_DASHES = ["-", "--"]


def draw(steps: Floats, ratios: dict[str, Floats], ax: Axes | None) -> Axes:
    """Draw lines for few layers, a heat map for many; only finite ratios > 0 are drawn."""
    with errors.requiring("TrustHistory.plot", "'lars-tree[report]'"):
        from matplotlib.ticker import MaxNLocator

    shown = {
        name: np.where(np.isfinite(column) & (column > 0), column, np.nan)
        for name, column in ratios.items()
    }
    is_map = len(shown) > _MOST_LINES
    if ax is None:
        height = min(9.0, max(4.0, 1.2 + 0.2 * len(shown))) if is_map else 4.0
        ax = _new_axes(height)
    (_heat_map if is_map else _lines)(ax, steps, shown)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_title("Trust ratios", loc="left")
    return ax


def _new_axes(height: float) -> Axes:
    """The axes of a new figure. A notebook shows the figure if a cell ends with these axes."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    class FigureAxes(Axes):
        def _repr_png_(self) -> bytes:
            picture = BytesIO()
            figure.savefig(picture, format="png", bbox_inches="tight")
            return picture.getvalue()

    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure.add_subplot(axes_class=FigureAxes)


def _lines(ax: Axes, steps: Floats, ratios: dict[str, Floats]) -> None:
    marker = "o" if len(steps) < 3 else None  # a line through one point is invisible
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


def _heat_map(ax: Axes, steps: Floats, ratios: dict[str, Floats]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    table = np.array(list(ratios.values()))
    known = table[np.isfinite(table)]
    low, high = (known.min(), known.max()) if known.size else (0.1, 1.0)
    if low == high:  # centre the only value on the colour scale
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
    labels = list(map(_label, ratios))
    ax.set_yticks(range(0, len(table), stride), labels[::stride], fontsize="small")
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


def _edges(steps: Floats) -> Floats:
    """The edges of the cells along the step axis: half way between the steps."""
    centers = np.asarray(steps, float)
    if len(centers) < 2:
        return np.concatenate([centers - 0.5, centers + 0.5])
    middles = (centers[1:] + centers[:-1]) / 2
    ends = [2 * centers[0] - middles[0]], [2 * centers[-1] - middles[-1]]
    return np.concatenate([ends[0], middles, ends[1]])


def _label(name: str, most: int = 40) -> str:
    """The name, cut at its start if it is long; '$' is escaped: it would start a formula."""
    name = name if len(name) <= most else f"...{name[3 - most :]}"
    return name.replace("$", r"\$")
