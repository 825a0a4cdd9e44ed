"""The types of arguments: what a checker of a user's code needs to know of options.

An array of any library is what has a shape and a dtype, so that no library is imported. A `str`
has none of these types, but it may name a mesh axis.
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
    """A list, a tuple or the like; a `str` is a `Sequence` too, but looks only for a `str`."""

    def __len__(self) -> int: ...
    def __contains__(self, value: object, /) -> bool: ...
    def __getitem__(self, index: SupportsIndex, /) -> Child_co: ...
    def __iter__(self) -> Iterator[Child_co]: ...
    def index(self, value: Any, /) -> int: ...  # which a dict does not have


# One value for all leaves, or a prefix of the weights; None stands where these have nothing.
if TYPE_CHECKING:
    PerLeaf: TypeAlias = (
        Value | Mapping[Any, "PerLeaf[Value] | None"] | ListLike["PerLeaf[Value] | None"]
    )
else:  # `typing.get_type_hints` would look for the name in the modules that use it
    PerLeaf = Value | Mapping[Any, Any] | ListLike[Any]
# What mypy infers of a dict that holds values beside dicts.
MixedDict: TypeAlias = dict[str, object]

Number: TypeAlias = SupportsFloat | AnyArray
Schedule: TypeAlias = Callable[[Any], Any]

Numbers: TypeAlias = PerLeaf[Number] | MixedDict
Rates: TypeAlias = PerLeaf[Number | Schedule] | MixedDict
Flags: TypeAlias = PerLeaf[bool | np.bool_] | MixedDict
Axes: TypeAlias = PerLeaf[SupportsIndex | None] | MixedDict
MeshAxes: TypeAlias = PerLeaf[Hashable] | MixedDict

NonFinite: TypeAlias = Literal["propagate", "raise", "skip"]
NonFinites: TypeAlias = PerLeaf[NonFinite]
