"""Classes registered with JAX, torch or optree, as their users write them.

Each function registers a class with one library, once, and returns a function that makes a node of
two children. All classes but the parameter lists of torch have static data: `tag`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import attrs
from conftest import need


class Fields:
    """A node with two children in attributes, and a method for each way to register it."""

    def __init__(self, a: Any, b: Any, tag: str = "tag") -> None:
        self.a, self.b, self.tag = a, b, tag

    def tree_flatten(self):
        return (self.a, self.b), self.tag

    @classmethod
    def tree_unflatten(cls, tag, children):
        return cls(*children, tag)


class Table(Mapping):
    """A mapping that gives the libraries no keys, and that is more than its items."""

    def __init__(self, items, tag="tag"):
        self.items_, self.tag = dict(items), tag

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)

    def tree_flatten(self):
        return tuple(self.items_.values()), (tuple(self.items_), self.tag)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(zip(aux[0], children, strict=True), aux[1])


def _table(cls):
    return lambda a, b, tag="tag": cls({"b": b, "a": a}, tag)


@functools.cache
def jax_dataclass():
    jax = need("jax")

    @jax.tree_util.register_dataclass
    @dataclass
    class Params:
        a: Any
        b: Any
        tag: str = field(default="tag", metadata={"static": True})

    return Params


@functools.cache
def jax_class():
    return need("jax").tree_util.register_pytree_node_class(type("Unnamed", (Fields,), {}))


@functools.cache
def jax_class_with_keys():
    tree_util = need("jax").tree_util

    @tree_util.register_pytree_with_keys_class
    class Named(Fields):
        def tree_flatten(self):
            return (self.b, self.a), self.tag

        def tree_flatten_with_keys(self):
            names = map(tree_util.GetAttrKey, "ba")
            return tuple(zip(names, (self.b, self.a), strict=True)), self.tag

        @classmethod
        def tree_unflatten(cls, tag, children):
            return cls(*reversed(tuple(children)), tag)

    return Named


@functools.cache
def jax_dict():
    """A dict with an item that is static."""
    tree_util = need("jax").tree_util

    @tree_util.register_pytree_with_keys_class
    class Tagged(dict):
        def tree_flatten_with_keys(self):
            names = [name for name in self if name != "tag"]
            return [(tree_util.DictKey(name), self[name]) for name in names], (
                tuple(names),
                self["tag"],
            )

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls({**dict(zip(aux[0], children, strict=True)), "tag": aux[1]})

    return lambda a, b, tag="tag": Tagged(a=a, b=b, tag=tag)


@functools.cache
def jax_attrs():
    """An attrs class with a static field."""

    @need("jax").tree_util.register_pytree_node_class
    @attrs.frozen
    class Layer:
        a: Any
        tag: str
        b: Any

        def tree_flatten(self):
            return (self.a, self.b), self.tag

        @classmethod
        def tree_unflatten(cls, tag, children):
            return cls(children[0], tag, children[1])

    return lambda a, b, tag="tag": Layer(a, tag, b)


@functools.cache
def jax_mapping():
    cls = need("jax").tree_util.register_pytree_node_class(type("Table", (Table,), {}))
    return _table(cls)


@functools.cache
def torch_class():
    return _registered_with_torch(type("Unnamed", (Fields,), {}))


@functools.cache
def torch_mapping():
    return _table(_registered_with_torch(type("Table", (Table,), {})))


def _registered_with_torch(cls, **options):
    def unflatten(children, context):
        return cls.tree_unflatten(context, children)

    _torch_pytree().register_pytree_node(cls, cls.tree_flatten, unflatten, **options)
    return cls


@functools.cache
def torch_class_with_keys():
    pytree = _torch_pytree()

    def flatten_with_keys(node):
        return [(pytree.GetAttrKey(name), getattr(node, name)) for name in "ab"], node.tag

    cls = type("Named", (Fields,), {})
    return _registered_with_torch(cls, flatten_with_keys_fn=flatten_with_keys)


def _torch_pytree():
    need("torch")
    return importlib.import_module("torch.utils._pytree")


@functools.cache
def optree_class():
    return _registered_with_optree(type("Unnamed", (Fields,), {}))


@functools.cache
def optree_mapping():
    return _table(_registered_with_optree(type("Table", (Table,), {})))


def _registered_with_optree(cls):
    optree = need("optree")
    namespace = optree.registry.__GLOBAL_NAMESPACE
    return optree.register_pytree_node_class(cls, namespace=namespace)


@functools.cache
def optree_class_with_keys():
    optree = need("optree")
    cls = type("Named", (Fields,), {})
    optree.register_pytree_node(
        cls,
        lambda node: ((node.a, node.b), node.tag, ("a", "b")),
        cls.tree_unflatten,
        path_entry_type=optree.GetAttrEntry,
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    return cls


def jax_partial():
    """A function with bound arguments."""
    jax = need("jax")
    return lambda a, b, tag=len: jax.tree_util.Partial(tag, a, k=b)


# By name: how to register the class, and the paths of its two children.
REGISTERED = {
    "jax dataclass": (jax_dataclass, [("a",), ("b",)]),
    "jax class": (jax_class, [(0,), (1,)]),
    "jax class with keys": (jax_class_with_keys, [("b",), ("a",)]),
    "jax dict": (jax_dict, [("a",), ("b",)]),
    "jax attrs": (jax_attrs, [("a",), ("b",)]),
    "jax mapping": (jax_mapping, [("b",), ("a",)]),
    "jax partial": (jax_partial, [(0, 0), (1, "k")]),
    "torch class": (torch_class, [(0,), (1,)]),
    "torch class with keys": (torch_class_with_keys, [("a",), ("b",)]),
    "torch mapping": (torch_mapping, [("b",), ("a",)]),
    "optree class": (optree_class, [(0,), (1,)]),
    "optree class with keys": (optree_class_with_keys, [("a",), ("b",)]),
    "optree mapping": (optree_mapping, [("b",), ("a",)]),
}


def tree_map(name):
    """The function `tree_map` of the library of a class; None is a leaf."""
    if name.startswith("torch"):
        return _torch_pytree().tree_map
    if name.startswith("optree"):
        return functools.partial(need("optree").tree_map, none_is_leaf=True)
    return functools.partial(need("jax").tree.map, is_leaf=lambda x: x is None)
