"""The performance targets, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import odd
from benchmarks.contestants import CONTESTANTS, OPTIMIZERS
from benchmarks.sections import LIMIT, Results
from benchmarks.trees import TITLES

OURS, OURS_TORCH = "lars_tree, numpy", "lars_tree, torch"
OPTIMIZER = "lars_tree.torch.Lars"
MIB = 2**20


@dataclass(frozen=True)
class Target:
    """An upper bound for `measured`, or a lower bound if `at_least`; None is not measured."""

    what: str
    bound: float
    measured: float | None
    unit: str = "×"
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """Met, missed or not measured."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "met" if met else "missed"

    @property
    def aim(self) -> str:
        """The bound with its direction."""
        return f"{'≥' if self.at_least else '≤'} {self.show(self.bound)}"

    def show(self, value: float | None) -> str:
        """The value with its unit, in three digits, so that rounding does not hide a miss."""
        if value is None:
            return ""
        return f"{value:.3g}{self.unit}" if self.unit == "×" else f"{value:.3g} {self.unit}"


def targets(results: Results) -> list[Target]:
    """All targets, with what was measured."""
    return [
        *_in_place(results),
        *_out_of_place(results),
        *_with_momentum(results),
        *_odd_leaves(results),
        *_others(results),
    ]


def _in_place(results: Results) -> Iterator[Target]:
    for tree, limit, speed in [("resnet", 1.6, 2.5), ("gpt2", 1.5, 2.0), ("small", None, 12.0)]:
        times, title = results.in_place.get(tree, {}), f"{TITLES[tree]}, in place"
        ours = times.get(OURS)
        if limit is not None:
            yield Target(f"{title}: time / memory limit", limit, _ratio(times, OURS, LIMIT))
        else:
            yield Target(f"{title}: time", 0.6, None if ours is None else 1e3 * ours, "ms")
        best = _fastest_peer(times)
        named = f" ({best.split(',')[0]})" if best else ""
        fastest = _ratio(times, best, OURS)
        yield Target(f"{title}: fastest peer{named} / lars_tree", speed, fastest, at_least=True)
        torch = _ratio(times, OURS_TORCH, OURS)
        bound = 2.5 if tree == "small" else 1.2
        yield Target(f"{title}: torch / numpy", bound, torch)


def _out_of_place(results: Results) -> Iterator[Target]:
    for tree, title in TITLES.items():
        times = results.out_of_place.get(tree, {})
        for name, bound in {"optax, jitted": 2.5, "numpy by hand": 1.6}.items():
            what = f"{title}, out of place: {name.split(',')[0]} / lars_tree"
            yield Target(what, bound, _ratio(times, name, OURS), at_least=True)


def _with_momentum(results: Results) -> Iterator[Target]:
    for name in (OPTIMIZER, "lars_tree.Lars, numpy"):
        for tree, speed in {"resnet": 2.0, "small": 4.0}.items():
            times, title = results.momentum.get(tree, {}), f"{TITLES[tree]}, momentum: "
            best = _fastest_peer(times)
            what = f"{title}fastest peer ({best.split(',')[0]}) / {name}"
            yield Target(what, speed, _ratio(times, best, name), at_least=True)
            if tree == "resnet":
                yield Target(f"{title}{name} / memory limit", 1.6, _ratio(times, name, LIMIT))
                fused = _ratio(times, name, "torch SGD, fused")
                yield Target(f"{title}{name} / torch SGD, fused", 1.3, fused)
        extra = results.memory.get("in place", {}).get(name)
        what = f"{name}: extra memory beyond the velocity"
        yield Target(what, 1.0, None if extra is None else extra / MIB, "MiB")


def _odd_leaves(results: Results) -> Iterator[Target]:
    for group in odd.GROUPS:
        times = results.odd.get(group.title, {})
        for name, bound in group.bounds.items():
            what = f"{group.title}: {name} / {group.base}"
            yield Target(what, bound, _ratio(times, name, group.base))


def _others(results: Results) -> Iterator[Target]:
    for tree in ("resnet", "gpt2"):
        times = results.dtypes.get(tree, {})
        for library in ("numpy", "torch"):
            what = f"{TITLES[tree]}, {library}: float32 / bfloat16"
            speed = _ratio(times, f"{library} float32", f"{library} bfloat16")
            yield Target(what, 1.5, speed, at_least=True)
    growth = _ratio(results.growth.get("numpy", {}), 100_000, 1000)
    yield Target("small leaves: time per leaf of 100,000 / of 1,000", 1.3, growth)
    for way in ("in place", "out of place"):
        for name in (OURS, OURS_TORCH):
            extra = results.memory.get(way, {}).get(name)
            what = f"{name.split(', ')[1]}, {way}: extra memory"
            yield Target(what, 1.0, None if extra is None else extra / MIB, "MiB")
    for what, bound, seconds in [
        ("import: time beyond numpy's", 40.0, results.import_time),
        ("repr of 100,000 leaves", 50.0, results.repr_time),
    ]:
        yield Target(what, bound, None if seconds is None else 1e3 * seconds, "ms")


def _fastest_peer(times: dict[str, float]) -> str:
    peers = [name for name, x in (CONTESTANTS | OPTIMIZERS).items() if x.peer and name in times]
    return min(peers, key=times.__getitem__, default="")


def _ratio(times: dict[Any, float], above: Any, below: Any) -> float | None:
    if above in times and below in times:
        return times[above] / times[below]
    return None
