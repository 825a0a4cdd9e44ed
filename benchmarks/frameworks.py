"""Steps that a framework traces, shards or differentiates, next to the same rule by other means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.contestants import DECAY, LR, MOMENTUM, as_torch
from benchmarks.groups import Group, Steps
from lars_tree import Lars, lars_update

Tree = dict[str, Any]
Shapes = list[tuple[int, ...]]

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments

UPDATE, OURS = "lars_update", "lars_tree.Lars"
BY_HAND = "by hand"
LEAVES_OF = {n: [(16, 16) if i % 2 else (64,) for i in range(n)] for n in (161, 1000)}
LARGE: Shapes = [(1_000_000,)] * 8
SHARDED: Shapes = [(1024, 256)] * 40
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def _values(shapes: Shapes, scale: float, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        for i, shape in enumerate(shapes)
    }


# ---- JAX


def _jax_trees(shapes: Shapes, sharded: bool) -> tuple[Tree, Tree]:
    import jax

    where = None
    if sharded:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w, g = _values(shapes, 0.05, 1), _values(shapes, 0.01, 2)
    return jax.device_put(w, where), jax.device_put(g, where)


def _jax_steps(
    shapes: Shapes, sharded: bool
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions to be jitted, with their arguments."""
    import optax

    w, g = _jax_trees(shapes, sharded)
    ours = Lars(LR, MOMENTUM, weight_decay=DECAY)
    theirs = optax.lars(LR, weight_decay=DECAY)

    def optax_step(w: Tree, g: Tree, state: Any) -> tuple[Tree, Any]:
        updates, state = theirs.update(g, state, w)
        return optax.apply_updates(w, updates), state

    return {
        "optax.lars": (optax_step, (w, g, theirs.init(w))),
        OURS: (ours.update, (w, g, ours.init(w))),
        UPDATE: (lambda w, g: lars_update(w, g, LR, decay_lambda=DECAY), (w, g)),
    }


def _compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import jax

    jax.clear_caches()
    return jax.jit(function).lower(*arguments).compile()


def _compiling(shapes: Shapes, sharded: bool = False) -> Steps:
    steps = _jax_steps(shapes, sharded)
    return {name: partial(_compiled, *step) for name, step in steps.items()}


def _running(shapes: Shapes, sharded: bool = False) -> Steps:
    import jax

    def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
        compiled = _compiled(function, arguments)
        return lambda: jax.block_until_ready(compiled(*arguments))

    return {name: run(*step) for name, step in _jax_steps(shapes, sharded).items()}


def _jax_group(
    title: str, build: Callable[..., Steps], bound: float, shapes: Shapes, **options: Any
) -> Group:
    bounds = dict.fromkeys((OURS, UPDATE), bound)
    sharded = "variables" in options
    return Group(title, partial(build, shapes, sharded), "optax.lars", bounds, "optax", **options)


# ---- torch autograd


def _torch_by_hand(w: Tree, g: Tree) -> Tree:
    new = {}
    for name, x in w.items():
        ratio = x.norm() / (g[name].norm() + DECAY * x.norm())
        new[name] = x - LR * ratio * (g[name] + DECAY * x)
    return new


def _differentiable(shapes: Shapes) -> Steps:
    """The step and its derivative."""
    w = {name: as_torch(x).requires_grad_() for name, x in _values(shapes, 0.05, 1).items()}
    g = {name: as_torch(x) for name, x in _values(shapes, 0.01, 2).items()}

    def backward(step: Callable[[Tree, Tree], Tree]) -> Callable[[], None]:
        return lambda: sum(x.sum() for x in step(w, g).values()).backward()

    def ours(w: Tree, g: Tree) -> Tree:
        return lars_update(w, g, LR, decay_lambda=DECAY, stop_gradients=False)

    return {BY_HAND: backward(_torch_by_hand), UPDATE: backward(ours)}


# ---- Dask


def _dask_steps() -> dict[str, Callable[[], list[Any]]]:
    """Functions that return the lazy results of a step."""
    import dask.array as da

    shapes: Shapes = [(1000, 1000)] * 40
    w, g = (
        {
            name: da.from_array(x, chunks=250).persist()
            for name, x in _values(shapes, *given).items()
        }
        for given in ((0.05, 1), (0.01, 2))
    )

    def by_hand(x: Any, dx: Any) -> Any:
        x_norm, dx_norm = (da.sqrt((a.astype("f8") ** 2).sum()) for a in (x, dx))
        ratio = x_norm / (dx_norm + DECAY * x_norm)
        return (x - LR * ratio * (dx + DECAY * x)).astype("f4")

    return {
        BY_HAND: lambda: [by_hand(x, g[name]) for name, x in w.items()],
        UPDATE: lambda: list(lars_update(w, g, LR, decay_lambda=DECAY).values()),
    }


def _dask_compute() -> Steps:
    import dask

    def compute(build: Callable[[], list[Any]]) -> Callable[[], Any]:
        arrays = build()
        return lambda: dask.compute(*arrays, scheduler="threads")

    return {name: compute(build) for name, build in _dask_steps().items()}


GROUPS = [
    *(
        _jax_group(f"{n:,} JAX leaves, compiling", _compiling, 1.0, shapes)
        for n, shapes in LEAVES_OF.items()
    ),
    *(_jax_group(f"{n:,} JAX leaves, jitted", _running, 1.1, x) for n, x in LEAVES_OF.items()),
    _jax_group("8 JAX leaves of 1 M, jitted", _running, 1.1, LARGE),
    _jax_group("4 devices, compiling", _compiling, 1.1, SHARDED, variables=FOUR_DEVICES),
    _jax_group("4 devices, jitted", _running, 1.1, SHARDED, variables=FOUR_DEVICES),
    *(
        Group(title, partial(_differentiable, shapes), BY_HAND, {UPDATE: 2.5}, "torch")
        for title, shapes in {
            "200 torch leaves of 16×16, forward and backward": [(16, 16)] * 200,
            "20 torch leaves of 1 M, forward and backward": [(1000, 1000)] * 20,
        }.items()
    ),
    Group("Dask, building", _dask_steps, BY_HAND, {UPDATE: 1.0}, "dask"),
    Group("Dask, computing", _dask_compute, BY_HAND, {UPDATE: 1.0}, "dask"),
]
