"""Arrays of more than 2^31 elements, by hand: `python -m tests.reliability.large`.

It needs 5 GB of memory and minutes, so it is not an attack of the page. Weights are 0.5 but for
samples around the indices 0, 2^31 and at the end. Gradients are 0 but for the same samples, in
memory that is mapped and never written. The norms are sums of integers, and so exact.
"""

from __future__ import annotations

import mmap
import sys
from fractions import Fraction
from math import isqrt
from time import monotonic
from typing import Any

import numpy as np

import lars_tree as lt

SIZE = 2**31 + 4099
LR, MIDDLE = 0.25, 2**31
SAMPLES = [0, 1, 4095, 2**30, MIDDLE - 2, MIDDLE - 1, MIDDLE, MIDDLE + 1, SIZE - 2, SIZE - 1]


def mapped(size: int) -> np.ndarray:
    """Zeros that take no memory until they are written."""
    return np.frombuffer(mmap.mmap(-1, 2 * size), np.float16)


def check(name: str, w: np.ndarray, g: np.ndarray, view: Any = lambda x: x) -> None:
    """Take a step of views of w and g, and compare elements with the exact step."""
    start = monotonic()
    w[...] = 0.5
    flat = [(i // w.shape[1], i % w.shape[1]) if w.ndim == 2 else i for i in SAMPLES]
    for k, at in enumerate(flat):
        w[at], g[at] = 1 + k / 8, (-1) ** k * (1 + k)
    before = {at: Fraction(float(w[at])) for at in flat}
    w_norm = root(Fraction(w.size - len(flat), 4) + sum(x * x for x in before.values()))
    g_norm = root(sum(Fraction(float(g[at])) ** 2 for at in flat))
    rate = LR * 2.0**-10 * float(w_norm / g_norm)
    x = view(w)
    lt.lars_update(x, view(g), LR, trust_coefficient=2.0**-10, out=x)
    for at in flat:
        exact = float(before[at]) - rate * float(g[at])
        error = abs(float(w[at]) - exact) / np.spacing(np.float16(max(before[at], abs(exact))))
        assert error <= 1, (name, at, float(w[at]), exact)
    assert np.count_nonzero(w != 0.5) == len(flat), name
    print(f"{name}: {w.size:,} elements, {monotonic() - start:.0f} s", flush=True)


def root(x: Fraction) -> Fraction:
    """The square root, to 60 binary places."""
    return Fraction(isqrt(int(x * 4**60)), 2**60)


def of_torch(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x)


def main() -> None:
    w, g = mapped(SIZE), mapped(SIZE)
    if "torch" in sys.argv:
        check("torch", w, g, of_torch)
    else:
        check("contiguous", w, g)
        gap = 64  # between two rows
        width = SIZE // 2
        shape, strides = (2, width), (2 * (width + gap), 2)
        w, g = (np.ndarray(shape, np.float16, mapped(2 * (width + gap)), 0, strides) for _ in "wg")
        SAMPLES[-2:] = [2 * width - 2, 2 * width - 1]
        check("rows with gaps", w, g)


if __name__ == "__main__":
    main()
