"""The optimizers that `gpu.py` compares, and the measurement of their steps on one model.

The contestants alternate. An error of one is recorded with its figures, and the others go on.
"""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from math import prod
from time import monotonic, perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks import contestants as peers
from benchmarks.contestants import DECAY, MOMENTUM, TRUST
from benchmarks.device import Cpu, Step, captured
from benchmarks.measure import TURN
from benchmarks.trees import Shapes

BASE, COPY, OURS = "torch SGD, fused", "copy", "lars_tree"
LR = 0.01  # small, so that the weights stay finite over thousands of steps
LEAST_ROUNDS = 3  # even if the time is over
LONGEST = 0.6  # the share of the time that one contestant may take to get ready


def _compiled(step: Step, device: Cpu) -> Step:
    compiled: Step = torch.compile(step, backend=device.backend)
    return compiled


WAYS: dict[str, Callable[[Step, Cpu], Step]] = {
    "plain": lambda step, _: step,
    "compiled": _compiled,
    "graph": lambda step, _: captured(step),
}


@dataclass(frozen=True)
class Contestant:
    """An optimizer, its options, and the way in which its step is called."""

    find: Callable[[], Any]  # imports the class
    options: dict[str, Any] = field(default_factory=dict)
    module: str = "torch"
    way: str = "plain"


def lars(way: str = "plain", **options: Any) -> Contestant:
    """Our optimizer."""
    return Contestant(peers.torch_lars, {"trust_coefficient": TRUST, **options}, way=way)


def _bitsandbytes() -> Any:
    from bitsandbytes.optim import LARS

    return LARS


GRAPH, INTERPRETER = f"{OURS}, CUDA graph", f"{OURS}, interpreter"
CONTESTANTS = {
    BASE: Contestant(peers.sgd, {"fused": True}),
    "torch SGD, foreach": Contestant(peers.sgd, {"foreach": True}),
    OURS: lars(),
    f"{OURS}, foreach": lars(foreach=True),
    f"{OURS}, compiled": lars("compiled"),
    GRAPH: lars("graph"),
    INTERPRETER: lars(fused=True),
    "timm": Contestant(peers.timm_lars, {"trust_coeff": TRUST}, "timm"),
    "pytorch_optimizer": Contestant(
        peers.pytorch_lars, {"trust_coefficient": TRUST}, "pytorch_optimizer"
    ),
    "bitsandbytes": Contestant(_bitsandbytes, {"max_unorm": TRUST}, "bitsandbytes"),
}


def left_out(device: Cpu) -> dict[str, str]:
    """The contestants that cannot run here, and why."""
    reasons = {name: "not installed" for name, x in CONTESTANTS.items() if not find_spec(x.module)}
    if not device.is_gpu:
        reasons[GRAPH] = "needs a GPU"
    if device.is_gpu or os.environ.get("TRITON_INTERPRET") != "1":
        reasons[INTERPRETER] = "only with --dry and TRITON_INTERPRET=1"
    elif not find_spec("triton"):
        reasons[INTERPRETER] = "needs triton"
    return reasons


@dataclass
class Figures:
    """What was measured of one contestant, in seconds and bytes."""

    name: str
    engine: str = ""
    ready: float | None = None  # to build it, to compile, to take the first steps
    seconds: float | None = None
    cpu_seconds: float | None = None  # until a call returns
    syncs: int | None = None
    peak: int | None = None
    held: int | None = None  # beyond parameters, gradients and state
    error: str = ""


@contextmanager
def recorded(figures: Figures, seconds: float = 0.0) -> Iterator[None]:
    """Record an error; with `seconds`, also record it as an error to take longer than that."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    alarm = seconds > 0 and hasattr(signal, "SIGALRM")
    try:
        if alarm:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again if a library catches it
        yield
    except Exception as error:
        traceback.print_exc()
        figures.error = _summary(error)
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _summary(error: BaseException) -> str:
    """The error, and the first error of its chain, such as the reason why a capture failed."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    texts = (" ".join("".join(traceback.format_exception_only(x)).split()) for x in (error, first))
    return "; first: ".join(dict.fromkeys(text[:300] for text in texts))


class Run:
    """A contestant on one model."""

    def __init__(self, name: str, step: Step | None = None) -> None:
        self.figures = Figures(name)
        self.step: Step = step or (lambda: None)
        self.calls = 0  # in a turn
        self.samples: tuple[list[float], list[float]] = ([], [])

    def build(self, contestant: Contestant, shapes: Shapes, device: Cpu) -> None:
        """Make the parameters and the step; take the first steps, and check what they do."""
        start = perf_counter()
        torch.manual_seed(0)
        values = (torch.randn(shape, device=device.name) for shape in shapes.values())
        parameters = [torch.nn.Parameter(0.05 * x) for x in values]
        for p in parameters:
            p.grad = 0.01 * torch.randn_like(p)
        before = device.held()
        options = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, **contestant.options}
        opt = contestant.find()(parameters, **options)
        step = WAYS[contestant.way](opt.step, device)
        for _ in range(3):
            step()
        old = parameters[0].detach().clone()
        step()
        if torch.equal(old, parameters[0]) or not parameters[0].isfinite().all():
            raise RuntimeError("the step does not change the weights, or not to finite values")
        del old
        after = device.held()
        if before is not None and after is not None and contestant.way != "graph":
            self.figures.held = after - before - _state_bytes(opt)
        if contestant.find is peers.torch_lars:
            self.figures.engine = str(getattr(opt, "engine", "?"))
        self.figures.ready = perf_counter() - start
        self.step = step
        self.opt = opt  # a graph does not keep the tensors that it uses

    def turn(self, device: Cpu) -> None:
        """Time a call until it returns, then calls in a row until their work is done."""
        device.synchronize()
        start = perf_counter()
        self.step()
        self.samples[1].append(perf_counter() - start)
        device.synchronize()
        self.calls = self.calls or max(1, round(TURN / max(1e-6, device.per_call(self.step, 1))))
        self.samples[0].append(device.per_call(self.step, self.calls))
        quartiles = (float(np.quantile(x, 0.25)) for x in self.samples)
        self.figures.seconds, self.figures.cpu_seconds = quartiles

    def count(self, device: Cpu) -> None:
        """Count syncs and memory. A graph allocates its memory when it is captured."""
        self.figures.syncs = device.syncs(self.step)
        if self.figures.name != GRAPH:
            self.figures.peak = device.peak(self.step)


def _state_bytes(opt: Any) -> int:
    tensors = (x for state in opt.state.values() for x in state.values())
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))


def measure_model(shapes: Shapes, device: Cpu, seconds: float, save: Callable[[Any], None]) -> None:
    """Measure all contestants on one model. `save` gets the results so far, after each part."""
    deadline = monotonic() + seconds
    x, y = (torch.ones(device.copied // 4, device=device.name) for _ in range(2))
    runs = [Run(COPY, lambda: x.copy_(y))]
    size = 4 * sum(map(prod, shapes.values()))

    def report() -> None:
        rows = [asdict(run.figures) for run in runs]
        save({"tensors": len(shapes), "bytes": size, "copied": 2 * x.nbytes, "rows": rows})

    absent = left_out(device)
    for name in (name for name in CONTESTANTS if name not in absent):
        runs.append(Run(name))
        with recorded(runs[-1].figures, LONGEST * seconds):
            runs[-1].build(CONTESTANTS[name], shapes, device)
        report()
    gc.collect()
    gc.freeze()  # collections during a step then do not scan the parameters
    rng = np.random.default_rng(0)
    for done in range(device.rounds):
        if done < LEAST_ROUNDS or monotonic() < deadline:
            _each([runs[i] for i in rng.permutation(len(runs))], lambda run: run.turn(device))
    gc.unfreeze()
    report()
    _each(runs, lambda run: run.count(device))
    report()


def _each(runs: Iterable[Run], act: Callable[[Run], None]) -> None:
    """Call `act` for each contestant that has not failed."""
    for run in runs:
        if not run.figures.error:
            with recorded(run.figures):
                act(run)
