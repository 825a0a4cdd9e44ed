"""Converts mappings to Containers on the way into a Container, and Containers to dicts.

Knows no arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lars_tree import _nodes, _tree, errors

P = ParamSpec("P")
T = TypeVar("T")


def explain_cycles(method: Callable[P, T]) -> Callable[P, T]:
    """Let a method of Container name the cycle in a tree that it is given."""

    @wraps(method)
    def explaining(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return method(*arguments, **options)
        except RecursionError:
            names = ["self", *(f"argument {i}" for i in range(1, len(arguments)))]
            error = _tree.explained(dict(zip(names, arguments, strict=True)))
            if isinstance(error, errors.StructureError):
                raise error from None
            raise  # no cycle: a function of the user may recurse too deeply

    return explaining


def convert(argument: str, value: Any, cls: type) -> Any:
    """The value, with its mappings converted to Containers of this class.

    Raises:
        StructureError: the value holds itself, or a list in it cannot be rebuilt.
    """
    if _tree.is_leaf(value):
        return value
    with _tree.explaining({argument: value}):
        return _tree.rebuilding(argument, convert_node, value, cls)


def convert_node(value: Any, cls: type) -> Any:
    """The value with its mappings, also those in lists and tuples, as Containers."""
    if _tree.is_leaf(value) or _nodes.is_container(value):
        return value
    if isinstance(value, Mapping):
        keys = [key for key, _ in _tree.children(value)]
        children = _nodes.map_children(value, convert_node, cls)
        return _nodes.container(cls, zip(keys, children, strict=True))
    if isinstance(value, (list, tuple)):
        items = _nodes.map_children(value, convert_node, cls)
        if any(new is not old for new, (_, old) in zip(items, _tree.children(value), strict=True)):
            return _nodes.replace_children(value, items)
    return value


def to_dicts(node: Any, _: None = None) -> Any:
    """The node with dicts in place of its Containers."""
    if _tree.is_leaf(node):
        return node
    children = _nodes.map_children(node, to_dicts)
    if _nodes.is_container(node):
        return dict(zip(node, children, strict=True))
    return _nodes.replace_children(node, children)
