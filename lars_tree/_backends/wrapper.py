"""The base of the public class `Array`: an object that holds one native array."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any


class Wrapper:
    """An object that holds a native array."""

    __slots__ = ("_data",)
    _data: Any

    @abstractmethod
    def _wrapping(self, data: Any) -> Wrapper:
        """A new wrapper, of the same class as this one, for another array."""


def is_wrapped(x: Any) -> bool:
    """Whether the real type of x is a wrapper class; `__class__` may differ."""
    return issubclass(type(x), Wrapper)


def unwrap(x: Any) -> Any:
    """The native array of a wrapper; any other object unchanged."""
    return x._data if issubclass(type(x), Wrapper) else x


def rewrapped(new: Any, old: Any) -> Any:
    """The new array, wrapped if `old` is a wrapper."""
    return old._wrapping(new) if issubclass(type(old), Wrapper) else new
