"""What becomes of values on their way into a Container and out of it. Knows no arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lars_tree import _nodes, _tree, errors

P = ParamSpec("P")
T = TypeVar("T")


def explained(method: Callable[P, T]) -> Callable[P, T]:
    """The method of a Container, which says where a tree that it is given holds itself."""

    @wraps(method)
    def explaining(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return method(*arguments, **options)
        except RecursionError:
            names = ["self", *(f"argument {i}" for i in range(1, len(arguments)))]
            error = _tree.explained(dict(zip(names, arguments, strict=True)))
            if isinstance(error, errors.StructureError):
                raise error from None
            raise  # it may come from a function that the user gave

    return explaining


def taken(argument: str, value: Any, cls: Any) -> Any:
    """The value, with its mappings converted to Containers of this class.

    Raises:
        StructureError: the value holds itself, or a list in it cannot be rebuilt.
    """
    if _tree.is_leaf(value):
        return value
    with _tree.explaining({argument: value}):
        return _tree.rebuilding(argument, converted, value, cls)


def converted(value: Any, cls: Any) -> Any:
    """The value with its mappings, also those in lists and tuples, as Containers."""
    if _tree.is_leaf(value) or _nodes.is_container(value):
        return value
    if isinstance(value, Mapping):
        keys = [key for key, _ in _tree.children(value)]
        return _nodes.container(
            cls, zip(keys, _nodes.map_children(value, converted, cls), strict=True)
        )
    if isinstance(value, (list, tuple)):
        items = _nodes.map_children(value, converted, cls)
        if any(new is not old for new, (_, old) in zip(items, _tree.children(value), strict=True)):
            return _nodes.replace_children(value, items)
    return value


def plain(node: Any, _: None = None) -> Any:
    """The node with dicts for its Containers."""
    if _tree.is_leaf(node):
        return node
    children = _nodes.map_children(node, plain)
    if _nodes.is_container(node):
        return dict(zip(node, children, strict=True))
    return _nodes.replace_children(node, children)
