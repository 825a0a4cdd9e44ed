"""The assertions of lars_tree.testing: which trees they accept, and the messages of failures."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st
from test_testing import FORMATS, example

import lars_tree.testing as testing
from lars_tree import Array, Container, StructureError
from lars_tree.testing import assert_close_ulp, assert_identical


def message(check, *args, **options):
    with pytest.raises(AssertionError) as caught:
        check(*args, **options)
    return str(caught.value)


NAN = np.array([np.nan])
DIFFERENT = [
    ({"a": 1.0}, Container(a=1.0), "expected a Container with keys 'a', got a dict"),
    ([1], (1,), "expected a tuple of 1 item, got a list of 1 item"),
    ({"b": 1, "a": 1}, {"a": 1, "b": 1}, "expected the keys in the order 'a', 'b', got 'b', 'a'"),
    ({"a": {"b": 1}}, {"a": {"c": 1}}, "a: missing 'c'; unexpected 'b'"),
    ({"bais": 1}, {"bias": 1}, "missing 'bias'; unexpected 'bais' (did you mean 'bias'?)"),
    ([np.ones(2)], [np.ones(3)], "0: expected float64 (3,), got float64 (2,)"),
    (np.ones(2, "f4"), np.ones(2), "actual: expected float64 (2,), got float32 (2,)"),
    (np.ones(2, ">f8"), np.ones(2), "expected float64 (2,), got >f8 (2,)"),
    (np.array(1.0), np.float64(1), "expected numpy.float64, got numpy.ndarray"),
    (Array(np.ones(1)), np.ones(1), "expected numpy.ndarray, got lars_tree.array.Array"),
    (None, np.ones(1), "expected numpy.ndarray, got NoneType"),
    (1, 2, "actual: expected 2, got 1"),
    (np.array([0.0]), np.array([-0.0]), "at [0] 0.0, expected -0.0, 0 ulp off"),
    (NAN, np.ones(1), "at [0] nan, expected 1.0, inf ulp off"),
    (np.array([1 + 2j]), np.array([1 + 2.5j]), "at [0] imag part 2.0, expected 2.5"),
    (np.array([[1, 2]]), np.array([[1, 3]]), "1 of 2 elements differs: at [0, 1] 2, expected 3"),
]


@pytest.mark.parametrize(("actual", "expected", "says"), DIFFERENT)
def test_the_message_of_assert_identical(actual, expected, says):
    text = message(assert_identical, actual, expected)
    assert text.startswith("actual is not identical to expected\n  ")
    assert says in text


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nans_are_identical_and_memory_order_is_ignored():
    nan, negative_nan = np.uint64([0x7FF8 << 48]), np.uint64([0xFFF8_0000_0000_0001])
    assert_identical(nan.view(float), negative_nan.view(float))
    x = np.arange(6.0).reshape(2, 3)
    assert_identical([x, float("nan")], [np.asfortranarray(x), float("nan")])


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_identity_in_other_libraries(library):
    need(library)
    arrays = testing.arrays("bfloat16", (2,), elements=st.just(1.5), library=library)
    x, y = example(arrays), example(arrays.map(lambda x: x * 2))
    assert_identical({"a": x}, {"a": x})
    assert "at [0] 3.0, expected 1.5" in message(assert_identical, {"a": y}, {"a": x})
    in_numpy = np.float32([1.5, 1.5])
    assert "expected numpy.ndarray" in message(assert_identical, x, in_numpy)
    assert "expected float32 (2,)" in message(assert_identical, x, in_numpy, check_type=False)


def test_the_worst_element_is_shown():
    a, b = np.zeros((2, 3), np.float32), np.zeros((2, 3))
    a[0, 1], a[1, 2], b[0, 1], b[1, 2] = 1 + 2.0**-23, 5, 1, 4
    text = message(assert_close_ulp, {"k": a}, {"k": b}, 0.5)
    assert "k: 2 of 6 elements are too far off: at [1, 2] 5.0, expected 4.0, 2.1e+06 ulp" in text
    assert_close_ulp(a[0], b[0], 1)
    assert "at [1] 1.0000001, expected 1.0, 1 ulp off" in message(
        assert_close_ulp, a[0], b[0], 0.99
    )


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data(), steps=st.integers(1, 5))
def test_an_ulp_is_the_distance_of_neighbours(name, data, steps):
    """A number differs by n ulps from its n-th neighbour, up to the next power of two."""
    ml_dtypes = need("ml_dtypes")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    bits = np.dtype(f"u{dtype.itemsize}")
    start = data.draw(testing.arrays(name, (1,), layouts=["C"]))
    floor = start.view(bits) & ~bits.type(7)  # leaves room below the next power of two
    x, y = floor.view(dtype), (floor + bits.type(steps)).view(dtype)
    exact = np.array([Decimal(float(x[0]))], object)
    for expected in (x, exact):
        assert_close_ulp(y, expected, steps)
        assert f"{steps} ulp off" in message(assert_close_ulp, y, expected, steps - 0.5)


def test_scale_dtype_and_overflow():
    w, tiny = np.float32([1e-9]), np.array([0.0])
    assert "ulp off" in message(assert_close_ulp, w, tiny, 1)
    assert_close_ulp({"a": w}, {"a": tiny}, 1, scale={"a": 1.0})
    assert_close_ulp(np.array([1 + 2.0**-24]), np.ones(1), 1, dtype="float32")
    assert_close_ulp(np.float32([np.inf]), np.array([3.41e38]), 2)
    assert_close_ulp(np.float32([np.inf]), np.array([1e300]), 0)
    assert "inf ulp off" in message(assert_close_ulp, NAN, np.ones(1), 1e9)
    assert_close_ulp(NAN, NAN, 0)
    assert "at [0] 1.0, expected 0.0, inf ulp off" in message(
        assert_identical, np.ones(1), np.zeros(1)
    )
    with pytest.raises(StructureError, match="scale does not match expected"):
        assert_close_ulp({"a": w}, {"a": w}, scale={"b": 1.0})


def test_assert_close_ulp_compares_keys_and_shapes():
    text = message(assert_close_ulp, {"a": np.ones(1)}, {"b": np.ones(1)})
    assert text == "actual does not match expected\n  actual: missing 'b'; unexpected 'a'"
    assert "expected float64 (2,), got float64 (1,)" in message(
        assert_close_ulp, np.ones(1), np.ones(2)
    )
    assert_close_ulp(Container(a=np.ones(1), b=None), {"b": None, "a": np.ones(1)})
