"""Weights that several threads step in place, and the results of the same steps one by one.

For the parts `threads` and `processes`. A mode is a function that makes the weights of a `Shared`
and its steps, one for each of `THREADS` threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import permutations
from typing import Any

import numpy as np

from lars_tree import Array, Container, Lars, lars_update, schedules
from lars_tree._core import writes

THREADS = 4
PATIENCE = 120.0  # seconds until steps that do not end are reported
STRIDES = 2**16  # bytes of a strided array that is updated in chunks, because of `little_room`

Draw = Callable[..., Any]  # draws an array of a shape and a dtype


@dataclass
class Shared:
    """Trees of arrays that steps write to, the step of each thread, and a further result."""

    trees: Any
    steps: list[Callable[[], Any]]
    count: Callable[[], Any] = field(default=lambda: None)

    def contents(self) -> tuple[Any, ...]:
        """The bytes of all arrays, and the further result."""
        return *map(_bytes, Container({"": self.trees}).leaves()), self.count()


def _bytes(x: Any) -> bytes | None:
    if x is None:
        return None
    if hasattr(x, "untyped_storage"):  # numpy has no bfloat16
        return bytes(x.detach().untyped_storage())
    return np.asarray(x).tobytes()


def little_room() -> None:
    """From now on, this process updates even small strided arrays in chunks."""
    writes.MAX_HELD = STRIDES


# ---- Modes


def _weights(draw: Draw) -> dict[str, Any]:
    shapes = {"a": ((3, 5), "f4"), "b": ((7,), "f8"), "c": ((4,), "f2"), "d": ((2, 2), "c8")}
    return {"top": draw((6,), "f4"), "in": [{k: draw(*x) for k, x in shapes.items()}]}


def _strided(draw: Draw) -> dict[str, Any]:
    return {"a": draw((6, 2), "f4")[:, 0], "b": draw((5,), "f8"), "c": draw((3, 4), "f4").T[::2]}


def _like(draw: Draw, tree: Any) -> Any:
    """A gradient of numpy arrays, by the shapes and dtypes of a tree."""
    return Container({"": tree}).map(lambda x: draw(x.shape, x.dtype)).to_dict()[""]


def _updates(draw: Draw, w: Any, **options: Any) -> Shared:
    gs = [_like(draw, w) for _ in range(THREADS)]
    return Shared(w, [lambda g=g: lars_update(w, g, 0.1, out=w, **options) for g in gs])


def _optimizer(draw: Draw, w: Any, optimizer: Lars) -> Shared:
    gs, state = [_like(draw, w) for _ in range(THREADS)], optimizer.init(w)
    return Shared([w, state], [lambda g=g: optimizer.update(w, g, state, out=w) for g in gs])


def update(draw: Draw) -> Shared:
    return _updates(draw, _weights(draw), decay_lambda=0.01)


def strided(draw: Draw) -> Shared:
    return _updates(draw, _strided(draw), decay_lambda=0.01)


def joint_norm(draw: Draw) -> Shared:
    return _updates(
        draw, _weights(draw), decay_lambda=0.1, joint_norm=True, adapt={"top": False, "*": True}
    )


def native_threads(draw: Draw) -> Shared:
    """More elements than one thread of the kernel updates."""
    return _updates(draw, {"a": draw((300_000,), "f4"), "b": draw((9,), "f4")})


def chunks(draw: Draw) -> Shared:
    """With `little_room`, `a` is updated in chunks."""
    w = {"a": draw((STRIDES // 2, 2), "f4")[:, 0], **_strided(draw)}
    return _updates(draw, w, decay_lambda=0.01)


def subtrees(draw: Draw) -> Shared:
    """Each thread steps two of four arrays, each array is stepped by two threads."""
    w = [draw((5,), "f4") for _ in range(THREADS)]
    pairs = [[w[i], w[(i + 1) % THREADS]] for i in range(THREADS)]
    gs = [_like(draw, pair) for pair in pairs]
    calls = zip(pairs, gs, strict=True)
    return Shared(w, [lambda x=x, g=g: lars_update(x, g, 0.1, out=x) for x, g in calls])


def views(draw: Draw) -> Shared:
    """Each thread steps another part of one array; neighbouring parts overlap."""
    memory = draw((4 * THREADS + 4,), "f8")
    parts = [{"view": memory[4 * i : 4 * i + 8]} for i in range(THREADS)]
    gs = [_like(draw, part) for part in parts]
    calls = zip(parts, gs, strict=True)
    return Shared(memory, [lambda x=x, g=g: lars_update(x, g, 0.1, out=x) for x, g in calls])


def lars(draw: Draw) -> Shared:
    return _optimizer(draw, _weights(draw), Lars(0.1, weight_decay=0.01, trust_coefficient=1.0))


def lars_strided(draw: Draw) -> Shared:
    schedule = schedules.Polynomial(0.5, total_steps=30, power=2.0)
    return _optimizer(draw, _strided(draw), Lars(schedule, trust_coefficient=1.0))


def lars_schedules(draw: Draw) -> Shared:
    """Schedules and functions of paths, which run Python during the step."""
    rates = {"top": lambda step: 0.5 / (1 + step), "in": schedules.Cosine(0.5, total_steps=30)}
    decay = {"weight_decay": lambda path, leaf: 0.01 * len(path)}
    optimizer = Lars(rates, nesterov=True, trust_coefficient=1.0, **decay)
    return _optimizer(draw, _weights(draw), optimizer)


def lars_skip(draw: Draw) -> Shared:
    """The gradient of each second thread is not finite, so its step is skipped and counted."""
    shared = _optimizer(draw, _weights(draw), Lars(0.1, nonfinite="skip", trust_coefficient=1.0))
    return _with_bad(shared)


def lars_containers(draw: Draw) -> Shared:
    w = Container(_weights(draw), wrapped=Array(draw((4,), "f4")))
    return _optimizer(draw, w, Lars(0.1, trust_coefficient=1.0))


def _with_bad(shared: Shared) -> Shared:
    for step in shared.steps[1::2]:
        g = step.__defaults__[0]
        g["top"][2] = np.nan
    return shared


def _tensors(tree: Any) -> Any:
    import torch

    return Container({"": tree}).map(torch.from_numpy).to_dict()[""]


def torch_update(draw: Draw) -> Shared:
    import torch

    w = _tensors({"a": draw((3, 5), "f4"), "b": draw((7,), "f8")})
    w["c"] = torch.from_numpy(draw((9,), "f4")).bfloat16()
    gs = [{k: torch.from_numpy(draw(x.shape, "f4")) for k, x in w.items()} for _ in range(THREADS)]
    return Shared(w, [lambda g=g: lars_update(w, g, 0.1, out=w) for g in gs])


def mixed(draw: Draw) -> Shared:
    """Arrays of numpy and torch; the kernel updates all but the strided ones."""
    w = {"numpy": _strided(draw), "torch": _tensors({"a": draw((3, 5), "f4")})}
    optimizer = Lars(schedules.Cosine(0.5, total_steps=30), trust_coefficient=1.0)
    state = optimizer.init(w)
    gs = [
        {"numpy": _like(draw, w["numpy"]), "torch": _tensors({"a": draw((3, 5), "f4")})}
        for _ in range(THREADS)
    ]
    return Shared([w, state], [lambda g=g: optimizer.update(w, g, state, out=w) for g in gs])


def _torch_lars(draw: Draw, groups: int, **options: Any) -> Shared:
    """All threads share the gradients. The first step makes the buffers of the momentum."""
    import torch

    import lars_tree.torch

    params = [torch.nn.Parameter(torch.from_numpy(draw((3, 5), "f4"))) for _ in range(5)]
    for p in params:
        p.grad = torch.from_numpy(draw((3, 5), "f4"))
    # Groups with different rates; the last parameters are strided.
    params[-1].data, params[-1].grad = params[-1].data.T, params[-1].grad.T
    given = [{"params": params[i::groups], "lr": 0.1 + 0.2 * i} for i in range(groups)]
    optimizer = lars_tree.torch.Lars(given, trust_coefficient=1.0, **options)

    def buffers() -> Any:
        found = [optimizer.state[p]["momentum_buffer"] for p in params]
        return [_bytes(x) for x in found], int(optimizer.skipped)

    return Shared(params, [optimizer.step] * THREADS, buffers)


def torch_lars(draw: Draw) -> Shared:
    return _torch_lars(draw, 1, lr=0.1, weight_decay=0.01)


def torch_lars_groups(draw: Draw) -> Shared:
    return _torch_lars(draw, 3, lr=0.1, nesterov=True)


def torch_lars_skip(draw: Draw) -> Shared:
    return _torch_lars(draw, 2, lr=0.1, nonfinite="skip")


def torch_lars_foreach(draw: Draw) -> Shared:
    return _torch_lars(draw, 2, lr=0.1, foreach=True)


NUMPY_MODES = (
    *(update, strided, joint_norm, native_threads, chunks, subtrees, views),
    *(lars, lars_strided, lars_schedules, lars_skip, lars_containers),
)
OPTIMIZER_MODES = (torch_lars, torch_lars_groups, torch_lars_skip, torch_lars_foreach)
TORCH_MODES = (torch_update, mixed, *OPTIMIZER_MODES) if find_spec("torch") else ()
BY_NAME = {mode.__name__: mode for mode in (*NUMPY_MODES, *TORCH_MODES)}

# Modes whose threads all make the same step; the orders of its steps would take long to compute.
ONE_GRADIENT = {mode.__name__ for mode in (*OPTIMIZER_MODES, native_threads)}


# ---- Steps one by one, and by threads


def made(mode: str, seed: int) -> Shared:
    """The weights and steps of a mode; the same ones for the same seed."""
    rng = np.random.default_rng(seed)

    def draw(shape: Any, dtype: Any) -> np.ndarray:
        x = rng.normal(size=shape)
        if np.dtype(dtype).kind == "c":
            x = x + 1j * rng.normal(size=shape)
        return np.asarray(x, dtype)

    return BY_NAME[mode](draw)


@cache
def one_by_one(mode: str, seed: int, count: int, mixes: bool) -> frozenset[Any]:
    """The contents after `count` steps of the first thread; or after a step of each.

    The latter in each order of the threads.
    """
    orders: Iterable[tuple[int, ...]] = permutations(range(THREADS)) if mixes else [(0,) * count]
    found = set()
    for order in orders:
        shared = made(mode, seed)
        for index in order:
            shared.steps[index]()
        found.add(_hashable(shared.contents()))
    return frozenset(found)


def _hashable(x: Any) -> Any:
    return tuple(map(_hashable, x)) if isinstance(x, (list, tuple)) else x


def by_threads(mode: str, seed: int, count: int, mixes: bool) -> str | None:
    """Step in threads; None if the results are those of steps one by one, or what is wrong.

    Each thread makes its own step once (`mixes`), or all together make `count` steps of the first.
    """
    shared, expected = made(mode, seed), one_by_one(mode, seed, count, mixes)
    steps = shared.steps if mixes else [shared.steps[0]] * THREADS
    times = 1 if mixes else count // THREADS
    failures = in_threads([lambda step=step: [step() for _ in range(times)] for step in steps])
    if failures:
        return f"{mode}, seed {seed}: {failures[0]!r}"
    if _hashable(shared.contents()) not in expected:
        order = "any order" if mixes else f"{count} steps"
        return f"{mode}, seed {seed}: other bytes than those of {order} one by one"
    return None


def in_threads(works: list[Callable[[], Any]]) -> list[BaseException]:
    """Run each function in a thread of its own, all at once; return what they raised."""
    barrier, failures = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[], Any]) -> None:
        try:
            barrier.wait(PATIENCE)
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        if thread.is_alive():
            failures.append(TimeoutError(f"a thread did not end within {PATIENCE:.0f} s"))
    return failures


def forever(mode: str, threads: int, pause: float | None = None) -> Shared:
    """Start daemon threads that step the same weights; return after each has made a step."""
    shared, ready = made(mode, 0), threading.Barrier(threads + 1)

    def work(step: Callable[[], Any]) -> None:
        step()
        ready.wait(PATIENCE)
        while True:
            step()
            if pause is not None:
                time.sleep(pause)

    for index in range(threads):
        step = shared.steps[index % THREADS]
        threading.Thread(target=work, args=(step,), daemon=True).start()
    ready.wait(PATIENCE)
    return shared


def cycled(rng: np.random.Generator, choices: list[Any]) -> Iterator[Any]:
    """All choices in random order, again and again."""
    while True:
        for index in rng.permutation(len(choices)):
            yield choices[index]
