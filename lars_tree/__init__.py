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


def __dir__() -> list[str]:
    """Public names only, without the modules that define them, such as `update`."""
    modules = {"errors", "io", "report", "testing", "torch"}
    return sorted([*__all__, "__version__", *(modules & globals().keys())])


if not TYPE_CHECKING:  # with a __getattr__, a type checker would accept any name

    def __getattr__(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module 'lars_tree' has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        try:
            return version("lars-tree")
        except PackageNotFoundError:  # a source tree that is not installed
            return "0.0.0+unknown"
