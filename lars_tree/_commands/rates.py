"""The options of a step, from those of the command line; and the trees in files it is taken on."""

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
    """The tree in a file: a .safetensors file is mapped, an .npz file is loaded."""
    return io.load(file) if formats.find(file) is npz else io.open(file)


def for_leaves(
    w: Any, lr: float, lr_for: Sequence[tuple[str, float]], no_adapt: Sequence[str], **shared: Any
) -> tuple[Any, dict[str, Any]]:
    """The rate and the other options of `lars_update` for these weights.

    Args:
        w: The weights.
        lr: The rate of the leaves that no pattern matches.
        lr_for: Patterns of leaves, each with a rate; the last match counts.
        no_adapt: Patterns of leaves that are updated by plain SGD.
        **shared: Options that are the same for all leaves.

    Raises:
        OptionError: a rate is invalid, even if no leaf takes it; a pattern matches no leaf.
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
