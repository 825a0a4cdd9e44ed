"""The time of a step of many small leaves: `python -m benchmarks.growth numpy|torch LEAVES ROUNDS`.

Prints the median seconds.
"""

from __future__ import annotations

import sys

from benchmarks import measure
from benchmarks.sections import container, in_place_step
from benchmarks.trees import small, weights_and_gradients


def main(library: str, leaves: int, rounds: int) -> None:
    """Measure one step in place."""
    w, g = (container(flat, library) for flat in weights_and_gradients(small(leaves)))
    times = measure.medians({"step": in_place_step(w, g)}, rounds)
    sys.stdout.write(f"{times['step']}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
