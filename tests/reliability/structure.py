"""Structure: a tree that does not match the weights is refused, at every node.

At each node of the gradients, `out`, the velocity or a tree of rates, something is missing,
unexpected, misspelt, of another length or class, or contains itself; or a node of the weights
cannot be rebuilt. Each error is a `StructureError` that names the argument and the node, and no
byte of any array, no counter and no node has changed. Trees that look unusual but match give the
numbers of the reference.

A tree deeper than Python's recursion limit gives a RecursionError of Python.
"""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lars_tree import Container, StateError, StructureError
from tests.reliability import bad_arrays as arrays
from tests.reliability import calls, outcomes
from tests.reliability.attack import Attempts, attack
from tests.reliability.calls import LARS, UPDATE, Call, Fault

MAPPINGS = ((), ("blocks", 0), ("blocks", 1, 1), ("head",))
SEQUENCES = (("blocks",), ("blocks", 1))
ARGUMENTS = {"w": 0, "dcdw": 1, "out": 2, "velocity": 3}

Path = tuple[Any, ...]
Convert = Callable[[Any], Any]


def replaced(node: Any, path: Path, convert: Convert) -> Any:
    """A copy of the tree in which one node is converted."""
    if not path:
        return convert(node)
    key, *rest = path
    if isinstance(node, dict):
        items = {k: replaced(x, tuple(rest), convert) if k == key else x for k, x in node.items()}
        return type(node)(items)
    return type(node)(
        replaced(x, tuple(rest), convert) if k == key else x for k, x in enumerate(node)
    )


def reshaped(argument: str, path: Path, convert: Convert) -> Callable[[list[Any]], list[Any]]:
    """Convert a node of an argument; in an update in place, out stays w."""

    def shape(trees: list[Any]) -> list[Any]:
        trees = list(trees)
        place, in_place = ARGUMENTS[argument], trees[2] is trees[0]
        if argument == "velocity":
            velocity = replaced(trees[3]["velocity"].to_dict(), path, convert)
            trees[3] = dict(trees[3]) | {"velocity": velocity}
        else:
            trees[place] = replaced(trees[place], path, convert)
        if argument == "w" and in_place:
            trees[2] = trees[0]
        return trees

    return shape


def at_node(argument: str, nodes: tuple[Path, ...], convert: Convert, below: Path = ()) -> Any:
    """A fault of the node with this index, which the error names, or its child `below`."""

    def spoil(call: Call, i: int) -> None:
        if argument == "lr":
            call.lr = replaced(calls.tree([calls.LR] * 7), nodes[i], convert)
        else:
            call.shape = reshaped(argument, nodes[i], convert)
        path = (*(("velocity",) if argument == "velocity" else ()), *nodes[i], *below)
        call.named = ("/".join(map(str, path)) or argument,)

    return spoil


class Broken(Mapping[Any, Any]):
    """Keys without values."""

    def __getitem__(self, key: Any) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(("kernel", "bias"))

    def __len__(self) -> int:
        return 2


class Lookup(Mapping[Any, Any]):
    """A mapping that cannot be made of other items."""

    def __init__(self, *, items: Any) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Locked(dict[Any, Any]):
    """A dict that refuses to be made of other items."""

    made = 0

    def __init__(self, *arguments: Any) -> None:
        if Locked.made:
            raise TypeError("locked")
        super().__init__(*arguments)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("locked")


def locked(node: Any) -> Any:
    Locked.made = 0
    new = Locked(node)
    Locked.made = 1
    return new


def first(node: Any) -> Any:
    return next(iter(node))


def without(node: Any) -> Any:
    return {key: x for key, x in node.items() if key != first(node)}


def renamed(convert: Convert) -> Convert:
    return lambda node: {convert(k) if k == first(node) else k: x for k, x in node.items()}


def containing_itself(node: Any) -> Any:
    new = dict(node) if isinstance(node, dict) else list(node)
    new[first(node) if isinstance(node, dict) else 0] = new
    return new


def through_a_list(node: Any) -> Any:
    new = dict(node) if isinstance(node, dict) else list(node)
    new[first(node) if isinstance(node, dict) else 0] = [new]
    return new


Fields = namedtuple("Fields", "x y")
IN_MAPPINGS: dict[str, Convert] = {
    "lacks a key": without,
    "has one key more": lambda node: {**node, "more": np.ones((2, 3), np.float32)},
    "has None more": lambda node: {**node, "more": None},
    "has a misspelt key": renamed(lambda key: key[:-1] + "x"),
    "has a key in capitals": renamed(str.upper),
    "has a key of bytes": renamed(str.encode),
    "has a number as key": renamed(lambda key: 0),
    "has None as key": renamed(lambda key: None),
    "has a tuple as key": renamed(lambda key: (key,)),
    "has a key with a slash": renamed(lambda key: f"{key}/"),
    "has a key with a line break": renamed(lambda key: f"{key}\n  x: y"),
    "has an empty key": renamed(lambda key: ""),
    "has keys 1 and '1' more": lambda node: {**node, 1: None, "1": None},
    "is empty": lambda node: {},
    "is an empty Container": lambda node: Container(),
    "is a list": lambda node: list(node.values()),
    "is a tuple": lambda node: tuple(node.values()),
    "is a list of pairs": lambda node: list(node.items()),
    "is an empty list": lambda node: [],
    "is a namedtuple": lambda node: Fields(*[*node.values(), None][:2]),
    "is a deeper dict": lambda node: {"x": dict(node)},
}
IN_SEQUENCES: dict[str, Convert] = {
    "is shorter": lambda node: node[:1],
    "is longer": lambda node: [*node, np.ones((2, 3), np.float32)],
    "is longer by None": lambda node: [*node, None],
    "is empty": lambda node: [],
    "is an empty tuple": lambda node: (),
    "is an empty dict": lambda node: {},
    "is a dict with names": lambda node: {str(i): x for i, x in enumerate(node)},
    "is a dict from 1": lambda node: dict(enumerate(node, 1)),
    "is a namedtuple": lambda node: Fields(*node),
    "is a deeper list": lambda node: [list(node)],
}
# These match all leaves below, as gradients and rates.
LEAVES: dict[str, Convert] = {
    "is None": lambda node: (
        False if isinstance(node, dict) and "embed" in node else None
    ),  # out=None would be valid
    "is an array": lambda node: np.ones((2, 3), np.float32),
    "is a number": lambda node: 1.0,
    "is a string": lambda node: "node",
    "is a set": lambda node: set(),
    "is an iterator": lambda node: iter(()),
}
CYCLES = {"contains itself": containing_itself, "contains itself in a list": through_a_list}
ODD_MAPPINGS: dict[str, Convert] = {
    "has another order": lambda node: dict(reversed(node.items())),
    "is an OrderedDict": OrderedDict,
    "is a defaultdict": lambda node: defaultdict(list, node),
    "is a UserDict": UserDict,
    "is a proxy": lambda node: MappingProxyType(dict(node)),
    "is a ChainMap": lambda node: ChainMap({}, dict(node)),
    "is a Container": Container,
    "is a dict": lambda node: dict(node),
    "is a lookup": lambda node: Lookup(items=node),
    "is locked": locked,
}
ODD_SEQUENCES: dict[str, Convert] = {
    "is a tuple": tuple,
    "is a list": list,
    "is a deque": deque,
    "is a UserList": UserList,
    "is a dict of indices": lambda node: dict(enumerate(node)),
}
CANNOT = ("is a ChainMap", "is a lookup")  # be rebuilt
WHERE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "dcdw": ("dcdw", calls.MODES, (UPDATE, LARS)),
    "out": ("out", ("into out",), (UPDATE, LARS)),
    "velocity": ("state", calls.MODES, (LARS,)),
    "lr": ("lr", calls.MODES, (UPDATE, LARS)),
}


def faults(kinds: dict[str, Convert], nodes: tuple[Path, ...], error: Any) -> list[Fault]:
    return [
        Fault(f"{side} {name}", at_node(side, nodes, convert), error, argument, modes, functions)
        for side, (argument, modes, functions) in WHERE.items()
        for name, convert in kinds.items()
        if not (kinds is LEAVES and side in ("dcdw", "lr"))
        if not (name == "is a list of pairs" and side == "lr")  # the keys are bad rates
        if not (name in CANNOT and side == "velocity")
    ]


def cyclic(nodes: tuple[Path, ...]) -> list[Fault]:
    """The error names the place where a node is found again."""

    def spoil(side: str, name: str) -> Any:
        def fault(call: Call, i: int) -> None:
            at_node(side, nodes, CYCLES[name])(call, i)
            key = 0 if nodes[i] in SEQUENCES else first(calls.at(calls.tree(range(7)), nodes[i]))
            # In other trees, the list is what does not match.
            inner = (0,) if name.endswith("list") and side in ("w", "lr") else ()
            path = (*(("velocity",) if side == "velocity" else ()), *nodes[i], key, *inner)
            call.named = ("/".join(map(str, path)),)

        return fault

    sides = {"w": ("w", calls.MODES, (UPDATE, LARS)), **WHERE}
    return [
        Fault(f"{side} {name}", spoil(side, name), StructureError, argument, modes, functions)
        for side, (argument, modes, functions) in sides.items()
        for name in CYCLES
    ]


def state(convert: Convert) -> Callable[[Call, int], None]:
    def spoil(call: Call, i: int) -> None:
        call.shape = lambda trees: [*trees[:3], convert(trees[3])]
        call.named = ("state",)

    return spoil


STATES: dict[str, Convert] = {
    "None": lambda s: None,
    "a list": lambda s: list(s.values()),
    "empty": lambda s: {},
    "a string": lambda s: "state",
    **{
        f"without {k}": lambda s, k=k: {x: s[x] for x in s if x != k}
        for k in ("step", "skipped", "velocity")
    },
    "misspelt": lambda s: {("stepp" if k == "step" else k): x for k, x in s.items()},
    "larger": lambda s: {**s, "more": 1},
    "nested": lambda s: {"state": s},
    "the weights": lambda s: s["velocity"],
}
OF_WEIGHTS = [
    *(
        Fault(f"w {n}", at_node("w", MAPPINGS, ODD_MAPPINGS[n]), StructureError, "w", ("new",))
        for n in CANNOT
    ),
    *(
        Fault(f"w {n}", at_node("w", MAPPINGS, f), None, modes=("in place", "into out"))
        for n, f in ODD_MAPPINGS.items()
    ),
    *(
        Fault(f"w {n}", at_node("w", MAPPINGS, f), None, modes=("new",))
        for n, f in ODD_MAPPINGS.items()
        if n not in CANNOT
    ),
]


@attack(
    "A tree that does not match the weights is refused, with its nodes",
    "structural faults, and unusual trees that match",
    count=100_000,
    short=500,
    plain=True,
    needs=("pandas", "torch", "ml_dtypes"),
)
def trees(rng: np.random.Generator) -> Attempts:
    every = calls.cases(
        [
            *faults(IN_MAPPINGS, MAPPINGS, StructureError),
            *faults(LEAVES, MAPPINGS, StructureError),
            *faults(ODD_MAPPINGS, MAPPINGS, None),
            *cyclic(MAPPINGS),
            *OF_WEIGHTS,
        ],
        len(MAPPINGS),
    )
    every += calls.cases(
        [
            *faults(IN_SEQUENCES, SEQUENCES, StructureError),
            *faults(LEAVES, SEQUENCES, StructureError),
            *faults(ODD_SEQUENCES, SEQUENCES, None),
            *cyclic(SEQUENCES),
        ],
        len(SEQUENCES),
    )
    every += calls.cases(
        [
            Fault(f"state is {n}", state(f), StateError, "state", functions=(LARS,))
            for n, f in STATES.items()
        ],
        1,
    )

    def valid(function: str, mode: str) -> Call:
        return calls.make(function, mode, arrays.valid, arrays.new_counter)

    return outcomes.attempts(rng, every, valid, arrays.strided, arrays.seen, arrays.numbers)
