"""The arithmetic operators of Array and Container, all defined in terms of one method."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeVar

S = TypeVar("S", bound="Arithmetic")


def binary(operation: Callable[..., Any]) -> Callable[[S, Any], S]:
    """The method of a binary operator with self on the left."""
    return lambda self, other: self._operate(operation, self, other)


def reflected(operation: Callable[..., Any]) -> Callable[[S, Any], S]:
    """The method of a binary operator with self on the right."""
    return lambda self, other: self._operate(operation, other, self)


class Arithmetic:
    """+ - * / // % ** @, unary minus and plus, and abs()."""

    __slots__ = ()

    # If a numpy array is on the left, numpy returns NotImplemented, and Python calls our operator.
    __array_ufunc__ = None

    @abstractmethod
    def _operate(self, operation: Callable[..., Any], *operands: Any) -> Self:
        """operation(*operands), or NotImplemented. One operand is self."""

    __add__, __radd__ = binary(operator.add), reflected(operator.add)
    __sub__, __rsub__ = binary(operator.sub), reflected(operator.sub)
    __mul__, __rmul__ = binary(operator.mul), reflected(operator.mul)
    __truediv__, __rtruediv__ = binary(operator.truediv), reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = binary(operator.floordiv), reflected(operator.floordiv)
    __mod__, __rmod__ = binary(operator.mod), reflected(operator.mod)
    __pow__, __rpow__ = binary(operator.pow), reflected(operator.pow)
    __matmul__, __rmatmul__ = binary(operator.matmul), reflected(operator.matmul)

    def __neg__(self) -> Self:
        return self._operate(operator.neg, self)

    def __pos__(self) -> Self:
        return self._operate(operator.pos, self)

    def __abs__(self) -> Self:
        return self._operate(operator.abs, self)
