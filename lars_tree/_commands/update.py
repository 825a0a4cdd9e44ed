"""`lars-tree update`: one LARS step on weights in a file, a leaf at a time.

Each leaf is read, stepped and written when its turn comes: memory is bounded by the largest leaf.
The result is written to a temporary file, which takes its place in one step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lars_tree import _show, _tree
from lars_tree._commands.output import Output
from lars_tree._commands.steps import Array, Rates, Step, steps
from lars_tree._files import formats
from lars_tree._files.arrays import Lazy
from lars_tree._files.replacing import replacing
from lars_tree.update import lars_update


def update(weights: str, grads: str, out: str, rates: Rates) -> Output:
    """Write the new weights to `out`, which may be one of the files that are read."""
    format_ = formats.find(out)
    with formats.opened(weights) as w, formats.opened(grads) as g:
        todo = steps(w, g, rates)
        entries = {step.name: step.weights for step in todo}
        formats.check(format_, entries, {step.name: step.path for step in todo})
        with replacing(out) as file, _progress(sum(x.nbytes for x in entries.values())) as advance:
            news = {
                step.name: Lazy(x.dtype, x.shape, _stepping(step, advance))
                for step, x in zip(todo, entries.values(), strict=True)
            }
            format_.write(file, news, w.metadata)
        blanks = _tree.leaves(w.tree)
    totals = _show.totals(blanks)
    record = {"weights": weights, "gradients": grads, "out": out, **totals._asdict()}
    return Output(f"{out}: {_show.summary(blanks)}", record)


def _stepping(step: Step, advance: Callable[[int], None]) -> Callable[[], Array]:
    """What reads a leaf and steps it."""

    def stepped() -> Array:
        w, dcdw = step.fetch()
        if dcdw is not None:
            options = dict(step.options)
            lars_update(w, dcdw, options.pop("lr"), **options, out=w)
        advance(w.nbytes)
        return w

    return stepped


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """What to call with the number of bytes that are done: it moves a bar, in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=size)
        yield lambda count: progress.advance(task, count)
