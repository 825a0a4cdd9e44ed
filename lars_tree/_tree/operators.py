"""The arithmetic operators of Array and Container, all defined by one method."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self


class Arithmetic:
    """+ - * / // % ** @, unary minus and plus, and abs()."""

    __slots__ = ()

    # With an array on the left, numpy returns NotImplemented, so Python calls our operator.
    __array_ufunc__ = None

    @abstractmethod
    def _operate(self, operation: Callable[..., Any], *operands: Any) -> Self:
        """operation(*operands), or NotImplemented. One operand is self."""

    def __add__(self, other: Any) -> Self:
        return self._operate(operator.add, self, other)

    def __radd__(self, other: Any) -> Self:
        return self._operate(operator.add, other, self)

    def __sub__(self, other: Any) -> Self:
        return self._operate(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Self:
        return self._operate(operator.sub, other, self)

    def __mul__(self, other: Any) -> Self:
        return self._operate(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Self:
        return self._operate(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Self:
        return self._operate(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Self:
        return self._operate(operator.truediv, other, self)

    def __floordiv__(self, other: Any) -> Self:
        return self._operate(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Self:
        return self._operate(operator.floordiv, other, self)

    def __mod__(self, other: Any) -> Self:
        return self._operate(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Self:
        return self._operate(operator.mod, other, self)

    def __pow__(self, other: Any) -> Self:
        return self._operate(operator.pow, self, other)

    def __rpow__(self, other: Any) -> Self:
        return self._operate(operator.pow, other, self)

    def __matmul__(self, other: Any) -> Self:
        return self._operate(operator.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Self:
        return self._operate(operator.matmul, other, self)

    def __neg__(self) -> Self:
        return self._operate(operator.neg, self)

    def __pos__(self) -> Self:
        return self._operate(operator.pos, self)

    def __abs__(self) -> Self:
        return self._operate(operator.abs, self)
