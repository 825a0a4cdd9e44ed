"""The step that `update` takes and `show` measures: gradients and options for each leaf.

Gradients are matched with weights by their names in the files, so that a flat state_dict matches
a tree whose names were split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lars_tree import errors, io
from lars_tree._commands.patterns import matching
from lars_tree._core.advance import matched
from lars_tree._core.execute import checked
from lars_tree._core.native import Native
from lars_tree._core.options import DEFAULTS, check
from lars_tree._files import formats, npz
from lars_tree._files.names import join
from lars_tree._tree import structure
from lars_tree.container import Container

# Leaves are updated, measured and written in groups of at most these sizes, or alone.
_MOST_BYTES = 1 << 24
_MOST_LEAVES = 1000


def read(file: str) -> Container:
    """Map a file, or load it if its format cannot be mapped."""
    read = io.load if formats.find(file) is npz else io.open
    try:
        return read(file)
    except errors.FileError:  # the names may collide
        return read(file, flat=True)


class Step(NamedTuple):
    """The arguments of `lars_update`, each with one value for each leaf.

    Attributes:
        paths: The paths of the leaves.
        names: The names of the leaves in the file.
        ws: The weights, or arrays with their dtypes and shapes.
        gs: The gradients; None for a leaf that is not updated.
        columns: The values of lr, decay_lambda and adapt.
        shared: The other options, with one value for all leaves.
        words: The names of the files, for errors.
    """

    paths: list[errors.Path]
    names: list[str]
    ws: list[Any]
    gs: list[Any]
    columns: dict[str, list[Any]]
    shared: dict[str, Any]
    words: errors.Words

    def arguments(self, indices: Iterable[int]) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """The gradients, the rates and the other options of some leaves, as lists."""
        indices = list(indices)
        options = {name: [x[i] for i in indices] for name, x in self.columns.items()}
        return [self.gs[i] for i in indices], options.pop("lr"), {**self.shared, **options}

    def check(self) -> None:
        """Raise every error that `lars_update` would raise before it reads the elements."""
        given = {**DEFAULTS, **self.shared, **self.columns}
        columns, caller = matched(self.ws, self.gs, given)
        rest = Native(columns, measures=True).rest
        caller = caller._replace(paths=lambda: self.paths, words=self.words)
        checked(columns, caller, rest)


def groups(indices: Iterable[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Divide leaves into groups, in order. `sizes` has the bytes of all leaves."""
    group: list[int] = []
    size = 0
    for i in indices:
        if group and (size + sizes[i] > _MOST_BYTES or len(group) == _MOST_LEAVES):
            yield group
            group, size = [], 0
        group.append(i)
        size += sizes[i]
    if group:
        yield group


def prepare(
    weights: str,
    w: Any,
    grads: str,
    g: Any,
    *,
    keep_missing: bool,
    broadcast: bool,
    lr: float,
    lr_for: Sequence[tuple[str, float]],
    decay_lambda: float,
    decay_for: Sequence[tuple[str, float]],
    no_adapt: Sequence[str],
    **shared: Any,
) -> Step:
    """Match the tree w of the file `weights` with gradients and options, and check all of them."""
    for name, given, more in (("lr", lr, lr_for), ("decay_lambda", decay_lambda, decay_for)):
        for values in (given, dict(more)):
            check({name: values})  # even if no leaf uses the value
    paths = [path for path, _ in structure.walk(w)]
    ws = structure.leaves(w)
    named = list(map(join, paths))
    columns: dict[str, list[Any]] = {
        "lr": [lr] * len(ws),
        "decay_lambda": [decay_lambda] * len(ws),
        "adapt": [True] * len(ws),
    }
    patterns = [
        ("lr", "--lr-for", lr_for),
        ("decay_lambda", "--decay-for", decay_for),
        ("adapt", "--no-adapt", [(pattern, False) for pattern in no_adapt]),
    ]
    for name, option, pairs in patterns:
        for pattern, value in pairs:
            for i in matching(option, pattern, named, weights):
                columns[name][i] = value
    words = errors.Words(w=weights, dcdw=grads)
    step = Step(paths, named, ws, [], columns, shared, words)
    step = step._replace(gs=_gradients(step, g, keep_missing, broadcast))
    if not broadcast:
        _refuse_other_shapes(step)
    step.check()
    return step


def _gradients(step: Step, g: Any, keep_missing: bool, broadcast: bool) -> list[Any]:
    """The gradient in the tree g for each leaf, matched by name.

    None in the gradients applies to all leaves below it; with `broadcast`, an array does so too.
    """
    given = {join(path): (path, leaf) for path, leaf in structure.walk(g)}
    found: list[Any] = []
    used: set[str] = set()
    missing: dict[str, errors.Path] = {}
    faults: dict[errors.Path, str] = {}
    for path, name, w in zip(step.paths, step.names, step.ws, strict=True):
        source = name
        while source and source not in given:  # look for a node above
            source = source.rpartition(".")[0]
        where, gradient = given.get(source, (None, None))
        if where is None:
            if w is not None:
                missing[name] = path
            found.append(None)
            continue
        used.add(source)
        if gradient is not None and source == name and w is None:
            faults[where] = f"expected None, got {errors.describe(gradient)}"
        elif gradient is not None and source != name and not broadcast:
            text = f"expected a gradient for each leaf below it, got {errors.describe(gradient)}"
            faults[where] = f"{text} (--broadcast)"
        found.append(None if w is None else gradient)
    unknown = [name for name in given if name not in used]
    for i, name in enumerate(unknown):
        hint = errors.did_you_mean(name, missing) if i < errors.MOST_LINES else ""
        faults[given[name][0]] = f"not in {step.words.w}{hint}"
    headline = f"{step.words.dcdw} does not match {step.words.w}"
    if missing and not keep_missing:
        faults = dict.fromkeys(missing.values(), "expected a gradient, got none") | faults
        headline += " (--keep-missing keeps weights that have no gradient)"
    elif not faults and not any(x is not None for x in found):
        faults[()] = "expected at least one gradient, got none"
    if faults:
        raise errors.error(errors.StructureError, "dcdw", headline, faults.items())
    return found


def _refuse_other_shapes(step: Step) -> None:
    lines = [
        (path, f"expected shape {w.shape}, got {g.shape}")
        for path, w, g in zip(step.paths, step.ws, step.gs, strict=True)
        if g is not None and g.shape != w.shape
    ]
    if lines:
        headline = f"{step.words.dcdw} has gradients of another shape than {step.words.w}"
        headline += " (--broadcast repeats gradients of a smaller shape)"
        raise errors.error(errors.ShapeError, "dcdw", headline, lines)
