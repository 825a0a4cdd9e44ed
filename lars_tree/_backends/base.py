"""What an array library has to offer, and what is the same for most of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from enum import Enum
from functools import lru_cache, partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lars_tree._rule import Measured, Rule, mesh_axes

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan
    from lars_tree._writes import Writes

Array = Any


class Kind(Enum):
    """Kinds of element types, as far as the rule cares."""

    REAL = "real"
    COMPLEX = "complex"
    INTEGER = "integer"
    OTHER = "other"


# Of an array: as many as numpy has.
MOST_AXES = 64

FLOATING = (Kind.REAL, Kind.COMPLEX)


class Values(Enum):
    """Whether the elements of an array can be looked at."""

    HERE = "in CPU memory"
    FAR = "on an accelerator: looking means waiting"
    LATER = "not computed yet: a tracer or a lazy array"


class Facts(NamedTuple):
    """What the checks need to know of an array."""

    shape: tuple[int, ...]
    kind: Kind
    dtype: Any
    device: Hashable
    layout: Layout | None = None  # over processes, of what is spread over some


class Layout(NamedTuple):
    """How the parts of an array are spread over processes."""

    mesh: Hashable
    placements: Hashable


class Leaf(NamedTuple):
    """One array of the weights with all that its step takes.

    `place` counts the leaves of the tree. `dcdw` is None where the weights stay as they are, `out`
    where the results are new arrays, `velocity` where there is no momentum. Where there is an `out`
    the velocity is written to where it is.
    """

    place: int
    w: Any
    dcdw: Any
    out: Any
    rule: Rule
    backend: Backend
    velocity: Any = None


class Columns(NamedTuple):
    """All leaves of an update side by side, one item of each list for each leaf; unchecked.

    Where `outs` is None the results are new arrays; else velocities are written to where they are,
    and so are the `counters` of a state, by their names. A leaf without momentum may have None
    among the velocities.
    """

    ws: list[Any]
    dcdws: list[Any]
    outs: list[Any] | None
    rules: list[Rule]
    velocities: list[Any] | None = None
    counters: Mapping[str, Any] = MappingProxyType({})

    def row(self, place: int) -> tuple[Any, Any, Any, Any]:
        """w, dcdw, out and velocity of a leaf; None where there are none."""
        columns = (self.ws, self.dcdws, self.outs, self.velocities)
        w, dcdw, out, velocity = (None if xs is None else xs[place] for xs in columns)
        return w, dcdw, out, velocity


class News(NamedTuple):
    """The results of an update out of place, one item for each leaf; None until it is there."""

    ws: list[Any]
    velocities: list[Any] | None


class New(NamedTuple):
    """What a step makes of a leaf."""

    w: Any
    velocity: Any = None


class Engine(Protocol):
    """What a caller wants to step some leaves of an update in place, at these places."""

    @property
    def places(self) -> Collection[int]:
        """The places of its leaves."""

    def trusted(self, leaves: list[Leaf]) -> list[Leaf]:
        """Those of all leaves that need not be checked: it can tell that nothing is wrong."""

    def results(self, leaves: list[Leaf]) -> Iterable[tuple[Array, Array]]:
        """Pairs of an array to write to, and what to write; nothing is written yet."""


class Shards(Protocol):
    """What this process has of leaves that are spread over processes, as layers of a plan.

    It is not yet stepped when they are taken: first come the norms of the plan, which `reduce`
    changes. All processes must take the same leaves, reduce, and `agree` in the same order.

    Attributes:
        news: The results by place.
        copies: Pairs of an array to write to and of what to write, when the plan was stepped.
    """

    news: dict[int, New]
    copies: list[tuple[Array, Array]]

    @property
    def places(self) -> dict[int, int]:
        """The places of the leaves by the rows of the plan."""

    def trust(self, leaves: list[Leaf]) -> list[Leaf]:
        """Take those of unchecked leaves of which a few comparisons tell that nothing is wrong.

        Returns:
            The leaves that were taken.
        """

    def take(self, leaves: list[Leaf]) -> None:
        """Take all of these leaves, which were checked, that a plan can step."""

    def reduce(self, norms: bytearray) -> None:
        """Put the norms of whole layers in the place of those of the parts here."""

    def agree(self, bad: set[int]) -> set[int]:
        """The places that are bad in any process, given those that are bad in this one."""

    def announce(self) -> None:
        """Have the library know that arrays are written to without it."""


class Backend(ABC):
    """One array library. Checks come first: what reaches `update` has passed them all."""

    name: str

    @abstractmethod
    def facts(self, x: Array) -> Facts:
        """Shape, dtype and device of an array that has no fault."""

    @abstractmethod
    def values(self, x: Array) -> Values:
        """Where the elements are."""

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """The elements of an array whose values are here or far; a view where that is possible."""

    @abstractmethod
    def full(self, number: complex, like: Array) -> Array:
        """A 0-d array of a number, on the device of `like` and as precise as it needs."""

    @abstractmethod
    def copy(self, x: Array, stop_gradients: bool) -> Array:
        """A copy that shares no memory."""

    @abstractmethod
    def zeros(self, w: Array, dtype: Any) -> Array:
        """Zeros of the shape of w, where w is."""

    @abstractmethod
    def counter(self, w: Array) -> Array:
        """A new 0-d array of integers that counts from 0, on the device of w."""

    @abstractmethod
    def update(self, leaves: list[Leaf], writes: Writes) -> list[New]:
        """The weights and velocities after one step; those of leaves with an `out` are in memory
        that holds them only when the writes, to which they are added, are made.

        Every leaf has a gradient.
        """

    @abstractmethod
    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        """What their steps are made of, by the code that makes them: arrays where the leaves are.

        Each is 0-d, or a vector where the leaf has a layer axis. Every leaf has a gradient.
        """

    def numbers(self, rows: np.ndarray[Any, Any], ws: list[Array]) -> list[Measured]:
        """What the native engine measured, a row for each of the weights, as numbers like them."""
        return list(map(Measured._make, rows))

    def fetch(self, xs: list[Array]) -> list[np.ndarray[Any, Any]]:
        """The elements of arrays with known values, waiting for them once."""
        return [self.to_numpy(x) for x in xs]

    @abstractmethod
    def all_finite(self, xs: list[Array]) -> Any:
        """A truth value, or a 0-d array of one where values are not here."""

    @abstractmethod
    def choose(self, flag: Any, a: Array, b: Array) -> Array:
        """A where the flag (of `all_finite`) holds, else b."""

    @abstractmethod
    def write(self, out: Array, x: Array) -> None:
        """Copy the elements of x, of the same shape and dtype, into `out`."""

    def writers(self, pairs: list[tuple[Array, Array]]) -> list[Callable[[], Any]]:
        """Calls that copy x to `out`, for pairs of both; as few calls as possible."""
        return [partial(self.write, out, x) for out, x in pairs]

    def copied_memory(
        self, out: Array, x: Array
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
        """Numpy arrays of one dtype with the memory of `out` and the elements of x; None where the
        library must copy them itself.
        """
        return None

    def announce(self, outs: Iterable[Array]) -> None:
        """Have the library know that arrays are written to without it."""
        return

    def prepare(
        self, plan: Plan, columns: Columns, news: News | None, places: list[int] | None
    ) -> list[int]:
        """Add those leaves to a plan of the native engine that it supports; the places of others.

        The arrays are unchecked, and may be none of this library. Without `outs` the results are
        new arrays, put into `news`; without these either, the leaves are only measured. `places`
        says which leaves to look at; None means all.
        """
        return list(range(len(columns.ws))) if places is None else places

    def shards(self, plan: Plan) -> Shards | None:
        """What takes leaves that are spread over processes; None if the native engine cannot."""
        return None

    def finish(self, columns: Columns, news: News, places: Iterable[int]) -> None:
        """Make the new arrays at these places, which `prepare` took, what users expect."""
        return

    def count(self, plan: Plan, counter: Array) -> bool:
        """Have a plan add one to a counter when the step is taken; whether it can."""
        return False

    def velocity_dtype(self, w: Array) -> Any:
        """The dtype of the velocity of w: its own, or float32 if that is shorter than float32."""
        return np.dtype(np.float32) if w.dtype.itemsize == 2 else w.dtype

    def namespace(self, x: Array) -> Any:
        """The module with functions such as `clip` and `cos` of arrays like x."""
        return np

    def fault(self, x: Array) -> str | None:
        """Why x cannot be computed with; None if it can."""
        return None

    def out_fault(self, x: Array) -> str | None:
        """Why nothing can be written to x; None if it can."""
        return None

    def sizes(self, xs: list[Array]) -> tuple[list[int], list[int]]:
        """The numbers of elements and of bytes, as arrays of one type declare them; 0 if unknown.

        May be called for 100,000 of them.
        """
        usable = [None if self.fault(x) else x for x in xs]
        counts = [0 if x is None else prod(x.shape) for x in usable]
        return counts, [getattr(x, "nbytes", 0) for x in usable]

    def axis_fault(self, w: Array, rule: Rule) -> str | None:
        """What is wrong with the option axis_name for weights w; None if it is right."""
        axes = mesh_axes(rule)
        return f"expected None for an array of {self.name}, got {named(axes)}" if axes else None

    def varying(self, x: Array) -> frozenset[Any]:
        """The mesh axes of a surrounding `jax.shard_map` over which x is known to vary."""
        return frozenset()

    def on_all_shards(self, flag: Any, leaves: list[Leaf]) -> Any:
        """A flag of `all_finite`, true where it is true for all shards of these leaves."""
        return flag

    def memory(self, x: Array) -> np.ndarray[Any, Any] | None:
        """An array at the same addresses, for arithmetic with addresses alone; None if unknown."""
        return None

    def records(self, x: Array) -> bool:
        """Whether the history of x is being recorded for differentiation."""
        return False


def named(axes: Iterable[Hashable]) -> str:
    """The names of mesh axes, for a message."""
    return " and ".join(sorted(map(repr, axes)))


@lru_cache(256)  # not all: programs make structured dtypes as they go
def kind_of_numpy(dtype: np.dtype[Any]) -> Kind:
    """The kind of a numpy dtype, the extension type bfloat16 included."""
    if dtype.kind == "f" or (is_bfloat16(dtype) and dtype.isnative):
        return Kind.REAL if dtype.itemsize > 1 else Kind.OTHER
    if dtype.kind == "c":
        return Kind.COMPLEX
    return Kind.INTEGER if dtype.kind in "iu" else Kind.OTHER


@lru_cache(256)
def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is the type of ml_dtypes, which numpy can hold but not compute with."""
    return dtype.name == "bfloat16"
