"""The options of a step as the command line gives them, and the trees in files they apply to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from lars_tree import _options, _tree, errors, io
from lars_tree._files import formats, npz
from lars_tree.container import Container


class Rates(NamedTuple):
    """The options of a step, before the weights are known.

    Attributes:
        lr: The rate.
        lr_for: Pairs of a pattern and the rate of the leaves that match it; the last match counts.
        no_adapt: Patterns of leaves that are updated by plain SGD.
        shared: Further options of `lars_update`, the same for all leaves.
    """

    lr: float
    lr_for: Sequence[tuple[str, float]]
    no_adapt: Sequence[str]
    shared: Mapping[str, Any]

    def options(self, w: Any) -> tuple[Any, dict[str, Any]]:
        """The rate and the other options of `lars_update` for these weights.

        Raises:
            OptionError: a rate is invalid, even if no leaf takes it; a pattern matches no leaf.
        """
        paths = ["/".join(map(str, path)) for path, _ in _tree.walk(w)]
        for lr in (self.lr, dict(self.lr_for)):
            _options.check({"lr": lr})
        lrs, adapt = dict.fromkeys(paths, self.lr), dict.fromkeys(paths, True)
        for pattern, lr in self.lr_for:
            lrs.update(dict.fromkeys(_matching("lr_for", pattern, paths), lr))
        for pattern in self.no_adapt:
            adapt.update(dict.fromkeys(_matching("no_adapt", pattern, paths), False))
        by_leaf = [_tree.rebuild(w, [values[path] for path in paths]) for values in (lrs, adapt)]
        return by_leaf[0], {**self.shared, "adapt": by_leaf[1]}


def _matching(argument: str, pattern: str, paths: list[str]) -> list[str]:
    found = [path for path in paths if fnmatchcase(path, pattern)]
    if not found:
        hint = errors.did_you_mean(pattern, paths)
        text = f"{argument} matches no leaf: expected a pattern of paths, got {pattern!r}{hint}"
        raise errors.error(errors.OptionError, argument, text, [])
    return found


def read(file: str) -> Container:
    """The tree in a file: a .safetensors file is mapped, an .npz file is loaded as a whole."""
    return io.load(file) if formats.find(file) is npz else io.open(file)
