"""`lars-tree show`: the tree in a file, and with gradients the table of its layers."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

from lars_tree import _show, _tree, errors, report
from lars_tree._commands.output import Output, columns
from lars_tree._commands.steps import Rates, steps
from lars_tree._files import formats


def tree(file: str) -> Output:
    """What arrays there are. None of them is read."""
    with formats.opened(file) as stored:
        leaves = [(errors.path_string(path), x) for path, x in _tree.walk(stored.tree)]
        metadata = {k: text for k, text in stored.metadata.items() if k != formats.STRUCTURE}
    totals = _show.totals(x for _, x in leaves)
    text = [f"{file}: {_show.summary(x for _, x in leaves)}"]
    text += columns([(path, _show.leaf(x)) for path, x in leaves])
    record = {
        "file": file,
        **totals._asdict(),
        "metadata": metadata,
        "tree": [_described(path, x) for path, x in leaves],
    }
    return Output("\n".join(text), record)


def _described(path: str, x: Any) -> dict[str, Any]:
    if x is None:
        return {"path": path, "shape": None, "dtype": None, "parameters": 0, "bytes": 0}
    return {
        "path": path,
        "shape": x.shape,
        "dtype": str(x.dtype),
        "parameters": prod(x.shape),
        "bytes": x.nbytes,
    }


def table(file: str, grads: str, rates: Rates) -> Output:
    """The layers beside the step that these gradients would make; read one leaf at a time."""
    records: list[dict[str, Any]] = []
    with formats.opened(file) as w, formats.opened(grads) as g, warnings.catch_warnings():
        # Each ratio that is odd is in the table.
        warnings.simplefilter("ignore", report.TrustRatioWarning)
        for step in steps(w, g, rates):
            lr, options = step.options["lr"], {k: x for k, x in step.options.items() if k != "lr"}
            old, dcdw = (_nested(step.path, x) for x in step.fetch())
            records += report.layer_table(old, dcdw, lr, **options).records
    layers = report.LayerTable(records)
    return Output(layers.to_text(), {"file": file, "gradients": grads, "layers": layers.records})


def _nested(path: errors.Path, leaf: Any) -> Any:
    """A tree of this leaf alone."""
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf
