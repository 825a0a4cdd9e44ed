"""The types of the extension module (module.cpp)."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, final

@final
class Reader:
    """Reads the arrays and rules of one library; there is one reader for each library."""

    def __new__(
        cls,
        types: tuple[type, ...],
        fields: tuple[str, ...],
        make: Callable[[Any], Any] | None = None,
        copy: Callable[[Any], Any] | None = None,
        tensors: tuple[Any, ...] | None = None,
        as_bits: Callable[[Any], Any] | bool | None = None,
    ) -> Reader:
        """Create a reader.

        Args:
            types: The array types that are supported; subclasses are not supported.
            fields: The names of the fields of a rule, which is a tuple.
            make: Returns a new array for the result of the given weights.
            copy: Returns a copy of a velocity; the copy is updated instead of the original.
            tensors: How to read torch tensors, see reader.hpp; None for numpy arrays.
            as_bits: Returns a uint16 view of a bfloat16 array, and None for any other array; True
                if uint16 arrays are such views already.
        """

@final
class Plan:
    """The layers that the native engine updates in one call.

    `prepare` adds layers and writes nothing. `norms` and then `apply` make the two passes over
    memory; `step` makes both for each layer while it is in the cache. `apply` and `step` write all
    layers or none.
    """

    def __new__(cls, threads: int, instruction_set: int) -> Plan: ...
    def prepare(
        self,
        reader: Reader,
        ws: list[Any],
        dcdws: list[Any],
        outs: list[Any] | None,
        rules: list[Any],
        velocities: list[Any] | None,
        new_ws: list[Any] | None = None,
        new_velocities: list[Any] | None = None,
        indices: list[int] | None = None,
    ) -> list[int]:
        """Add the leaves that the kernel supports; return the indices of the other leaves.

        Leaves without any array are skipped. With `outs`, the new weights are written to `outs`,
        and velocities are updated in place. Without `outs`, new arrays are stored in `new_ws` and
        `new_velocities`; if these are None too, the plan can only be measured.

        Args:
            reader: Reads the arrays and rules.
            ws: The weights, one item for each leaf.
            dcdws: The gradients, with the shapes of the weights. None leaves the weights unchanged.
            outs: The arrays to write to, or None.
            rules: The rules, one item for each leaf.
            velocities: The velocities; None, as the list or an item, means no momentum.
            new_ws: A list of the same length for the new weights.
            new_velocities: A list of the same length for the new velocities.
            indices: The leaves to add; None for all.
        """

    def count(self, counter: Any) -> bool:
        """Let the plan increment this int64 array; return False if the array is not supported."""

    def overlaps(
        self, written: list[tuple[int, int]] = ..., read: list[tuple[int, int]] = ...
    ) -> bool:
        """Whether memory is written twice, or both written and read.

        Args:
            written: Further memory ranges that are written: pairs of addresses, start and end.
            read: Further memory ranges that are read.
        """

    def spans(self) -> list[tuple[int, int]]:
        """The memory ranges that are written, as pairs of addresses: start and end."""

    def norms(self, bounds: bool = False) -> bytearray:
        """The norms: for each layer a row of 8 doubles, the fields of `Norms` in rule.hpp.

        With `bounds`, also find the largest magnitude of each velocity, which `nonfinite` needs.
        """

    def measure(self, norms: bytearray) -> bytearray:
        """For each layer a row of 4 doubles, the fields of `formula.Measured`."""

    def nonfinite(self, norms: bytearray) -> list[int]:
        """The rows of the layers that would get an infinite or NaN weight or velocity.

        Layers whose rule propagates these values are left out. Elements are computed only if the
        norms, which must be computed with bounds=True, do not prove that all results are finite.
        """

    def apply(self, norms: bytearray) -> None:
        """The second pass: update all layers, given the norms from the first pass."""

    def step(self) -> None:
        """Update all layers, like `norms` and then `apply`."""

    @property
    def must_be_finite(self) -> bool:
        """Whether the rule of a layer does not propagate infinity and NaN."""

    @property
    def indices(self) -> list[int]:
        """The index of the leaf of each layer, in the order of the rows of `norms`."""

    @property
    def written(self) -> list[Any]:
        """The given arrays that are written to."""

def collect(
    tree: Any,
    found: list[Any],
    kinds: dict[type, int],
    kind_of: Callable[[Any], int],
    others: Callable[..., Any],
    /,
) -> None:
    """Append the leaves of a tree to a list.

    others(node, found) does the same for nodes that are not walked natively.
    """

def match(
    tree: Any,
    prefix: Any,
    found: list[Any],
    exact: bool,
    kinds: dict[type, int],
    kind_of: Callable[[Any], int],
    others: Callable[..., Any],
    /,
) -> bool:
    """Append the value of a prefix for each leaf of a tree; return whether `prefix` is one.

    others(node, prefix, found, exact) does the same for nodes that are not walked natively.
    """

def rebuild(
    tree: Any,
    leaves: Iterator[Any],
    kinds: dict[type, int],
    kind_of: Callable[[Any], int],
    others: Callable[..., Any],
    keys: list[Any],
    /,
) -> Any:
    """A tree with the same nodes and new leaves.

    others(node, leaves) does the same for nodes that are not rebuilt natively. If it raises, the
    path of the node is appended to `keys`, the innermost key first.
    """

def best_instruction_set() -> int:
    """The best supported instruction set: 0 baseline, 1 AVX2, 2 AVX-512."""

class _Kernel(Protocol):
    """The type of this module, for values that are None where it was not built."""

    @property
    def Reader(self) -> type[Reader]: ...  # noqa: N802
    @property
    def Plan(self) -> type[Plan]: ...  # noqa: N802
    def collect(
        self,
        tree: Any,
        found: list[Any],
        kinds: dict[type, int],
        kind_of: Callable[[Any], int],
        others: Callable[..., Any],
        /,
    ) -> None: ...
    def match(
        self,
        tree: Any,
        prefix: Any,
        found: list[Any],
        exact: bool,
        kinds: dict[type, int],
        kind_of: Callable[[Any], int],
        others: Callable[..., Any],
        /,
    ) -> bool: ...
    def rebuild(
        self,
        tree: Any,
        leaves: Iterator[Any],
        kinds: dict[type, int],
        kind_of: Callable[[Any], int],
        others: Callable[..., Any],
        keys: list[Any],
        /,
    ) -> Any: ...
    def best_instruction_set(self) -> int: ...
