"""Array libraries: one module each, and the table that finds it by the type of a leaf.

Nothing is imported that the user has not imported: the table is looked up in `sys.modules` only.
Only the real type of an object counts: what `__class__` says of it may be a lie, and C code that
believes it crashes. To add a library: a module with a `backend_of`, a row here, a row in
`tests/conftest.py`. One that follows the array API standard needs neither module nor row here.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from typing import Any
from weakref import ref

from lars_tree._backends.base import Backend
from lars_tree._nodes import is_permanent

# Where the library defines the type, the name of the type, the module here.
_TABLE = [
    ("numpy", "ndarray", "numpy"),
    ("numpy", "generic", "numpy"),
    ("torch", "Tensor", "torch"),
    ("jax", "Array", "jax"),
    ("jax.core", "Tracer", "jax"),
    ("dask.array", "Array", "dask"),
    ("cupy", "ndarray", "standard"),
]

# Of classes that their modules keep alive anyway.
_CACHE: dict[type, Backend | None] = {type(None): None}
# Of all others, by their ids: each entry goes when its class is freed.
_OTHERS: dict[int, tuple[ref[type], Backend | None]] = {}


def find(x: Any) -> Backend | None:
    """The backend for an array, None if x is not an array of a known library."""
    cls = type(x)
    if cls in _CACHE:
        return _CACHE[cls]
    known = _OTHERS.get(id(cls))
    return known[1] if known is not None else _remembered(cls, _look_up(x))


def _remembered(cls: type, backend: Backend | None) -> Backend | None:
    if is_permanent(cls):
        return _CACHE.setdefault(cls, backend)
    key = id(cls)
    _OTHERS[key] = (ref(cls, lambda _: _OTHERS.pop(key, None)), backend)
    return backend


def _look_up(x: Any) -> Backend | None:
    for module, name, ours in _TABLE:
        # Dotted look-ups find nothing while the library is still being imported.
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and issubclass(type(x), cls):
            return _load(ours, x)
    if hasattr(type(x), "__array_namespace__"):
        return _load("standard", x)
    return None


# A fork waits until no thread is importing a backend: that thread would not be in the child to
# finish, and the child would wait for it.
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
    backend: Backend | None = module.backend_of(x)
    return backend
