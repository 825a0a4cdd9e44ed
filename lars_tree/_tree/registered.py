"""Nodes that JAX, torch or optree have registered as pytrees, read as their library reads them.

The libraries are only looked up in `sys.modules`. They are asked for one level of a tree: a child
is not entered, whatever it is. `_tree/kinds.py` decides which nodes are read here.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from lars_tree import errors

Node = Any


class Reading(NamedTuple):
    """A node with its children.

    Attributes:
        keys: The keys of the children, or None if the library gives only positions.
        children: The children, in the order of the library.
        static: The other data of the node, which can be compared.
        make: A function that makes a node of new children and the same static data.
    """

    keys: list[Hashable] | None
    children: list[Any]
    static: Any
    make: Callable[[list[Any]], Node]

    def pairs(self) -> list[tuple[Hashable, Any]]:
        """The (key, child) pairs; a child without a key of its own has its position as key."""
        keys = self.keys
        if keys is None or not _are_unique(keys):
            keys = [Position(index, self.static) for index in range(len(self.children))]
        return list(zip(keys, self.children, strict=True))


class Position(int):
    """The position of a child in a node whose library gives its children no keys.

    What a position means may depend on the static data of the node, which often holds the names of
    the children. Positions in two nodes are therefore equal only if their static data is equal.
    """

    static: Any

    def __new__(cls, index: int, static: Any) -> Position:
        new = super().__new__(cls, index)
        new.static = static
        return new

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other) is True
        return same and (not isinstance(other, Position) or equal(self.static, other.static))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __str__(self) -> str:
        return int.__repr__(self)

    def __repr__(self) -> str:
        return f"{self} of {errors.shortened(str(self.static), 100)}"

    def __reduce__(self) -> Any:  # static data often cannot be pickled
        return int, (int(self),)


def equal(a: Any, b: Any) -> bool:
    """Whether the static data of two nodes is equal; False if it cannot be compared."""
    try:
        return bool(a == b)
    except Exception:  # arrays, and classes of users
        return False


def names(children: list[Any], pairs: Iterable[tuple[Hashable, Any]]) -> list[Hashable] | None:
    """The keys of these children among (key, child) pairs; None if they are not all found."""
    held = list(pairs)
    keys: dict[int, deque[Hashable]] = defaultdict(deque)
    for key, child in held:
        keys[id(child)].append(key)
    try:
        return [keys[id(child)].popleft() for child in children]
    except IndexError:
        return None


def _are_unique(keys: list[Hashable]) -> bool:
    try:
        return len(set(keys)) == len(keys)
    except TypeError:  # not hashable
        return False


def _key(entry: Any) -> Hashable:
    """The key in an entry of a path of JAX or torch: a mapping's key, an index or a name."""
    for name in ("name", "key", "idx"):
        if hasattr(entry, name):
            return getattr(entry, name)  # type: ignore[no-any-return]
    return entry  # type: ignore[no-any-return]


# JAX and optree answer the same questions under the same names.


def _is_node_of(library: Any, node: Node, **options: Any) -> bool:
    all_leaves = getattr(library, "all_leaves", None)
    return all_leaves is not None and not all_leaves([node], **options)


def _one_level() -> Callable[[Any], bool]:
    """An `is_leaf` for the flattening of one node: the children are leaves, whatever they are."""
    answers = iter([False])
    return lambda _: next(answers, True)


def _is_node_of_jax(node: Node) -> bool:
    return _is_node_of(sys.modules.get("jax.tree_util"), node)


def _read_with_jax(node: Node) -> Reading:
    tree_util: Any = sys.modules["jax.tree_util"]
    found, structure = tree_util.tree_flatten_with_path(node, is_leaf=_one_level())
    entries = [path[0] for path, _ in found]
    without = any(isinstance(entry, tree_util.FlattenedIndexKey) for entry in entries)
    keys = None if without else list(map(_key, entries))
    return Reading(keys, [child for _, child in found], structure, structure.unflatten)


def _is_node_of_optree(node: Node) -> bool:
    return _is_node_of(sys.modules.get("optree"), node, none_is_leaf=True)


def _read_with_optree(node: Node) -> Reading:
    optree: Any = sys.modules["optree"]
    paths, children, structure = optree.tree_flatten_with_path(
        node, is_leaf=_one_level(), none_is_leaf=True
    )
    keys = [key for (key,) in paths]
    # Without entries of its own, a class gets the positions as entries.
    without = keys == list(range(len(keys)))
    return Reading(None if without else keys, children, structure, structure.unflatten)


def _definition_of_torch(cls: type) -> Any:
    return getattr(sys.modules.get("torch.utils._pytree"), "SUPPORTED_NODES", {}).get(cls)


def _is_node_of_torch(node: Node) -> bool:
    return _definition_of_torch(type(node)) is not None or _holds_parameters(node)


def _read_with_torch(node: Node) -> Reading:
    definition = _definition_of_torch(type(node))
    if definition is None:
        return _read_parameters(node)
    keys: list[Hashable] | None = None
    if definition.flatten_with_keys_fn is None:
        children, context = definition.flatten_fn(node)
    else:
        pairs, context = definition.flatten_with_keys_fn(node)
        keys, children = [_key(entry) for entry, _ in pairs], [child for _, child in pairs]

    def make(values: list[Any]) -> Node:
        return definition.unflatten_fn(values, context)

    return Reading(keys, list(children), (type(node), context), make)


# Torch registers none of its modules, but these two are nothing but nodes.


def _holds_parameters(node: Node) -> bool:
    modules = sys.modules.get("torch.nn")
    found = (getattr(modules, name, None) for name in ("ParameterDict", "ParameterList"))
    return any(cls is not None and issubclass(type(node), cls) for cls in found)


def _read_parameters(node: Any) -> Reading:
    is_dict = hasattr(type(node), "items")
    pairs = list(node.items() if is_dict else enumerate(node))

    def make(values: list[Any]) -> Node:
        new = copy.copy(node)  # with all other attributes, such as buffers
        held = {name: x for name, x in vars(node).items() if isinstance(x, (dict, set))}
        vars(new).update({name: x.copy() for name, x in held.items()})
        for (key, _), value in zip(pairs, values, strict=True):
            delattr(new, str(key))
            setattr(new, str(key), value)  # a tensor set as an item would become a parameter
        return new

    return Reading([key for key, _ in pairs], [child for _, child in pairs], type(node), make)


_LIBRARIES: list[tuple[Callable[[Node], bool], Callable[[Node], Reading]]] = [
    (_is_node_of_jax, _read_with_jax),
    (_is_node_of_torch, _read_with_torch),
    (_is_node_of_optree, _read_with_optree),
]


def find(node: Node) -> int | None:
    """The number of the first library that has registered the class of the node, or None."""
    for index, (is_node, _) in enumerate(_LIBRARIES):
        if is_node(node):
            return index
    return None


def read(node: Node, library: int) -> Reading:
    return _LIBRARIES[library][1](node)
