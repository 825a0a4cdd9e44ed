"""`lars-tree show`: the tree in a file, or the table of its layers if gradients are given."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lars_tree import errors, report
from lars_tree._commands.output import Output, columns, one_line, progress
from lars_tree._commands.patterns import matching
from lars_tree._commands.step import groups, prepare, read
from lars_tree._display import show
from lars_tree._files import formats, names
from lars_tree._tree import structure


def tree(file: str, patterns: Sequence[str], depth: int | None) -> Output:
    """The arrays in the file, without reading their elements, and its metadata."""
    with formats.opened(file, to_list=True) as stored:
        leaves = list(structure.walk(stored.tree))
        metadata = {k: text for k, text in stored.metadata.items() if k != formats.STRUCTURE}
    named = [names.join(path) for path, _ in leaves]
    shown = [(*leaves[i], named[i]) for i in _selected(patterns, named, file)]
    totals, part = (show.totals(x for _, x, *_ in xs)._asdict() for xs in (leaves, shown))
    header = f"{file}: {show.summary(x for _, x in leaves)}"
    if patterns:
        header += f"; shown: {show.summary(x for _, x, _ in shown)}"
    rows = _rows(shown, depth)
    lines = columns(
        [(k, show.summary(x) if isinstance(x, list) else show.leaf(x)) for k, x in rows.items()]
    )
    if metadata:
        lines += ["metadata:", *columns([(one_line(k), one_line(x)) for k, x in metadata.items()])]
    described = [_described(path, x) for path, x in rows.items()]
    record = {"file": file, **totals, "shown": part, "metadata": metadata, "tree": described}
    return Output("\n".join([header, *lines]), record)


def _selected(patterns: Sequence[str], named: list[str], file: str) -> list[int]:
    """The indices of the leaves that match one of the patterns; without patterns, of all leaves."""
    if not patterns:
        return list(range(len(named)))
    return sorted({i for pattern in patterns for i in matching("PATTERN", pattern, named, file)})


def _rows(leaves: list[tuple[errors.Path, Any, str]], depth: int | None) -> dict[str, Any]:
    """The leaves by path; those below the depth in lists, by the pattern that selects them."""
    rows: dict[str, Any] = {}
    for path, x, name in leaves:
        keys = name.split(".")
        if depth is None or len(keys) <= depth:
            rows[errors.path_string(path)] = x
        else:
            rows.setdefault(f"{errors.path_string(tuple(keys[:depth]))}/*", []).append(x)
    return rows


def _described(path: str, x: Any) -> dict[str, Any]:
    if isinstance(x, list):
        return {"path": path, **show.totals(x)._asdict()}
    return {
        "path": path,
        "shape": None if x is None else x.shape,
        "dtype": None if x is None else str(x.dtype),
        "parameters": 0 if x is None else x.size,
        "bytes": 0 if x is None else x.nbytes,
    }


def table(file: str, patterns: Sequence[str], grads: str, options: dict[str, Any]) -> Output:
    """The table of the layers for a step with these gradients and options."""
    step = prepare(file, read(file), grads, read(grads), **options)
    selected = [i for i in _selected(patterns, step.names, file) if step.ws[i] is not None]
    sizes = [0 if w is None else w.nbytes for w in step.ws]
    records: list[dict[str, Any]] = []
    with (
        # The table already shows the ratios that the warning names.
        warnings.catch_warnings(action="ignore", category=report.TrustRatioWarning),
        progress(sum(sizes[i] for i in selected), "show") as advance,
    ):
        for group in groups(selected, sizes):
            advance(sum(sizes[i] for i in group))
            gs, lr, given = step.arguments(group)
            rows = report.layer_table([step.ws[i] for i in group], gs, lr, **given)
            # Each leaf has one row, whose path is a number.
            shown = (errors.path_string(step.paths[i]) for i in group)
            records += [{**row, "path": path} for path, row in zip(shown, rows, strict=True)]
    layers = report.LayerTable(records)
    return Output(layers.to_text(), {"file": file, "gradients": grads, "layers": layers.records})
