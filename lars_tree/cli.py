"""The `lars-tree` command: how it starts and ends. What it takes is in `_commands/parser.py`.

0 is success; `diff` returns 1 for files that differ; 2 is an error, of which one line on stderr
says what is wrong; 130 is Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: The arguments; None takes those of the process.

    Raises:
        SystemExit: 1, without a word, where the reader of stdout has gone away.
    """
    try:
        import click
    except ModuleNotFoundError:
        return _fail("lars-tree", "click is not installed: pip install 'lars-tree[cli]'")
    from lars_tree._commands.parser import commands

    for stream in (sys.stdout, sys.stderr):  # keys may be of any script
        _show_any_character(stream)
    try:
        status: int = commands.main(argv, "lars-tree", standalone_mode=False)
    except click.exceptions.Abort:  # Ctrl-C
        return 130
    except click.UsageError as error:
        return _fail(error.ctx.command_path if error.ctx else "lars-tree", error.format_message())
    except click.ClickException as error:
        return _fail("lars-tree", error.format_message())
    return status


def _show_any_character(stream: Any) -> None:
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _fail(name: str, message: str) -> int:
    headline, *lines = message.splitlines()
    rest = "; ".join(line.strip() for line in lines)
    sys.stderr.write(f"{name}: {headline}{': ' if rest else ''}{rest}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
