"""Deep trees, long names and many names: time and memory stay proportional to the file size."""

from __future__ import annotations

import inspect
import json
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import need
from test_io import assert_same
from test_io_hostile import archive, entry, npy, safetensors

from lars_tree import Container, FileError, StructureError, io

need("ml_dtypes")
need("safetensors")

DEEPEST = 100
EMPTY = entry(dtype="U8", shape=[0], offsets=[0, 0])

# Ways to put a tree one level deeper.
NODES = {
    "dict": lambda x: {"k": x},
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "dict of an integer": lambda x: {7: x},
    "dict of dots": lambda x: {"a.b": x},
    "dict of a slash": lambda x: {"a/b": x},
}
READ = [io.load, io.open, io.metadata]


@pytest.fixture(params=[".safetensors", ".npz"])
def path(request, tmp_path):
    return tmp_path / f"w{request.param}"


def deep(kind, levels, leaf):
    tree = leaf
    for _ in range(levels - 1):
        tree = NODES[kind](tree)
    return {"top": tree}


def refused(path, content):
    """The error message for a file. Assert that all functions raise the same message."""
    path.write_bytes(content)
    texts = set()
    for read in READ if path.suffix == ".safetensors" else [io.load, io.metadata]:
        with pytest.raises(FileError) as caught:
            read(path)
        texts.add(str(caught.value))
    (text,) = texts
    return text


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("leaf", [np.ones(1), None, {}, [], ()], ids=repr)
def test_100_levels_come_back_and_101_are_refused(kind, leaf, path):
    tree = deep(kind, DEEPEST, leaf)
    io.save(tree, path, metadata={"a": "b"})
    assert_same(io.load(path), Container(tree))
    assert io.metadata(path) == {"a": "b"}
    if path.suffix == ".safetensors":
        assert_same(io.open(path).map(np.array), Container(tree))
    with pytest.raises(StructureError, match="expected at most 100 levels") as caught:
        io.save(deep(kind, DEEPEST + 1, leaf), path)
    assert caught.value.argument == "tree"
    assert [len(x) for x in caught.value.paths] == [DEEPEST + 1]
    assert_same(io.load(path), Container(tree))


def test_far_too_deep_trees_are_refused_without_a_recursion_error(path):
    with pytest.raises(StructureError, match="expected at most 100 levels"):
        io.save(deep("list", 5_000, None), path)
    with pytest.raises(StructureError, match="expected at most 100 levels"):
        io.to_state_dict(deep("dict", 5_000, np.ones(1)))


def test_a_tree_that_holds_itself_twice_is_refused(path):
    tree = {}
    tree["a"] = tree["b"] = tree
    with pytest.raises(StructureError, match="tree contains itself"):
        io.save(tree, path)


def test_depth_does_not_depend_on_the_stack_of_the_caller(path):
    tree = deep("dict of dots", DEEPEST, np.ones(1))

    def at(frames, call):
        return call() if frames == 0 else at(frames - 1, call)

    frames = sys.getrecursionlimit() // 2
    at(frames, lambda: io.save(tree, path))
    assert at(frames, lambda: io.load(path)).num_leaves() == 1
    with pytest.raises(StructureError, match="expected at most 100 levels"):
        at(frames, lambda: io.save({"a": tree}, path))


def test_a_valid_file_is_not_called_malformed_if_the_stack_is_nearly_full(path):
    io.save(deep("dict of dots", DEEPEST, np.ones(1)), path)

    def at(frames, call):
        return call() if frames == 0 else at(frames - 1, call)

    io.load(path)
    with pytest.raises(RecursionError):
        at(sys.getrecursionlimit() - len(inspect.stack(0)) - 80, lambda: io.load(path))


def test_names_are_split_to_the_same_depth(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors({".".join("a" * DEEPEST): EMPTY}, b""))
    for read in READ:
        read(path)
    for parts in (DEEPEST + 1, 400, 100_000):
        text = refused(path, safetensors({".".join("a" * parts): EMPTY}, b""))
        assert "has more than 100 levels" in text
    text = refused(tmp_path / "w.npz", archive((".".join("a" * 400) + ".npy", npy())))
    assert "has more than 100 levels" in text


def test_a_flat_name_may_have_any_number_of_dots(path):
    tree = {".".join("a" * 400): np.ones(1)}
    io.save(tree, path)
    assert_same(io.load(path), Container(tree))


@pytest.mark.parametrize("levels", [DEEPEST + 1, 250, 100_000])
@pytest.mark.parametrize(("start", "end"), [('["list",', "]"), ('["dict",["a",', "]]")])
def test_a_deeper_structure_is_refused(start, end, levels, tmp_path):
    text = '["dict",["top",' + start * (levels - 1) + "null" + end * (levels - 1) + "]]"
    kept = {"lars_tree.structure": text}
    contents = {
        ".safetensors": safetensors({"__metadata__": kept}, b""),
        ".npz": archive(("__metadata__.npy", npy(np.array(json.dumps(kept))))),
    }
    for suffix, content in contents.items():
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"more than 100 levels|nested too deeply"):
            io.load(path)


def test_a_duplicate_name_is_found_in_linear_time(tmp_path):
    """The duplicate is the last of 50,000 names: comparing all pairs would take half a minute."""
    path = tmp_path / "w.safetensors"
    text = json.dumps({f"n{i}": EMPTY for i in range(50_000)})
    path.write_bytes(safetensors(f'{text[:-1]}, "n49999": {json.dumps(EMPTY)}}}'.encode(), b""))
    with pytest.raises(FileError, match="\n  n49999: the header has this name twice"):
        io.load(path)


LONG = {
    "dots": {"." * 5_000_000: EMPTY},
    "letters and a collision": {"a" * 5_000_000: EMPTY, "a" * 5_000_000 + ".b": EMPTY},
    "a structure without the name": {
        "__metadata__": {"lars_tree.structure": '["dict"]'},
        "a" * 5_000_000: EMPTY,
    },
    "dots in many names": {f"{i}{'.' * 98}": EMPTY for i in range(3_000)},
}


@pytest.mark.parametrize("case", LONG)
def test_long_names_take_memory_in_proportion(case, tmp_path):
    path = tmp_path / "w.safetensors"
    content = safetensors(LONG[case], b"")
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileError) as caught:
            io.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(content)
    assert len(str(caught.value)) < 3000


def test_many_nodes_for_few_leaves_come_back(path):
    """The file records the structure, because splitting the names may not create so many nodes."""
    tree = {f"{i}": deep("dict", 50, np.ones(1)) for i in range(30)}
    io.save(tree, path)
    assert_same(io.load(path), Container(tree))
