"""`lars-tree show`: the tree in a file, or the table of its layers if gradients are given."""

from __future__ import annotations

import warnings
from typing import Any

from lars_tree import errors, report
from lars_tree._commands.output import Output, columns
from lars_tree._commands.rates import for_leaves, read
from lars_tree._display import show
from lars_tree._files import formats
from lars_tree._tree import structure


def tree(file: str) -> Output:
    """The arrays in the file, without reading their elements."""
    with formats.opened(file, to_list=True) as stored:
        leaves = [(errors.path_string(path), x) for path, x in structure.walk(stored.tree)]
        metadata = {k: text for k, text in stored.metadata.items() if k != formats.STRUCTURE}
    lines = columns([(path, show.leaf(x)) for path, x in leaves])
    text = "\n".join([f"{file}: {show.summary(x for _, x in leaves)}", *lines])
    totals = show.totals(x for _, x in leaves)._asdict()
    described = [
        {
            "path": path,
            "shape": None if x is None else x.shape,
            "dtype": None if x is None else str(x.dtype),
            "parameters": 0 if x is None else x.size,
            "bytes": 0 if x is None else x.nbytes,
        }
        for path, x in leaves
    ]
    return Output(text, {"file": file, **totals, "metadata": metadata, "tree": described})


def table(file: str, grads: str, options: dict[str, Any]) -> Output:
    """The table of the layers for a step with these gradients and options."""
    w = read(file)
    lr, options = for_leaves(w, **options)
    # The table already shows the ratios that the warning names.
    with warnings.catch_warnings(action="ignore", category=report.TrustRatioWarning):
        layers = report.layer_table(w, read(grads), lr, **options)
    return Output(layers.to_text(), {"file": file, "gradients": grads, "layers": layers.records})
