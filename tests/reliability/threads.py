"""Threads: steps of several threads give the result of the same steps one by one.

In-place steps of the same memory run one after another, in any order; each is made exactly once.
Steps of different memory run at the same time. What is *read* while another thread writes to it in
place is not protected: a file that is saved meanwhile may contain parts of two steps. To save while
other threads step, save results of steps without `out`, which never change, or save between steps.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lars_tree import Container, Lars, StructureError, io, lars_update, set_num_threads
from tests.reliability import shared
from tests.reliability.attack import Attempts, attack
from tests.reliability.shared import THREADS, by_threads, cycled, in_threads, little_room, made

SEEDS = 3


def _crowded() -> None:
    """Let threads switch as often as possible, and use the slow paths."""
    sys.setswitchinterval(1e-5)
    set_num_threads(3)
    little_room()


@attack(
    "In-place steps of the same weights run one by one",
    "times 4 threads step the same weights, in 18 modes; the bytes are those of the steps one by "
    "one",
    count=1500,
    short=40,
    plain=True,
    needs=("torch",),
)
def same_weights(rng: np.random.Generator) -> Attempts:
    _crowded()
    # With equal gradients, the result must be that of all steps; otherwise, that of some order.
    cases = [(mode, False) for mode in shared.BY_NAME]
    cases += [(mode, True) for mode in shared.BY_NAME if mode not in shared.ONE_GRADIENT]
    for mode, mixes in cycled(rng, cases):
        yield by_threads(mode, int(rng.integers(SEEDS)), 5 * THREADS, mixes)


@attack(
    "Steps of different weights do not affect each other",
    "times 4 threads step trees of their own, with one optimizer and one gradient",
    count=500,
    short=20,
    plain=True,
)
def own_weights(rng: np.random.Generator) -> Attempts:
    _crowded()
    for mode in cycled(rng, ["update", "strided", "joint_norm", "chunks", "lars_containers"]):
        seed = int(rng.integers(SEEDS))
        trees = [made(mode, seed) for _ in range(THREADS)]
        works = [lambda tree=tree: [tree.steps[0]() for _ in range(5)] for tree in trees]
        yield _wrong(mode, seed, trees, in_threads(works))
        yield _one_optimizer(seed)


def _wrong(
    mode: str, seed: int, trees: list[shared.Shared], failures: list[BaseException]
) -> str | None:
    if failures:
        return f"{mode}, seed {seed}: {failures[0]!r}"
    (expected,) = shared.one_by_one(mode, seed, 5, False)
    if any(tree.contents() != expected for tree in trees):
        return f"{mode}, seed {seed}: other bytes than those of 5 steps one by one"
    return None


def _one_optimizer(seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    w = {"a": rng.normal(size=40), "b": [rng.normal(size=(3, 4)).astype("f4")]}
    g = Container(w).map(lambda x: x[::-1].copy()).to_dict()
    optimizer = Lars(lambda step: 0.5 / (1 + step), trust_coefficient=1.0)
    found: list[Any] = []

    def work() -> None:
        new, state = w, optimizer.init(w)
        for _ in range(10):
            new, state = optimizer.update(new, g, state)
        found.append([x.tobytes() for x in Container(w=new, state=state).leaves()])

    failures = in_threads([work] * THREADS)
    if failures:
        return f"one optimizer, seed {seed}: {failures[0]!r}"
    work()
    return None if all(x == found[-1] for x in found) else f"one optimizer, seed {seed}: bytes"


@attack(
    "A tree that another thread changes is stepped whole or not at all",
    "times 3 threads step a tree while 2 others add and remove a leaf, replace one, or change the "
    "gradient's dict: each step is made, or raises StructureError",
    count=400,
    short=15,
    plain=True,
)
def changing_tree(rng: np.random.Generator) -> Attempts:
    _crowded()
    for walked in cycled(rng, [dict, Container, _InOrder]):
        yield _changed(walked, int(rng.integers(2, 40)))


class _InOrder(dict[str, Any]):
    """A dict that is walked by its method."""

    def items(self) -> Any:
        return dict.items(self)


def _changed(make: Callable[[Any], Any], size: int) -> str | None:
    w = make({str(i): np.zeros(3) for i in range(size)})
    g = make({str(i): np.full(3, -1.0) for i in range(size)})
    stop, taken = threading.Event(), []

    def change(tree: Any) -> None:
        while not stop.is_set():
            tree["last"] = np.ones(2)
            tree["last"] = np.ones(2)
            del tree["last"]

    def step() -> None:
        try:
            for _ in range(20):
                try:
                    lars_update(w, g, 1.0, adapt=False, out=w)
                except StructureError:
                    continue
                taken.append(1)
        finally:
            remaining.pop()
            if not remaining:
                stop.set()

    remaining = [1] * 3
    failures = in_threads([step] * 3 + [lambda: change(w), lambda: change(g)])
    if failures:
        return f"{make.__name__} of {size}: {failures[0]!r}"
    found = {float(x) for leaf in w.values() for x in leaf}
    if found != {float(len(taken))}:
        return f"{make.__name__} of {size}: leaves are {found} after {len(taken)} steps"
    return None


@attack(
    "A file saved beside steps contains one step",
    "files read while a thread steps without `out`, and two threads save the last result to one "
    "file",
    count=600,
    short=40,
)
def saved(rng: np.random.Generator) -> Attempts:
    _crowded()
    optimizer = Lars(0.1, trust_coefficient=1.0)
    w = {"a": rng.normal(size=50), "b": [rng.normal(size=(3, 4)).astype("f4")]}
    g = Container(w).map(lambda x: x[::-1].copy()).to_dict()
    last, chain_of_steps, stop, failures = [(w, optimizer.init(w))], [], threading.Event(), []

    def step() -> None:
        new, state = optimizer.update(last[0][0], g, last[0][1])
        chain_of_steps.append(_bytes_of({"w": new, "state": state}))
        last[0] = new, state
        stop.wait(1e-3)

    def save() -> None:
        new, state = last[0]
        io.save({"w": new, "state": state}, path)

    def loop(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.npz"
        step()
        save()
        threads = [
            threading.Thread(target=loop, args=(x,), daemon=True) for x in (step, save, save)
        ]
        for thread in threads:
            thread.start()
        try:
            while not failures:
                read = io.load(path)
                index = int(read["state"]["step"]) - 1
                right = _bytes_of(read) == chain_of_steps[index]
                yield None if right else f"the file has step {index} with other bytes"
            yield f"{failures[0]!r}"
        finally:
            stop.set()
            for thread in threads:
                thread.join(shared.PATIENCE)


def _bytes_of(tree: Any) -> list[bytes]:
    leaves = sorted(Container(tree).leaves(), key=lambda x: x.shape)
    return list(chain(x.tobytes() for x in leaves))
