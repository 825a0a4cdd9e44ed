"""When a class is a node: its registration with JAX, torch or optree, and the classes of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from conftest import need
from registered_classes import REGISTERED, Fields, jax_class, jax_mapping

from lars_tree import Array, Container, Lars, LeafError, lars_update
from lars_tree._tree import structure

W, G = np.array([3.0, 4.0]), np.array([0.0, 10.0])
NEW = [3.0, 3.5]  # ratio 5 / 10: a step of 0.05 * [0, 10]


def values(tree):
    return [x.tolist() for x in structure.leaves(tree)]


@pytest.mark.parametrize("library", ["jax", "torch", "optree"])
def test_a_class_may_be_registered_after_it_was_a_leaf(library):
    need(library)
    cls = type("Late", (Fields,), {})
    assert structure.is_leaf(cls(W, W))
    assert len(structure.leaves([cls(W, W)])) == 1
    with pytest.raises(LeafError, match="expected an array, got a Late"):
        lars_update({"x": cls(W, W)}, G, 0.1)
    if library == "jax":
        need("jax").tree_util.register_pytree_node_class(cls)
    elif library == "torch":
        pytree = pytest.importorskip("torch.utils._pytree")
        pytree.register_pytree_node(
            cls, cls.tree_flatten, lambda children, tag: cls.tree_unflatten(tag, children)
        )
    else:
        optree = need("optree")
        optree.register_pytree_node_class(cls, namespace=optree.registry.__GLOBAL_NAMESPACE)
    assert values(lars_update({"x": cls(W, W)}, G, 0.1)) == [NEW, NEW]


def test_a_class_in_a_namespace_of_optree_is_a_leaf():
    optree = need("optree")
    cls = type("Spaced", (Fields,), {})
    optree.register_pytree_node_class(cls, namespace="somewhere")
    assert structure.is_leaf(cls(W, W))


def test_arrays_are_leaves_even_if_their_class_is_registered():
    torch = need("torch")
    pytree = pytest.importorskip("torch.utils._pytree")

    class Tensor(torch.Tensor):
        pass

    pytree.register_pytree_node(Tensor, lambda x: ([x.data], None), lambda c, _: c[0])
    x = torch.ones(2).as_subclass(Tensor)
    arrays = [x, Array(W), need("jax").numpy.ones(2), torch.nn.Parameter(torch.ones(2))]
    assert all(map(structure.is_leaf, arrays))
    assert len(structure.leaves(arrays)) == 4


def test_an_empty_node_does_not_decide_for_its_class():
    tree_util = need("jax").tree_util

    @tree_util.register_pytree_node_class
    class Flat(dict):
        """Gives the library the leaves of all levels, like the FlatMap of Haiku."""

        def tree_flatten(self):
            return tree_util.tree_flatten(dict(self))

        @classmethod
        def tree_unflatten(cls, structure, leaves):
            return cls(tree_util.tree_unflatten(structure, leaves))

    flat = {"b": {"c": W}, "a": W}
    for items in ({}, {"a": W}, flat, {}):
        new = lars_update(Flat(items), G, 0.1)
        assert type(new) is Flat
        assert [path for path, _ in structure.walk(new)] == [
            path for path, _ in structure.walk(items)
        ]
    assert values(lars_update(flat, Flat(b={"c": G}, a=0 * G), 0.1)) == [NEW, W.tolist()]


def test_nodes_without_children_are_kept():
    jax = need("jax")

    @jax.tree_util.register_static
    @dataclass(frozen=True)
    class Config:
        name: str

    w = {"c": Config("x"), "w": W, "e": jax_class()([], {})}
    new = lars_update(w, {"c": Config("y"), "w": G, "e": jax_class()([], {})}, 0.1)
    assert (new["c"], new["w"].tolist(), new["e"].a) == (Config("x"), NEW, [])
    assert Lars(0.1).init(w).velocity.c == Config("x")


def test_a_container_takes_all_items_of_a_registered_mapping():
    node = REGISTERED["jax dict"][0]()(W, G)
    assert list(Container(node)) == ["a", "b", "tag"]
    assert Container(x=node).x is node  # only a part of its items are children
    table = Container(x=jax_mapping()(W, G))
    assert (type(table.x), list(table.x)) == (Container, ["b", "a"])
