"""Backends: one module for each array library, found by the type of a leaf.

Libraries are only looked up in `sys.modules`, so this package never imports a library that the user
did not import. The real type of an object is used, not `__class__`: C code may crash on an object
with a false `__class__`. To add a library, add a module with a `BACKEND`, a row to `_TABLE` and a
row in `tests/conftest.py`. A library that follows the array API standard needs only the row in
`tests/conftest.py`.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

from lars_tree._backends.base import Backend
from lars_tree._tree.kinds import is_permanent

# The module that defines the type, the name of the type, the module of the backend.
_TABLE = [
    ("numpy", "ndarray", "numpy"),
    ("numpy", "generic", "numpy"),
    ("torch", "Tensor", "torch.backend"),
    ("jax", "Array", "jax"),
    ("jax.core", "Tracer", "jax"),
    ("dask.array", "Array", "dask"),
    ("cupy", "ndarray", "standard"),
]

# Backends by class. `_CACHE` keeps its classes alive, so it has only classes that their modules
# keep alive anyway.
_CACHE: dict[type, Backend | None] = {type(None): None}
_CACHE_OF_OTHERS: WeakKeyDictionary[type, Backend | None] = WeakKeyDictionary()


def find(x: Any) -> Backend | None:
    """The backend for an array, None if x is not an array of a known library."""
    cls = type(x)
    if cls in _CACHE:
        return _CACHE[cls]
    if cls in _CACHE_OF_OTHERS:
        return _CACHE_OF_OTHERS[cls]
    backend = _look_up(x)
    (_CACHE if is_permanent(cls) else _CACHE_OF_OTHERS)[cls] = backend
    return backend


def is_float0(x: Any) -> bool:
    """Whether x is what `jax.grad(allow_int=True)` returns for integers: it has no elements."""
    return find(x) is not None and getattr(x.dtype, "names", None) == ("float0",)


def _look_up(x: Any) -> Backend | None:
    for module, name, ours in _TABLE:
        # The attribute is missing while the library is still being imported.
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and issubclass(type(x), cls):
            return _load(ours, x)
    if hasattr(type(x), "__array_namespace__"):
        return _load("standard", x)
    return None


# A fork waits until no thread imports a backend. Otherwise the child, which does not have that
# thread, would wait for its import forever.
_importing = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_importing.acquire,
        after_in_parent=_importing.release,
        after_in_child=_importing.release,
    )


def _load(name: str, x: Any) -> Backend | None:
    with _importing:
        module = import_module(f"lars_tree._backends.{name}")
    backend: Backend | None = module.backend_of(x) if name == "standard" else module.BACKEND
    return backend
