"""Array, which behaves like its native array, and the Container methods that depend on arrays."""

from __future__ import annotations

import copy
import operator
import pickle
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import LIBRARIES, need, to_library, to_numpy
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Array, Container, LarsTreeError, LeafError, StructureError, lars_update

A = np.array([[3.0, 4.0, 0.5], [-1.0, 2.0, 8.0]], np.float32)
B = np.array([[0.5, -2.0, 1.0], [4.0, 0.25, -1.0]], np.float32)

ARITHMETIC = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
]
COMPARISONS = [operator.lt, operator.le, operator.eq, operator.ne, operator.ge, operator.gt]
# Libraries whose operators raise for unknown operands instead of returning NotImplemented.
REFUSES = {"strict"}
PICKLED = [library.name for library in LIBRARIES if library.name in {"numpy", "torch", "jax"}]

NAMES = st.text("ab", max_size=2)
NUMBERS = st.recursive(
    st.floats(1, 9), lambda c: st.dictionaries(NAMES, c, min_size=1, max_size=3), max_leaves=6
).map(lambda tree: Container(root=tree))
OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]


def assert_native(actual, expected):
    """Check that actual is an Array of the type, dtype and elements of a native result."""
    assert type(actual) is Array
    assert type(actual.data) is type(expected)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(to_numpy(actual), to_numpy(expected))


def test_the_native_array_is_not_copied(library):
    x = to_library(library.name, A)
    assert Array(x).data is Array(Array(x)).data is x


def test_attributes_are_those_of_the_native_array(library):
    x = to_library(library.name, A)
    array = Array(x)
    assert (array.shape, array.ndim, array.size) == ((2, 3), 2, 6)
    assert (array.dtype, array.device) == (x.dtype, getattr(x, "device", "cpu"))


@pytest.mark.parametrize("operation", ARITHMETIC + COMPARISONS, ids=lambda op: op.__name__)
def test_operators_give_the_results_of_the_native_array(library, operation):
    a, b = to_library(library.name, A), to_library(library.name, B)
    assert_native(operation(Array(a), Array(b)), operation(a, b))
    assert_native(operation(Array(a), b), operation(a, b))
    if library.name not in REFUSES:
        assert_native(operation(a, Array(b)), operation(a, b))
    assert_native(operation(Array(a), 2.0), operation(a, 2.0))
    assert_native(operation(2.0, Array(a)), operation(2.0, a))


def test_powers_and_products_give_the_results_of_the_native_array(library):
    a, b = to_library(library.name, np.abs(A)), to_library(library.name, B[0])
    assert_native(Array(a) ** 3.0, a**3.0)
    assert_native(2.0 ** Array(a), 2.0**a)
    assert_native(Array(a) @ Array(b), a @ b)
    if library.name not in REFUSES:
        assert_native(a @ Array(b), a @ b)


@pytest.mark.parametrize("operation", [operator.neg, operator.pos, operator.abs])
def test_signs_give_the_results_of_the_native_array(library, operation):
    a = to_library(library.name, A)
    assert_native(operation(Array(a)), operation(a))


def test_a_numpy_scalar_on_the_left_gives_an_array():
    assert_native(np.float64(2.0) * Array(A), np.float64(2.0) * A)


def test_inplace_operators_make_a_new_array():
    x = A.copy()
    array = Array(x)
    array += 1.0
    assert_native(array, A + 1.0)
    assert (x == A).all()


def test_indexing_gives_the_results_of_the_native_array(library):
    a = to_library(library.name, A)
    assert_native(Array(a)[1, :], a[1, :])
    assert_native(Array(a)[:, 0:2], a[:, 0:2])


def test_an_array_can_be_an_index():
    assert_native(Array(A)[Array(A > 1.0)], A[A > 1.0])


def test_assignment_writes_to_the_native_array():
    x = A.copy()
    Array(x)[0] = Array(B)[0]
    assert (x == [B[0], A[1]]).all()


def test_assignment_to_an_immutable_array_raises_the_error_of_the_library():
    with pytest.raises(TypeError, match="immutable"):
        Array(to_library("jax", A))[0] = 1.0


def test_iteration_gives_arrays():
    assert len(Array(A)) == 2
    assert [row.data.tolist() for row in Array(A)] == A.tolist()
    assert all(type(row) is Array for row in Array(A))


def test_an_array_of_one_element_converts_to_a_number(library):
    x = Array(to_library(library.name, np.array(3.0)))
    assert (float(x), int(x), complex(x), bool(x)) == (3.0, 3, 3 + 0j, True)
    assert ["a", "b", "c"][Array(to_library(library.name, np.array(2)))] == "c"


def test_the_truth_value_of_many_elements_is_an_error():
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Array(A))


def test_an_array_is_unhashable():
    with pytest.raises(TypeError, match="unhashable"):
        hash(Array(A))


def test_numpy_converts_an_array(library):
    actual = np.asarray(Array(to_library(library.name, A)))
    assert type(actual) is np.ndarray
    assert (actual == A).all()


def test_numpy_shares_memory_unless_a_copy_is_requested():
    array = Array(A)
    assert np.shares_memory(np.asarray(array), A)
    assert not np.shares_memory(np.array(array, copy=True), A)
    assert np.asarray(array, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy"):
        np.asarray(array, dtype=np.float64, copy=False)


def test_ufuncs_refuse_an_array():
    with pytest.raises(TypeError, match="__array_ufunc__"):
        np.sqrt(Array(A))


def test_dlpack_shares_memory():
    x = A.copy()
    assert np.shares_memory(np.from_dlpack(Array(x)), x)
    torch = need("torch")
    assert torch.from_dlpack(Array(x)).data_ptr() == x.ctypes.data


def test_an_array_has_no_array_namespace():
    compat = need("array_api_compat")
    assert not hasattr(Array(A), "__array_namespace__")
    assert not compat.is_array_api_obj(Array(A))
    with pytest.raises(TypeError, match="not a supported array type"):
        compat.array_namespace(Array(A))
    assert compat.array_namespace(Array(A).data).sum(Array(A).data) == A.sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1.0, 2.0],
        lambda: (1.0, 2.0),
        lambda: 1.0,
        lambda: None,
        lambda: "relu",
        lambda: {"a": A},
        lambda: Container(a=A),
        lambda: memoryview(A),
        lambda: Mock(spec=np.ndarray),
        lambda: need("scipy.sparse").csr_array(A),
    ],
    ids=lambda make: type(make()).__name__,
)
def test_data_that_is_not_an_array_is_refused(make):
    with pytest.raises(LeafError, match=r"(?s)data is not an array.*numpy\.asarray") as caught:
        Array(make())
    assert (caught.value.argument, caught.value.paths) == ("data", ((),))


def test_results_that_are_not_arrays_are_not_wrapped():
    torch = need("torch")
    assert (Array(torch.ones(2)) == None) is False  # noqa: E711
    mixed = Array(np.array([A, "x", None], dtype=object))
    assert (mixed[1], list(mixed)[2]) == ("x", None)
    assert_native(mixed[0], A)
    assert_native(Array(np.ones(2))[0], np.float64(1))


def test_placeholders_of_pytree_libraries_are_kept():
    jax = need("jax")
    made = jax.tree.map(lambda _: None, Array(A))
    assert type(made) is Array
    assert made.data is copy.copy(made).data is None


@pytest.mark.parametrize("name", PICKLED)
def test_copies_and_pickles_are_arrays(name):
    x = to_library(name, A)
    assert copy.copy(Array(x)).data is x
    for twin in (copy.deepcopy(Array(x)), pickle.loads(pickle.dumps(Array(x)))):
        assert_native(twin, x)


def test_a_deep_copy_shares_no_memory():
    array = Array(A.copy())
    twin = copy.deepcopy(array)
    twin[0] = 0.0
    assert (array.data == A).all()


def test_repr_shows_the_elements():
    assert repr(Array(np.array([1.0, 2.5]))) == "Array([1. , 2.5])"
    assert repr(Array(np.float64(2.0))) == "Array(2.0)"


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_repr_aligns_its_lines(name):
    first, second = repr(Array(to_library(name, A))).split("\n")
    assert first.startswith("Array([[")
    assert second.index("[") == first.index("[[") + 1


def test_lars_update_is_that_of_the_package(library):
    w, g = to_library(library.name, A), to_library(library.name, B)
    expected = lars_update(w, g, 0.1, decay_lambda=0.5)
    assert_native(Array(w).lars_update(g, 0.1, decay_lambda=0.5), expected)
    assert_native(Array(w).lars_update(Array(g), 0.1, decay_lambda=0.5), expected)
    assert_native(lars_update(Array(w), g, 0.1, decay_lambda=0.5), expected)
    np.testing.assert_array_equal(to_numpy(w), A)


def test_lars_update_writes_to_itself():
    w = Array(A.copy())
    expected = lars_update(A, B, 0.1)
    assert w.lars_update(B, 0.1, out=w) is w
    assert (w.data == expected).all()


def test_lars_update_takes_an_array_as_its_rate():
    rate = np.array([[0.1], [0.0]], np.float32)
    expected = lars_update(A, B, rate)
    assert (Array(A).lars_update(Array(B), Array(rate)).data == expected).all()
    assert (expected[1] == A[1]).all()
    assert (expected[0] != A[0]).all()


def test_lars_update_names_the_invalid_argument():
    with pytest.raises(LarsTreeError, match="dcdw"):
        Array(A).lars_update(np.ones(5), 0.1)


def test_arithmetic_with_a_container_applies_it_to_each_leaf():
    w = Container(a=A, b={"c": 2 * A})
    assert (Array(B) - w == Container(a=B - A, b={"c": B - 2 * A})) is True
    assert (w - Array(B) == Container(a=A - B, b={"c": 2 * A - B})) is True


def test_a_dict_is_not_an_operand():
    with pytest.raises(TypeError, match="unsupported operand"):
        Array(A) + {"a": A}
    assert (Array(A) == {"a": A}) is False


def test_a_leaf_stays_an_array():
    w = Container(a=Array(A), b=[Array(B)])
    new = w.lars_update(Container(a=B, b=[A]), 0.1)
    assert [type(x) for x in new.leaves()] == [Array, Array]
    assert (w.num_leaves(), w.num_parameters(), w.num_bytes()) == (2, 12, 48)
    assert "float32 (2, 3)" in repr(w)


# Containers of arrays: comparison, display, arithmetic


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.array([np.ones(2), 1], dtype=object),
        lambda: np.ones(2, dtype=[("a", int)]),
        lambda: np.array(["a"]),
        lambda: np.array([1], "M8[s]"),
        lambda: need("scipy.sparse").csr_matrix(np.eye(2)),
        lambda: need("torch").ones(2).to(need("torch").float8_e4m3fn),
        lambda: need("torch").ones(2, 2).to_sparse(),
        lambda: need("torch").ones(2, device="meta"),
        lambda: need("jax").random.key(0),
        lambda: need("dask.array").ones(2),
    ],
    ids=["object", "struct", "str", "date", "scipy", "float8", "sparse", "meta", "key", "dask"],
)
def test_odd_arrays_are_compared_and_shown_without_errors(make):
    """Even an array whose elements cannot be compared equals itself."""
    x, twin = make(), make()
    assert Container(a=x) == Container(a=x)
    assert (Container(a=x) == Container(a=twin)) in {True, False}
    assert Container(a=x) != Container(a=np.zeros(3))
    assert set(Container(a=x).diff({"a": np.zeros(3)})) == {"a"}
    assert repr(Container(a=x)).startswith("Container: 1 leaf, ")
    assert "<b>a</b>" in Container(a=x)._repr_html_()


def test_equality_and_allclose_compare_elements(library):
    x = np.array([1.0, 2.0], np.float32)
    w, same = (Container(a=[to_library(library.name, x)]) for _ in range(2))
    nearly = Container(a=[to_library(library.name, x + np.float32(1e-4))])
    if library.name == "dask":  # lazy elements are not computed
        same = w
    assert w == same
    assert w.allclose(same)
    assert w != nearly
    assert not w.allclose(nearly)
    assert (
        w.allclose(nearly, atol=1e-3) == w.allclose(nearly, rtol=1e-3) == (library.name != "dask")
    )


def test_equality_ignores_key_order_but_nan_differs_from_itself():
    assert Container(a=np.array([np.nan])) != Container(a=np.array([np.nan]))
    assert Container(a=1, b=2) == Container(b=2, a=1)


@pytest.mark.parametrize("name", OPERATORS)
@given(w=NUMBERS, number=st.floats(1, 3))
def test_operators_apply_to_each_leaf_from_both_sides(name, w, number):
    f = getattr(operator, name)
    array = np.array([1.0, number])
    for x in (number, np.float64(number), array, Array(array)):
        assert f(w, x).allclose(w.map(lambda leaf, x=x: f(leaf, x)))
        assert f(x, w).allclose(w.map(lambda leaf, x=x: f(x, leaf)))
    other = w.map(lambda x: x + number)
    for x in (other, other.to_dict()):
        assert f(w, x) == w.map(f, other)
        assert f(x, w) == other.map(f, w)


def test_either_operand_can_be_a_prefix():
    w, prefix = Container(a={"b": 6, "c": 8}, d=9), Container(a=2, d=3)
    assert w - prefix == {"a": {"b": 4, "c": 6}, "d": 6}
    assert prefix - w == prefix.to_dict() - w == {"a": {"b": -4, "c": -6}, "d": -6}
    assert (w.map(lambda x: None) * 2).leaves() == [None, None, None]
    with pytest.raises(TypeError, match="NoneType") as caught:  # None is not dropped silently
        w * {"a": 1, "d": None}
    assert caught.value.__notes__ == ["at d"]


def test_signs_and_matrix_products():
    x = np.array([[1.0, -2.0]])
    w = Container(a=x)
    assert (-w == {"a": -x}) is (+w == {"a": x}) is (abs(w) == {"a": abs(x)}) is True
    assert (w @ {"a": x.T}).a == (x @ w.map(np.transpose)).a == 5


def test_operands_that_do_not_match_are_refused():
    with pytest.raises(StructureError, match="a: missing 'b'; unexpected 'c'"):
        Container(a={"b": 1}) + Container(a={"c": 1})
