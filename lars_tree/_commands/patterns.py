"""Patterns that select leaves by path ('encoder/*') or by the names in a file ('encoder.*')."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from lars_tree import errors
from lars_tree._tree import by_path


def matching(option: str, pattern: str, names: Sequence[str], file: str) -> list[int]:
    """The indices of the leaves, given by name, that match; an OptionError if there are none.

    '.' and '/' are the same; otherwise patterns are those of `by_path`. A pattern that matches a
    node selects all leaves below it. The name of a leaf or node selects only this leaf or node.

    >>> names = ["encoder.kernel", "encoder.bias", "head.bias"]
    >>> [matching("--lr-for", text, names, "") for text in ("*.bias", "*/bias", "encoder")]
    [[1, 2], [1, 2], [0, 1]]
    """
    texts = list(map(_normal, names))
    found = _found(pattern, texts)
    if not found:
        text = f"{option} matches no leaf of {file}: expected a pattern of paths or names, "
        text += f"got {pattern!r}{_hint(pattern, texts)}"
        raise errors.error(errors.OptionError, option, text, [])
    return found


def _normal(text: str) -> str:
    return text.replace(".", "/")


def _found(pattern: str, texts: Sequence[str]) -> list[int]:
    pattern = _normal(pattern)
    named = [i for i, text in enumerate(texts) if f"{text}/".startswith(f"{pattern}/")]
    matches = by_path.matcher(pattern, "/")
    return named or [i for i, text in enumerate(texts) if matches(text)]


def _hint(pattern: str, texts: Sequence[str]) -> str:
    """Suggest known keys instead of misspelt ones, and '*/' before a pattern of the last keys."""
    import difflib  # imported late, because only errors need it

    keys = dict.fromkeys(key for text in texts for key in text.split("/"))
    known = list(islice(keys, errors.MOST_CANDIDATES))
    parts = re.split(r"([./])", pattern)
    for i, key in enumerate(parts[::2]):
        if key not in keys and not by_path.is_pattern(key):
            parts[2 * i] = next(iter(difflib.get_close_matches(key, known, n=1)), key)
    spelt = "".join(parts)
    for candidate in (spelt, f"*{'.' if '.' in pattern else '/'}{spelt}"):
        if _found(candidate, texts):
            return f" (did you mean {candidate!r}?)"
    return ""
