"""`lars-tree update`: one LARS step on the weights in a file.

The weights are copied to a temporary file beside OUT and updated there through a memory map; then
the file is renamed. An .npz file cannot be mapped: it is loaded, updated in memory, and saved.
"""

from __future__ import annotations

from typing import Any

from lars_tree import io
from lars_tree._commands.output import Output
from lars_tree._commands.rates import for_leaves, read
from lars_tree._core.advance import matched
from lars_tree._core.execute import checked
from lars_tree._core.options import DEFAULTS
from lars_tree._display import show
from lars_tree._files import formats, names, npz, safetensors
from lars_tree._files.replacing import replacing
from lars_tree._tree import structure
from lars_tree.container import Container
from lars_tree.update import lars_update


def update(weights: str, grads: str, out: str, options: dict[str, Any]) -> Output:
    """Write the new weights to `out`, which may be `weights` or `grads`."""
    format_ = formats.find_to_write(out)
    with formats.opened(weights) as w:
        g = read(grads)
        lr, options = for_leaves(w.tree, **options)
        # Raise all errors of lars_update before the weights are copied.
        checked(*matched(w.tree, g, {**DEFAULTS, **options, "lr": lr}))
        paths = {names.join(path): path for path, _ in structure.walk(w.tree)}
        formats.check(format_, w.entries, paths)
        if format_ is npz:
            new = io.load(weights)
            lars_update(new, g, lr, **options, out=new)
            io.save(new, out, metadata=io.metadata(weights))
        else:
            with replacing(out) as file:
                format_.write(file, w.entries, w.metadata)
                file.flush()
                new = formats.tree(file.name, *safetensors.mapped(file.name, "r+"), Container)
                lars_update(new, g, lr, **options, out=new)
                del new  # Windows does not rename a mapped file
        blanks = structure.leaves(w.tree)
    record = {"weights": weights, "gradients": grads, "out": out, **show.totals(blanks)._asdict()}
    return Output(f"{out}: {show.summary(blanks)}", record)
