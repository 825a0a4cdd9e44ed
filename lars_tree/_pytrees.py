"""Container and Array as nodes of the tree libraries of JAX, torch and optree.

Nothing is imported here that the user does not import: each library is told when it is there, at
once or right after its own import. dm-tree needs no telling: to it a Container is a dict.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Items = Iterable[tuple[Hashable, Any]]


class Keys:
    """The keys of a node in two orders: sorted, by which nodes compare equal, and their own.

    So key order is kept, and a function that is compiled for one order serves the others.
    """

    def __init__(self, keys: Iterable[Hashable]) -> None:
        self.own = tuple(keys)
        self.sorted = tuple(sorted(self.own, key=_sort_key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keys) and self.sorted == other.sorted

    def __hash__(self) -> int:
        return hash(self.sorted)

    def __repr__(self) -> str:
        return f"Keys({list(self.own)})"

    def flatten(self, node: dict[Any, Any]) -> list[Any]:
        """The children in sorted order."""
        return [dict.__getitem__(node, key) for key in self.sorted]

    def items(self, children: Iterable[Any]) -> Items:
        """The (key, child) pairs in their own order, from children in sorted order."""
        by_key = dict(zip(self.sorted, children, strict=True))
        return [(key, by_key[key]) for key in self.own]


def _sort_key(key: Hashable) -> tuple[str, Any]:
    """Keys of several types sort by type first, those without an order by how they are written."""
    return type(key).__qualname__, key if isinstance(key, (str, int, float)) else repr(key)


def register(cls: Any) -> None:
    """Make a Container type known to each library, now or when it is imported.

    A library keeps the types that it knows alive. One that is imported later is not told of types
    that are no more.
    """
    known = weakref.ref(cls)
    for name in ("jax", "torch", "optree"):
        when_imported(name, partial(_tell, known, name))


def _tell(known: weakref.ref[Any], name: str, library: Any) -> None:
    cls = known()
    if cls is not None:
        _hooks(cls)[name](library)


def _hooks(cls: Any) -> dict[str, Callable[[Any], None]]:
    def flatten(node: dict[Any, Any]) -> tuple[list[Any], Keys]:
        keys = Keys(node)
        return keys.flatten(node), keys

    def unflatten(keys: Keys, children: Iterable[Any]) -> Any:
        return cls._lars_tree_make(keys.items(children))

    def with_jax(jax: Any) -> None:
        def flatten_with_keys(node: dict[Any, Any]) -> tuple[list[Any], Keys]:
            children, keys = flatten(node)
            names = map(jax.tree_util.DictKey, keys.sorted)
            return list(zip(names, children, strict=True)), keys

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)

    def with_torch(torch: Any) -> None:
        pytree = sys.modules["torch.utils._pytree"]

        def flatten_with_keys(node: dict[Any, Any]) -> tuple[list[Any], Keys]:
            children, keys = flatten(node)
            names = map(pytree.MappingKey, keys.sorted)
            return list(zip(names, children, strict=True)), keys

        pytree.register_pytree_node(
            cls,
            flatten,
            lambda children, keys: unflatten(keys, children),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            to_dumpable_context=lambda keys: list(keys.own),
            from_dumpable_context=Keys,
            flatten_with_keys_fn=flatten_with_keys,
        )

    def with_optree(optree: Any) -> None:
        def flatten_with_entries(
            node: dict[Any, Any],
        ) -> tuple[list[Any], Keys, Sequence[Hashable]]:
            children, keys = flatten(node)
            return children, keys, keys.sorted

        optree.register_pytree_node(
            cls,
            flatten_with_entries,
            unflatten,
            path_entry_type=optree.MappingEntry,
            namespace=optree.registry.__GLOBAL_NAMESPACE,
        )

    return {"jax": with_jax, "torch": with_torch, "optree": with_optree}


def register_wrapper(cls: type, data: str) -> None:
    """Make a type that wraps one value known to each library."""

    def flatten(node: Any) -> tuple[list[Any], None]:
        return [getattr(node, data)], None

    def unflatten(_: None, children: Iterable[Any]) -> Any:
        new: Any = object.__new__(cls)  # libraries put all kinds of placeholders into the nodes
        setattr(new, data, next(iter(children)))
        return new

    def with_torch(torch: Any) -> None:
        pytree = sys.modules["torch.utils._pytree"]
        pytree.register_pytree_node(cls, flatten, lambda children, _: unflatten(None, children))

    def with_optree(optree: Any) -> None:
        optree.register_pytree_node(
            cls, flatten, unflatten, namespace=optree.registry.__GLOBAL_NAMESPACE
        )

    when_imported("jax", lambda jax: jax.tree_util.register_pytree_node(cls, flatten, unflatten))
    when_imported("torch", with_torch)
    when_imported("optree", with_optree)


def trust_in_files(cls: type) -> None:
    """Let `torch.load(weights_only=True)` call this class with whatever a file says.

    Only for our own classes: the constructor of a user's subclass may do anything.
    """
    when_imported("torch", lambda torch: torch.serialization.add_safe_globals([cls]))


def when_imported(name: str, hook: Callable[[ModuleType], None]) -> None:
    """Call hook(module) now if the module is there, otherwise after its import."""
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.hooks.setdefault(name, []).append(hook)


class _Finder:
    """Finds nothing itself: lets the others find, and has the hooks called after the import.

    No MetaPathFinder, as the loader is no Loader: importing importlib.abc takes ten milliseconds.
    """

    def __init__(self) -> None:
        self.hooks: dict[str, list[Callable[[ModuleType], None]]] = {}
        self.searching: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in self.hooks or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None and spec.loader is not None:
            hooked: Any = _HookedLoader(spec.loader, self)
            spec.loader = hooked
        return spec


class _HookedLoader:
    """The module's own loader, which calls the hooks at the end and then steps aside."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for hook in self._finder.hooks.pop(module.__name__, []):
            hook(module)


_FINDER = _Finder()
