"""Copies of small tensors from the CPU to a device, made without waiting for the device.

In a captured CUDA graph, such a copy is made again by each replay. The host memory that it reads is
therefore kept for good. A capture cannot allocate host memory, so memory for a copy of each shape
is kept ready: the step before the capture makes copies of the same shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_KEPT = 16

_ready: dict[Any, Tensor] = {}
_captured: list[Any] = []


def is_capturing(device: torch.device) -> bool:
    """Whether operations on the device are captured in a graph now."""
    module: Any = getattr(torch, device.type, None)
    captures = hasattr(module, "is_current_stream_capturing") and module.is_initialized()
    return bool(captures and module.is_current_stream_capturing())


def keep(x: Any) -> None:
    """Keep what a captured graph reads, as nothing tells when the graph is gone."""
    _captured.append(x)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device."""
    if device.type == "cpu" or not torch.accelerator.is_available():  # or a simulated device
        return host.to(device)
    key = host.dtype, host.shape
    if is_capturing(device):
        memory = _ready.pop(key, None)
        pinned = host.pin_memory() if memory is None else memory.copy_(host)
        keep(pinned)
    else:
        pinned = host.pin_memory()
        if key not in _ready:
            make_room(_ready)
            _ready[key] = torch.empty_like(host, pin_memory=True)
    return pinned.to(device, non_blocking=True)


def make_room(cache: dict[Any, Any]) -> None:
    """Drop the oldest values of a full cache."""
    while len(cache) >= MAX_KEPT:
        oldest, *_ = list(cache)  # one operation, as another thread may change the dict
        cache.pop(oldest, None)


def index(numbers: list[int], device: torch.device) -> Tensor:
    return sent(torch.tensor(numbers, device="cpu"), device)
