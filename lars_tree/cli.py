"""The `lars-tree` command: entry point, errors, exit status. `_commands/parser.py` has its options.

The exit status is 0 for success; 1 if `diff` finds differences; 2 for an error, with one line on
stderr; 130 for Ctrl-C. docs/command.md lists them for users.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import suppress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: The command-line arguments; by default `sys.argv[1:]`.

    Raises:
        SystemExit: with status 1 and no message, if the reader of stdout closed the pipe.
    """
    try:
        return _main(argv)
    except KeyboardInterrupt:  # outside of the code for which click turns it into an Abort
        return 130


def _main(argv: Sequence[str] | None) -> int:
    try:
        import click
    except ModuleNotFoundError:
        return _fail("lars-tree", "click is not installed: pip install 'lars-tree[cli]'")
    from lars_tree._commands.parser import commands

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # some keys may not be encodable
            stream.reconfigure(errors="backslashreplace")
    try:
        given = list(sys.argv[1:] if argv is None else argv) or ["--help"]
        status: int = commands.main(given, "lars-tree", standalone_mode=False)
    except click.exceptions.Abort:  # Ctrl-C
        return 130
    except click.UsageError as error:
        return _fail(error.ctx.command_path if error.ctx else "lars-tree", error.format_message())
    except click.ClickException as error:
        return _fail("lars-tree", error.format_message())
    except OSError as error:  # other errors of files were turned into a UsageError
        return _fail("lars-tree", f"{error.filename or 'standard output'}: {error.strerror}")
    return status


def _fail(name: str, message: str) -> int:
    headline, *lines = message.splitlines()
    rest = "; ".join(line.strip() for line in lines)
    with suppress(OSError, AttributeError):  # stderr is full, closed or None
        sys.stderr.write(f"{name}: {headline}{': ' if rest else ''}{rest}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
