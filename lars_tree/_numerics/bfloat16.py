"""Conversions between double and the bits of bfloat16, which numpy does not have.

bfloat16 is the upper half of a float32. Libraries convert double to bfloat16 via float32, which
rounds twice; `encode` rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NumpyArray = np.ndarray[Any, Any]


def decode(bits: NumpyArray) -> NumpyArray:
    """Convert bfloat16 bits (uint16) to doubles, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def encode(values: NumpyArray) -> NumpyArray:
    """Round doubles to the nearest bfloat16, ties to even; return the bits (uint16)."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    # Round to odd first: the last bit records inexactness, so the second rounding is correct.
    away = np.abs(nearest) > np.abs(values)
    odd = (bits - away) | (nearest != values)
    rounded = ((odd + 0x7FFF + ((odd >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
