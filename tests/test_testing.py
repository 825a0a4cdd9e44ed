"""The strategies of lars_tree.testing: which values they generate, and the simplest examples."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, defaultdict
from random import Random

import numpy as np
import pytest
from conftest import need
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

import lars_tree.testing as testing
from lars_tree import Array, Container, OptionError, lars_update
from lars_tree._tree import structure
from lars_tree.testing import assert_identical

GENERATE = settings(max_examples=600, database=None, phases=[Phase.generate])
SHRINK = settings(GENERATE, phases=[Phase.generate, Phase.shrink])


def found(strategy, condition, settings, seed):
    """A list with the value that hypothesis finds from this seed, or an empty list."""
    try:
        return [find(strategy, condition, settings=settings, random=Random(seed))]
    except NoSuchExample:
        return []


def example(strategy, condition=lambda x: True):
    """Any value that fulfils the condition; raises NoSuchExample if hypothesis finds none."""
    for seed in range(3):
        for value in found(strategy, condition, GENERATE, seed):
            return value
    raise NoSuchExample("from three seeds")


def made(strategy, condition):
    """Whether any of 100 generated values fulfils the condition."""
    return bool(found(strategy, condition, settings(GENERATE, max_examples=100), 0))


def least(strategy, condition=lambda x: True):
    """The simplest value that fulfils the condition.

    Tries three seeds, because from one seed hypothesis may not shrink to the simplest value.
    """
    values = [x for seed in range(3) for x in found(strategy, condition, SHRINK, seed)]
    return min(values, key=lambda x: len(repr(x)))


def size(x):
    return np.abs(x.astype(np.float64)).max(initial=0)


# ---- Arrays

EACH = {
    "0-d": lambda x: x.ndim == 0,
    "empty": lambda x: x.size == 0,
    "empty, of two axes": lambda x: x.size == 0 and x.ndim == 2,
    "Fortran order": lambda x: x.flags.f_contiguous and not x.flags.c_contiguous,
    "negative strides": lambda x: x.size > 1 and min(x.strides) < 0,
    "gaps": lambda x: x.size > 1 and not x.flags.forc and min(x.strides) > 0,
    "zeros": lambda x: x.size > 1 and not x.any(),
    "negative zero": lambda x: x.size and (np.signbit(x) & (x == 0)).any(),
    "equal elements": lambda x: x.size > 1 and x.all() and (x == x.flat[0]).all(),
    "equal magnitudes": lambda x: x.size == 2 and x.any() and x.flat[0] == -x.flat[1],
    "several sizes": lambda x: size(x) / 1e6 > np.abs(x[x != 0]).min(initial=np.inf),
}


@pytest.mark.parametrize("what", EACH)
def test_arrays_of_each_kind_are_made(what):
    shapes = st.sampled_from([(), (2,), (0, 2), (2, 2)])
    x = example(testing.arrays(st.sampled_from(["float32", "float64"]), shapes), EACH[what])
    assert x.flags.writeable


FORMATS = {
    "float16": (2.0**-24, 65504.0),
    "bfloat16": (2.0**-133, 3.38e38),
    "float32": (2.0**-149, 3.4e38),
    "float64": (2.0**-1074, 1.79e308),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_whole_range_of_each_format_is_covered(name):
    """Some arrays are in each third of the exponent range, and some elements are subnormal."""
    if name == "bfloat16":
        need("ml_dtypes")
    smallest, largest = (np.log2(x) for x in FORMATS[name])
    arrays = testing.arrays(name, (2,))
    for third in range(3):
        low = smallest + (largest - smallest) * third / 3
        high = smallest + (largest - smallest) * (third + 1) / 3

        def within(x, low=low, high=high):
            with np.errstate(divide="ignore"):
                exponents = np.log2(np.abs(x.astype(np.float64)))
            return (low <= exponents).all() and (exponents <= high).all()

        assert example(arrays, within).dtype.name == name
    assert 0 < size(example(arrays, lambda x: 0 < size(x) < 64 * FORMATS[name][0])) < 1e-5
    assert size(example(arrays, lambda x: size(x) > FORMATS[name][1] / 64)) <= largest_of(name)


def largest_of(name):
    return float(need("ml_dtypes").finfo(name).max if name == "bfloat16" else np.finfo(name).max)


@given(testing.arrays())
def test_elements_are_finite_by_default(x):
    assert np.isfinite(x.astype(np.float64)).all()


def test_arrays_shrink_to_zeros_in_c_order():
    x = least(testing.arrays(), lambda x: x.size > 3)
    assert (x.dtype, x.size, x.any(), x.flags.c_contiguous) == (np.float64, 4, False, True)
    assert least(testing.arrays()).shape == ()
    assert least(testing.arrays(shape=(2,)), lambda x: x[0] > 0).tolist()[0] == 1


@pytest.mark.parametrize("dtype", [">f4", np.float16, np.dtype("complex64"), "complex128"])
def test_other_dtypes(dtype):
    x = example(
        testing.arrays(dtype, (2,)), lambda x: x.all() and (x.imag.all() or x.dtype.kind == "f")
    )
    assert x.dtype == np.dtype(dtype)


def test_shapes_and_elements_from_strategies():
    elements = st.sampled_from([1.0, np.nan])
    arrays = testing.arrays("float32", st.sampled_from([(3,), (2, 2)]), elements=elements)
    assert least(arrays).tolist() == [1, 1, 1]
    assert example(arrays, lambda x: x.ndim == 2 and np.isnan(x).all()).shape == (2, 2)
    complexes = testing.arrays("complex64", (1,), elements=st.just(1 + 2j))
    assert example(complexes).tolist() == [1 + 2j]
    assert not made(testing.arrays(layouts=["C"]), lambda x: not x.flags.c_contiguous)


@pytest.mark.parametrize("name", FORMATS)
def test_tensors(name):
    torch = need("torch")
    arrays = testing.arrays(getattr(torch, name), library="torch")
    x = example(arrays, lambda x: x.ndim == 2 and not x.is_contiguous() and x.any())
    assert (x.dtype, type(x)) == (getattr(torch, name), torch.Tensor)
    tiny = example(arrays, lambda x: 0 < x.double().abs().sum() < 64 * FORMATS[name][0])
    assert tiny.any()
    y = least(arrays, lambda x: x.numel() > 1)
    assert (tuple(y.shape), y.any().item(), y.is_contiguous()) == ((2,), False, True)


@pytest.mark.parametrize("name", FORMATS)
def test_jax_arrays(name):
    jax = need("jax")
    x = least(testing.arrays(name, library="jax"), lambda x: x.ndim == 2 and x.size > 1)
    assert isinstance(x, jax.Array)
    assert (x.dtype.name, np.asarray(x).any()) == (name, False)
    tiny = testing.arrays(name, (1,), library="jax")
    assert example(tiny, lambda x: 0 < size(np.asarray(x)) < 64 * FORMATS[name][0]).shape == (1,)


def test_libraries_may_be_mixed():
    torch = need("torch")
    either = testing.arrays(library=st.sampled_from(["numpy", "torch"]), shape=(1,))
    tree = example(
        testing.nests(either, node_types=[list]),
        lambda tree: len({type(x) for x in structure.leaves(tree)}) == 2,
    )
    assert {type(x).__module__ for x in structure.leaves(tree)} == {"numpy", "torch"}
    w, g = example(testing.layers(library=st.just("torch"), shape=(1,)), lambda pair: pair[0].any())
    assert (type(w), w.dtype) == (torch.Tensor, g.dtype)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_only_the_library_of_the_arrays_is_imported(library):
    if library == "torch":
        need("torch")
    code = f"""if 1:
        import sys, warnings
        from hypothesis import find
        from lars_tree.testing import arrays, check_update_laws
        find(arrays(library={library!r}), lambda x: True)
        print({{"torch", "jax"}} & set(sys.modules))"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout.strip(), found.returncode) == (
        "set()" if library == "numpy" else "{'torch'}",
        0,
    ), found.stderr


def test_without_hypothesis_the_error_names_the_package_to_install():
    code = """if 1:
        import sys
        sys.modules["hypothesis"] = None
        import lars_tree.testing"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    hint = "lars_tree.testing needs hypothesis: pip install 'lars-tree[testing]'"
    assert found.stderr.splitlines()[-1] == f"ModuleNotFoundError: {hint}"
    assert "During handling" not in found.stderr


# ---- Trees


def test_unusual_keys_are_made():
    made = set()

    @settings(max_examples=1000, derandomize=True)
    @given(testing.nests(st.just(1), node_types=[Container]))
    def collect(tree):
        made.update(key for path, _ in structure.walk(tree) for key in path)

    collect()
    assert made >= {"a", 0, -1, *testing.trees.ODD_KEYS}
    assert any(isinstance(key, str) and len(key) > 2 and not key.isascii() for key in made)


@pytest.mark.parametrize("cls", testing.trees.NODE_TYPES, ids=lambda cls: cls.__name__)
def test_nodes_of_each_type_are_made(cls):
    assert example(testing.nests(st.just(1)), lambda tree: type(tree) is cls and len(tree) > 1)
    inner = least(
        testing.nests(st.just(1), node_types=[dict, cls]),
        lambda tree: type(tree) is dict and [type(x) for x in tree.values()] == [cls],
    )
    assert list(inner) == ["a"]


def test_attrs_classes_as_node_types():
    attrs = need("attrs")
    pair = attrs.make_class("Pair", ["one", "two"])
    assert least(testing.nests(st.just(1), node_types=[pair]), lambda x: x != 1) == pair(1, 1)


def test_trees_shrink_to_the_simplest():
    assert structure.leaves(least(testing.nests())) in ([], [0])
    assert least(testing.nests(), structure.is_leaf).tolist() == 0
    assert least(testing.containers()) == Container()
    w = least(testing.containers(), lambda w: len(w.leaves()) > 1)
    assert w.paths() == [("a",), ("b",)]
    assert [x.tolist() for x in w.leaves()] == [0, 0]
    ones = testing.containers(st.just(1))
    assert least(ones, lambda w: any(len(path) > 2 for path in w.paths())).leaves() == [1]


def test_containers_shrink_to_flat_ones_from_most_seeds():
    many = lambda w: len(w.leaves()) > 1  # noqa: E731
    starts = [found(testing.containers(), many, SHRINK, seed) for seed in range(6)]
    assert [w.paths() for (w,) in starts].count([("a",), ("b",)]) >= 4


def is_tied(tree):
    found = structure.leaves(tree)
    return len({id(x) for x in found}) < len(found)


def test_leaves_are_tied_only_on_request():
    objects = st.builds(object)
    tied = testing.containers(objects, tied=True)
    w = least(tied, is_tied)
    assert w.a is w.b
    assert example(tied, lambda w: len(w.leaves()) > 1 and not is_tied(w))
    assert not made(testing.containers(objects), is_tied)


@given(testing.weights_and_gradients(shuffle_keys=True))
def test_an_update_takes_the_weights_and_gradients(pair):
    w, dcdw = pair
    new = lars_update(w, dcdw, 0.1)
    assert [path for path, _ in structure.walk(new)] == [path for path, _ in structure.walk(w)]


def test_weights_and_gradients_of_each_kind_are_made():
    pairs = testing.weights_and_gradients(shuffle_keys=True, node_types=[dict])
    a, b = example(pairs, lambda p: isinstance(p[0], dict) and list(p[0]) != list(p[1]))
    assert a.keys() == b.keys()
    assert example(pairs, lambda p: p[0] is not None and p[1] is None)
    assert example(pairs, lambda p: p[0] is None) == (None, None)
    broadcast = testing.layers(broadcast=True)
    w, g = example(broadcast, lambda p: p[0].shape != p[1].shape)
    assert np.broadcast_shapes(w.shape, g.shape) == w.shape
    assert example(testing.layers(), lambda p: p[0].shape == p[1].shape == (2,))
    ordered = testing.weights_and_gradients(testing.layers(shape=()), node_types=[dict])
    assert not made(ordered, lambda p: isinstance(p[0], dict) and list(p[0]) != list(p[1]))


TREE = Container(a={"b": 1, "items": [2, 3]}, c=(4, OrderedDict(d=5)), e=defaultdict(list, f=6))


@given(testing.prefixes_of(TREE))
def test_prefixes_of_a_tree_broadcast_to_it(prefix):
    structure.broadcast("lr", TREE, prefix)


def test_all_prefixes_are_made():
    prefixes = testing.prefixes_of(TREE, st.just(0))
    assert least(prefixes) == 0
    assert least(prefixes, lambda p: p != 0).to_dict() == {"a": 0, "c": 0, "e": 0}
    assert example(prefixes, lambda p: p != 0 and set(p.paths()) == set(TREE.paths()))
    assert example(prefixes, lambda p: p != 0 and list(p) == ["e", "c", "a"])
    assert example(prefixes, lambda p: p != 0 and p["a"] != 0 and list(p["a"]) == ["items", "b"])


def test_options_are_those_of_the_update():
    OPTIONS = testing.strategies.OPTIONS
    assert least(testing.options()) == {}
    options = example(testing.options(), lambda options: options.keys() == OPTIONS.keys())
    assert lars_update(np.array([3.0, 4.0]), np.ones(2), 0.1, **options).shape == (2,)
    assert least(testing.options("eps"), lambda options: options.get("eps")) == {"eps": 1e-8}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: testing.arrays(library="tensorflow"),
            "library: expected one of 'numpy', 'torch', 'jax'",
        ),
        (lambda: testing.layers(library="np"), "library: expected one of"),
        (
            lambda: testing.arrays(layouts=["c"]),
            "layouts: expected one of 'C', 'F', 'reversed', 'gaps'",
        ),
        (
            lambda: testing.arrays(layouts="gaps"),
            "layouts: expected a list of layouts .*, got 'gaps'",
        ),
        (lambda: testing.nests(node_types=dict), "node_types: expected a list of types"),
        (lambda: testing.nests(node_types=["dict"]), "node_types: expected types .*, got 'dict'"),
        (lambda: testing.arrays("int64"), "dtype: expected one of 'float64', .*, got 'int64'"),
        (lambda: testing.layers("bool"), "dtype: expected one of"),
        (lambda: testing.arrays(np.longdouble), "dtype: expected one of"),
        (lambda: testing.arrays("float23"), r"got 'float23' \(did you mean 'float32'\?\)"),
        (lambda: testing.layers(layouts=["gap"]), r"got 'gap' \(did you mean 'gaps'\?\)"),
        (
            lambda: testing.options("eps", "decay"),
            "names: expected one of 'decay_lambda', .*, got 'decay'",
        ),
    ],
)
def test_invalid_arguments_of_strategies_are_refused_at_once(make, text):
    with pytest.raises(OptionError, match=text) as caught:
        make()
    assert caught.value.argument in ("library", "layouts", "names", "node_types", "dtype")


def test_a_drawn_dtype_is_checked_too():
    with pytest.raises(OptionError, match="got 'int32'"):
        example(testing.arrays(st.just("int32"), (1,)))


@given(testing.weights_and_gradients())
def test_weights_are_identical_to_themselves_and_to_their_update_without_gradients(pair):
    w, _ = pair
    assert_identical(w, w)
    assert_identical(lars_update(w, None, 0.1), w)


def test_wrapped_arrays_are_leaves():
    wrapped = testing.arrays(shape=(1,)).map(Array)
    w = example(testing.nests(wrapped, node_types=[list]), structure.leaves)
    assert {type(x) for x in structure.leaves(w)} == {Array}
