"""The performance targets, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants import CONTESTANTS, OPTIMIZERS
from benchmarks.sections import GROUPS, LIMIT, OPTIMIZER, Results
from benchmarks.trees import TITLES

OURS, OURS_TORCH = "lars_tree, numpy", "lars_tree, torch"
OURS_LARS = "lars_tree.Lars, numpy"
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
        *_groups(results),
        *_others(results),
    ]


def _in_place(results: Results) -> Iterator[Target]:
    for tree, limit, speed in [("resnet", 1.55, 2.3), ("gpt2", 1.35, 2.2), ("small", None, 10.0)]:
        times, title = results.in_place.get(tree, {}), f"{TITLES[tree]}, in place"
        if limit is not None:
            yield Target(f"{title}: time / memory limit", limit, _ratio(times, OURS, LIMIT))
        else:
            yield _milliseconds(f"{title}: time", 0.45, times.get(OURS))
        yield _against_peers(title, times, OURS, speed)
        if tree != "small":
            yield Target(f"{title}: torch / numpy", 1.2, _ratio(times, OURS_TORCH, OURS))


def _milliseconds(what: str, bound: float, seconds: float | None) -> Target:
    return Target(what, bound, None if seconds is None else 1e3 * seconds, "ms")


def _against_peers(title: str, times: dict[str, float], name: str, speed: float) -> Target:
    best = _fastest_peer(times)
    peer = f" ({best.split(',')[0]})" if best else ""
    what = f"{title}: fastest peer{peer} / {name.removesuffix(', numpy')}"
    return Target(what, speed, _ratio(times, best, name), at_least=True)


def _out_of_place(results: Results) -> Iterator[Target]:
    for tree, title in TITLES.items():
        times = results.out_of_place.get(tree, {})
        for name, bound in {"optax, jitted": 2.5, "numpy by hand": 1.6}.items():
            what = f"{title}, out of place: {name.split(',')[0]} / lars_tree"
            yield Target(what, bound, _ratio(times, name, OURS), at_least=True)
    ours = results.out_of_place.get("small", {}).get(OURS)
    yield _milliseconds(f"{TITLES['small']}, out of place: time", 0.8, ours)


def _with_momentum(results: Results) -> Iterator[Target]:
    for tree, name, speed, slower_than_sgd in [
        ("resnet", OPTIMIZER, 2.2, 1.5),
        ("resnet", OURS_LARS, 2.2, 1.5),
        ("small", OPTIMIZER, 3.0, 1.2),
    ]:
        times, title = results.momentum.get(tree, {}), f"{TITLES[tree]}, momentum"
        yield _against_peers(title, times, name, speed)
        what = f"{title}: {name} / torch SGD, fused"
        yield Target(what, slower_than_sgd, _ratio(times, name, "torch SGD, fused"))
    times = results.momentum_dtypes
    for name in (OPTIMIZER, OURS_LARS):
        for dtype in ("float16", "bfloat16"):
            what = f"{TITLES['resnet']}, momentum, {name}: {dtype} / float32"
            yield Target(what, 1.2, _ratio(times, f"{name} {dtype}", f"{name} float32"))
        extra = results.memory.get("in place", {}).get(name)
        what = f"{name}: extra memory beyond the velocity"
        yield Target(what, 1.0, None if extra is None else extra / MIB, "MiB")


def _groups(results: Results) -> Iterator[Target]:
    for group in (group for groups in GROUPS.values() for group in groups):
        times = results.groups.get(group.title, {})
        for name, bound in group.bounds.items():
            what = f"{group.title}: {name} / {group.base}"
            yield Target(what, bound, _ratio(times, name, group.base))


def _others(results: Results) -> Iterator[Target]:
    for tree in ("resnet", "gpt2"):
        times = results.dtypes.get(tree, {})
        for library in ("numpy", "torch"):
            what = f"{TITLES[tree]}, {library}: bfloat16 / float32"
            ratio = _ratio(times, f"{library} bfloat16", f"{library} float32")
            yield Target(what, 0.65, ratio)
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
        yield _milliseconds(what, bound, seconds)


def _fastest_peer(times: dict[str, float]) -> str:
    peers = [name for name, x in (CONTESTANTS | OPTIMIZERS).items() if x.peer and name in times]
    return min(peers, key=times.__getitem__, default="")


def _ratio(times: dict[Any, float], above: Any, below: Any) -> float | None:
    if above in times and below in times:
        return times[above] / times[below]
    return None
