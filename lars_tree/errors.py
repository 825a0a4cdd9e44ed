"""The exceptions of the package, and how their messages are built.

All messages have one form: a headline that names the argument, then one line per path with what was
expected and what was found. This module imports no array library; it reads only `shape` of arrays.
"""

from __future__ import annotations

import operator
import reprlib
from collections import UserList
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
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


def __dir__() -> list[str]:
    return __all__


Path = tuple[Hashable, ...]

MOST_LINES = 10
MOST_CANDIDATES = 1000  # keys compared for a hint; difflib takes minutes for a million keys


class LarsTreeError(Exception):
    """Base class of all errors of the package.

    >>> try:
    ...     lars_update({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(3), "b": np.ones(2)}, 0.1)
    ... except LarsTreeError as error:
    ...     print(error.argument, error.paths)
    ...     print(error)
    dcdw (('a',),)
    dcdw does not broadcast to w
      a: expected a shape that broadcasts to (2,), got (3,)

    Attributes:
        argument: The name of the invalid argument, such as "dcdw".
        paths: The paths of the invalid leaves: tuples of keys, () for a bare array.
    """

    argument: str = ""
    paths: tuple[Path, ...] = ()


class StructureError(LarsTreeError, ValueError):
    """A tree does not match the weights, contains itself, or has a node that cannot be rebuilt.

    `paths` has every differing path; the message shows the first ten.
    """


class LeafError(LarsTreeError, TypeError):
    """A leaf is not an array, or is an unsupported array, such as a sparse or freed one."""


class ShapeError(LarsTreeError, ValueError):
    """The shape of an array does not match, or does not broadcast to, the shape of its weights."""


class DtypeError(LarsTreeError, TypeError):
    """Weights or gradients are not floating point, or mix complex and real."""


class BackendError(LarsTreeError, TypeError):
    """The arrays of one leaf belong to different libraries or are on different devices."""


class OptionError(LarsTreeError, ValueError):
    """A rate or an option has an invalid value."""


class OutError(LarsTreeError, ValueError):
    """The result cannot be written to `out`."""


class StateError(LarsTreeError, ValueError):
    """The state does not match the weights, or is not the state of an optimizer."""


class NonFiniteError(LarsTreeError, ArithmeticError):
    """New weights would be NaN or infinite, and nonfinite="raise" was given."""


class FileError(LarsTreeError, ValueError):
    """A file is malformed or has unsupported content; the message names the file and the entry."""


class PathKeyError(LarsTreeError, KeyError):
    """A Container has no item at a path, or cannot store an item there."""

    def __str__(self) -> str:  # a KeyError shows the repr of its message
        return str(self.args[0])


class PathAttributeError(LarsTreeError, AttributeError):
    """A Container has no such key, or the key cannot be set as an attribute."""


Line = tuple[Path, str]


def path_string(path: Path) -> str:
    """The path as a user would write it: keys joined by '/', unusual keys quoted."""
    return "/".join(_segment(key) for key in path)


def _segment(key: Hashable) -> str:
    if isinstance(key, str):
        return key if key and "/" not in key and key.isprintable() else repr(key)
    return str(key) if isinstance(key, int) else reprlib.repr(key)


def error(
    kind: type[LarsTreeError],
    argument: str,
    headline: str,
    lines: Iterable[Line] = (),
    shown: Callable[[Path], str] = path_string,
    *,
    paths: Iterable[Path] | None = None,
) -> LarsTreeError:
    """An exception of this kind; the message is a headline and one line per path.

    `paths` are given only if they are not those of the lines.
    """
    lines = list(lines)
    exception = kind(message(argument, headline, lines, shown))
    exception.argument = argument
    exception.paths = tuple(path for path, _ in lines) if paths is None else tuple(paths)
    return exception


def file_error(file: object, text: str, name: str | None = None) -> LarsTreeError:
    """A FileError about a file, or about the entry `name` of this file."""
    return file_faults(file, [(name, text)])


def file_faults(file: object, faults: Iterable[tuple[str | None, str]]) -> LarsTreeError:
    """A FileError about entries of a file, given by name; None is the file itself."""
    faults = list(faults)
    paths: list[Path] = [() if name is None else (name,) for name, _ in faults]
    lines = [
        (tuple(shortened(str(key)) for key in path), shortened(text))
        for path, (_, text) in zip(paths, faults, strict=True)
    ]
    headline = f"path {str(file)!r} cannot be read"
    return error(FileError, "path", headline, lines, paths=paths)


@contextmanager
def requiring(user: str, packages: str) -> Iterator[None]:
    """Make the error for a missing library say what needs it, and how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        text = f"{user} needs {library}: pip install {packages}"
        raise ModuleNotFoundError(text, name=library) from None


def shortened(text: str, most: int = 1000) -> str:
    """The text, without its middle if it is long, because names in files can have any length."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def whole_number(argument: str, x: Any, least: int) -> int:
    """The number as an int; raises OptionError if it is not an integer >= `least`."""
    try:
        number = None if type(x).__name__ == "bool" else operator.index(x)  # numpy's bool too
    except TypeError:
        number = None
    if number is None or number < least:
        text = f"{argument}: expected a whole number >= {least}, got {x!r}"
        raise error(OptionError, argument, text)
    return number


def message(
    argument: str,
    headline: str,
    lines: Sequence[Line],
    shown: Callable[[Path], str] = path_string,
) -> str:
    """The headline and one line per path, up to MOST_LINES; then the number of further paths."""
    first = [f"\n  {shown(path) or argument}: {text}" for path, text in lines[:MOST_LINES]]
    rest = len(lines) - len(first)
    return headline + "".join(first) + (f"\n  and {rest} more" if rest else "")


class Words(NamedTuple):
    """The names of arguments and options in messages, and in the `argument` of errors.

    The defaults are the names in `lars_update` and `Lars`, which the code uses throughout; `name`
    translates them to the user's names, which differ in `torch.Lars`.
    """

    w: str = "w"
    dcdw: str = "dcdw"
    out: str = "out"
    state: str = "state"
    weights: str = "weights"  # the leaves of w
    outs: str = "leaves of out"
    velocity: str = "velocity"
    options: Mapping[str, str] = MappingProxyType({})  # only options renamed for the user
    path: Callable[[Path], str] = path_string
    hint: str = ""  # what to do if the state does not match the weights

    def name(self, argument: str) -> str:
        """The user's name of an argument or option."""
        names = {"w": self.w, "dcdw": self.dcdw, "out": self.out, "state": self.state}
        return names.get(argument) or self.options.get(argument, argument)

    def error(
        self, kind: type[LarsTreeError], argument: str, headline: str, lines: Iterable[Line]
    ) -> LarsTreeError:
        """Like the function `error`, with the user's names; errors of states also get the hint."""
        exception = error(kind, self.name(argument), headline, lines, self.path)
        if self.hint and argument == "state" and issubclass(kind, (StateError, BackendError)):
            exception.args = (f"{exception}\n  {self.hint}",)
        return exception


WORDS = Words()


def did_you_mean(key: object, known: Iterable[object]) -> str:
    """' (did you mean ...?)' if one of the first MOST_CANDIDATES known keys is close, else ''."""
    import difflib  # imported late, because only errors need it

    if not isinstance(key, str):
        return ""
    names = [name for name in islice(known, MOST_CANDIDATES) if isinstance(name, str)]
    close = difflib.get_close_matches(key, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def key_differences(
    expected: Sequence[Hashable], found: Sequence[Hashable], hints: bool = True
) -> str:
    """The missing and the unexpected keys of one node, with hints for misspelt keys."""
    found_keys, expected_keys = set(found), set(expected)
    missing = [key for key in expected if key not in found_keys]
    extra = [key for key in found if key not in expected_keys]

    def shown(key: object) -> str:
        return repr(key) + (did_you_mean(key, missing) if hints else "")

    parts = []
    if missing:
        parts.append("missing " + enumerated(missing, shown=repr))
    if extra:
        parts.append("unexpected " + enumerated(extra, shown=shown))
    return "; ".join(parts)


def describe(node: Any) -> str:
    """A leaf or a node in words: 'an array of shape (3, 4)'."""
    if node is None:
        return "None"
    name = type(node).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    if issubclass(type(node), Mapping):  # not isinstance: `__class__` may claim another type
        keys = enumerated(node, shown=repr)
        return f"{article} {name} with keys {keys}" if keys else f"an empty {name}"
    if issubclass(type(node), (list, tuple, UserList)):
        return f"{article} {name} of {counted(len(node), 'item')}"
    shape = _shape(node)
    if shape is None:
        return f"{article} {name}"
    if is_array_type(type(node)):
        return f"an array of shape {shape}"
    return f"{_with_package(type(node))} of shape {shape}"


def not_an_array(x: Any) -> str:
    """The message for an object where an array is expected, with what to do instead."""
    found = describe(x) if _shape(x) is None else f"{_with_package(type(x))} of shape {_shape(x)}"
    hint = next((text for name, text in _HINTS.items() if hasattr(type(x), name)), "")
    if not hint and _is_function(x):
        hint = "select the arrays, for example with equinox.filter"
    return f"expected an array, got {found}" + (f": {hint}" if hint else "")


# What to do with an object whose class has such an attribute.
_HINTS = {
    "to_numpy": "convert it with .to_numpy()",
    "toarray": "convert it with .toarray()",
    "todense": "convert it with .todense()",
    "__array__": "convert it with numpy.asarray",
    "named_parameters": "give dict(model.named_parameters()), or use lars_tree.torch.Lars",
    "__dataclass_fields__": "register its class as a pytree, for example with JAX",
}


def is_array_type(cls: type) -> bool:
    """Whether the objects of a class are arrays by one of the protocols for arrays."""
    return any(hasattr(cls, f"__{name}__") for name in _ARRAY_PROTOCOLS)


# Data frames and sparse matrices have none of these methods.
_ARRAY_PROTOCOLS = ("array_namespace", "dlpack", "array_function")


def _shape(x: Any) -> tuple[Any, ...] | None:
    try:
        shape = getattr(x, "shape", None)
    except Exception:  # a lazy parameter, or a weak proxy of a deleted object
        return None
    return tuple(shape) if isinstance(shape, tuple) else None


def _is_function(x: Any) -> bool:
    try:
        return callable(x) and hasattr(x, "__name__")
    except Exception:  # a weak proxy of a deleted object
        return False


def _with_package(cls: type) -> str:
    """The name of a class with its public module: 'a pandas.DataFrame'."""
    module = "" if cls.__module__ == "builtins" else str(cls.__module__)
    public = takewhile(lambda part: part and not part.startswith("_"), module.split("."))
    name = ".".join([*public, cls.__name__])
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: '1 leaf', '2,000 leaves'; the default plural adds an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def enumerated(words: Iterable[Any], most: int = 5, shown: Callable[[Any], str] = str) -> str:
    """Up to `most` words separated by commas; then the number of further words."""
    words = list(words)
    rest = len(words) - most
    return ", ".join(map(shown, words[:most])) + (f" and {rest} more" if rest > 0 else "")
