"""How a step is measured on the CPU and on a GPU: its time, its waiting, its memory.

`tests/test_benchmarks_gpu.py` runs `Cuda` and `captured` with a simulated GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import per_call

Step = Callable[[], Any]


class Cpu:
    """The CPU, which has no graphs, no device memory, and no waiting for a device."""

    is_gpu = False
    name = "cpu"
    backend = "eager"  # of torch.compile: inductor would need a C++ compiler
    rounds = 2
    copied = 2**20  # bytes

    def synchronize(self) -> None:
        """Wait until all submitted work is done."""

    def per_call(self, step: Step, calls: int) -> float:
        """Seconds of one call, including the work that it submits."""
        return per_call(step, calls)

    def syncs(self, step: Step) -> int | None:
        """How often a step waits for the device."""
        return None

    def peak(self, step: Step) -> int | None:
        """The device memory that a step allocates and frees again, in bytes."""
        return None

    def held(self) -> int | None:
        """The device memory of all tensors in bytes, without the rounding of the allocator."""
        return None


class Cuda(Cpu):
    """The current device of CUDA or ROCm."""

    is_gpu = True
    name = "cuda"
    backend = "inductor"
    rounds = 60
    copied = 2**28  # more than a cache holds

    def synchronize(self) -> None:
        """See `Cpu`."""
        torch.cuda.synchronize()

    def per_call(self, step: Step, calls: int) -> float:
        """See `Cpu`. Where submitting takes longer than the work, this is the time to submit."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def syncs(self, step: Step) -> int:
        """See `Cpu`. torch warns of all waiting but that for the whole device and for events."""
        device, event = torch.cuda, torch.cuda.Event
        calls: list[str] = []

        def counted(original: Callable[..., None]) -> Callable[..., None]:
            def call(*args: Any, **options: Any) -> None:
                calls.append(original.__name__)
                original(*args, **options)

            return call

        self.synchronize()
        with (
            patch.object(device, "synchronize", counted(device.synchronize)),
            patch.object(event, "synchronize", counted(event.synchronize)),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return len(calls) + sum("called a synchronizing" in str(x.message) for x in caught)

    def peak(self, step: Step) -> int:
        """See `Cpu`."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated()) - int(before)

    def held(self) -> int:
        """See `Cpu`."""
        return int(torch.cuda.memory_stats().get("requested_bytes.all.current", 0))


def captured(step: Step) -> Step:
    """Return a function that replays a CUDA graph of the step."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # restores the current stream also if the capture fails
        for _ in range(3):  # the first steps make the buffers
            step()
        with torch.cuda.graph(graph, stream=stream):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    replay: Step = graph.replay
    return replay
