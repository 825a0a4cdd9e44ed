"""Leaks: calls of the public functions leave no memory, references, files or threads behind.

Every public function, class and method of the modules below is called, with valid arguments, and
the updates with invalid ones too. An attempt makes 20,000 calls, or as many as fit into a second of
processor time, but at least 100. Then Python's allocated blocks, the bytes that malloc has
allocated, the references to the arguments, and the numbers of open files and of threads must be as
before.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
from native.leaks import allocated

import lars_tree as lt
from lars_tree import Container, Lars, io, report, schedules
from tests.reliability.attack import Attempts, attack

CALLS, SECONDS = 20_000, 1.0
Calls = dict[str, Callable[[], Any]]


def growth(call: Callable[[], Any], given: list[Any]) -> str | None:
    """What grows with the number of calls."""
    for _ in range(5):  # fills caches
        call()
    calls, before, start = 0, measure(given), process_time()
    while calls < 100 or (calls < CALLS and process_time() - start < SECONDS):
        for _ in range(20):
            call()
        calls += 20
    # Other code grows a little: CPython keeps 4,096 names of attributes.
    limits = (calls / 2, 8 * calls, calls / 2, 0.5, 0.5)
    names = ("blocks of Python", "bytes", "references", "open files", "threads")
    rows = zip(names, measure(given), before, limits, strict=True)
    grown = [f"{after - old} {name}" for name, after, old, limit in rows if after - old > limit]
    return f"{', '.join(grown)} more after {calls} calls" if grown else None


def measure(given: list[Any]) -> tuple[float, ...]:
    gc.collect()
    references = sum(map(sys.getrefcount, given))
    files = len(os.listdir("/proc/self/fd"))
    blocks = sys.getallocatedblocks()
    return blocks, allocated(), references, files, threading.active_count()


def weights() -> Container:
    return Container(a=np.arange(1.0, 4.0), b={"c": np.ones(5, np.float32), "d": [np.ones(())]})


def ignoring(call: Callable[[], Any]) -> Callable[[], Any]:
    def called() -> None:
        with suppress(Exception):
            call()

    return called


def of_updates(w: Any, g: Any, folder: Path) -> Calls:
    opt, state = Lars(0.1), Lars(0.1).init(w)
    bad = {"a": np.ones(4)}
    strided = {"s": np.ones((4, 2))[:, 0]}
    return {
        "lars_update": lambda: lt.lars_update(w, g, 0.1),
        "lars_update, in place": lambda: lt.lars_update(w, g, 0.0, out=w),
        "lars_update, strided": lambda: lt.lars_update(strided, 1.0, 0.0, out=strided),
        "lars_update, of another structure": ignoring(lambda: lt.lars_update(w, bad, 0.1)),
        "lars_update, of another shape": ignoring(lambda: lt.lars_update(w.a, bad["a"], 0.1)),
        "lars_update, a bad rate": ignoring(lambda: lt.lars_update(w, g, -1.0)),
        "lars_update, tied": ignoring(lambda: lt.lars_update([w.a, w.a], 1.0, 0.1, out=[w.a] * 2)),
        "Lars": lambda: Lars(0.1, nesterov=True),
        "Lars, a bad option": ignoring(lambda: Lars(0.1, momentun=0.9)),
        "Lars.init": lambda: opt.init(w),
        "Lars.update": lambda: opt.update(w, g, state),
        "Lars.update, in place": lambda: opt.update(w, g, state, out=w, lr=0.0),
        "Lars.update, a bad state": ignoring(lambda: opt.update(w, g, {})),
        "Lars.__eq__": lambda: (opt == Lars(0.1), hash(opt), repr(opt)),
        "get_num_threads": lt.get_num_threads,
        "set_num_threads": lambda: lt.set_num_threads(None),
        "set_num_threads, a bad number": ignoring(lambda: lt.set_num_threads(0)),
        "native_available": lt.native_available,
        "Array": lambda: lt.Array(w.a).lars_update(g.a, 0.1),
        "Array, operators": lambda: (lt.Array(w.a) + 1, lt.Array(w.a)[0], repr(lt.Array(w.a))),
    }


def of_container(w: Any, g: Any, folder: Path) -> Calls:
    made: Calls = {
        "Container": weights,
        "Container.from_flat": lambda: Container.from_flat({"a/b": 1, "a/c": 2}),
        "Container.map": lambda: w.map(lambda x: x),
        "Container.unflatten": lambda: w.unflatten(w.leaves()),
        "Container.filter": lambda: w.filter(lambda path, x: x.ndim > 0),
        "Container.partition": lambda: w.partition(lambda path, x: x.ndim > 0),
        "Container.diff": lambda: w.diff(g),
        "Container.merge": lambda: w.merge(g),
        "Container.allclose": lambda: w.allclose(g),
        "Container.lars_update": lambda: w.lars_update(g, 0.1),
        "Container.get": lambda: (w.get("a"), w.get("b/c"), w.get("x")),
        "Container.pop": lambda: w.copy().pop("a"),
        "Container.popitem": lambda: w.copy().popitem(),
        "Container.setdefault": lambda: w.copy().setdefault("z", w.a),
        "Container.update": lambda: w.copy().update(g),
        "Container.fromkeys": lambda: Container.fromkeys("ab", 0),
        "Container, operators": lambda: (w + g, w * 2, 1 - w, -w, abs(w), w | g, w == g),
        "Container, a missing key": ignoring(lambda: w["b/x"]),
        "Container, a missing attribute": ignoring(lambda: w.aa),
        "Container, shown": lambda: (repr(w), w._repr_html_()),
    }
    for name in public(Container):
        if f"Container.{name}" not in made:
            made[f"Container.{name}"] = getattr(w.copy(), name)
    return made


def public(owner: Any) -> list[str]:
    """The names of the public methods of a class."""
    return [name for name, _ in inspect.getmembers(owner, callable) if not name.startswith("_")]


class Writer:
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...


def of_modules(w: Any, g: Any, folder: Path) -> Calls:
    made: Calls = {}
    for suffix in ("npz", "safetensors"):
        path = folder / f"w.{suffix}"
        io.save(w, path)
        made |= {
            f"io.save, {suffix}": lambda path=path: io.save(w, path),
            f"io.load, {suffix}": lambda path=path: io.load(path),
            f"io.metadata, {suffix}": lambda path=path: io.metadata(path),
        }
    broken = folder / "broken.npz"
    broken.write_bytes(b"PK\3\4" + bytes(100))
    sharded = folder / "sharded.safetensors.index.json"
    io.save(w, sharded, max_shard_size=60)
    return made | {
        "io.open": lambda: io.open(folder / "w.safetensors"),
        "io.save, sharded": lambda: io.save(w, sharded, max_shard_size=60),
        "io.load, a broken file": ignoring(lambda: io.load(broken)),
        "io.load, no file": ignoring(lambda: io.load(folder / "no.npz")),
        "io.to_state_dict": lambda: io.from_state_dict(io.to_state_dict({"a": w.a})),
        "io.from_state_dict": lambda: io.from_state_dict({"a.b": w.a}),
        "report.trust_ratios": lambda: report.trust_ratios(w, g, 0.1),
        "report.trust_ratios, of another structure": ignoring(
            lambda: report.trust_ratios(w, {"a": 1.0}, 0.1)
        ),
        "report.layer_table": lambda: repr(report.layer_table(w, g, 0.1)),
        "report.TrustHistory": lambda: report.TrustHistory().record({"a": 1.0}, 0),
        "report.ScalarCallback": lambda: report.ScalarCallback(Writer())({"a": 1.0}, 0),
        "schedules.Constant": lambda: schedules.Constant(0.1, warmup_steps=3)(2),
        "schedules.Cosine": lambda: schedules.Cosine(0.1, 9, warmup_steps=3)(5),
        "schedules.Polynomial": lambda: schedules.Polynomial(0.1, 9, warmup_steps=3)(5),
    }


def of_torch() -> Calls:
    import torch

    from lars_tree.torch import Lars as Optimizer
    from lars_tree.torch import param_groups

    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt, foreach = (Optimizer(model.parameters(), 0.1, foreach=x) for x in (None, True))
    bad = Optimizer([torch.nn.Parameter(torch.ones(2))], 0.1, nonfinite="raise")
    bad.param_groups[0]["params"][0].grad = torch.full((2,), torch.nan)
    t = {"a": torch.ones(3), "b": torch.ones(3, 2)[:, 0]}
    return {
        "torch.Lars": lambda: Optimizer(param_groups(model), 0.1),
        "torch.Lars.step": opt.step,
        "torch.Lars.step, foreach": foreach.step,
        "torch.Lars.step, not finite": ignoring(bad.step),
        "torch.Lars.state_dict": lambda: opt.load_state_dict(opt.state_dict()),
        "torch.Lars.trust_ratios": opt.trust_ratios,
        "lars_update, tensors": lambda: lt.lars_update(t, t, 0.1),
        "lars_update, tensors in place": lambda: lt.lars_update(t, t, 0.0, out=t),
        "lars_update, sparse": ignoring(lambda: lt.lars_update(t["a"], t["a"].to_sparse(), 0.1)),
    }


def of_jax() -> Calls:
    import jax

    from lars_tree.optax import lars

    w = {"a": jax.numpy.ones(3), "b": jax.numpy.ones((2, 2))}
    transform = lars(0.1)
    state = transform.init(w)
    step = jax.jit(lambda w, g: lt.lars_update(w, g, 0.1))
    return {
        "lars_update, JAX": lambda: lt.lars_update(w, w, 0.1),
        "lars_update, jit": lambda: step(w, w),
        "lars_update, JAX with out": ignoring(lambda: lt.lars_update(w, w, 0.1, out=w)),
        "optax.lars": lambda: transform.update(w, state, w),
    }


EXEMPT = {"schedules", "errors"} | set(lt.errors.__all__) | {"TrustRatioWarning", "LayerTable"}


def uncovered(names: list[str]) -> list[str]:
    """The public names that no call uses."""
    modules = (("", lt), ("io.", io), ("report.", report), ("schedules.", schedules))
    public_names = [
        f"{prefix}{name}" for prefix, x in modules for name in x.__all__ if name not in EXEMPT
    ]
    used = {name.split(",")[0] for name in names}
    return [name for name in public_names if name not in used]


def grown(rng: np.random.Generator, calls: Calls, given: list[Any]) -> Attempts:
    names = list(calls)
    for i in rng.permutation(len(names)):
        try:
            for _ in range(4):  # caches may grow at first; a leak grows each time
                found = growth(calls[names[i]], given)
                if found is None:
                    break
        except Exception as error:
            found = f"raised {error!r}"
        yield found and f"{names[i]}: {found}"


@attack(
    "Repeated calls leak nothing",
    "public functions and methods, 20,000 calls each",
    count=500,
    short=10,
    seconds=100,
)
def of_functions(rng: np.random.Generator) -> Attempts:
    with TemporaryDirectory() as folder:
        w, g = weights(), weights()
        calls = {
            name: call
            for make in (of_updates, of_container, of_modules)
            for name, call in make(w, g, Path(folder)).items()
        }
        missing = uncovered(list(calls))
        yield f"not tried: {missing}" if missing else None
        yield from grown(rng, calls, [w, g, *w.leaves(), *g.leaves()])


@attack(
    "Repeated calls leak nothing",
    "functions with arrays of torch and JAX",
    count=100,
    short=5,
    seconds=40,
    needs=("torch", "jax", "optax"),
)
def of_libraries(rng: np.random.Generator) -> Attempts:
    yield from grown(rng, of_torch() | of_jax(), [])
