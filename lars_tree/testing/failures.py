"""The report about broken laws: what was expected, where the error is, and the smallest example."""

from __future__ import annotations

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


def report(
    subject: Any, broken: dict[str, Exception], laws: dict[str, Law], *, nested: bool
) -> str:
    """The broken laws of an update function or optimizer, each with its error and an example."""
    name = function_of(subject).__name__
    plural = "a law" if len(broken) == 1 else f"{len(broken)} laws"
    parts = [f"{name} breaks {plural}"]
    if nested and len(broken) == len(laws) > 1:
        parts.append(_FLAT)
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
    own = {code.co_filename for code in map(_code, (subject, law)) if code}
    code = _code(subject)
    if frames:
        where = ([x for x in frames if x[0] in own] or frames)[-1]  # the innermost
    elif code:
        where = code.co_filename, code.co_firstlineno, code.co_name
    else:
        return ""
    return 'File "{}", line {}, in {}'.format(*where)


_FOLDERS = [f"{Path(module.__file__ or '').parent}{os.sep}" for module in (errors, hypothesis)]


def _users_frames(error: Exception) -> Iterator[tuple[str, int, str]]:
    """File, line and function of the frames outside of this package and hypothesis."""
    for frame, line in walk_tb(error.__traceback__):
        filename = frame.f_code.co_filename
        if not filename.startswith(tuple(_FOLDERS)):
            yield filename, line, frame.f_code.co_name


def _code(x: Any) -> Any:
    function = inspect.unwrap(function_of(x))
    if isinstance(function, type):  # a class of optimizers, or that of a callable object
        methods = vars(function)
        function = methods.get("__call__", methods.get("__init__"))
    return getattr(function, "__code__", None)


def function_of(x: Any) -> Any:
    """The function in a partial, or the class of a callable object: what has a name and a file."""
    while isinstance(x, partial):
        x = x.func
    return x if hasattr(x, "__name__") else type(x)
