"""Objects that hold one native array, as `Array` does: known here without what they offer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any


class Wrapper:
    """An object that holds a native array."""

    __slots__ = ("_data",)
    _data: Any

    @abstractmethod
    def _wrapping(self, data: Any) -> Wrapper:
        """A wrapper of another array."""


def is_wrapped(x: Any) -> bool:
    """Whether x is a wrapper: by its real type, as `__class__` may say something else."""
    return issubclass(type(x), Wrapper)


def unwrap(x: Any) -> Any:
    """The native array of a wrapper; anything else as it is."""
    return x._data if issubclass(type(x), Wrapper) else x


def rewrapped(new: Any, old: Any) -> Any:
    """The new array, in a wrapper where the old one is in one."""
    return old._wrapping(new) if issubclass(type(old), Wrapper) else new
