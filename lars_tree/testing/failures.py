"""The report about broken laws: what was expected, where the error is, and the smallest example."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import hypothesis

from lars_tree import errors
from lars_tree.testing.laws import Law

# Every example of hypothesis starts with these lines.
_HEADER = re.compile(r"^[^\n]*\(\n\s*data=data\(\.\.\.\),\n\)\n?")
_FLAT = "Every law is broken. If the function takes only flat dicts, check it with nested=False."
_MOMENTUM = (
    "Every law is broken, because the optimizer has no argument 'momentum': check it with "
    "momentum=None."
)


def report(
    subject: Any, broken: dict[str, Exception], laws: dict[str, Law], *, nested: bool
) -> str:
    """The broken laws of an update function or optimizer, each with its error and an example."""
    name = function_of(subject).__name__
    plural = "a law" if len(broken) == 1 else f"{len(broken)} laws"
    parts = [f"{name} breaks {plural}"]
    if len(broken) == len(laws) > 1:
        lacks = [isinstance(e, TypeError) and "'momentum'" in str(e) for e in broken.values()]
        parts += [_MOMENTUM] if all(lacks) else [_FLAT] if nested else []
    for law, error in broken.items():
        doc = (function_of(laws[law]).__doc__ or "").strip().partition("\n")[0]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        notes = [_HEADER.sub("", note) for note in getattr(error, "__notes__", [])]
        where = _where(error, subject, laws[law])
        body = "\n".join(filter(None, [doc, where, f"{kind}{error}", *notes]))
        parts.append(f"{law}\n{textwrap.indent(body, '  ')}")
    return "\n\n".join(parts)


def _where(error: Exception, subject: Any, law: Law) -> str:
    """The line of the user's code that raised the error, or else where the subject is defined."""
    frames = list(_users_frames(error))
    definitions = [_definition(x) for x in (subject, law)]
    own = {x[0] for x in definitions if x}
    where = definitions[0]
    if frames:
        where = ([x for x in frames if x[0] in own] or frames)[-1]  # the innermost
    return 'File "{}", line {}, in {}'.format(*where) if where else ""


# The laws use context managers, so contextlib is in their tracebacks.
_FOLDERS = [f"{Path(module.__file__ or '').parent}{os.sep}" for module in (errors, hypothesis)]
_HIDDEN = (*_FOLDERS, contextlib.__file__)


def _users_frames(error: Exception) -> Iterator[tuple[str, int, str]]:
    """File, line and function of the frames outside of this package and hypothesis."""
    for frame, line in walk_tb(error.__traceback__):
        filename = frame.f_code.co_filename
        if not filename.startswith(_HIDDEN):
            yield filename, line, frame.f_code.co_name


def _definition(x: Any) -> tuple[str, int, str] | None:
    """File, line and name of a function, or of the class of an optimizer or a callable object."""
    found = function_of(inspect.unwrap(function_of(x)))
    code = getattr(found, "__code__", None)
    if code:
        return code.co_filename, code.co_firstlineno, code.co_name
    try:
        return inspect.getfile(found), inspect.getsourcelines(found)[1], found.__name__
    except (OSError, TypeError):  # it has no source
        return None


def function_of(x: Any) -> Any:
    """The function in a partial, or the class of a callable object: what has a name and a file."""
    while isinstance(x, partial):
        x = x.func
    return x if hasattr(x, "__name__") else type(x)
