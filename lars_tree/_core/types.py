"""The types of arguments, for type checkers of users' code.

An array of any library is described as an object with a shape and a dtype, so that no library has
to be imported. Of the types of options, only those of mesh axes and of `nonfinite` accept a `str`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
    TypeVar,
)

import numpy as np

T = TypeVar("T")
Value = TypeVar("Value")
Child_co = TypeVar("Child_co", covariant=True)


class AnyArray(Protocol):
    """An array of any library."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


class ListLike(Protocol[Child_co]):
    """A list, tuple or similar, but not a `str`: `str.__contains__` accepts only a `str`."""

    def __len__(self) -> int: ...
    def __contains__(self, value: object, /) -> bool: ...
    def __getitem__(self, index: SupportsIndex, /) -> Child_co: ...
    def __iter__(self) -> Iterator[Child_co]: ...
    def index(self, value: Any, /) -> int: ...  # a dict does not have this method


# One value for all leaves, or a prefix of the weights, with None where the weights have None.
if TYPE_CHECKING:
    PerLeaf: TypeAlias = (
        Value | Mapping[Any, "PerLeaf[Value] | None"] | ListLike["PerLeaf[Value] | None"]
    )
else:  # `typing.get_type_hints` would look for the name in the modules that use it
    PerLeaf = Value | Mapping[Any, Any] | ListLike[Any]
# The type that mypy infers for a dict whose values are numbers and dicts.
MixedDict: TypeAlias = dict[str, object]

# A function of the path and the leaf. (Path parameters of any type are accepted.)
ByPath: TypeAlias = Callable[[Any, Any], Value | None]

Number: TypeAlias = SupportsFloat | AnyArray
Schedule: TypeAlias = Callable[[Any], Any]

Numbers: TypeAlias = PerLeaf[Number] | MixedDict | ByPath[Number]
Rates: TypeAlias = PerLeaf[Number | Schedule] | MixedDict
Flags: TypeAlias = PerLeaf[bool | np.bool_] | MixedDict | ByPath[bool | np.bool_]
Axes: TypeAlias = PerLeaf[SupportsIndex | None] | MixedDict | ByPath[SupportsIndex]
MeshAxes: TypeAlias = PerLeaf[Hashable] | MixedDict

NonFinite: TypeAlias = Literal["propagate", "raise", "skip"]
NonFinites: TypeAlias = PerLeaf[NonFinite] | ByPath[NonFinite]
