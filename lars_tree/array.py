"""Array: a thin wrapper of one native array, for users who prefer methods.

Its operators call those of the native array.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.wrapper import Wrapper, unwrap
from lars_tree._tree import pytrees
from lars_tree._tree.operators import Arithmetic, binary
from lars_tree.update import Updatable

if TYPE_CHECKING:
    from typing import Protocol, TypeVar

    from lars_tree.container import Container

    Tree = TypeVar("Tree", bound=Container)

    class _Operator(Protocol):
        """An operator of Array; with a Container as the other operand, it returns a Container."""

        @overload
        def __call__(self, other: Tree, /) -> Tree: ...
        @overload
        def __call__(self, other: Any, /) -> Array: ...


class Array(Updatable, Wrapper, Arithmetic):
    """A wrapper of a native array (numpy, torch, JAX, Dask, CuPy, ...) with a `lars_update` method.

    >>> w = Array(np.array([3.0, 4.0]))
    >>> w.lars_update(np.array([0.0, 10.0]), 0.1)    # ratio 5 / 10: a step of 0.05 * [0, 10]
    Array([3. , 3.5])
    >>> 2 * w > 7
    Array([False,  True])

    Pass `.data` to functions of an array library: they need the native array. An Array has no
    `__array_namespace__`, so that no library treats it as one of its own arrays.

    Args:
        data: The native array, or another Array, whose native array is shared. Not copied.

    Raises:
        LeafError: data is not an array of a supported library (a list or a number, for example).
    """

    __slots__ = ()

    def __init__(self, data: Any) -> None:
        self._data = unwrap(data)
        if _backends.find(self._data) is None:
            text = f"expected an array of a library, got {errors.describe(data)}"
            text += ": make it an array first, for example with numpy.asarray"
            raise errors.error(errors.LeafError, "data", "data is not an array", [((), text)])

    def _wrapping(self, data: Any) -> Array:
        return Array(data)

    @property
    def data(self) -> Any:
        """The native array."""
        return self._data

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as a tuple."""
        return tuple(self._data.shape)

    @property
    def dtype(self) -> Any:
        """The dtype object of the library."""
        return self._data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def device(self) -> Any:
        """The device object of the library; "cpu" if the library has no devices."""
        return getattr(self._data, "device", "cpu")

    def _operate(self, operation: Callable[..., Any], *operands: Any) -> Self:
        result: Self = NotImplemented  # Python then calls the operator of the Container
        if not any(issubclass(type(operand), dict) for operand in operands):
            result = _wrapped(operation(*map(unwrap, operands)))
        return result

    if TYPE_CHECKING:
        __add__: _Operator
        __sub__: _Operator
        __mul__: _Operator
        __truediv__: _Operator
        __floordiv__: _Operator
        __mod__: _Operator
        __pow__: _Operator
        __matmul__: _Operator

    __lt__, __le__ = binary(operator.lt), binary(operator.le)
    __ge__, __gt__ = binary(operator.ge), binary(operator.gt)
    __eq__, __ne__ = binary(operator.eq), binary(operator.ne)  # type: ignore[assignment]

    __hash__ = None  # type: ignore[assignment]  # comparisons are elementwise

    def __getitem__(self, key: Any) -> Any:
        return _wrapped(self._data[unwrap(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._data[unwrap(key)] = unwrap(value)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        return map(_wrapped, self._data)

    def __bool__(self) -> bool:
        return bool(self._data)

    def __int__(self) -> int:
        return int(self._data)

    def __float__(self) -> float:
        return float(self._data)

    def __complex__(self) -> complex:
        return complex(self._data)

    def __index__(self) -> int:
        return operator.index(self._data)

    def __repr__(self) -> str:
        text = repr(self._data)
        start = text.find("(")
        first, *rest = (text[start + 1 : -1] if text.endswith(")") else text).split("\n")
        # The library aligns continuation lines with its class name, whose length differs from ours.
        shift = len("Array") - start
        rest = [" " * shift + line if shift > 0 else line[-shift:] for line in rest]
        return "Array(" + "\n".join([first, *rest]) + ")"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._data, dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self._data.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._data.__dlpack_device__()

    def __copy__(self) -> Array:
        new: Array = object.__new__(Array)  # in a pytree of JAX or torch, data may be a placeholder
        new._data = self._data
        return new


def _wrapped(x: Any) -> Any:
    """Wrap x if it is an array. An operation may also return another object, such as a bool."""
    return x if _backends.find(x) is None else Array(x)


pytrees.register_wrapper(Array, "_data")
pytrees.trust_in_files(Array)
