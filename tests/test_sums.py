"""Norms of long arrays, and of numbers whose squares are out of range.

Rounding errors do not grow with the number of elements. Equal elements are the worst case of a
plain sum, as all its rounding errors add up.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
from hypothesis import example, given
from hypothesis import strategies as st
from reference import mpf

from lars_tree import lars_update
from lars_tree._backends.arrays import NamespaceOps
from lars_tree._backends.cpu.norms import pieces
from lars_tree._numerics import formula
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


@example([5e-324], 1.0)
@example([2.0**-500, 2.0**-460], 1.0)
@example([2.0**480, 2.0**520], 1.0)
@example([1.7e308] * 4, 1.0)
@example([0.0], 1.0)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
    st.sampled_from([1.0, 2.0**500, 2.0**-500]),
)
def test_a_norm_of_scaled_sums_is_exact_over_the_whole_range(values, factor):
    """Engines for several devices and fused kernels add up squares with each of three scales."""
    x = np.array(values)
    with np.errstate(all="ignore"):
        x = np.where(np.isfinite(x * factor), x * factor, x)
        sums = [np.sum((x * scale) ** 2, keepdims=True) for scale in formula.SCALES]
        norm = formula.norm_of_sums(NamespaceOps(np), *sums)
    exact = reference.norm(map(mpf, x.tolist()))
    scaled, scale = float(norm.scaled[0]), float(norm.scale[0])
    assert abs(mpf(scaled) * scale - exact) <= 4 * 2**-53 * exact
    assert math.frexp(scale)[0] == 0.5  # a power of two
    assert math.isfinite(1 / scale)
    assert scaled == 0 or 2.0**-100 < scaled < 2.0**101
    assert scale == 1 or exact


@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_has_a_finite_scale(special):
    with np.errstate(invalid="ignore"):
        norm = formula.norm_of_sums(NamespaceOps(np), *np.full((3, 1), special))
    assert np.array_equal(norm.scaled, [special], equal_nan=True)
    assert 0 < float(norm.scale[0]) < math.inf


@pytest.mark.parametrize(("name", "parts"), [("float16", 1), ("complex64", 2)])
@pytest.mark.parametrize(
    ("numbers", "chunk"),
    [
        *((n, 2**14) for n in (0, 1, 2**14, 2**14 + 2, 2**28, 2**28 + 2**14 - 2)),
        *((2**28 + 2**14, 2**15), (2**29, 2**15), (2**29 + 2**15, 2**16), (2**34, 2**20)),
    ],
)
def test_pieces_have_the_size_of_the_chunks_of_the_kernel(name, parts, numbers, chunk):
    """There are at most 16,384 full chunks. A complex element counts as two numbers."""
    flat, length = np.broadcast_to(np.zeros((), name), numbers // parts), chunk // parts
    found = list(itertools.islice(pieces(flat), 4))
    assert found == [slice(i, i + length) for i in range(0, len(flat), length)[:4]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
@pytest.mark.filterwarnings("ignore::lars_tree.report.TrustRatioWarning")
def test_one_element_can_make_a_norm_infinite_or_nan(dtype, special):
    x = np.ones(20_000, dtype)
    x[5] = special
    (row,) = layer_table(x, x[::-1].copy(), 0.1)
    assert np.array_equal([row["w_norm"], row["g_norm"]], [abs(special)] * 2, equal_nan=True)
