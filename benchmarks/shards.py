"""Steps of FSDP2 over gloo: `torchrun --standalone --nproc-per-node=2 -m benchmarks.shards ROUNDS`.

Prints the median seconds of a step of each optimizer as JSON. A barrier before and after each step
keeps the processes together.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.contestants import MOMENTUM
from benchmarks.odd import OPTIONS
from lars_tree.torch import Lars


def _parameters() -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(700, 700) for _ in range(50)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    for x in model.parameters():
        x.grad = torch.full_like(x, 1e-3)
    return list(model.parameters())


def _time(step: Any) -> float:
    dist.barrier()
    start = perf_counter()
    step()
    dist.barrier()
    return perf_counter() - start


def main(rounds: int) -> None:
    """Measure the optimizers alternately; the first process prints the medians."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    options: dict[str, Any] = {"lr": 1e-3, "momentum": MOMENTUM}
    optimizers = {
        "torch SGD": torch.optim.SGD(_parameters(), foreach=True, **options),
        "lars_tree.torch.Lars": Lars(_parameters(), **options, **OPTIONS),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 1):
        for name, optimizer in optimizers.items():
            seconds = _time(optimizer.step)
            if turn:  # the first step creates the velocities
                times[name].append(seconds)
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps({name: median(x) for name, x in times.items()}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
