"""TrustHistory: trust ratios over a run, kept on their devices until they are read."""

from __future__ import annotations

import operator
import sys
import warnings
from math import prod
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.base import Values
from lars_tree._backends.wrapper import unwrap
from lars_tree._report.measure import fetch, is_traced, layer_paths, traced_error, unreadable
from lars_tree._tree import structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TrustRatioWarning(UserWarning):
    """Some layers have a trust ratio that is 0, not finite, or clipped. The message names them."""


def warn(headline: str, lines: list[errors.Line]) -> None:
    """Warn about these layers, if any. The warning names the calling line outside this package."""
    if lines:
        level, frame = 1, sys._getframe(0)
        while frame is not None and _package(frame) == "lars_tree":
            level, frame = level + 1, frame.f_back  # type: ignore[assignment]
        text = errors.message("w", headline, lines)
        warnings.warn(text, TrustRatioWarning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__package__")).partition(".")[0]


class TrustHistory:
    """The trust ratios of each layer over the steps of a run.

    >>> from lars_tree.report import TrustHistory, trust_ratios
    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> history = TrustHistory()
    >>> for step in range(3):
    ...     g = w.map(lambda x: x + 1)
    ...     history.record(trust_ratios(w, g, 0.1))
    ...     w = w.lars_update(g, 0.1)
    >>> history
    TrustHistory: 2 layers, 3 steps from 0 to 2
    >>> history.ratios["kernel"].round(4)
    array([0.7809, 0.7624, 0.7428])

    `record` is cheap: it keeps the arrays on their devices and does not wait. Reading `ratios`
    fetches all new values at once.

    Memory is bounded: when more than `capacity` steps are kept, every other step is dropped. From
    then on only every second step is kept, later only every fourth, and so on. The kept steps
    therefore always span the whole run evenly.

    Args:
        capacity: The largest number of steps to keep, at least 2.

    Raises:
        OptionError: `capacity` is not a whole number >= 2.
    """

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = errors.whole_number("capacity", capacity, least=2)
        self._like: Any = None
        self._steps: list[int] = []
        self._rows: list[list[Any]] = []
        self._shapes: list[tuple[int, ...] | None] = []  # per leaf; None until its first ratio
        self._fetched = 0  # how many of the first rows contain numpy arrays
        self._stride = 1
        self._seen = 0
        self._next = 0

    def record(self, ratios: Any, step: int | None = None) -> None:
        """Record the ratios of one step.

        Args:
            ratios: The result of `trust_ratios`. A jitted function has to return it, because
                tracers cannot be recorded. A layer without a ratio (None) has a gap at this step.
            step: The number of the step; by default the last number plus 1.

        Raises:
            StructureError: The tree does not match the first record.
            LeafError: A value is traced, or is not a number; or a leaf has more or fewer layers
                than before. Nothing is recorded.
        """
        step = self._next if step is None else operator.index(step)
        like, shapes = self._like, self._shapes
        if like is None:
            with structure.explaining({"ratios": ratios}):
                values = [None] * len(structure.leaves(ratios))
                like = structure.for_reading(ratios, values, "ratios")
            shapes = [None] * len(structure.leaves(like))
        given = structure.broadcast(
            "ratios", like, ratios, exact=True, to="those of the first record"
        )
        row = [_kept(x) for x in given]
        self._like, self._shapes, self._next = like, _shapes_with(row, shapes, like), step + 1
        if self._seen % self._stride == 0:
            self._rows.append(row)
            self._steps.append(step)
        self._seen += 1
        if len(self._rows) > self.capacity:
            self._fetched = (self._fetched + 1) // 2
            self._rows, self._steps = self._rows[::2], self._steps[::2]
            self._stride *= 2

    @property
    def steps(self) -> np.ndarray[Any, Any]:
        """The numbers of the kept steps: a vector of int64."""
        return np.array(self._steps, np.int64)

    @property
    def ratios(self) -> dict[str, np.ndarray[Any, Any]]:
        """The ratios of each layer by path: vectors like `steps`, NaN where there is no ratio."""
        return {errors.path_string(path): column for path, column, _ in self._columns()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the ratios over the steps: a line for each layer, or a heat map for many layers.

        Args:
            ax: The axes to draw on; by default those of a new figure outside pyplot, which a
                notebook shows. To save it, call `history.plot().figure.savefig(path)`.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is missing: `pip install 'lars-tree[report]'`.

        Warns:
            TrustRatioWarning: Names the layers with a ratio that is 0 or not finite at some step,
                which a logarithmic axis cannot show.
        """
        from lars_tree._report import plots

        columns = self._columns()
        faults: list[errors.Line] = []
        for path, column, present in columns:
            odd = present & ~(np.isfinite(column) & (column > 0))
            if odd.any():
                kinds = " or ".join(f"{x:g}" for x in np.unique(column[odd]))
                faults.append((path, f"ratio is {kinds} at {odd.sum()} of {len(odd)} steps"))
        warn("some layers have odd trust ratios", faults)
        return plots.draw(self.steps, self.ratios, ax)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        if not self._steps:
            return "TrustHistory: nothing recorded"
        count = sum(prod(shape) for shape in self._shapes if shape is not None)
        layers, steps = errors.counted(count, "layer"), errors.counted(len(self), "step")
        return f"TrustHistory: {layers}, {steps} from {self._steps[0]:,} to {self._steps[-1]:,}"

    def _columns(self) -> list[tuple[errors.Path, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """The path of each layer, its ratios, and a mask of the steps where it has a ratio."""
        self._fetch()
        found = []
        leaves = zip(self._shapes, zip(*self._rows, strict=True), strict=True)
        for (path, _), (shape, column) in zip(structure.walk(self._like), leaves, strict=False):
            if shape is None:
                continue
            present = np.array([x is not None for x in column])
            gap = np.full(shape, np.nan)
            table = np.stack([gap if x is None else x for x in column]).reshape(len(column), -1)
            for layer, ratios in zip(layer_paths(path, shape), table.T, strict=True):
                found.append((layer, ratios, present))
        return found

    def _fetch(self) -> None:
        rows = self._rows[self._fetched :]
        values = iter(fetch("ratios", [x for row in rows for x in row if x is not None]))
        self._rows[self._fetched :] = [
            [None if x is None else next(values) for x in row] for row in rows
        ]
        self._fetched = len(self._rows)


def _kept(x: Any) -> Any:
    """The ratio to keep. Lazy ratios are computed, because their graph keeps the weights alive."""
    x = unwrap(x)
    if x is None or unreadable(x):  # `_shapes_with` will raise an error
        return x
    backend = _backends.find(x)
    if backend is None:
        return np.asarray(x, np.float64)
    if is_traced(x):
        raise traced_error("ratios")
    return fetch("ratios", [x])[0] if backend.values(x) is Values.TRACED else x


def _shapes_with(row: list[Any], shapes: list[Any], like: Any) -> list[Any]:
    """The shapes of all leaves so far, including leaves whose first ratio is in this row."""
    found = list(shapes)
    faults: dict[int, str] = {}
    for i, x in enumerate(row):
        if x is None:
            continue
        text = unreadable(x)
        if text is None and found[i] is None:
            found[i] = x.shape
        elif text is None and found[i] != x.shape:
            text = f"expected ratios of shape {tuple(found[i])} as before, got {tuple(x.shape)}"
        if text is not None:
            faults[i] = text
    if faults:
        paths = [path for path, _ in structure.walk(like)]  # only errors need them
        lines = [(paths[i], text) for i, text in faults.items()]
        raise errors.error(errors.LeafError, "ratios", "ratios cannot be recorded", lines)
    return found
