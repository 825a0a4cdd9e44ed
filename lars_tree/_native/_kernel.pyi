"""The types of what module.cpp defines."""

from collections.abc import Callable
from typing import Any, Protocol, final

@final
class Reader:
    """How the arrays and rules of one library are read; made once for each library."""

    def __new__(
        cls,
        types: tuple[type, ...],
        fields: tuple[str, ...],
        make: Callable[[Any], Any] | None = None,
        copy: Callable[[Any], Any] | None = None,
        tensors: tuple[Any, ...] | None = None,
        as_bits: Callable[[Any], Any] | bool | None = None,
    ) -> Reader:
        """A reader of arrays of these types, and of rules that are tuples of these fields.

        Args:
            types: The types of arrays to take.
            fields: The names of the fields of a rule.
            make: Returns new memory for a result.
            copy: Returns a copy of a velocity, to be stepped in its place.
            tensors: How to read torch tensors, see reader.hpp; None for the buffer protocol.
            as_bits: Views bfloat16 arrays, which have no buffer protocol, as uint16; True where
                arrays of uint16 are such views already.
        """

@final
class Plan:
    """The layers that the native engine steps in one update.

    `prepare` adds layers and writes nothing. Then come `norms` and `apply`, or `step`, which does
    both for each layer while it is in the cache. `apply` and `step` write all layers or none.
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
        places: list[int] | None = None,
    ) -> list[int]:
        """Add the leaves that the kernel supports; the places of those that it does not.

        Leaves without weights, gradient, `out` and velocity are passed over. With `outs` weights
        and velocities are written to where they are. Without them new arrays are made, and put
        into `new_ws` and `new_velocities`; without these either, the plan can only be measured.

        Args:
            reader: How to read them.
            ws: The weights, one item for each leaf.
            dcdws: The gradients, of the shapes of their weights. None keeps the weights in place.
            outs: The arrays to write to, or None.
            rules: The rules.
            velocities: The velocities; None, for all or for a leaf, for no momentum.
            new_ws: Where to put new arrays, a list of the same length.
            new_velocities: The same for velocities.
            places: Which leaves to look at; None for all.
        """

    def count(self, counter: Any) -> bool:
        """Add one to the int64 of this numpy array when the step is taken; False if it cannot."""

    def overlaps(
        self, written: list[tuple[int, int]] = ..., read: list[tuple[int, int]] = ...
    ) -> bool:
        """Whether memory that is written is written twice, or read as well.

        Args:
            written: Further memory, as pairs of addresses: start and end.
            read: The same, of memory that is read.
        """

    def spans(self) -> list[tuple[int, int]]:
        """The memory that is written, as pairs of addresses: start and end."""

    def norms(self, bounds: bool = False) -> bytearray:
        """The norms of all layers: a row of 8 doubles for each, see Norms in rule.hpp.

        Args:
            bounds: Also read the velocities, as `nonfinite` needs their largest magnitude.
        """

    def measure(self, norms: bytearray) -> bytearray:
        """What the step of each layer is made of: a row of 4 doubles, the fields of `Measured`."""

    def nonfinite(self, norms: bytearray) -> list[int]:
        """The rows of those layers that get an infinite or NaN weight or velocity.

        Only of layers whose rule does not propagate such numbers. Elements are looked at only
        where the norms, made with bounds=True, do not prove that all results are finite.
        """

    def apply(self, norms: bytearray) -> None:
        """Step all layers by the coefficients that follow from these norms."""

    def step(self) -> None:
        """Step all layers: `norms` and `apply` in one."""

    @property
    def must_be_finite(self) -> bool:
        """Whether a rule does not propagate infinity and NaN."""

    @property
    def places(self) -> list[int]:
        """The place of the leaf of each layer, in the order of the rows of `norms`."""

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
    """Append the leaves of a nest to a list.

    others(node, found) does so for the nodes of kinds that are not walked natively.
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
    """Append the value that a prefix has for each leaf of a nest; whether it is a prefix.

    others(node, prefix, found, exact) does so for the nodes of kinds that are not walked natively.
    """

def best_instruction_set() -> int:
    """The number of the best instruction set here: 0 none in particular, 1 AVX2, 2 AVX-512."""

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
    def best_instruction_set(self) -> int: ...
