"""Conversion of mappings to Containers, and of Containers to dicts. Does not depend on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lars_tree import errors
from lars_tree._tree import nodes, structure

P = ParamSpec("P")
T = TypeVar("T")


def explain_cycles(method: Callable[P, T]) -> Callable[P, T]:
    """Make a method of Container raise a StructureError, not a RecursionError, for a cycle."""

    @wraps(method)
    def explaining(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return method(*arguments, **options)
        except RecursionError:
            names = ["self", *(f"argument {i}" for i in range(1, len(arguments)))]
            error = structure.explained(dict(zip(names, arguments, strict=True)))
            if isinstance(error, errors.StructureError):
                raise error from None
            raise  # no cycle: a function of the user may recurse too deeply

    return explaining


def convert(argument: str, value: Any, cls: type) -> Any:
    """Call `convert_node`; raise a StructureError if the value is cyclic or cannot be rebuilt."""
    if structure.is_leaf(value):
        return value
    with structure.explaining({argument: value}):
        return structure.rebuilding(argument, convert_node, value, cls)


def convert_node(value: Any, cls: type) -> Any:
    """The value with its mappings, also in lists and tuples, converted to this Container class."""
    if structure.is_leaf(value) or nodes.is_container(value):
        return value
    if isinstance(value, Mapping) and not nodes.has_other_children(value):
        pairs = list(nodes.items(value))
        children = nodes.map_pairs(pairs, convert_node, cls)
        keys = [key for key, _ in pairs]
        return nodes.container(cls, zip(keys, children, strict=True))
    if isinstance(value, (list, tuple)):
        pairs = list(nodes.children(value))
        items = nodes.map_pairs(pairs, convert_node, cls)
        if any(new is not old for new, (_, old) in zip(items, pairs, strict=True)):
            return nodes.replace_children(value, items)
    return value


def to_dicts(node: Any, _: None = None) -> Any:
    """The node with its Containers converted to dicts."""
    if structure.is_leaf(node):
        return node
    children = nodes.map_children(node, to_dicts)
    if nodes.is_container(node):
        return dict(zip(node, children, strict=True))
    return nodes.replace_children(node, children)
