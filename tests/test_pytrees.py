"""Container and Array as pytree nodes of JAX, torch, optree and dm-tree, in either import order."""

from __future__ import annotations

import importlib
import importlib.util
import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tree as dm_tree
from conftest import CI, need
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Array, Container
from lars_tree._tree import pytrees, structure

ROOT = Path(pytrees.__file__).parents[2]
KEYS = st.text("ab/.", max_size=2) | st.integers(0, 2) | st.sampled_from([1.5, None, (1, "a")])
CONTAINERS = st.recursive(
    st.integers(0, 9),
    lambda child: st.dictionaries(KEYS, child, max_size=3) | st.lists(child, max_size=2),
    max_leaves=8,
).map(lambda tree: Container(root=tree))

# For each library: its pytree module, and the names of its functions for leaves, structure, map.
LIBRARIES = {
    "jax": ("jax.tree_util", "tree_leaves", "tree_structure", "tree_map"),
    "torch": ("torch.utils._pytree", "tree_leaves", "tree_structure", "tree_map"),
    "optree": ("optree", "tree_leaves", "tree_structure", "tree_map"),
}


@pytest.fixture(params=LIBRARIES, scope="module")
def pytree(request):
    """The functions (leaves, structure, map) of each library that is installed."""
    module, *names = LIBRARIES[request.param]
    need(request.param)
    return [getattr(importlib.import_module(module), name) for name in names]


def reverse(node):
    """The same tree with the keys of all nodes in reverse order."""
    if isinstance(node, dict):
        return Container({key: reverse(node[key,]) for key in reversed(node)})
    return [reverse(child) for child in node] if isinstance(node, list) else node


def python(code):
    """Run code in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# In a fresh interpreter

CHECK = """
w = lt.Container(b=1.0, a={"y": 2.0, "x": [3.0]})
doubled = tree_map(lambda x: x * 2, w)
assert doubled.to_dict() == {"b": 2.0, "a": {"y": 4.0, "x": [6.0]}}, doubled.to_dict()
assert type(doubled) is type(doubled.a) is lt.Container
assert doubled.paths() == w.paths()
assert type(tree_map(lambda x: x, lt.Array(np.ones(1)))) is lt.Array
"""

CHECK_FILES = """
import io
file = io.BytesIO()
torch.save(lt.Container(b=torch.ones(2), a={"c": lt.Array(torch.ones(1))}), file)
file.seek(0)
loaded = torch.load(file, weights_only=True)
assert type(loaded) is type(loaded.a) is lt.Container
assert type(loaded.a.c) is lt.Array
assert loaded.paths() == [("b",), ("a", "c")]
"""


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "theirs first"])
def test_they_are_nodes_in_either_import_order(ours_first):
    names = [name for name in LIBRARIES if CI or importlib.util.find_spec(name)]
    if not names:
        pytest.skip("none of the libraries is installed")
    ours, theirs = "import numpy as np, lars_tree as lt", f"import {', '.join(names)}"
    lines = [ours, theirs] if ours_first else [theirs, ours]
    for name in names:
        module, *_, tree_map = LIBRARIES[name]
        lines += [f"from {module} import {tree_map} as tree_map", CHECK]
    python("\n".join([*lines, CHECK_FILES if "torch" in names else ""]))


def test_a_library_that_fails_to_import_breaks_nothing(tmp_path):
    """Each import raises the error of the library, and Containers still work."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('no driver')")
    python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import lars_tree as lt
for _ in range(2):
    try:
        import torch
    except RuntimeError as error:
        assert str(error) == "no driver"
    else:
        raise AssertionError("torch was imported")
    assert "torch" not in sys.modules
assert lt.Container(a=1).map(lambda x: x + 1).to_dict() == {{"a": 2}}
""")


# Import hooks


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """A function that writes a module with a given source and returns the name of the module."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def make(source):
        name = f"module_{tmp_path.name}_{len(names)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    yield make
    for name in names:
        sys.modules.pop(name, None)
        pytrees._FINDER.hooks.pop(name, None)


def test_hooks_are_called_once_and_after_the_import(make_module):
    name = make_module("early = 1\nlate = 2")
    seen = []
    pytrees.when_imported(name, lambda module: seen.append(("first", module.late)))
    pytrees.when_imported(name, lambda module: seen.append(("second", module.late)))
    for _ in range(2):  # finding a module without importing it must keep the hooks
        assert importlib.util.find_spec(name) is not None
    assert seen == []
    module = importlib.import_module(name)
    importlib.reload(module)
    assert seen == [("first", 2), ("second", 2)]


def test_a_hook_is_called_at_once_for_an_imported_module(make_module):
    name = make_module("")
    module = importlib.import_module(name)
    seen = []
    pytrees.when_imported(name, seen.append)
    assert seen == [module]


def test_a_hook_waits_while_another_thread_imports_the_module(make_module):
    name = make_module("import time\ntime.sleep(0.3)\nlate = 2")
    thread = threading.Thread(target=importlib.import_module, args=(name,))
    thread.start()
    while name not in sys.modules:
        time.sleep(0.001)
    seen = []
    pytrees.when_imported(name, lambda module: seen.append(module.late))
    thread.join()
    assert seen == [2]


def test_a_hook_survives_a_failed_import(make_module, monkeypatch):
    name = make_module("import os\nif 'LARS_TREE_BROKEN' in os.environ: raise OSError('broken')")
    seen = []
    pytrees.when_imported(name, seen.append)
    monkeypatch.setenv("LARS_TREE_BROKEN", "1")
    with pytest.raises(OSError, match="broken"):
        importlib.import_module(name)
    assert seen == []
    monkeypatch.delenv("LARS_TREE_BROKEN")
    assert seen == [importlib.import_module(name)]


def test_a_hooked_module_keeps_its_own_loader(make_module):
    name = make_module("")
    plain = importlib.import_module(make_module(""))
    pytrees.when_imported(name, lambda module: None)
    module = importlib.import_module(name)
    assert type(module.__loader__) is type(plain.__loader__)
    assert type(module.__spec__.loader) is type(plain.__spec__.loader)


def test_a_missing_library_with_a_hook_is_still_missing():
    name = "a_module_that_does_not_exist"
    pytrees.when_imported(name, lambda module: None)
    try:
        assert importlib.util.find_spec(name) is None
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)
    finally:
        del pytrees._FINDER.hooks[name]


# Laws


@given(w=CONTAINERS)
def test_a_map_keeps_nodes_and_key_order(pytree, w):
    *_, tree_map = pytree
    mapped = tree_map(lambda x: x + 1, w)
    assert mapped == w.map(lambda x: x + 1)
    assert mapped.paths() == w.paths()
    assert type(mapped) is Container


@given(w=CONTAINERS)
def test_structures_do_not_depend_on_key_order(pytree, w):
    leaves, structure, _ = pytree
    assert structure(reverse(w)) == structure(w)
    assert hash(structure(reverse(w))) == hash(structure(w))
    assert leaves(reverse(w)) == leaves(w)


@given(w=CONTAINERS, other=CONTAINERS)
def test_structures_are_equal_exactly_for_equal_keys(pytree, w, other):
    _, structure, _ = pytree
    same = w.map(lambda x: 0) == other.map(lambda x: 0)
    assert (structure(w) == structure(other)) == same


def test_dm_tree_maps_over_a_container():
    w = Container(b=1, a={"z": 2, "y": [3, None]})
    mapped = dm_tree.map_structure(lambda x: x and x + 1, w)
    assert type(mapped) is type(mapped.a) is Container
    assert mapped.to_dict() == {"b": 2, "a": {"z": 3, "y": [4, None]}}
    assert mapped.paths() == w.paths()


def test_a_subclass_keeps_its_type(pytree):
    class Weights(Container):
        pass

    *_, tree_map = pytree
    mapped = tree_map(lambda x: x + 1, Weights(a=1, b={"c": 2}))
    assert (type(mapped), type(mapped.b), mapped.b.c) == (Weights, Weights, 3)


def test_an_array_is_a_node_around_its_array(pytree):
    leaves, _, tree_map = pytree
    array = Array(np.ones(2))
    assert leaves(array)[0] is array.data
    mapped = tree_map(lambda x: x * 2, Container(a=array))
    assert type(mapped.a) is Array
    assert (mapped.a.data == 2).all()


W = Container(b=1.0, a={"y": 2.0, "x": [3.0]})


def test_jax_names_leaves_by_their_keys():
    tree_util = need("jax").tree_util
    paths = [tree_util.keystr(path) for path, _ in tree_util.tree_flatten_with_path(W)[0]]
    assert paths == ["['a']['x'][0]", "['a']['y']", "['b']"]


def test_torch_names_leaves_by_their_keys():
    need("torch")
    pytree = importlib.import_module("torch.utils._pytree")
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(W)[0]]
    assert paths == ["['a']['x'][0]", "['a']['y']", "['b']"]


def test_optree_names_leaves_by_their_keys():
    optree = need("optree")
    assert optree.tree_paths(W) == [("a", "x", 0), ("a", "y"), ("b",)]
    assert [accessor(W) for accessor in optree.tree_accessors(W)] == [3.0, 2.0, 1.0]


def test_a_structure_of_torch_can_be_serialized():
    need("torch")
    pytree = importlib.import_module("torch.utils._pytree")
    spec = pytree.tree_structure(W)
    read = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert read == spec
    assert pytree.tree_unflatten([1, 2, 3], read).paths() == W.paths()


# Uses in the libraries


def test_jit_does_not_retrace_for_another_key_order():
    jax = need("jax")
    traces = []

    @jax.jit
    def doubled(w):
        traces.append(list(w))
        return w.map(lambda x: x * 2)

    assert doubled(W).allclose({"b": 2.0, "a": {"y": 4.0, "x": [6.0]}})
    assert doubled(reverse(W)).allclose({"b": 2.0, "a": {"y": 4.0, "x": [6.0]}})
    assert traces == [["b", "a"]]
    doubled(Container(b=1.0))
    assert traces == [["b", "a"], ["b"]]


def test_jax_differentiates_and_maps_over_a_container():
    jax = need("jax")
    w = Container(a=jax.numpy.arange(3.0), b={"c": jax.numpy.ones(3)})
    slope = jax.grad(lambda w: (w.a**2).sum() + 3 * w.b.c.sum())(w)
    assert type(slope) is Container
    assert (slope.a.tolist(), slope.b.c.tolist()) == ([0, 2, 4], [3, 3, 3])
    assert jax.vmap(lambda w: w + 1)(w).a.tolist() == [1, 2, 3]


def test_torch_differentiates_a_container():
    torch = need("torch")
    w = Container(a=torch.arange(3.0), b={"c": torch.ones(3)})
    slope = torch.func.grad(lambda w: (w.a**2).sum() + 3 * w.b.c.sum())(w)
    assert type(slope) is Container
    assert (slope.a.tolist(), slope.b.c.tolist()) == ([0, 2, 4], [3, 3, 3])


def test_a_state_dict_is_converted_and_back():
    torch = need("torch")
    layer = torch.nn.Linear(2, 3)
    w = Container.from_flat({f"head.{k}": x for k, x in layer.state_dict().items()}, sep=".")
    assert list(w.to_flat(".")) == ["head.weight", "head.bias"]
    other = torch.nn.Linear(2, 3)
    other.load_state_dict(w.head)
    assert (other.weight == layer.weight).all()


@given(st.lists(st.text("ab/", max_size=2), unique=True, max_size=4))
def test_torch_load_returns_equal_containers(keys):
    torch = need("torch")
    w = Container({key: {"t": torch.tensor([i]), "n": [i, None]} for i, key in enumerate(keys)})
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded == w
    assert type(loaded) is Container
    assert loaded.paths() == w.paths()
    assert all(type(child) is Container for child in loaded.values())


def test_array_classes_of_libraries_are_cached_for_the_kernel():
    torch, jax = need("torch"), need("jax")
    leaves = [torch.ones(1), torch.nn.Parameter(torch.ones(1)), jax.numpy.ones(1)]
    assert len(structure.leaves(leaves)) == 3
    assert set(map(type, leaves)) <= structure.KINDS.keys()


def test_a_subclass_is_freed_unless_a_library_registered_it():
    code = """
import gc, weakref
from lars_tree import Container
cls = type("Local", (Container,), {})
assert type(cls(a=cls(b=1)).copy().a) is cls
seen = weakref.ref(cls)
del cls
gc.collect()
assert seen() is None
import optree
assert optree.tree_leaves(Container(a=1)) == [1]
"""
    need("optree")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tied_weights_stay_tied_in_a_file():
    torch = need("torch")
    x = torch.ones(2)
    file = io.BytesIO()
    torch.save(Container(a=x, b={"c": x}), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    loaded.a[0] = 5.0
    assert loaded.b.c[0] == 5.0


def test_leaves_in_the_order_of_another_library_are_put_back_by_it(pytree):
    """Its order is that of the sorted keys; the keys of the Container keep their order."""
    w = Container(b=1, a={"d": 2, "c": 3})
    leaves, structure_of, _ = pytree
    assert leaves(w) == [3, 2, 1]
    again = structure_of(w).unflatten(leaves(w))
    assert again == w
    assert (list(again), list(again.a)) == (["b", "a"], ["d", "c"])
