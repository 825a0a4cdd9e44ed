"""One of the processes that test_distributed.py starts: runs a suite and prints what it measured.

    python distributed_worker.py SUITE RANK WORLD_SIZE STORE

A suite is a module with a generator `measure(world)` of names with measurements. Rank 0 prints them
as lines of JSON; which of them are right is for the test to say.
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
    """Counts the calls of all_reduce."""
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
    """Counts all that the backend sends too, as "gloo:all_reduce" and others; is slow.

    Not by CommDebugMode: with a dispatch mode at work, lars_update takes another way.
    """
    with all_reduces() as counts:
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            yield counts
        counts.update(x.name for x in profile.function_events if x.name.startswith("gloo:"))


def distribute(x, mesh, placements):
    """A DTensor of x, which all processes have; without placements, x itself. Always a copy."""
    if placements is None:
        return x.clone()
    return distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)


def part(x):
    """What this process holds of x."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def error(actual, expected):
    """The largest relative error of a tensor; of bfloat16, in units of the last place."""
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


def kept(new, w):
    """Whether a tensor is laid out as its weights are."""
    if isinstance(w, DTensor) != isinstance(new, DTensor):
        return False
    return not isinstance(w, DTensor) or (
        (new.placements, new.device_mesh) == (w.placements, w.device_mesh)
    )


def compare(xs, wholes, like):
    """How far tensors are from what they should be, and whether they are laid out like others.

    Args:
        xs: The tensors.
        wholes: All of each of them, as they should be.
        like: Tensors that are laid out as they should be.
    """
    errors = []
    for x, expected, w in zip(xs, wholes, like, strict=True):
        if isinstance(w, DTensor):
            expected = distribute(expected, w.device_mesh, w.placements)
        errors.append(error(part(x), part(expected)))
    laid_out = all(map(kept, xs, like))
    found = everywhere((errors, laid_out, [_bits(x) for x in xs]))
    known = {}
    pairs = [pair for *_, mine in found for pair in enumerate(mine)]
    return {
        "error": float(torch.tensor([errors for errors, *_ in found]).max()),  # NaN if any is
        "kept": all(laid_out for _, laid_out, _ in found),
        # Whether all that hold the same part of a tensor hold the same bits of it.
        "replicas agree": all(known.setdefault((i, key), bits) == bits for i, (key, bits) in pairs),
    }


def _bits(x):
    """Which part of x this process holds, and its bits."""
    key = ()
    if isinstance(x, DTensor):
        pairs = zip(x.device_mesh.get_coordinate(), x.placements, strict=True)
        key = tuple(i for i, placement in pairs if not placement.is_replicate())
    return key, part(x).reshape(-1).view(torch.uint8).numpy().tobytes()


def everywhere(mine):
    """What each process has, of each."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def raised(call):
    """What each process raises, by name and with its paths; the first line of its message."""
    try:
        call()
    except lars_tree.LarsTreeError as fault:
        paths = ["/".join(map(str, path)) for path in fault.paths]
        return everywhere([type(fault).__name__, paths, str(fault).splitlines()[0]])
    return everywhere(None)


def main(suite, rank, world, path):
    rank, world = int(rank), int(world)
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name, measured in importlib.import_module(suite).measure(world):
        if rank == 0:
            print(json.dumps([name, measured]), flush=True)
    # Not by a barrier of gloo: that is over here while others are still at it.
    store.set(f"{rank} is done", "")
    store.wait([f"{other} is done" for other in range(world)])


if __name__ == "__main__":
    code = 1
    try:
        main(*sys.argv[1:])
        code = 0
    except BaseException:
        traceback.print_exc()
    # At once. After a failure the others wait for this process; and where nothing failed, a thread
    # of gloo may still have to release a tensor, which aborts an interpreter that is being taken
    # down (pytorch issue 190489).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
