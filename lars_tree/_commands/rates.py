"""Reads trees from files, and converts the command-line options to options of `lars_update`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from lars_tree import errors, io
from lars_tree._core import options
from lars_tree._files import formats, npz
from lars_tree._tree import structure
from lars_tree.container import Container


def read(file: str) -> Container:
    """Map a .safetensors file, or load an .npz file."""
    return io.load(file) if formats.find(file) is npz else io.open(file)


def for_leaves(
    w: Any, lr: float, lr_for: Sequence[tuple[str, float]], no_adapt: Sequence[str], **shared: Any
) -> tuple[Any, dict[str, Any]]:
    """The rate and the other options of `lars_update` for weights w, from the command line.

    Raises an OptionError for an invalid rate, even if no leaf uses it, and for a pattern that
    matches no leaf.
    """
    for given in (lr, dict(lr_for)):
        options.check({"lr": given})
    paths = ["/".join(map(str, path)) for path, _ in structure.walk(w)]
    lrs, adapt = dict.fromkeys(paths, lr), dict.fromkeys(paths, True)
    for pattern, rate in lr_for:
        lrs.update(dict.fromkeys(_matching("lr_for", pattern, paths), rate))
    for pattern in no_adapt:
        adapt.update(dict.fromkeys(_matching("no_adapt", pattern, paths), False))
    rates, adapted = (
        structure.rebuild(w, [values[path] for path in paths]) for values in (lrs, adapt)
    )
    return rates, {**shared, "adapt": adapted}


def _matching(argument: str, pattern: str, paths: list[str]) -> list[str]:
    found = [path for path in paths if fnmatchcase(path, pattern)]
    if not found:
        hint = errors.did_you_mean(pattern, paths)
        text = f"{argument} matches no leaf: expected a pattern of paths, got {pattern!r}{hint}"
        raise errors.error(errors.OptionError, argument, text, [])
    return found
