"""Weights and gradients in files, leaf by leaf, with the options of each; all checked first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _options, _tree, errors
from lars_tree._core.advance import matched
from lars_tree._core.execute import checked
from lars_tree._files import names
from lars_tree._files.formats import Stored

Array = np.ndarray[Any, Any]


class Rates(NamedTuple):
    """The options of a step, as a command line gives them.

    Attributes:
        lr: The rate.
        lr_for: Pairs of a pattern and the rate of the leaves that match it; the last one counts.
        no_adapt: Patterns of leaves that take plain steps of SGD.
        shared: Further options of `lars_update`, for all leaves.
    """

    lr: float
    lr_for: Sequence[tuple[str, float]] = ()
    no_adapt: Sequence[str] = ()
    shared: Mapping[str, Any] = {}


class Step(NamedTuple):
    """A leaf with what its step needs. The gradient is None where the weights stay as they are."""

    path: errors.Path
    name: str
    weights: Any  # a Lazy, as is the gradient
    gradient: Any
    options: dict[str, Any]

    def fetch(self) -> tuple[Array, Array | None]:
        """Weights and gradient, as they are in the files."""
        return self.weights.leaf(), self.gradient and self.gradient.leaf()


def steps(w: Stored, g: Stored, rates: Rates) -> list[Step]:
    """The steps, in the order of the leaves. Nothing has been read but what arrays there are.

    Raises:
        LarsTreeError: as `lars_update` does; also for a pattern that matches no leaf.
    """
    paths = [path for path, _ in _tree.walk(w.tree)]
    known = ["/".join(map(str, path)) for path in paths]
    for given in (rates.lr, dict(rates.lr_for)):  # also those that in the end no leaf takes
        _options.check({"lr": given})
    lrs = [rates.lr] * len(known)
    for pattern, lr in rates.lr_for:
        for i in _matching("lr_for", pattern, known):
            lrs[i] = lr
    adapt = [True] * len(known)
    for pattern in rates.no_adapt:
        for i in _matching("no_adapt", pattern, known):
            adapt[i] = False
    by_leaf = {"lr": _tree.rebuild(w.tree, lrs), "adapt": _tree.rebuild(w.tree, adapt)}
    # What is wrong with all of it is raised before the first leaf is read.
    checked(*matched(w.tree, g.tree, {**_options.DEFAULTS, **rates.shared, **by_leaf}))
    return list(_steps(w, g, paths, lrs, adapt, rates.shared))


def _matching(argument: str, pattern: str, known: list[str]) -> list[int]:
    found = [i for i, name in enumerate(known) if fnmatchcase(name, pattern)]
    if not found:
        hint = errors.did_you_mean(pattern, known)
        text = f"{argument} matches no leaf: expected a pattern of paths, got {pattern!r}{hint}"
        raise errors.error(errors.OptionError, argument, text, [])
    return found


def _steps(
    w: Stored,
    g: Stored,
    paths: list[errors.Path],
    lrs: list[float],
    adapt: list[bool],
    shared: Mapping[str, Any],
) -> Iterator[Step]:
    sources = _tree.rebuild(g.tree, [names.join(path) for path, _ in _tree.walk(g.tree)])
    rows = zip(paths, _tree.broadcast("dcdw", w.tree, sources), lrs, adapt, strict=True)
    for path, source, lr, adapts in rows:
        name = names.join(path)
        if name in w.entries:  # else None stands there
            options = {**shared, "lr": lr, "adapt": adapts}
            yield Step(path, name, w.entries[name], g.entries.get(source), options)
