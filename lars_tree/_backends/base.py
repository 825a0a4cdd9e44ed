"""The interface of an array library, with defaults that most libraries share.

The types for the arrays of an update, in the order of their use:

    Columns    the arguments of all leaves, one list per argument, unchecked
    Operand    one array with the facts that its library reports, for checks (`_core/operands.py`)
    Leaf       the checked arguments of the step of one leaf
    Engine     updates some leaves in place, if the caller chooses an engine for them
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from enum import Enum
from functools import lru_cache, partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from lars_tree._backends.memory import NumpyArray
from lars_tree._numerics.formula import Measured, Rule, mesh_axes

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan

NativeArray = Any  # an array of any library

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable | None)

MAX_AXES = 64  # as in numpy


class Kind(Enum):
    """The kinds of element types that the rule distinguishes."""

    REAL = "real"
    COMPLEX = "complex"
    INTEGER = "integer"
    OTHER = "other"


FLOATING = (Kind.REAL, Kind.COMPLEX)


class Values(Enum):
    """Where the elements of an array are, which decides whether they can be read."""

    CPU = "in CPU memory"
    DEVICE = "on an accelerator: reading them waits for it"
    TRACED = "not computed yet: a tracer or a lazy array"


class Facts(NamedTuple):
    """The properties of an array that the checks use."""

    shape: tuple[int, ...]
    kind: Kind
    dtype: Any
    device: Hashable
    sharding: Sharding | None = None  # None: not sharded over processes


class Sharding(NamedTuple):
    """How an array is sharded over processes."""

    mesh: Hashable
    placements: Hashable


class Leaf(NamedTuple):
    """The checked arguments of the step of one leaf.

    `leaf_index` is the index of the leaf in the tree. `dcdw` is None if the weights stay unchanged,
    `out` is None if the results are new arrays, and `velocity` is None without momentum. With an
    `out`, the velocity is updated in place.
    """

    leaf_index: int
    w: Any
    dcdw: Any
    out: Any
    rule: Rule
    backend: Backend
    velocity: Any = None


class Columns(NamedTuple):
    """The unchecked arguments of an update: one list per argument, with one item per leaf.

    If `outs` is None, the results are new arrays; otherwise the velocities and the `counters` of
    the state are updated in place. The velocity of a leaf without momentum may be None.
    """

    ws: list[Any]
    dcdws: list[Any]
    outs: list[Any] | None
    rules: list[Rule]
    velocities: list[Any] | None = None
    counters: Mapping[str, Any] = MappingProxyType({})

    def row(self, index: int) -> tuple[Any, Any, Any, Any]:
        """w, dcdw, out and velocity of a leaf; None for an argument that is missing."""
        columns = (self.ws, self.dcdws, self.outs, self.velocities)
        w, dcdw, out, velocity = (None if xs is None else xs[index] for xs in columns)
        return w, dcdw, out, velocity


class StepResult(NamedTuple):
    """The new weights and velocity of one leaf."""

    w: Any
    velocity: Any = None


class StepResults(NamedTuple):
    """The new arrays of an update that is not in place; an item is None until it is computed."""

    ws: list[Any]
    velocities: list[Any] | None


class Engine(Protocol):
    """An engine that the caller chooses for the leaves at `indices`, to update them in place.

    If a rule has the option `nonfinite`, the engine must update all leaves.
    """

    @property
    def indices(self) -> Collection[int]: ...

    def trusted(self, leaves: list[Leaf]) -> list[Leaf]:
        """The given leaves that pass a cheap pre-check, so that they need no full check."""

    def update(self, leaves: list[Leaf], writes: Writes) -> tuple[list[int], Any]:
        """Prepare the step of these leaves, and add its writes; writes nothing itself.

        Returns the indices of leaves with nonfinite="raise" that would not be finite, and whether
        the step applies: a bool, or a 0-d bool array on the device.
        """


class Shards(Protocol):
    """The shards of this process, as layers of a plan.

    `trust` and `take` add leaves to the plan. Then `reduce` completes the norms of the plan, and
    the plan is applied. All processes must add the same leaves, and call `reduce` and `agree` in
    the same order.

    Attributes:
        results: The results by leaf index.
        copies: Pairs of an array to write to and its new values, valid once the plan was applied.
    """

    results: dict[int, StepResult]
    copies: list[tuple[NativeArray, NativeArray]]

    @property
    def leaf_indices(self) -> dict[int, int]:
        """The leaf index of each row of the plan."""

    def trust(self, leaves: list[Leaf]) -> list[Leaf]:
        """Add the unchecked leaves that pass a cheap pre-check to the plan, and return them."""

    def take(self, leaves: list[Leaf]) -> None:
        """Add all checked leaves that a plan can update."""

    def reduce(self, norms: bytearray) -> None:
        """Replace the norms of shards by the norms of whole layers."""

    def agree(self, bad: set[int]) -> set[int]:
        """The leaf indices that are in `bad` in any process."""

    def announce(self) -> None:
        """Like `Backend.announce`, for the arrays of the leaves that were added."""


class Writes(Protocol):
    """The methods of `_core.writes.Writes` that backends use; they are documented there."""

    plan: Plan | None

    def add(self, backend: Backend, out: NativeArray, x: NativeArray) -> None: ...
    def result(self, leaf: Leaf, new: StepResult) -> StepResult: ...
    def announce(self, backend: Backend, outs: Iterable[NativeArray]) -> None: ...
    def copy(self, target: NumpyArray, values: NumpyArray) -> None: ...
    def holds(self, size: int) -> bool: ...
    def step(self, step: Callable[[], Any]) -> None: ...
    def step_in_chunks(self, step: Callable[[], Any]) -> None: ...


class Backend(ABC):
    """One array library. `update` and `measure` only receive leaves that passed all checks."""

    name: str

    @abstractmethod
    def facts(self, x: NativeArray) -> Facts:
        """Shape, dtype and device of an array that has no fault."""

    @abstractmethod
    def values(self, x: NativeArray) -> Values:
        """Where the elements are."""

    def to_numpy(self, x: NativeArray) -> NumpyArray:
        """The elements of an array that is not traced; a view if possible."""
        return np.asarray(x)

    @abstractmethod
    def full(self, number: complex, like: NativeArray) -> NativeArray:
        """A number as a 0-d array of double precision, on the device of `like`."""

    @abstractmethod
    def copy(self, x: NativeArray, stop_gradients: bool) -> NativeArray:
        """A copy that shares no memory."""

    @abstractmethod
    def zeros(self, w: NativeArray, dtype: Any) -> NativeArray:
        """Zeros with the shape and device of w."""

    @abstractmethod
    def counter(self, w: NativeArray) -> NativeArray:
        """A new 0-d array of integers with the value 0, on the device of w."""

    @abstractmethod
    def update(self, leaves: list[Leaf], writes: Writes) -> list[StepResult]:
        """The weights and velocities after one step.

        The results of leaves with an `out` are added to `writes`, and are valid after
        `writes.make()`. Every leaf has a gradient.
        """

    @abstractmethod
    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        """The norms and ratios of the steps, computed by the code of `update` on the same device.

        Each number is 0-d, or a vector if the leaf has a layer axis. Every leaf has a gradient.
        """

    def numbers(self, rows: NumpyArray, ws: list[NativeArray]) -> list[Measured]:
        """Convert the measurements of the native engine: one row for each array of weights."""
        return list(map(Measured._make, rows))

    def fetch(self, xs: list[NativeArray]) -> list[NumpyArray]:
        """The elements of arrays that are not traced, with one wait for the device."""
        return [self.to_numpy(x) for x in xs]

    @abstractmethod
    def all_finite(self, xs: list[NativeArray]) -> Any:
        """Whether all elements are finite: a bool, or a 0-d bool array."""

    @abstractmethod
    def choose(self, flag: Any, a: NativeArray, b: NativeArray) -> NativeArray:
        """Return `a` if the flag, a result of `all_finite`, is true, else `b`."""

    @abstractmethod
    def write(self, out: NativeArray, x: NativeArray) -> None:
        """Copy the elements of x, of the same shape and dtype, into `out`."""

    def writers(self, pairs: list[tuple[NativeArray, NativeArray]]) -> list[Callable[[], Any]]:
        """Functions, as few as possible, that copy x to `out` for all pairs (out, x)."""
        return [partial(self.write, out, x) for out, x in pairs]

    def copied_memory(
        self, out: NativeArray, x: NativeArray
    ) -> tuple[NumpyArray, NumpyArray] | None:
        """Numpy arrays of one dtype: the memory of `out` and the elements of x.

        None if only the library can copy the elements.
        """
        return None

    def announce(self, outs: Iterable[NativeArray]) -> None:
        """Tell the library that these arrays were written to without its operations."""
        return

    def prepare(
        self,
        plan: Plan,
        columns: Columns,
        results: StepResults | None,
        indices: list[int] | None,
    ) -> list[int]:
        """Add the leaves that the kernel supports to the plan; return the indices of the others.

        The arrays are unchecked, and may belong to another library. Without `outs`, new arrays are
        stored in `results`; without both, the leaves are only measured. Only the leaves
        at `indices` are considered; None means all.
        """
        return list(range(len(columns.ws))) if indices is None else indices

    def shards(self, plan: Plan) -> Shards | None:
        """An object that adds sharded leaves to a plan; None if the kernel cannot update them."""
        return None

    def finish(self, columns: Columns, results: StepResults, indices: Iterable[int]) -> None:
        """Convert the new arrays of leaves added by `prepare` to the types that users expect."""
        return

    def count(self, plan: Plan, counter: NativeArray) -> bool:
        """Let a plan increment a counter when it is applied; return whether this is supported."""
        return False

    def velocity_dtype(self, w: NativeArray) -> Any:
        """The dtype of the velocity of w: that of w, but float32 for half precision."""
        return np.dtype(np.float32) if w.dtype.itemsize == 2 else w.dtype

    def namespace(self, x: NativeArray) -> Any:
        """The module with functions such as `clip` and `cos` for arrays like x."""
        return np

    def fault(self, x: NativeArray) -> str | None:
        """Why LARS cannot compute with x; None if it can."""
        return None

    def out_fault(self, x: NativeArray) -> str | None:
        """Why x cannot be written to; None if it can be."""
        return None

    def sizes(self, xs: list[NativeArray]) -> tuple[list[int], list[int]]:
        """The numbers of elements and of bytes that arrays of one type declare; 0 if unknown.

        It must be fast for 100,000 arrays.
        """
        usable = [None if self.fault(x) else x for x in xs]
        counts = [0 if x is None else prod(x.shape) for x in usable]
        return counts, [getattr(x, "nbytes", 0) for x in usable]

    def axis_fault(self, w: NativeArray, rule: Rule) -> str | None:
        """Why the option axis_name is invalid for weights w; None if it is valid."""
        axes = mesh_axes(rule)
        return f"expected None for an array of {self.name}, got {named(axes)}" if axes else None

    def varying(self, x: NativeArray) -> frozenset[Any]:
        """The mesh axes of the surrounding `jax.shard_map` over which x varies."""
        return frozenset()

    def on_all_shards(self, flag: Any, leaves: list[Leaf]) -> Any:
        """A result of `all_finite`, reduced over all shards of these leaves."""
        return flag

    def memory(self, x: NativeArray) -> NumpyArray | None:
        """A numpy array at the addresses of x, not to be read; None if they are unknown."""
        return None

    def is_tracked(self, x: NativeArray) -> bool:
        """Whether x is tracked by autograd."""
        return False


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def named(axes: Iterable[Hashable]) -> str:
    return " and ".join(sorted(map(repr, axes)))


@lru_cache(256)  # bounded, as a program may create any number of structured dtypes
def kind_of_numpy(dtype: np.dtype[Any]) -> Kind:
    """The kind of a numpy dtype, including the extension type bfloat16."""
    if dtype.kind == "f" or (is_bfloat16(dtype) and dtype.isnative):
        return Kind.REAL if dtype.itemsize > 1 else Kind.OTHER
    if dtype.kind == "c":
        return Kind.COMPLEX
    return Kind.INTEGER if dtype.kind in "iu" else Kind.OTHER


@lru_cache(256)
def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is bfloat16 of ml_dtypes, which numpy can store but not compute with."""
    return dtype.name == "bfloat16"
