"""A tree comes back unchanged from a file, or is refused with the path of the invalid leaf."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import need, to_library, to_numpy
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import (
    Array,
    Container,
    DtypeError,
    FileError,
    LeafError,
    OptionError,
    StructureError,
    io,
)

ml_dtypes = need("ml_dtypes")
package = need("safetensors.numpy")

SUFFIXES = [".safetensors", ".npz"]
PLAIN = ["float16", "float32", "float64", "complex64", "bool"] + [
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
]
EXTENSIONS = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
READ = {".safetensors": [io.load, io.open], ".npz": [io.load]}
SHAPES = [(), (0,), (3,), (2, 3), (0, 4), (2, 0, 3), (4, 1, 2)]


@pytest.fixture(params=SUFFIXES)
def file(request, tmp_path):
    return tmp_path / f"w{request.param}"


def numbers(shape, dtype):
    bits = np.random.default_rng(0).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    if dtype == "bool":
        return bits[..., 0].astype(bool)
    return (bits * 57).reshape(-1).view(dtype).reshape(shape)


def assert_same(actual, expected):
    """Assert that node types, order of keys, dtypes, shapes and bits are the same."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, x in expected.items():
            assert_same(dict.__getitem__(actual, key), x)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, x in zip(actual, expected, strict=True):
            assert_same(a, x)
    elif expected is not None:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", PLAIN + EXTENSIONS)
def test_every_dtype_and_shape_comes_back(dtype, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    w = Container({f"{i}": numbers(shape, dtype) for i, shape in enumerate(SHAPES)})
    for suffix in SUFFIXES:
        if suffix == ".npz" and dtype.isbuiltin == 2:
            continue
        path = tmp_path / f"w{suffix}"
        io.save(w, path)
        assert_same(io.load(path), w)
        if suffix == ".safetensors":
            assert_same(io.open(path).map(np.asarray), w)
            if dtype.name not in EXTENSIONS[1:]:  # safetensors.numpy has no float8
                theirs = package.load_file(path)
                assert_same(Container({key: theirs[key] for key in w}), w)


LAYOUTS = {
    "fortran": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(x.transpose()).transpose(),
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian fortran": lambda x: np.asfortranarray(x.astype(x.dtype.newbyteorder(">"))),
    "unaligned": lambda x: np.frombuffer(b"x" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "matrix": lambda x: x.view(np.matrix),
    "Array": Array,
}


CASES = [(x, dtype, suffix) for x in LAYOUTS for dtype in ("f4", "c8") for suffix in SUFFIXES]
# Big-endian bfloat16 is not supported.
CASES += [(x, "bfloat16", ".safetensors") for x in LAYOUTS if "big" not in x]


@pytest.mark.parametrize(("layout", "dtype", "suffix"), CASES)
def test_every_layout_comes_back(layout, dtype, suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    given = LAYOUTS[layout](numbers((3, 4), dtype))
    x = given.data if layout == "Array" else np.asarray(given)
    before = x.tobytes()
    io.save({"x": given, "y": x[0]}, path)
    assert_same(io.load(path), Container(x=x.astype(dtype), y=x[0].astype(dtype)))
    assert x.tobytes() == before


def test_loaded_arrays_have_dtypes_that_the_native_kernel_supports(file):
    """The kernel refuses dtypes with an explicit byte order, although they equal native dtypes."""
    io.save({name: np.ones(2, name) for name in ("float16", "float32", "float64")}, file)
    for read in READ[file.suffix]:
        assert {x.dtype.byteorder for x in read(file).leaves()} == {"="}


def test_a_mapped_file_can_be_saved_to_itself(tmp_path):
    path = tmp_path / "w.safetensors"
    w = Container(a=np.arange(5.0), b=np.ones((2, 2), np.float32))
    io.save(w, path)
    mapped = io.open(path, "r+")
    io.save({"b": mapped.b, "a": mapped.a[::-1]}, path)
    assert_same(io.load(path), Container(b=w.b, a=w.a[::-1]))


def test_libraries(library, file):
    w = {"a": to_library(library.name, np.arange(6.0).reshape(2, 3)), "b": {}}
    io.save(w, file)
    assert_same(io.load(file), Container(a=np.arange(6.0).reshape(2, 3), b={}))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_loading_for_a_library(name, file):
    need(name)
    w = Container(a=np.arange(6, dtype=np.float32).reshape(2, 3), n=np.array(3, np.int32), e=[])
    w["bits"], w["empty"] = np.array([True, False]), np.empty((0, 2), np.float16)
    io.save(w, file)
    loaded = io.load(file, library=name)
    kind = {"torch": "Tensor", "jax": "ArrayImpl"}[name]
    assert {type(x).__name__ for x in loaded.leaves()} == {kind}
    assert_same(loaded.map(to_numpy), w)


def test_torch(tmp_path):
    torch = need("torch")
    path = tmp_path / "w.safetensors"
    base = torch.arange(12.0)
    w = {
        "bf16": torch.randn(3, 4).bfloat16().t(),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "part": base[3:7],
        "tied": base[3:7],
        "expanded": base[:1].expand(3, 4),
        "conj": torch.tensor([1 + 2j, 3j], dtype=torch.complex64).conj(),
        "neg": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
    }
    resizable = base.untyped_storage().resizable()
    io.save(w, path)
    assert base.untyped_storage().resizable() is resizable is True
    assert path.stat().st_size < 3000  # only the elements of a view are written
    for loaded in (io.load(path, library="torch"), need("safetensors.torch").load_file(path)):
        assert set(loaded) == set(w)
        for name, x in w.items():
            y = loaded[name]
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            assert torch.equal(y.double() if "f" in name else y, x.double() if "f" in name else x)
    loaded = io.load(path, library="torch")
    assert loaded.bf16.untyped_storage().resizable()  # like any tensor
    assert io.load(path).bf16.dtype == ml_dtypes.bfloat16
    assert np.array_equal(io.load(path).bf16.astype(float), w["bf16"].double().numpy())


def test_jax_arrays_are_not_rounded(tmp_path):
    jax = need("jax")
    path = tmp_path / "w.safetensors"
    io.save({"a": {"b": np.ones(2)}}, path)
    with pytest.raises(FileError, match=r"a\.b: float64 is disabled in JAX: set jax_enable_x64"):
        io.load(path, library="jax")
    with jax.enable_x64(True):
        assert io.load(path, library="jax").a.b.dtype == np.float64
    io.save({"w": jax.numpy.ones((2, 2), jax.numpy.bfloat16)}, path)
    assert io.load(path, library="jax").w.dtype == jax.numpy.bfloat16
    with pytest.raises(LeafError, match="w: expected elements, got an array that is traced"):
        jax.jit(lambda x: io.save({"w": x}, path))(np.ones(2))


keys = st.one_of(st.text(st.sampled_from("ab.1/_é\\"), max_size=3), st.integers(-2, 11))
arrays = st.sampled_from([np.arange(3.0), np.ones((2, 1), np.int8), np.array(True)])
trees = st.dictionaries(
    keys,
    st.recursive(
        st.one_of(arrays, st.none()),
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=3),
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
        ),
    ),
    max_size=3,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(tree=trees, metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
def test_a_tree_comes_back_or_is_refused(suffix, tree, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"tree{suffix}"
    names = [io.names.join(p) for p, x in _walk(tree) if x is not None]
    try:
        io.save(tree, path, metadata=metadata)
    except StructureError:
        assert len(set(names)) < len(names)
        return
    except OptionError:
        assert any("\ud800" <= c <= "\udfff" for pair in metadata.items() for x in pair for c in x)
        return
    assert len(set(names)) == len(names)
    assert_same(io.load(path), Container(tree))
    assert io.metadata(path) == metadata


def _walk(node, path=()):
    if isinstance(node, (dict, list, tuple)):
        for key, x in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _walk(x, (*path, key))
    else:
        yield path, node


def test_foreign_names_are_split(tmp_path):
    path = tmp_path / "w.safetensors"
    package.save_file({"b.0.w": np.ones(2), "b.1.w": np.zeros(2), "": np.ones(1)}, path)
    assert io.load(path).to_dict().keys() == {"b", ""}
    assert_same(io.load(path)["b"]["1"]["w"], np.zeros(2))
    package.save_file({"a": np.ones(2), "a.b": np.zeros(2)}, path)
    with pytest.raises(FileError, match=r"'a\.b' collides with another name"):
        io.load(path)
    package.save_file({"a.b.c": np.ones(2), "a.b": np.zeros(2)}, path)
    with pytest.raises(FileError, match=r"'a\.b(\.c)?' "):
        io.load(path)


class Point(tuple):
    __slots__ = ()


REFUSED = [
    ({"a": {"b": 1.0}}, LeafError, "a/b: expected an array, got a float"),
    ({"a": "text"}, LeafError, "a: expected an array, got a str"),
    ({"a": np.array(["text"])}, DtypeError, "a: expected numbers or bools, got <U4"),
    ({"a": np.array([None])}, DtypeError, "a: expected numbers or bools, got object"),
    ({"a": np.zeros(2, "M8[s]")}, DtypeError, "a: expected numbers or bools"),
    ({"a": np.zeros(2, "f4,i4")}, DtypeError, "a: expected numbers or bools"),
    ({"a": np.ma.masked_array([1.0], [True])}, LeafError, "a: expected dense data, got a masked"),
    ({"a": Point([np.ones(1)])}, StructureError, "a: expected a dict, list or tuple, got a Point"),
    ({"a": {1.5: np.ones(1)}}, StructureError, r"a: expected keys of type str or int, got 1.5"),
    ({True: np.ones(1)}, StructureError, "expected keys of type str or int, got True"),
    ({1: np.ones(1), "1": np.ones(1)}, StructureError, "1: its name '1' is also the name of 1"),
    ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, StructureError, "a/b: its name 'a.b' is also"),
    ({"__metadata__": np.ones(1)}, StructureError, "'__metadata__' cannot be a name"),
    ({"\ud800": np.ones(1)}, StructureError, "cannot be a name"),
    (np.ones(1), StructureError, "tree: expected a Container or dict, got an array"),
    ([np.ones(1)], StructureError, "tree: expected a Container or dict, got a list"),
]


@pytest.mark.parametrize(("tree", "kind", "text"), REFUSED)
def test_trees_that_would_not_come_back_are_refused(tree, kind, text, file):
    io.save({"old": np.ones(1)}, file)
    with pytest.raises(kind, match=text) as caught:
        io.save(tree, file)
    assert (type(caught.value), caught.value.argument) == (kind, "tree")
    assert_same(io.load(file), Container(old=np.ones(1)))
    assert os.listdir(file.parent) == [file.name]


def test_dtypes_and_names_that_a_format_lacks_are_refused(tmp_path):
    with pytest.raises(DtypeError, match=r"a/b: safetensors has no complex128: save it as \.npz$"):
        io.save({"a": {"b": np.ones(1, complex)}}, tmp_path / "w.safetensors")
    with pytest.raises(DtypeError, match=r"a: npz has no bfloat16: save it as \.safetensors$"):
        io.save({"a": np.ones(1, ml_dtypes.bfloat16)}, tmp_path / "w.npz")
    with pytest.raises(DtypeError, match=r"a: safetensors has no int4$"):  # .npz has no int4 either
        io.save({"a": np.ones(1, ml_dtypes.int4)}, tmp_path / "w.safetensors")
    with pytest.raises(StructureError, match="cannot be a name"):
        io.save({"a\0b": np.ones(1)}, tmp_path / "w.npz")
    with pytest.raises(
        FileError, match=r"'.*w\.pt' has an unsupported suffix\n  path: expected a name that"
    ):
        io.save({}, tmp_path / "w.pt")
    assert os.listdir(tmp_path) == []


def test_tensors_without_elements_are_refused(file):
    torch = need("torch")
    with pytest.raises(LeafError, match="a: expected dense data, got a tensor on the meta device"):
        io.save({"a": torch.ones(2, device="meta")}, file)
    with pytest.raises(LeafError, match="a: expected dense data, got a sparse"):
        io.save({"a": torch.ones(2).to_sparse()}, file)


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {1: "a"}, {"a": "\ud800"}, {"lars_tree.structure": ""}]
)
def test_metadata_must_be_strings(metadata, file):
    with pytest.raises(OptionError, match="metadata"):
        io.save({}, file, metadata=metadata)


def test_arguments(file):
    io.save({}, file)
    assert_same(io.load(str(file)), Container())
    assert io.metadata(file) == {}
    with pytest.raises(OptionError, match=r"library is unknown: expected .* got 'keras'"):
        io.load(file, library="keras")
    with pytest.raises(FileNotFoundError):
        io.load(file.with_name(f"x{file.suffix}"))
    with pytest.raises(OptionError, match=r"mode is unknown: expected 'r' or 'r.', got 'w'"):
        io.open(file, "w")


def test_links_stay_links(file):
    real = file.with_name(f"real{file.suffix}")
    file.symlink_to(real)  # `real` does not exist yet
    for value in (1.0, 2.0):
        io.save({"a": np.array(value)}, file)
        assert file.is_symlink()
        assert io.load(real).a == value
    assert sorted(os.listdir(file.parent)) == sorted([file.name, real.name])


@pytest.mark.parametrize(
    ("suffix", "module", "function"),
    [
        (".safetensors", np, "empty"),
        (".npz", np, "empty"),
        (".npz", np.lib.format, "read_array_header_1_0"),
    ],
)
def test_a_lack_of_memory_is_not_an_error_of_the_file(
    suffix, module, function, tmp_path, monkeypatch
):
    def no_memory(*arguments):
        raise MemoryError

    path = tmp_path / f"w{suffix}"
    io.save({"a": np.ones(3)}, path)
    monkeypatch.setattr(module, function, no_memory)
    with pytest.raises(MemoryError):
        io.load(path)
