"""Signals: an interrupted step is taken completely or not at all.

In each attempt, a signal whose handler raises, or an exception from another thread, comes at a
random moment of a step. Then weights, velocities and counters belong to one step, the one before or
the one after: they are compared, byte by byte, with steps that nothing interrupted. The exception
is raised once. Signal handlers, `siginterrupt`, the wakeup fd, blocked signals, the open files,
threads, numpy's errstate and the grad mode of torch are as before. The next step is taken in
another thread, so a lock that is still held would make it wait forever, and gives the right bytes.

The exception, with its traceback, is kept during the checks, as notebooks do. Two exceptions in one
step are survived. What does not survive by nature is a third one that comes while the code cleans
up after the first and the second.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np

from lars_tree import Container, Lars, io, lars_update
from lars_tree._core import writes
from tests.reliability.attack import Attempts, attack
from tests.reliability.interrupting import (
    Case,
    Thread,
    Timer,
    attempts,
    thread_that_raises,
    thread_that_signals,
)

CLAIM = "An interrupted step is taken completely or not at all"
OUTSIDE = 98
SAVED = "An interrupted save leaves the old file or the new one, and nothing else"


def mode(
    steps: str,
    *kinds: Any,
    claim: str = CLAIM,
    sender: Callable[[], Timer | Thread] = Timer,
    count: int = 1000,
    short: int = 60,
    seconds: float = 150.0,
    **options: Any,
) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Make an attack of a function that makes cases, of each of these kinds in turn."""

    def register(make: Callable[..., Case]) -> Callable[..., Case]:
        def attempts_(rng: np.random.Generator) -> Attempts:
            makes = [partial(make, kind) for kind in kinds] or [make]
            with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
                yield from attempts(makes, sender(), rng)

        attempts_.__name__, attempts_.__module__ = make.__name__, make.__module__
        attack(
            claim, f"interruptions {steps}", count=count, short=short, seconds=seconds, **options
        )(attempts_)
        return make

    return register


# ---- Weights


def weights(offset: float = 0.0) -> dict[str, Any]:
    """Seven arrays, some of them nested."""
    values = np.random.default_rng(1).normal(offset, 1.0, (7, 60)).astype(np.float32)
    kernel, bias, *others = values
    return {"kernel": kernel.reshape(12, 5), "bias": bias[:5].copy(), "others": others}


def like(w: Any, convert: Callable[[np.ndarray], Any]) -> Any:
    return Container(w).map(convert).to_dict()


def gradients() -> Any:
    return weights(0.5)


def strided(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 2, -1)[..., ::2]


def contents(trees: Any) -> list[bytes]:
    return [as_bytes(x) for x in Container({"": trees}).leaves()]


def as_bytes(x: Any) -> bytes:
    if hasattr(x, "detach"):  # numpy has no bfloat16
        x = x.detach().double()
    return np.asarray(x).tobytes()


def in_place(w: Any, g: Any, **options: Any) -> Case:
    """Steps of a `Lars` with momentum."""
    opt = Lars(0.1, trust_coefficient=0.1, weight_decay=0.01, **options)
    state = opt.init(w)
    return Case(lambda: opt.update(w, g, state, out=w), lambda: contents([w, state]))


# ---- Steps of trees


@mode("of `lars_update` in place", plain=True)
def update() -> Case:
    w, g = weights(), gradients()
    return Case(lambda: lars_update(w, g, 0.1, decay_lambda=0.01, out=w), lambda: contents(w))


@mode("of `Lars.update` in place", plain=True)
def momentum() -> Case:
    return in_place(weights(), gradients(), nesterov=True)


@mode('of updates with `nonfinite="skip"`, every second one skipped', np.nan, 1.0)
def skipping(value: float) -> Case:
    g = gradients()
    g["bias"][0] = value
    return in_place(weights(), g, nonfinite="skip")


@mode("of updates of strided arrays")
def strides() -> Case:
    return in_place(like(weights(), strided), gradients())


@mode("of updates of strided arrays in chunks")
def chunks() -> Case:
    writes.MAX_HELD = 1 << 9
    return in_place(like(weights(), strided), gradients())


@mode("of updates of torch tensors", needs=("torch",))
def tensors() -> Case:
    import torch

    return in_place(like(weights(), torch.from_numpy), like(gradients(), torch.from_numpy))


def mixed(convert: Callable[[Any], Any] = np.copy) -> Case:
    import torch

    def tree(w: Any, change: Callable[[Any], Any]) -> Any:
        half = torch.from_numpy(w["kernel"]).bfloat16()
        double = torch.from_numpy(w["bias"]).double()
        return {**w, "half": half, "double": double, "strided": change(w["kernel"])}

    return in_place(tree(weights(), strided), tree(gradients(), np.copy))


@mode("of updates of numpy arrays and torch tensors, bfloat16 to float64", needs=("torch",))
def libraries() -> Case:
    return mixed()


@mode("of updates of arrays that only their library can write", needs=("array_api_strict",))
def restored() -> Case:
    import array_api_strict

    def tree(w: Any) -> Any:
        return {**w, "others": [array_api_strict.asarray(x) for x in w["others"]]}

    return in_place(tree(weights()), tree(gradients()))


# ---- Steps of torch.Lars


def of_torch(steps: int, foreach: tuple[bool, ...] = (False, False)) -> Case:
    """The step after a number of steps; only the first one makes buffers and is not dampened."""
    import torch

    from lars_tree.torch import Lars as TorchLars

    params = [torch.nn.Parameter(torch.from_numpy(x)) for x in Container(weights()).leaves()]
    for p, g in zip(params, Container(gradients()).leaves(), strict=True):
        p.grad = torch.from_numpy(g)
    groups = [{"params": params[i + 1 :: 2], "foreach": foreach[i]} for i in (0, 1)]
    groups.append({"params": params[:1], "momentum": 0.0})
    opt = TorchLars(groups, 0.1, dampening=0.5, trust_coefficient=0.1)
    for _ in range(steps):
        opt.step()

    def found() -> Any:
        state = opt.state_dict()["state"]
        return contents(params), {i: (list(x), contents(x)) for i, x in state.items()}

    return Case(opt.step, found)


@mode("of `torch.Lars.step`, every second one the first of its optimizer", 0, 1, needs=("torch",))
def optimizer(steps: int) -> Case:
    return of_torch(steps)


@mode("of `torch.Lars.step` with two engines (kernel and foreach)", 0, 1, needs=("torch",))
def engines(steps: int) -> Case:
    return of_torch(steps, (False, True))


# ---- Steps of JAX


@mode("of updates of JAX arrays, which are not in place", needs=("jax",))
def jax() -> Case:
    import jax.numpy as jnp

    w, g, opt = like(weights(), jnp.asarray), like(gradients(), jnp.asarray), Lars(0.1)
    made = [(w, opt.init(w))]

    def step() -> None:
        made.append(opt.update(made[-1][0], g, made[-1][1]))

    return Case(step, lambda: contents(made))


# ---- Saving


SUFFIXES = ".npz", ".safetensors", ".safetensors.index.json"


@mode("of `io.save`, to .npz, .safetensors and shards in turn", *SUFFIXES, claim=SAVED, count=3000)
def saving(suffix: str) -> Case:
    path = Path(suffix[1:], f"w{suffix}")
    size = 600 if suffix.endswith("json") else None

    def save(w: Any) -> None:
        io.save(w, path, max_shard_size=size)

    path.parent.mkdir(exist_ok=True)
    save(weights())

    def found() -> Any:
        return contents(io.load(path)), len(os.listdir(path.parent))

    return Case(partial(save, gradients()), found)


# ---- Other senders


@mode(
    "by an exception from another thread (`PyThreadState_SetAsyncExc`)", sender=thread_that_raises
)
def raised() -> Case:
    return in_place(like(weights(), strided), gradients())


def thread_that_terminates() -> Thread:
    return thread_that_signals(signal.SIGTERM)


@mode("by SIGTERM from another thread", sender=thread_that_terminates)
def terminated() -> Case:
    return in_place(like(weights(), strided), gradients())


@mode("by two signals", *range(4), sender=partial(Timer, 2), needs=("torch",))
def twice(kind: int) -> Case:
    if kind < 2:
        return of_torch(kind, (False, True))
    return chunks() if kind == 2 else mixed()


@mode("of an update while two other threads take six steps of the same weights")
def crowd() -> Case:
    w, opt = like(weights(), strided), Lars(0.1, trust_coefficient=0.1)
    g, state, starts = gradients(), opt.init(w), queue.SimpleQueue[None]()

    def update() -> None:
        opt.update(w, g, state, out=w)

    def work() -> None:
        starts.get()
        for _ in range(3):
            update()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()

    def start() -> None:
        for _ in threads:
            starts.put(None)

    def step() -> None:
        start()
        update()

    def found() -> Any:
        start()
        for thread in threads:
            thread.join()
        return contents([w, state])

    return Case(step, found)


# ---- The command


@attack(
    "Ctrl-C in `lars-tree update` leaves the old file or the new one, and nothing else; the status "
    "is 130",
    "interruptions of the command",
    count=1000,
    short=20,
    seconds=40.0,
    needs=("click",),
)
def command(rng: np.random.Generator) -> Attempts:
    from lars_tree import cli

    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        io.save(weights(), "w.safetensors")
        io.save(gradients(), "g.safetensors")
        call = "update w.safetensors g.safetensors --lr 0.1 -o o.safetensors"
        for _ in range(2):  # the first one imports modules
            start = time.perf_counter()
            status = cli.main(call.split())
            length = time.perf_counter() - start
        new, old = Path("o.safetensors").read_bytes(), Path("w.safetensors").read_bytes()
        files = sorted(os.listdir())
        while status == 0:
            Path("o.safetensors").write_bytes(old)
            delay = rng.uniform(0.0, 1.2 * length)
            ended = _interrupted_child(lambda: cli.main(call.split()), delay)
            if ended in (0, OUTSIDE):
                continue
            found, names = Path("o.safetensors").read_bytes(), sorted(os.listdir())
            if ended == 130 and found in (old, new) and names == files:
                yield None
            else:
                which = "old" if found == old else "new" if found == new else "torn"
                yield f"after {delay:.6f} s: status {ended}, the file is {which}, files {names}"


def _interrupted_child(main: Callable[[], int], delay: float) -> int:
    """The exit status of a forked child that gets Ctrl-C."""
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
                os.write(started, b"1")
                status = main()
        except BaseException as error:
            # This function, the lambda and `cli.main`: it had not begun yet.
            status = 99 if len([*walk_tb(error.__traceback__)]) > 3 else OUTSIDE
        os._exit(status)
    os.read(ready, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGINT)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(ready)
    os.close(started)
    return status
