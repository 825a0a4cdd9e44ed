"""Arrays with given elements, but at any place in memory and with any strides."""

from __future__ import annotations

import tempfile

import numpy as np


def memory_order(x: np.ndarray) -> list[int]:
    """The axes, those with the largest strides first."""
    return sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))


def strided(
    rng: np.random.Generator,
    x: np.ndarray,
    *,
    mapped: bool = False,
    swapped: bool = False,
    simple: bool = False,
) -> np.ndarray:
    """An array equal to x, with its order of the axes in memory, and random strides.

    Args:
        rng: Decides about the gaps, if any, signs of strides and alignment.
        x: The elements; without gaps.
        mapped: In the memory map of a file, at any offset.
        swapped: With the other byte order, except bfloat16, which has only one.
        simple: Without what torch does not have: negative strides and unaligned addresses.
    """
    order = memory_order(x)
    ordered, dtype = x.transpose(order), x.dtype
    steps = rng.choice([1, 1, 2, 3], x.ndim)
    signs = np.ones(x.ndim, int) if simple else rng.choice([1, -1], x.ndim)
    before, after = rng.integers(0, 3, (2, x.ndim))
    if rng.random() < 0.3:  # without gaps, so that the kernel may update it
        steps, before, after = np.ones(x.ndim, int), *np.zeros((2, x.ndim), int)
    axes = list(zip(before, ordered.shape, steps, after, strict=True))
    window = tuple(slice(a, a + n * step, step) for a, n, step, _ in axes)
    shape = [a + n * step + b for a, n, step, b in axes]
    if swapped and dtype.kind in "fc":
        dtype = dtype.newbyteorder()
    offset = int(rng.integers(0, 64)) if not simple else dtype.itemsize * int(rng.integers(0, 8))
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(offset + size + 1, np.uint8)
    if mapped:
        with tempfile.TemporaryFile() as file:
            memory = np.memmap(file, np.uint8, "w+", shape=memory.shape)
    whole = memory[offset : offset + size].view(dtype).reshape(shape)
    part = whole[(*window, ...)][(*(slice(None, None, int(sign)) for sign in signs), ...)]
    part[...] = ordered
    return part.transpose(np.argsort(order))
