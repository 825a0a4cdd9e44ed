"""Update a whole nest of weights in one call, by Layer-wise Adaptive Rate Scaling (LARS).

Weights are a Container or any other nest, of any array library; gradients are matched by key:

    import lars_tree as lt

    w = lt.Container(encoder={"kernel": k, "bias": b}, head=h)     # numpy, torch, jax, ...
    w = w.lars_update(grads, 0.1, decay_lambda=1e-4)                # a new Container
    w.lars_update(grads, 0.1, out=w)                                # in place

    opt = lt.Lars(lt.schedules.Polynomial(0.1, total_steps=1000), momentum=0.9)
    state = opt.init(w)
    w, state = opt.update(w, grads, state)
"""

from lars_tree import schedules
from lars_tree._native import native_available
from lars_tree._native.threads import get_num_threads, set_num_threads
from lars_tree.array import Array
from lars_tree.container import Container
from lars_tree.errors import (
    BackendError,
    DtypeError,
    FileError,
    LarsTreeError,
    LeafError,
    NonFiniteError,
    OptionError,
    OutError,
    PathAttributeError,
    PathKeyError,
    ShapeError,
    StateError,
    StructureError,
)
from lars_tree.optimizer import Lars
from lars_tree.update import lars_update

__version__ = "0.1.0"

__all__ = [
    "Array",
    "BackendError",
    "Container",
    "DtypeError",
    "FileError",
    "Lars",
    "LarsTreeError",
    "LeafError",
    "NonFiniteError",
    "OptionError",
    "OutError",
    "PathAttributeError",
    "PathKeyError",
    "ShapeError",
    "StateError",
    "StructureError",
    "get_num_threads",
    "lars_update",
    "native_available",
    "schedules",
    "set_num_threads",
]
