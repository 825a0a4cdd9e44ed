"""One call that updates a tree of seven leaves, with a fault or an unusual input at one of them.

`outcomes.py` says whether it was refused with nothing changed, or gave the right numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lars_tree import Container, Lars, LarsTreeError, lars_update

PATHS = (
    ("embed",),
    ("blocks", 0, "kernel"),
    ("blocks", 0, "bias"),
    ("blocks", 1, 0),
    ("blocks", 1, 1, "scale"),
    ("head", "kernel"),
    ("head", "a/b"),
)
NAMES = (  # as a message shows the paths
    *("embed", "blocks/0/kernel", "blocks/0/bias", "blocks/1/0", "blocks/1/1/scale"),
    *("head/kernel", "head/'a/b'"),
)
MODES = ("new", "in place", "into out")
UPDATE, LARS = "lars_update", "Lars.update"
RULE = {"decay_lambda": 0.01, "trust_coefficient": 0.75, "eps": 0.001}
LR, MOMENTUM = 0.5, 0.5

Leaf = Any


def tree(leaves: Sequence[Leaf]) -> dict[str, Any]:
    """A tree of dicts, a list, a tuple and a Container, with leaves at three depths."""
    a, b, c, d, e, f, g = leaves
    blocks = [{"kernel": b, "bias": c}, (d, {"scale": e})]
    return {"embed": a, "blocks": blocks, "head": Container({"kernel": f, "a/b": g})}


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = dict.__getitem__(node, key) if isinstance(node, dict) else node[key]
    return node


def values(i: int) -> np.ndarray:
    """Weights of leaf i: few bits, so that all formats have them."""
    return (np.arange(1, 7, dtype=np.float32).reshape(2, 3) + i) / 8


def slopes(i: int) -> np.ndarray:
    """Gradients of leaf i."""
    return ((np.arange(6, dtype=np.float32) * 5 + i) % 7 - 2).reshape(2, 3) / 4


@dataclass
class Call:
    """The leaves of all arguments. In an update in place, `outs` is `ws`."""

    function: str
    mode: str
    ws: list[Leaf]
    gs: list[Leaf]
    outs: list[Leaf] | None
    velocities: list[Leaf] | None
    counters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    partner: int | None = None  # another leaf that the error names
    named: tuple[str, ...] = ()  # the paths that the error names, if they are not of leaves
    shape: Callable[[list[Any]], list[Any]] | None = None  # changes the trees
    lr: Any = LR  # or a tree in which all rates are LR

    def trees(self) -> list[Any]:
        """w, dcdw, out and state as the arguments of a call."""
        trees = self._trees()
        return trees if self.shape is None else self.shape(trees)

    def _trees(self) -> list[Any]:
        w, dcdw = tree(self.ws), tree(self.gs)
        out = None if self.outs is None else w if self.outs is self.ws else tree(self.outs)
        if self.velocities is None:
            return [w, dcdw, out, None]
        return [w, dcdw, out, Container(self.counters, velocity=tree(self.velocities))]

    def run(self, w: Any, dcdw: Any, out: Any, state: Any) -> tuple[Any, Any]:
        """The new weights and the new state."""
        if self.function == UPDATE:
            return lars_update(w, dcdw, self.lr, out=out, **RULE, **self.options), None
        rule = {name.replace("decay_lambda", "weight_decay"): x for name, x in RULE.items()}
        opt = Lars(LR, momentum=MOMENTUM, **rule, **self.options)
        return opt.update(w, dcdw, state, out=out, lr=self.lr)

    def leaves(self) -> list[Leaf]:
        lists = (self.ws, self.gs, self.outs or (), self.velocities or (), self.counters.values())
        return [x for leaves in lists for x in leaves]


def make(function: str, mode: str, convert: Callable[[np.ndarray], Leaf], counter: Any) -> Call:
    """A valid call with arrays that `convert` makes of numpy arrays."""
    ws, gs, outs = ([convert(f(i)) for i in range(7)] for f in (values, slopes, values))
    target = {"new": None, "in place": ws, "into out": outs}[mode]
    if function == UPDATE:
        return Call(function, mode, ws, gs, target, None)
    velocities = [convert(slopes(i + 3) / 2) for i in range(7)]
    return Call(
        function, mode, ws, gs, target, velocities, {"step": counter(3), "skipped": counter(1)}
    )


Spoil = Callable[[Call, int], Any]


@dataclass(frozen=True)
class Fault:
    """An input that must be refused with an error of this class, or updated correctly if None."""

    name: str
    spoil: Spoil
    error: type[LarsTreeError] | None
    argument: str = ""
    modes: tuple[str, ...] = MODES
    functions: tuple[str, ...] = (UPDATE, LARS)


def leaf(side: str, convert: Callable[[Leaf], Leaf], **options: Any) -> Callable[[Call, int], None]:
    """A fault of one leaf of "ws", "gs", "outs" or "velocities"; `convert` gets the valid leaf."""

    def spoil(call: Call, i: int) -> None:
        leaves = getattr(call, side)
        leaves[i] = convert(leaves[i])
        call.options |= options

    return spoil


def each(
    text: str,
    side: str | Callable[[Callable[[Leaf], Leaf]], Spoil],
    kinds: Mapping[str, Callable[[Leaf], Leaf]],
    error: type[LarsTreeError] | None,
    argument: str = "",
    modes: tuple[str, ...] = MODES,
    functions: tuple[str, ...] = (UPDATE, LARS),
) -> list[Fault]:
    """A fault for each kind of leaf, on one side as in `leaf`, or as `side` puts it there."""
    return [
        Fault(
            f"{text} {name}",
            leaf(side, convert) if isinstance(side, str) else side(convert),
            *(error, argument, modes, functions),
        )
        for name, convert in kinds.items()
    ]


def weights(convert: Callable[[Leaf], Leaf]) -> Callable[[Call, int], None]:
    """A leaf of w, and of out if that is another tree."""

    def spoil(call: Call, i: int) -> None:
        call.ws[i] = convert(call.ws[i])
        if call.outs is not None and call.outs is not call.ws:
            call.outs[i] = convert(call.outs[i])

    return spoil


def everywhere(convert: Callable[[Leaf], Leaf]) -> Callable[[Call, int], None]:
    """The same leaf of all arguments."""

    def spoil(call: Call, i: int) -> None:
        weights(convert)(call, i)
        call.gs[i] = convert(call.gs[i])
        if call.velocities is not None:
            call.velocities[i] = convert(call.velocities[i])

    return spoil


def counter(name: str, convert: Callable[[Leaf], Leaf]) -> Callable[[Call, int], None]:
    """A counter of the state."""

    def spoil(call: Call, i: int) -> None:
        call.counters[name] = convert(call.counters[name])

    return spoil


Case = tuple[Fault, int, str, str]


def cases(faults: Iterable[Fault], places: int = 7) -> list[Case]:
    """Every fault at every leaf (or node), in every mode and function in which it can occur."""
    return [
        (fault, i, mode, function)
        for fault in faults
        for i in range(places)
        for mode in fault.modes
        for function in fault.functions
    ]
