"""Registers Container and Array as pytree nodes of JAX, torch and optree, and with Flax's files.

None of these libraries is imported: the types are registered at once with a library that is already
imported, otherwise right after its import. dm-tree needs no registration: it treats a Container
as a dict.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class Keys:
    """The keys of a node, sorted and in their own order. Only the sorted keys are compared.

    Therefore unflattening restores the order of the keys, and a function that was compiled for one
    order is not compiled again for another.
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


def _sort_key(key: Hashable) -> tuple[str, Any]:
    """Sort by type first, then by value; by repr if the type may have no order."""
    return type(key).__qualname__, key if isinstance(key, (str, int, float)) else repr(key)


def _flatten(node: dict[Any, Any]) -> tuple[list[Any], Keys]:
    keys = Keys(node)
    return [dict.__getitem__(node, key) for key in keys.sorted], keys


def _flatten_with(
    entry: Callable[[Hashable], Any], node: dict[Any, Any]
) -> tuple[list[tuple[Any, Any]], Keys]:
    """Like `_flatten`, with (path entry, child) pairs in place of the children."""
    children, keys = _flatten(node)
    return list(zip(map(entry, keys.sorted), children, strict=True)), keys


def _unflatten(cls: Any, keys: Keys, children: Iterable[Any]) -> Any:
    by_key = dict(zip(keys.sorted, children, strict=True))
    return cls._lars_tree_make([(key, by_key[key]) for key in keys.own])


def _register_with_jax(cls: type, jax: Any) -> None:
    flatten_with_keys = partial(_flatten_with, jax.tree_util.DictKey)
    unflatten = partial(_unflatten, cls)
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, _flatten)


def _register_with_torch(cls: type, torch: Any) -> None:
    pytree = sys.modules["torch.utils._pytree"]
    pytree.register_pytree_node(
        cls,
        _flatten,
        lambda children, keys: _unflatten(cls, keys, children),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=lambda keys: list(keys.own),
        from_dumpable_context=Keys,
        flatten_with_keys_fn=partial(_flatten_with, pytree.MappingKey),
    )


def _register_with_optree(cls: type, optree: Any) -> None:
    def flatten(node: dict[Any, Any]) -> tuple[list[Any], Keys, tuple[Hashable, ...]]:
        children, keys = _flatten(node)
        return children, keys, keys.sorted

    optree.register_pytree_node(
        cls,
        flatten,
        partial(_unflatten, cls),
        path_entry_type=optree.MappingEntry,
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )


def _register_with_flax(cls: type, serialization: Any) -> None:
    """Let `flax.serialization` save and restore a Container as it does a dict."""

    def restore(target: Any, state: dict[str, Any]) -> Any:
        return cls._lars_tree_make(  # type: ignore[attr-defined]
            serialization.from_state_dict(dict(dict.items(target)), state)
        )

    serialization.register_serialization_state(
        cls, lambda node: serialization.to_state_dict(dict(dict.items(node))), restore
    )


def register(cls: type) -> None:
    """Register a Container type with each library, now or after the import of the library.

    A library keeps registered types alive; until it is imported, the type may be freed.
    """
    hook = partial(_register_if_alive, weakref.ref(cls))
    when_imported("jax", partial(hook, _register_with_jax))
    when_imported("torch", partial(hook, _register_with_torch))
    when_imported("optree", partial(hook, _register_with_optree))
    when_imported("flax.serialization", partial(hook, _register_with_flax))


def _register_if_alive(
    reference: weakref.ref[type], register_with: Callable[[type, Any], None], library: Any
) -> None:
    cls = reference()
    if cls is not None:
        register_with(cls, library)


def register_wrapper(cls: type, data: str) -> None:
    """Register a type whose only child is the attribute with the name `data`."""

    def flatten(node: Any) -> tuple[list[Any], None]:
        return [getattr(node, data)], None

    def unflatten(_: None, children: Iterable[Any]) -> Any:
        new: Any = object.__new__(cls)  # the child may be a placeholder of the library
        setattr(new, data, next(iter(children)))
        return new

    def with_torch(torch: Any) -> None:
        pytree = sys.modules["torch.utils._pytree"]
        pytree.register_pytree_node(cls, flatten, lambda children, _: unflatten(None, children))

    def with_optree(optree: Any) -> None:
        optree.register_pytree_node(
            cls, flatten, unflatten, namespace=optree.registry.__GLOBAL_NAMESPACE
        )

    def with_flax(serialization: Any) -> None:
        serialization.register_serialization_state(
            cls,
            lambda node: getattr(node, data),
            lambda _, state: unflatten(None, [state]),
        )

    when_imported("jax", lambda jax: jax.tree_util.register_pytree_node(cls, flatten, unflatten))
    when_imported("flax.serialization", with_flax)
    when_imported("torch", with_torch)
    when_imported("optree", with_optree)


def trust_in_files(cls: type) -> None:
    """Allow `torch.load(weights_only=True)` to call this class with arguments from the file.

    This is safe only for our own classes: the constructor of a user's subclass may do anything.
    """
    when_imported("torch", lambda torch: torch.serialization.add_safe_globals([cls]))


def when_imported(name: str, hook: Callable[[ModuleType], None]) -> None:
    """Call hook(module) now if the module is imported, otherwise after its import."""
    if sys.modules.get(name) is not None:
        hook(import_module(name))  # waits if another thread is importing it
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.hooks.setdefault(name, []).append(hook)


class _Finder:
    """Finds modules with the other finders, and wraps the loaders of hooked modules.

    It does not inherit from MetaPathFinder, because importing importlib.abc takes 10 ms.
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
            hooked: Any = _HookedLoader(spec.loader)
            spec.loader = hooked
        return spec


class _HookedLoader:
    """Loads a module with its real loader, which is restored first, and then calls the hooks."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for hook in _FINDER.hooks.pop(module.__name__, []):
            hook(module)


_FINDER = _Finder()
