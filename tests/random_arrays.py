"""Random arrays of each format, made of random bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from conftest import need

# For each format, the total number of bits and the number of stored significand bits.
FORMATS = {"float16": (16, 10), "bfloat16": (16, 7), "float32": (32, 23), "float64": (64, 52)}
REAL = {"complex64": "float32", "complex128": "float64"}


def dtype_of(name: str) -> Any:
    """The dtype of a format; numpy has no bfloat16 of its own."""
    return need("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def random_array(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    level: float = 0.5,
    spread: int = 2,
    special: Sequence[float] = (),
    order: str = "C",
) -> np.ndarray:
    """Random numbers with exponents near `level`: 0 for subnormal, 1 for the largest numbers."""
    if name in REAL:
        parts = random_array(rng, REAL[name], (*shape, 2), level, spread, special)
        return parts.view(name).reshape(shape).copy(order)
    total, stored = FORMATS[name]
    most = 2 ** (total - 1 - stored) - 1  # the exponent of infinity and NaN
    exponents = round(level * most) + rng.integers(-spread, spread + 1, shape)
    bits = np.clip(exponents, 0, most - 1) << stored | rng.integers(0, 2**stored, shape)
    bits = bits.astype(np.uint64) | rng.integers(0, 2, shape, np.uint64) << np.uint64(total - 1)
    x = bits.astype(f"u{total // 8}").view(dtype_of(name)).copy(order)
    for value in special:
        x[rng.random(shape) < 0.05] = value
    return x
