"""Peak memory of one step in a fresh process: `python -m benchmarks.memory NAME in|out`.

The peak is the high-water mark that Linux records for a process, reset just before the step.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from statistics import median

from benchmarks.contestants import CONTESTANTS, OPTIMIZERS
from benchmarks.measure import child
from benchmarks.trees import resnet50, small, weights_and_gradients

AVAILABLE = Path("/proc/self/clear_refs").exists()


def peak(name: str, in_place: bool, rounds: int) -> int:
    """The median of the peak extra bytes of a step on ResNet-50, without the new weights."""
    arguments = ("-m", "benchmarks.memory", name, "in" if in_place else "out")
    return int(median(int(child(*arguments).split()[-1]) for _ in range(rounds)))


def _measure(name: str, in_place: bool) -> int:
    contestant = (CONTESTANTS | OPTIMIZERS)[name]
    contestant.build(*weights_and_gradients(small(2)), in_place).step()  # imports and compiles
    w, g = weights_and_gradients(resnet50())
    outputs = 0 if in_place else sum(x.nbytes for x in w.values())
    case = contestant.build(w, g, in_place)
    if contestant.allocates:
        case.step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    new = case.step()
    extra = _status("VmHWM") - before - outputs
    assert new is not None
    return extra


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    sys.stdout.write(f"{_measure(sys.argv[1], sys.argv[2] == 'in')}\n")
