"""A process that test_distributed.py starts. It runs a suite and prints the measurements.

    python distributed_worker.py SUITE RANK WORLD_SIZE STORE

A suite is a module whose generator `measure(world)` yields pairs of a name and a measurement. Rank
0 prints each pair as a line of JSON; the test checks the measurements.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

import lars_tree


@contextmanager
def all_reduces():
    """Count the calls of all_reduce."""
    counts, original = Counter(), dist.all_reduce

    def counting(*args, **kwargs):
        counts["all_reduce"] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counting
    try:
        yield counts
    finally:
        dist.all_reduce = original


@contextmanager
def communication():
    """Count the calls of all_reduce and the operations of the backend ("gloo:all_reduce"). Slow.

    CommDebugMode is not used, because lars_update does not use the kernel under a dispatch mode.
    """
    with all_reduces() as counts:
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            yield counts
        counts.update(x.name for x in profile.function_events if x.name.startswith("gloo:"))


def distribute(x, mesh, placements):
    """Shard a copy of x, which all processes have in full; without placements, return the copy."""
    if placements is None:
        return x.clone()
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def local(x):
    """The local tensor of x in this process."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def error(actual, expected):
    """The largest relative error of an element; for bfloat16, in units in the last place."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if expected.dtype == torch.bfloat16:
        bits = [x.view(torch.int16).int() for x in (actual, expected)]
        ordered = [torch.where(x < 0, -32768 - x, x) for x in bits]
        return float((ordered[0] - ordered[1]).abs().max())
    difference = (actual - expected).abs() / expected.abs()
    return float(torch.where(actual == expected, 0.0, difference).max())


def same_layout(new, w):
    """Whether a tensor has the device mesh and placements of its weights."""
    if isinstance(w, DTensor) != isinstance(new, DTensor):
        return False
    return not isinstance(w, DTensor) or (
        (new.placements, new.device_mesh) == (w.placements, w.device_mesh)
    )


def compare(xs, wholes, like):
    """The largest error of tensors, whether their layout is right, and whether replicas agree.

    Args:
        xs: The tensors.
        wholes: The expected tensors, not sharded.
        like: Tensors with the expected layout.
    """
    errors = []
    for x, expected, w in zip(xs, wholes, like, strict=True):
        if isinstance(w, DTensor):
            expected = distribute(expected, w.device_mesh, w.placements)
        errors.append(error(local(x), local(expected)))
    kept = all(map(same_layout, xs, like))
    found = gathered((errors, kept, [_bits(x) for x in xs]))
    known = {}
    pairs = [pair for *_, mine in found for pair in enumerate(mine)]
    return {
        "error": float(torch.tensor([errors for errors, *_ in found]).max()),  # NaN if one is NaN
        "kept": all(kept for _, kept, _ in found),
        # Whether all processes with the same shard have the same bits.
        "replicas agree": all(known.setdefault((i, key), bits) == bits for i, (key, bits) in pairs),
    }


def _bits(x):
    """The mesh coordinates and the bits of the local shard of x."""
    key = ()
    if isinstance(x, DTensor):
        pairs = zip(x.device_mesh.get_coordinate(), x.placements, strict=True)
        key = tuple(i for i, placement in pairs if not placement.is_replicate())
    return key, local(x).reshape(-1).view(torch.uint8).numpy().tobytes()


def gathered(mine):
    """The values of all processes."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def raised(call):
    """For each process: the class, paths and first line of the error that the call raises."""
    try:
        call()
    except lars_tree.LarsTreeError as fault:
        paths = ["/".join(map(str, path)) for path in fault.paths]
        return gathered([type(fault).__name__, paths, str(fault).splitlines()[0]])
    return gathered(None)


def main(suite, rank, world, path):
    rank, world = int(rank), int(world)
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name, measured in importlib.import_module(suite).measure(world):
        if rank == 0:
            print(json.dumps([name, measured]), flush=True)
    # A gloo barrier could return while other processes are still in it, so the store is used.
    store.set(f"{rank} is done", "")
    store.wait([f"{other} is done" for other in range(world)])


if __name__ == "__main__":
    code = 1
    try:
        main(*sys.argv[1:])
        code = 0
    except BaseException:
        traceback.print_exc()
    # Exit at once. After a failure, the other processes would wait for this process. After success,
    # a thread of gloo may still release a tensor, which aborts an interpreter that is shutting down
    # (pytorch issue 190489).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
