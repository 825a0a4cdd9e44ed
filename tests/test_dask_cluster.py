"""Dask on two worker processes, with a tree larger than the memory limit of one process."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars

from lars_tree import lars_update

dask = need("dask")
da = need("dask.array")
distributed = need("distributed")
cloudpickle = need("cloudpickle")

# Pickle functions of this file by value, so that the workers need not import the file, or pytest.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 2**20
LIMIT = 400 * MIB
LR, DECAY, MOMENTUM = 0.1, 0.01, 0.9
# For each leaf: its shape and the shape of its chunks.
W = {
    "kernel": ((6000, 8000), (750, 1000)),
    "embedding": ((20_000_000,), (700_000,)),
    "bias": ((1000,), (1000,)),
}
DCDW = {**W, "kernel": ((8000,), (1000,))}  # broadcasts over the rows


def chunk(shape, place, lowest):
    """A chunk of elements from `lowest` to `lowest` + 1, computed from its position."""
    start = lowest + sum(math.sqrt(p + i) for i, p in enumerate(place, 2))
    return (np.arange(math.prod(shape)) * 0.6180339887 + start).reshape(shape) % 1 + lowest


def of_w(shape, place):
    return chunk(shape, place, 0.5)


def of_dcdw(shape, place):
    return chunk(shape, place, -0.4)


def lazy(make, shape, chunks, log):
    """A lazy array. The process that computes a chunk logs this in a file."""

    def block(block_info=None):
        with (Path(log) / str(os.getpid())).open("a") as file:
            file.write("x")
        return make(block_info[None]["chunk-shape"], block_info[None]["chunk-location"])

    chunks = da.core.normalize_chunks(chunks, shape)
    return da.map_blocks(block, chunks=chunks, dtype=float, meta=np.empty((0,) * len(shape)))


def places(x):
    """The shape and position of each chunk."""
    for place in np.ndindex(*x.numblocks):
        yield tuple(sizes[i] for sizes, i in zip(x.chunks, place, strict=True)), place


def norm(x, make):
    """The 2-norm, computed chunk by chunk by numpy in this process."""
    return math.sqrt(math.fsum(float(np.vdot(c, c)) for c in (make(*p) for p in places(x))))


def worst(results, ndim, coefficients):
    """The largest relative error of results that should be linear combinations of w and dcdw.

    The error is lazy, so that the workers compute it.
    """

    def block(*xs, block_info=None):
        shape, place = xs[0].shape, block_info[0]["chunk-location"]
        w, dcdw = of_w(shape, place), of_dcdw(shape[-ndim:], place[-ndim:])
        error = 0.0
        for x, (on_w, on_dcdw) in zip(xs, coefficients, strict=True):
            exact = on_w * w + on_dcdw * dcdw
            error = max(error, np.max(np.abs(x - exact) / np.maximum(np.abs(exact), 1e-3)))
        return np.full((1,) * xs[0].ndim, error)

    chunks = [(1,) * n for n in results[0].numblocks]
    return da.map_blocks(block, *results, dtype=float, chunks=chunks).max()


def made(log):
    """The number of computed chunks by process."""
    return {int(path.name): len(path.read_text()) for path in log.iterdir()}


@pytest.fixture
def workers(tmp_path):
    """Two workers; calling the fixture returns their process IDs."""
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": LIMIT}
    # Even without a dashboard there is a server, whose default port may be in use.
    local = {"host": "127.0.0.1", "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    where = {"local_directory": tmp_path / "spill", "dashboard_address": None}
    # Spill chunks to disk, and pause, well before a worker would be killed for its memory.
    early = {"target": 0.4, "spill": 0.5, "pause": 0.6}
    with (
        dask.config.set({f"distributed.worker.memory.{name}": x for name, x in early.items()}),
        distributed.LocalCluster(**options, **local, **where) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield lambda: set(client.run(os.getpid).values())


def test_two_workers_update_more_than_either_may_hold(workers, tmp_path):
    pids, log = workers(), tmp_path / "log"
    log.mkdir()
    w = {name: lazy(of_w, *given, log) for name, given in W.items()}
    dcdw = {name: lazy(of_dcdw, *given, log) for name, given in DCDW.items()}
    assert 500 * MIB < sum(x.nbytes for x in w.values()) < 600 * MIB

    new = lars_update(w, dcdw, LR, decay_lambda=DECAY)
    optimizer = Lars(LR, momentum=MOMENTUM, nesterov=True, decay_lambda=DECAY)
    whole = {name: da.broadcast_to(g, w[name].shape) for name, g in dcdw.items()}
    moved, state = optimizer.update(w, whole, optimizer.init(w))
    assert made(log) == {}

    errors = []
    for name, x in w.items():
        g = dcdw[name]
        w_norm, g_norm = norm(x, of_w), norm(g, of_dcdw) * math.sqrt(x.size / g.size)
        rate = LR * w_norm / (g_norm + DECAY * w_norm)
        first = (1 + MOMENTUM) * rate  # nesterov: u + momentum * v, where v = u at step 1
        coefficients = (
            (1 - rate * DECAY, -rate),
            (1 - first * DECAY, -first),
            (rate * DECAY, rate),
        )
        results = (new[name], moved[name], state.velocity[name])
        assert {(y.chunks, y.dtype) for y in results} == {(x.chunks, x.dtype)}
        errors.append(worst(results, g.ndim, coefficients))
    assert made(log) == {}

    errors, steps = dask.compute(da.stack(errors), state.step)
    assert steps == 1
    assert errors.shape == (3,)
    assert errors.max() <= 1e-12
    counts = made(log)
    assert set(counts) == pids == workers()  # both computed chunks, and none was restarted
    chunks = sum(math.prod(x.numblocks) for x in (*w.values(), *dcdw.values()))
    assert sum(counts.values()) >= chunks
