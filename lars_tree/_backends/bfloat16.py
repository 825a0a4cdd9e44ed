"""bfloat16 as bits: the upper half of a float32.

numpy does not have this type, so `cpu.py` reads and writes it through these two functions.
Libraries convert double to bfloat16 through float32, with two roundings; `encode` rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def decode(bits: Array) -> Array:
    """bfloat16 bits (uint16) as doubles, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def encode(values: Array) -> Array:
    """Doubles rounded to the nearest bfloat16, ties to even, as bits (uint16)."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    # Rounding to odd sets the last bit of inexact values, so that the second rounding is correct.
    away = np.abs(nearest) > np.abs(values)
    odd = (bits - away) | (nearest != values)
    rounded = ((odd + 0x7FFF + ((odd >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
