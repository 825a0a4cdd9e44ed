"""The result of a subcommand: text for people, or one JSON document; and progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from lars_tree import errors

_DELAY = 0.5  # the seconds before a progress bar appears
_MOST_METADATA = 200  # the characters shown of a text of unknown length


class Output(NamedTuple):
    """The text or the record to print, the exit status, and the file that was written."""

    text: str
    record: dict[str, Any]
    status: int = 0
    written: str | None = None

    def as_json(self) -> str:
        """The record in one line. NaN and infinities become strings: JSON does not have them."""
        return json.dumps(_plain(self.record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def columns(lines: list[tuple[str, str]]) -> list[str]:
    """Names and texts in two aligned columns."""
    width = max((len(name) for name, _ in lines), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in lines]


def one_line(text: str) -> str:
    """A text from a file, quoted if it has special characters, and shortened if it is long."""
    return errors.shortened(text if text.isprintable() else repr(text), _MOST_METADATA)


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the size of each part of the work when the part begins.

    It shows a bar on stderr if stderr is a terminal and the output is not JSON. Work that is done
    in half a second shows no bar.
    """
    with ExitStack() as stack:
        if not _shows_progress():
            yield lambda _: None
            return
        import click

        start, done, bar = time.monotonic(), 0, None

        def advance(size: int) -> None:
            nonlocal done, bar
            if bar is not None:
                bar.update(size)
            elif time.monotonic() - start > _DELAY:
                made = click.progressbar(length=total, label=label, file=sys.stderr)
                bar = stack.enter_context(made)
                bar.update(done + size)
            done += size

        yield advance


def _shows_progress() -> bool:
    import click

    context = click.get_current_context(silent=True)
    is_json = context is not None and context.params.get("as_json")
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal and os.environ.get("TERM") != "dumb" and not is_json
