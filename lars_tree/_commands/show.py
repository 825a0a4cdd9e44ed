"""`lars-tree show`: the tree in a file, and with gradients the table of its layers."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

from lars_tree import _show, _tree, errors, report
from lars_tree._commands.output import Output, columns
from lars_tree._commands.rates import Rates, read
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
    """The table of the layers for a step with these gradients."""
    w = read(file)
    lr, options = rates.options(w)
    # The table shows the ratios that the warning is about.
    with warnings.catch_warnings(action="ignore", category=report.TrustRatioWarning):
        layers = report.layer_table(w, read(grads), lr, **options)
    return Output(layers.to_text(), {"file": file, "gradients": grads, "layers": layers.records})
