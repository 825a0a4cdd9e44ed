"""Update a whole tree of weights in one call, by Layer-wise Adaptive Rate Scaling (LARS).

Weights are a Container or any other tree of arrays of any library; gradients are matched by key:

    import lars_tree as lt

    w = lt.Container(encoder={"kernel": k, "bias": b}, head=h)     # numpy, torch, jax, ...
    w = w.lars_update(grads, 0.1, decay_lambda=1e-4)                # a new Container
    w.lars_update(grads, 0.1, out=w)                                # in place

    opt = lt.Lars(lt.schedules.Polynomial(0.1, total_steps=1000), momentum=0.9)
    state = opt.init(w)
    w, state = opt.update(w, grads, state)
"""

from typing import TYPE_CHECKING

from lars_tree import errors, schedules
from lars_tree._native import native_available
from lars_tree._native.threads import get_num_threads, set_num_threads
from lars_tree.array import Array
from lars_tree.container import Container
from lars_tree.errors import *  # noqa: F403
from lars_tree.optimizer import Lars
from lars_tree.update import lars_update

__version__: str

__all__ = [
    "Array",
    "Container",
    "Lars",
    "get_num_threads",
    "lars_update",
    "native_available",
    "schedules",
    "set_num_threads",
]
__all__ += errors.__all__

# The public modules that need only numpy, and those that need another library. All of them are
# imported at their first use.
_MODULES, _MODULES_OF_EXTRAS = {"errors", "io", "report"}, {"optax", "testing", "torch"}


def __dir__() -> list[str]:
    """The public names. Modules that only define them, such as `update`, are left out.

    Modules that need another library are listed once they are imported, because tools read each
    name that is listed.
    """
    imported = _MODULES_OF_EXTRAS & globals().keys()
    return sorted({*__all__, "__version__", *_MODULES, *imported})


if TYPE_CHECKING:
    from lars_tree import io as io
    from lars_tree import optax as optax
    from lars_tree import report as report
    from lars_tree import testing as testing
    from lars_tree import torch as torch

else:  # with a __getattr__, a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name in _MODULES | _MODULES_OF_EXTRAS:
            from importlib import import_module

            return import_module(f"lars_tree.{name}")
        if name != "__version__":
            raise AttributeError(f"module 'lars_tree' has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        try:
            return version("lars-tree")
        except PackageNotFoundError:  # a source tree that is not installed
            return "0.0.0+unknown"
