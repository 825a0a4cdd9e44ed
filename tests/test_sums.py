"""Norms of long arrays: rounding errors do not grow with the number of elements.

Equal elements are the worst case of a plain sum, as all its rounding errors add up.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from lars_tree import lars_update
from lars_tree.report import layer_table

SIZE = 1_000_003


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_norms_of_many_equal_elements_are_exact(dtype):
    x = np.full(SIZE, 1 / 3, dtype)
    exact = math.sqrt(SIZE) * float(x[0])
    (row,) = layer_table(x, x, 0.1)
    bound = math.ulp(exact) if dtype == "float64" else 2**-43 * exact
    assert abs(row["w_norm"] - exact) <= bound


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("short", ["float16", "float32"])
def test_a_short_gradient_of_float64_weights_has_an_exact_norm(short, joint):
    """A ratio of norms shows in all bits of the result; here w has one element that is not 0."""
    g = np.full(SIZE, 1 / 3, short)
    w = np.zeros(SIZE)
    w[0] = 1.0
    options = {"joint_norm": joint, "decay_lambda": 2.0**-60}
    (new,) = {*lars_update(w, g, 1.0, **options)[1:].tolist()}
    exact = -float(g[1]) / (math.sqrt(SIZE) * float(g[1]))  # the decay is below the last bit
    assert abs(new - exact) <= 2 * math.ulp(exact)
