"""The kernel calls Python code, which may raise, or change the tree that the kernel is reading.

A tree may also be too deep for a thread's stack, so the kernel walks only the levels near the root.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import CI, need
from native_steps import numpy_reader, stepped

from lars_tree import _native
from lars_tree._numerics.formula import Rule
from lars_tree._tree import kinds, structure

if _native.kernel is None and (not CI or os.environ.get("LARS_TREE_NATIVE") == "0"):
    pytest.skip("the native kernel was not built, or is turned off", allow_module_level=True)


def walk(*trees, others):
    """The leaves that the kernel finds. Sets count as nodes; the kernel calls `others` for them."""
    found = []
    arguments = (found, True) if len(trees) == 2 else (found,)
    call = _native.kernel.match if len(trees) == 2 else _native.kernel.collect
    call(*trees, *arguments, {**structure.KINDS, set: kinds.ITEMS}, structure.kind_of, others)
    return found


CHANGES = {
    "a list grows": ([{0}, 1, 2], lambda tree: tree.append(3)),
    "a list shrinks": ([{0}, 1, 2], lambda tree: tree.pop()),
    "a list is emptied": ([{0}, 1, 2], lambda tree: tree.clear()),
    "a dict grows": ({"a": {0}, "b": 1}, lambda tree: tree.update(c=1)),
    "a dict shrinks": ({"a": {0}, "b": 1}, lambda tree: tree.pop("b")),
    "a dict is emptied": ({"a": {0}, "b": 1}, lambda tree: tree.clear()),
}


@pytest.mark.parametrize("side", ["tree", "tree with a prefix", "prefix"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_tree_that_changes_while_it_is_read_is_refused(name, side):
    tree, change = CHANGES[name]
    tree = type(tree)(tree)
    other = type(tree)(tree)
    trees = {"tree": (tree,), "tree with a prefix": (tree, other), "prefix": (other, tree)}

    def others(*_):
        change(tree)
        return True

    with pytest.raises(RuntimeError, match="a tree was changed while it was read"):
        walk(*trees[side], others=others)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_dict_whose_keys_are_replaced_while_it_is_read_is_refused(prefix):
    tree = {"a": {0}, "b": 1}

    def others(*_):
        tree["c"] = tree.pop("a")
        return True

    with pytest.raises(RuntimeError, match="a tree was changed while it was read"):
        walk(*[tree, dict(tree)][: 1 + prefix], others=others)


@pytest.mark.parametrize("changed", [0, 1])
def test_a_key_may_change_the_tree_when_it_is_compared(changed):
    """The walk must not use values that the comparison of keys freed."""

    class Key:
        def __hash__(self):
            return 0

        def __eq__(self, other):
            trees[changed].clear()
            return True

    trees = [{Key(): np.ones(3), "a": np.ones(2)} for _ in range(2)]
    with pytest.raises(RuntimeError, match="a tree was changed while it was read"):
        walk(*trees, others=None)


def test_a_callback_may_make_the_list_of_leaves_shorter():
    ws = [np.ones(3) for _ in range(20)]

    def make(w):
        del ws[5:]
        return np.empty_like(w)

    with pytest.raises(IndexError):
        stepped(numpy_reader(make=make), ws, [np.ones(3)] * 20, None, [Rule(0.1)] * 20)


@pytest.mark.parametrize("index", range(1, 6))
def test_exceptions_of_methods_of_tensors_propagate(index):
    torch = need("torch")
    from lars_tree._backends.torch.reader import _EXCHANGE, TENSOR_TYPES

    if _EXCHANGE is None:
        pytest.skip("this torch has no exchange of tensors")

    def raising(*_):
        raise KeyError("on purpose")

    tensors = (*_EXCHANGE[:index], raising, *_EXCHANGE[index + 1 :])
    ws, g = [torch.from_numpy(np.ones(3))], [torch.ones(3)]
    reader = _native.kernel.Reader(TENSOR_TYPES, Rule._fields, tensors=tensors)
    with pytest.raises(KeyError, match="on purpose"):
        stepped(reader, ws, g, ws, [Rule(0.1)])


DEEP = """
import collections, sys, threading
import attrs
from lars_tree._tree import structure
@attrs.define
class Fields:
    x: object
class Walked(dict):
    def items(self):
        return dict.items(self)
Named = collections.namedtuple("Named", "x")
def walked(x):
    return Walked(x=x)
def foreign(x):
    return collections.UserDict(x=x)
def deep(kinds, leaf):
    for i in range(10_000):
        leaf = kinds[i % len(kinds)](leaf)
    return leaf
def as_list(x):
    return [x]
def as_dict(x):
    return {"x": x}
def as_tuple(x):
    return (x,)
def work():
    for kinds in mixes:
        tree, prefix = deep(kinds, 1), deep(kinds, 2)
        kept.extend([tree, prefix])
        assert structure.leaves(tree) == [1]
        assert structure.broadcast("dcdw", tree, prefix) == [2]
        assert structure.broadcast("dcdw", [tree, tree], [3, prefix]) == [3, 2]
    print(len(mixes))
kept = []  # freed by the main thread, because Python 3.13 itself needs more stack to free them
kinds = [as_list, as_dict, as_tuple, walked, Named, Fields, foreign]
mixes = [[as_list], [as_dict], kinds, [as_list] * 31 + [walked]]
sys.setrecursionlimit(10**6)
import tree
threading.stack_size(2**16)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_deep_trees_in_a_thread_with_a_small_stack():
    result = subprocess.run(
        [sys.executable, "-c", DEEP], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "4\n", "")
