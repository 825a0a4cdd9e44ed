"""Cyclic and very deep trees give an error or a result, and never crash the interpreter."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lars_tree import Container, Lars, StructureError, io, lars_update, report
from lars_tree._tree import structure
from lars_tree.testing import assert_close_ulp, assert_identical

X = np.ones(2)


def cyclic():
    node = {"x": X}
    node["me"] = [node]
    return {"root": node}


def held():
    """A Container that contains itself."""
    w = Container(x=X)
    w["me"] = w
    return w


def unconverted(tree):
    """A Container whose items are not converted to Containers."""
    return Container._lars_tree_make(tree)


TAKE_A_TREE = {
    "Container": ("mapping", Container),
    "Container of keys": ("keys", lambda tree: Container(a=tree)),
    "Container of pairs": ("mapping", lambda tree: Container([("a", tree)])),
    "update": ("mapping", lambda tree: Container().update(tree)),
    "|": ("mapping", lambda tree: Container() | tree),
    "| on the right": ("mapping", lambda tree: tree | Container()),
    "|=": ("mapping", lambda tree: Container().__ior__(tree)),
    "setitem": ("value", lambda tree: Container().__setitem__("a", tree)),
    "setitem of a path": ("value", lambda tree: Container().__setitem__(("a", "b"), tree)),
    "setattr": ("value", lambda tree: setattr(Container(), "a", tree)),
    "setdefault": ("value", lambda tree: Container().setdefault("a", tree)),
    "from_flat": ("flat", lambda tree: Container.from_flat({"a.b": tree}, ".")),
    "from_state_dict": ("state_dict", lambda tree: io.from_state_dict({"a": tree})),
    "from_state_dict of it": ("state_dict", io.from_state_dict),
    "result of map": ("the result of fn", lambda tree: Container(a=1).map(lambda _: tree)),
    "map": ("the Container", lambda tree: unconverted(tree).map(print, tree)),
    "operator": ("self", lambda tree: unconverted(tree) + tree),
    "==": ("self", lambda tree: unconverted(tree) == tree),
    "diff": ("self", lambda tree: unconverted(tree).diff(tree)),
    "allclose": ("self", lambda tree: unconverted(tree).allclose(tree)),
    "save": ("tree", lambda tree: io.save(tree, "x.npz")),
    "to_state_dict": ("tree", io.to_state_dict),
    "w": ("w", lambda tree: lars_update(tree, 1.0, 0.1)),
    "dcdw": ("w", lambda tree: lars_update(tree, tree, 0.1)),
    "lr": ("lr", Lars),
    "prefix": ("lr", lambda tree: lars_update({"root": {"x": X}}, 1.0, tree)),
    "init": ("w", Lars(0.1).init),
    "trust_ratios": ("w", lambda tree: report.trust_ratios(tree, 1.0, 0.1)),
    "layer_table": ("w", lambda tree: report.layer_table(tree, 1.0, 0.1)),
    "record": ("ratios", lambda tree: report.TrustHistory().record(tree)),
    "scalars": ("ratios", lambda tree: report.ScalarCallback(None)(tree, 0)),
    "assert_identical": ("actual", lambda tree: assert_identical(tree, tree)),
    "assert_close_ulp": ("actual", lambda tree: assert_close_ulp(tree, tree)),
}
METHODS = {
    "copy": Container.copy,
    "leaves": Container.leaves,
    "paths": Container.paths,
    "unflatten": lambda w: w.unflatten([1]),
    "to_flat": Container.to_flat,
    "to_dict": Container.to_dict,
    "map": lambda w: w.map(print),
    "filter": lambda w: w.filter(lambda path, x: True),
    "partition": lambda w: w.partition(lambda path, x: True),
    "operator": lambda w: -w,
    "==": lambda w: w == held(),
    "!=": lambda w: held() != w,
    "in": lambda w: w in [held()],
    "num_leaves": Container.num_leaves,
}


@pytest.mark.parametrize("name", TAKE_A_TREE)
def test_a_tree_that_holds_itself_is_refused_with_its_path(name):
    argument, act = TAKE_A_TREE[name]
    with pytest.raises(
        StructureError, match=r"expected a tree, got the node at .* again"
    ) as caught:
        act(cyclic())
    assert caught.value.argument == argument
    assert caught.value.paths[0][-1] in (0, "me")


@pytest.mark.parametrize("name", METHODS)
def test_a_container_that_holds_itself_says_so(name):
    with pytest.raises(StructureError, match="self contains itself\n  me: expected a tree"):
        METHODS[name](held())


def test_trees_are_as_deep_as_the_recursion_limit_allows():
    tree = 1
    for _ in range(sys.getrecursionlimit() + 1):
        tree = {"a": tree}
    for walk in (structure.walk, lambda tree: structure.side_by_side(tree, tree)):
        assert len(list(walk(tree))) == 1
        with pytest.raises(RecursionError):
            list(walk({"a": tree}))


def test_a_recursion_error_of_a_users_function_is_not_replaced():
    def endless(x):
        return endless(x)

    with pytest.raises(RecursionError, match="maximum recursion depth"):
        Container(a=1).map(endless)


def test_a_deep_copy_of_a_container_that_holds_itself():
    import copy

    w = held()
    new = copy.deepcopy(w)
    assert new["me"] is new is not w
    assert new.x.tolist() == X.tolist()


def test_endless_nodes_are_refused():
    class Endless(dict):
        def items(self):
            return [("deeper", Endless())]

    with pytest.raises(RecursionError):
        lars_update(Endless(), 1.0, 0.1)


DEEP = """
import copy, pickle, sys, threading
import numpy as np
from collections import namedtuple
from lars_tree import Container, Lars, errors, io, lars_update, report
from lars_tree.testing import assert_identical, assert_close_ulp

sys.setrecursionlimit(10**6)
P = namedtuple("P", "x")

class Own(dict):
    def items(self):
        return dict.items(self)

KINDS = {
    "dict": lambda x: {"d": x},
    "list": lambda x: [x],
    "Container": lambda x: Container._lars_tree_make({"d": x}),
    "namedtuple": P,
    "own": lambda x: Own(d=x),
}

def deep(make):
    node = np.ones(1)
    for _ in range(DEPTH):
        node = make(node)
    return node

def held(x):
    return Container._lars_tree_make({"top": x})

ACTS = {
    "update": lambda w: lars_update(w, w, 0.1),
    "in place": lambda w: lars_update(w, 1.0, 0.0, out=w),
    "rates": lambda w: lars_update(w, w, w),
    "init": lambda w: Lars(0.1).init(w),
    "schedules": lambda w: Lars(w),
    "ratios": lambda w: report.trust_ratios(w, w, 0.1),
    "table": lambda w: report.layer_table(w, w, 0.1),
    "record": lambda w: report.TrustHistory().record(w),
    "make": lambda w: Container(a=w),
    "set": lambda w: Container().__setitem__("a", w),
    "or": lambda w: Container() | {"a": w},
    "from_state_dict": lambda w: io.from_state_dict({"a": w}),
    "repr": lambda w: repr(held(w)),
    "equal": lambda w: held(w) == held(w),
    "allclose": lambda w: held(w).allclose(held(w)),
    "diff": lambda w: held(w).diff(held(w)),
    "copy": lambda w: copy.copy(held(w)),
    "map": lambda w: held(w).map(lambda x: x + 1),
    "operator": lambda w: held(w) + held(w),
    "filter": lambda w: held(w).filter(lambda path, x: True),
    "to_flat": lambda w: held(w).to_flat(),
    "to_dict": lambda w: held(w).to_dict(),
    "identical": lambda w: assert_identical(w, w),
    "within_ulp": lambda w: assert_close_ulp(w, w),
    "mismatch": lambda w: lars_update(w, [w], 0.1),
}

def run():
    for kind, make in KINDS.items():
        w = deep(make)
        for name, act in ACTS.items():
            if kind != "dict" and name not in ("update", "make", "mismatch"):
                continue  # the same code for all kinds
            print(kind, name, flush=True)
            try:
                act(w)
            except errors.StructureError:
                assert name == "mismatch", (kind, name)
    w = deep(KINDS["Container"])
    print("deepcopy", flush=True)
    copy.deepcopy(w)
    print("pickle", flush=True)
    try:
        pickle.loads(pickle.dumps(w))
    except RecursionError:  # Python 3.12 and later limit pickle, whatever the recursion limit is
        assert sys.version_info >= (3, 12)
    print("done", flush=True)

thread = threading.Thread(target=run)  # with the usual stack size of a thread
thread.start()
thread.join()
"""


def test_deep_trees_do_not_overflow_the_stack():
    code = DEEP.replace("DEPTH", "10_000")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[-1:]) == (0, ["done"]), [*lines[-1:], done.stderr[-2000:]]
