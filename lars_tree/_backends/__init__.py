"""Array libraries: one module each, and the table that finds it by the type of a leaf.

Nothing is imported that the user has not imported: the table is looked up in `sys.modules` only.
To add a library: a module with a `backend_of`, a row here, a row in `tests/conftest.py`. One that
follows the array API standard needs neither module nor row here.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from typing import Any

from lars_tree._backends.base import Backend

# Where the library defines the type, the name of the type, the module here.
_TABLE = [
    ("numpy", "ndarray", "numpy"),
    ("numpy", "generic", "numpy"),
    ("torch", "Tensor", "torch"),
    ("jax", "Array", "jax"),
    ("dask.array", "Array", "dask"),
    ("cupy", "ndarray", "standard"),
]

_CACHE: dict[type, Backend | None] = {}


def find(x: Any) -> Backend | None:
    """The backend for an array, None if x is no array of a known library."""
    cls = type(x)
    try:
        return _CACHE[cls]
    except KeyError:
        return _CACHE.setdefault(cls, _look_up(x))


def _look_up(x: Any) -> Backend | None:
    for module, name, ours in _TABLE:
        # Dotted look-ups find nothing while the library is still being imported.
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and isinstance(x, cls):
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


def _load(name: str, x: Any) -> Backend:
    with _importing:
        module = import_module(f"lars_tree._backends.{name}")
    backend: Backend = module.backend_of(x)
    return backend
