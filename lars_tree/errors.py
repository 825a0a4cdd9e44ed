"""The exceptions of the package and the wording of every message.

One dialect: a headline that names the argument, then one line for each path, which says what was
expected and what was found. Knows no arrays beyond their `shape`, and no libraries.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = [
    "BackendError",
    "DtypeError",
    "FileError",
    "LarsTreeError",
    "LeafError",
    "NonFiniteError",
    "OptionError",
    "OutError",
    "PathAttributeError",
    "PathKeyError",
    "ShapeError",
    "StateError",
    "StructureError",
]

Path = tuple[Hashable, ...]

MOST_LINES = 10
MOST_CANDIDATES = 1000  # for a hint: comparing a name with each of a million takes minutes


class LarsTreeError(Exception):
    """Base of every error of the package.

    Attributes:
        argument: The name of the argument at fault, such as "dcdw".
        paths: The paths of the leaves at fault: tuples of keys, () for a bare array.
    """

    argument: str = ""
    paths: tuple[Path, ...] = ()


class StructureError(LarsTreeError, ValueError):
    """An argument's tree does not match that of the weights; lists every differing path."""


class LeafError(LarsTreeError, TypeError):
    """A leaf is something else than an array that can be computed with."""


class ShapeError(LarsTreeError, ValueError):
    """An array does not broadcast to the shape of its weights."""


class DtypeError(LarsTreeError, TypeError):
    """Weights or gradients are not floating point, or complex meets real."""


class BackendError(LarsTreeError, TypeError):
    """Arrays that meet at a leaf belong to different libraries or live on different devices."""


class OptionError(LarsTreeError, ValueError):
    """A rate or an option has a value that the rule is not defined for."""


class OutError(LarsTreeError, ValueError):
    """The result cannot be written to `out`."""


class StateError(LarsTreeError, ValueError):
    """The state of an optimizer does not fit the weights, or is not one."""


class NonFiniteError(LarsTreeError, ArithmeticError):
    """A step would hold NaN or infinity, and nonfinite="raise" was asked for."""


class FileError(LarsTreeError, ValueError):
    """A file is malformed, or holds what cannot be read; names the file and the entry."""


class PathKeyError(LarsTreeError, KeyError):
    """A Container has nothing at a path, or nothing can be put there."""

    def __str__(self) -> str:  # a KeyError shows the repr of its message
        return str(self.args[0])


class PathAttributeError(LarsTreeError, AttributeError):
    """A Container has no such key to read as an attribute, or it cannot be set as one."""


Line = tuple[Path, str]


def path_string(path: Path) -> str:
    """The path as a user would write it: keys joined by '/', odd ones quoted."""
    return "/".join(_segment(key) for key in path)


def _segment(key: Hashable) -> str:
    if isinstance(key, str):
        return key if key and "/" not in key and key.isprintable() else repr(key)
    return str(key) if isinstance(key, int) else reprlib.repr(key)


def error(
    kind: type[LarsTreeError],
    argument: str,
    headline: str,
    lines: Iterable[Line],
    shown: Callable[[Path], str] = path_string,
) -> LarsTreeError:
    """An exception of the given kind, its message made of a headline and a line for each path."""
    lines = list(lines)
    exception = kind(message(argument, headline, lines, shown))
    exception.argument = argument
    exception.paths = tuple(path for path, _ in lines)
    return exception


def file_error(file: object, text: str, name: str | None = None) -> LarsTreeError:
    """A FileError about a file, or about its entry of this name."""
    path = () if name is None else (name,)
    line = tuple(map(_shortened, path)), _shortened(text)
    exception = error(FileError, "path", f"path {str(file)!r} cannot be read", [line])
    exception.paths = (path,)
    return exception


def _shortened(text: str, most: int = 1000) -> str:
    """The text without its middle, if it is long: names in files may have any length."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def whole_number(argument: str, x: Any, least: int) -> int:
    """The number as an int; an OptionError where it is none, or too small."""
    try:
        number = None if type(x).__name__ == "bool" else operator.index(x)  # numpy's bool too
    except TypeError:
        number = None
    if number is None or number < least:
        text = f"{argument}: expected a whole number >= {least}, got {x!r}"
        raise error(OptionError, argument, text, [])
    return number


def message(
    argument: str,
    headline: str,
    lines: Sequence[Line],
    shown: Callable[[Path], str] = path_string,
) -> str:
    """A headline, then a line for each path up to a number of them."""
    first = [f"\n  {shown(path) or argument}: {text}" for path, text in lines[:MOST_LINES]]
    rest = len(lines) - len(first)
    return headline + "".join(first) + (f"\n  and {rest} more" if rest else "")


class Words(NamedTuple):
    """What a caller calls its arguments, in messages and as the `argument` of errors.

    The defaults are those of `lars_update` and `Lars`. The code calls arguments by these names
    and asks `name` for those of the caller.
    """

    w: str = "w"
    dcdw: str = "dcdw"
    out: str = "out"
    state: str = "state"
    weights: str = "weights"  # what w holds
    outs: str = "leaves of out"
    velocity: str = "velocity"
    options: Mapping[str, str] = MappingProxyType({})  # those with other names than in the rule
    path: Callable[[Path], str] = path_string
    hint: str = ""  # what to do about a state of other weights

    def name(self, argument: str) -> str:
        """The caller's name of an argument or option."""
        names = {"w": self.w, "dcdw": self.dcdw, "out": self.out, "state": self.state}
        return names.get(argument) or self.options.get(argument, argument)

    def error(
        self, kind: type[LarsTreeError], argument: str, headline: str, lines: Iterable[Line]
    ) -> LarsTreeError:
        """An exception as `error` makes it, for a headline and lines in these words."""
        exception = error(kind, self.name(argument), headline, lines, self.path)
        if self.hint and argument == "state" and issubclass(kind, (StateError, BackendError)):
            exception.args = (f"{exception}\n  {self.hint}",)
        return exception


WORDS = Words()


def did_you_mean(key: object, known: Iterable[object]) -> str:
    """' (did you mean ...?)' where one of the first known keys is a near miss, otherwise ''."""
    import difflib  # only errors need it

    if not isinstance(key, str):
        return ""
    names = [name for name in islice(known, MOST_CANDIDATES) if isinstance(name, str)]
    close = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def key_differences(
    expected: Sequence[Hashable], found: Sequence[Hashable], hints: bool = True
) -> str:
    """What is missing and what is unexpected among the keys of one node, with hints if wanted."""
    there, wanted = set(found), set(expected)
    missing = [key for key in expected if key not in there]
    surplus = [key for key in found if key not in wanted]
    parts = []
    if missing:
        parts.append("missing " + enumerated(missing, shown=repr))
    if surplus:

        def shown(key: object) -> str:
            return repr(key) + (did_you_mean(key, missing) if hints else "")

        parts.append("unexpected " + enumerated(surplus, shown=shown))
    return "; ".join(parts)


def describe(node: Any) -> str:
    """What a leaf or a node is, in words: 'an array of shape (3, 4)'."""
    if node is None:
        return "None"
    name = type(node).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    # By the real type, as `__class__` may say something else.
    if issubclass(type(node), Mapping):
        keys = enumerated(node, shown=repr)
        return f"{article} {name} with keys {keys}" if keys else f"an empty {name}"
    if issubclass(type(node), (list, tuple)):
        return f"{article} {name} of {counted(len(node), 'item')}"
    try:
        shape = getattr(node, "shape", None)
    except Exception:  # of a lazy parameter, or a proxy whose object is gone
        shape = None
    if isinstance(shape, tuple):
        return f"an array of shape {tuple(shape)}"
    return f"{article} {name}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """'1 leaf', '2,000 leaves'; without `plural`, an s is added."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def enumerated(words: Iterable[Any], most: int = 5, shown: Callable[[Any], str] = str) -> str:
    """The words with commas, at most five of them and then a count."""
    words = list(words)
    rest = len(words) - most
    return ", ".join(map(shown, words[:most])) + (f" and {rest} more" if rest > 0 else "")


def clipped(text: str, most: int = 80) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
