"""`lars-tree update`: one LARS step on the weights in a file.

The command computes a few leaves at a time, and writes them to a temporary file beside OUT; then it
renames the file. A kill at any moment leaves the complete old or new file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from lars_tree import errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._commands.output import Output, progress
from lars_tree._commands.step import Step, groups, prepare, read
from lars_tree._core import nonfinite
from lars_tree._display import show
from lars_tree._files import formats
from lars_tree._files.arrays import Entry
from lars_tree._files.replacing import replace
from lars_tree._tree import structure
from lars_tree.update import lars_update

_BLOCK = 1 << 16  # the number of bytes compared at a time


def update(weights: str, grads: str, out: str, choice: str, options: dict[str, Any]) -> Output:
    """Write the new weights to `out`, which may be `weights`. `choice` is the option nonfinite."""
    format_ = formats.find_to_write(out)
    with formats.opened(weights, to_map=True) as stored:
        w, g = stored.tree, read(grads)
        _refuse_inputs(out, weights, w, grads, g)
        step = prepare(weights, w, grads, g, **options)
        results = _Results(step, stored.entries, choice)

        def write(file: BinaryIO) -> None:
            with progress(sum(results.sizes), "update") as advance:
                format_.write(file, results.entries(advance), stored.metadata)
            if results.bad and choice == "raise":
                raise nonfinite.error(results.bad, lambda: step.paths, step.words)
            if results.bad:  # "skip"
                file.seek(0)  # the old weights take as many bytes
                format_.write(file, stored.entries, stored.metadata)

        with _naming(out):
            formats.check(format_, stored.entries, dict(zip(step.names, step.paths, strict=True)))
            replace(out, write)
        return _output(weights, grads, out, results)


class _Results:
    """The new weights, computed in groups when they are read.

    Attributes:
        step: The arguments of the step.
        moved, unchanged: The indices of the leaves that have a gradient and that changed or not.
        kept: The indices of the leaves that have no gradient.
        bad: The indices of the leaves that would not be finite.
    """

    def __init__(self, step: Step, stored: Mapping[str, Entry], choice: str) -> None:
        self.sizes = [0 if w is None else w.nbytes for w in step.ws]
        self.kept = [i for i, g in enumerate(step.gs) if g is None and step.ws[i] is not None]
        self.moved: list[int] = []
        self.unchanged: list[int] = []
        self.bad: list[int] = []
        self.step, self._stored = step, stored
        self._nonfinite = "propagate" if choice == "propagate" else "raise"
        self._ready: dict[int, NumpyArray] = {}
        self._group: dict[int, list[int]] = {}
        # Formats write leaves in the order of the file, but may write large dtypes first.
        by_dtype: dict[int, list[int]] = {}
        for i, g in enumerate(step.gs):
            if g is not None:
                by_dtype.setdefault(step.ws[i].dtype.itemsize, []).append(i)
        for indices in by_dtype.values():
            for group in groups(indices, self.sizes):
                self._group |= dict.fromkeys(group, group)

    def entries(self, advance: Callable[[int], None]) -> dict[str, Entry]:
        """The entries to write. Reading an entry calls `advance` with its size in bytes."""
        indices = {name: i for i, name in enumerate(self.step.names)}
        return {
            name: Entry(dtype, shape, partial(self._read, indices[name], advance))
            for name, (dtype, shape, _) in self._stored.items()
        }

    def _read(self, i: int, advance: Callable[[int], None]) -> NumpyArray:
        advance(self.sizes[i])
        if i not in self._group:
            return self._stored[self.step.names[i]].fetch()
        if i not in self._ready:
            self._compute(self._group[i])
        return self._ready.pop(i)

    def _compute(self, group: list[int]) -> None:
        step = self.step
        ws = [self._stored[step.names[i]].fetch() for i in group]
        gs, lr, options = step.arguments(group)
        options["nonfinite"] = self._nonfinite
        new: list[NumpyArray] = ws
        try:
            new = lars_update(ws, gs, lr, **options)
        except errors.NonFiniteError as error:
            self.bad += [leaf for i, leaf in enumerate(group) if (i,) in error.paths]
        for i, w, result in zip(group, ws, new, strict=True):
            (self.unchanged if _is_same(w, result) else self.moved).append(i)
            self._ready[i] = result


def _is_same(a: NumpyArray, b: NumpyArray) -> bool:
    """Whether two arrays have the same bytes; reads only as much as it needs."""
    x, y = (np.asarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    starts = range(0, x.size, _BLOCK)
    return all(x[i : i + _BLOCK].tobytes() == y[i : i + _BLOCK].tobytes() for i in starts)


def _refuse_inputs(out: str, weights: str, w: Any, grads: str, g: Any) -> None:
    """Refuse to replace the file of the gradients, or one of several files of the weights."""
    inputs = _files(grads, g)
    if not _is_same_file(out, weights):
        inputs |= _files(weights, w)
    for file in sorted(inputs):
        if _is_same_file(out, file):
            text = f"out is an input: expected another file than {file}, got {out}"
            raise errors.error(errors.OptionError, "out", text, [])


def _files(name: str, tree: Any) -> set[str]:
    """The files of one input: the given name, and the files that the leaves map."""
    mapped = {x.filename for x in structure.leaves(tree) if isinstance(x, np.memmap)}
    return {name, *(str(x) for x in mapped if x is not None)}


def _is_same_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except FileNotFoundError:
        return False


@contextmanager
def _naming(out: str) -> Iterator[None]:
    """Let the error of a tree that cannot be written in this format name the file."""
    try:
        yield
    except errors.LarsTreeError as error:
        if error.argument == "tree":
            error.args = (f"{out}: {error}",)
        raise


def _output(weights: str, grads: str, out: str, results: _Results) -> Output:
    ws, paths = results.step.ws, results.step.paths
    skipped, moved, unchanged = results.bad, results.moved, results.unchanged
    if skipped:
        moved, unchanged = [], [*moved, *unchanged]
    parts = [f"{len(moved):,} moved"]
    if unchanged:
        parts.append(f"{len(unchanged):,} unchanged by the step")
    if results.kept:
        parts.append(f"{len(results.kept):,} kept without a gradient")
    if skipped:
        bad = errors.enumerated(errors.path_string(paths[i]) for i in sorted(skipped))
        parts.append(f"step skipped, because new weights would not be finite: {bad}")
    lists = {"moved": moved, "unchanged": unchanged, "kept": results.kept, "skipped": skipped}
    record = {"weights": weights, "gradients": grads, "out": out, **show.totals(ws)._asdict()}
    record |= {k: [errors.path_string(paths[i]) for i in sorted(x)] for k, x in lists.items()}
    text = f"{out}: {show.summary(ws)}; {', '.join(parts)}"
    return Output(text, record, written=out)
