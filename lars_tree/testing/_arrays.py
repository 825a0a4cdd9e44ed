"""Arrays for tests: float formats, memory layouts, and conversion to the libraries.

numpy does not have bfloat16. Such elements are made as bits (uint16) and converted for the library
at the end, so torch does not need ml_dtypes. A library is imported only when one of its arrays is
made.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.wrapper import unwrap
from lars_tree._tree import structure

Library = Literal["numpy", "torch", "jax"]
LIBRARIES: tuple[Library, ...] = ("numpy", "torch", "jax")
LAYOUTS = ("C", "F", "reversed", "gaps")
FORMATS = ("float64", "float32", "float16", "bfloat16")
COMPLEX = ("complex64", "complex128")


class Format(NamedTuple):
    """A float format: significand bits, exponents of the smallest and largest normal number."""

    bits: int
    smallest: int
    largest: int


def refused(argument: str, text: str) -> errors.LarsTreeError:
    """The error for an argument with an invalid value."""
    return errors.error(errors.OptionError, argument, f"{argument}: {text}", [])


def items(argument: str, xs: Any, expected: str) -> list[Any]:
    """The items of a list or tuple; an OptionError for anything else, and if there are none."""
    if not isinstance(xs, (list, tuple)) or not xs:
        raise refused(argument, f"expected a list of {expected}, got {xs!r}")
    return list(xs)


def check_known(argument: str, x: Any, known: Sequence[str]) -> None:
    """Raise an OptionError unless x is one of the `known` names."""
    if x not in known:
        expected = errors.enumerated(map(repr, known), most=len(known))
        hint = errors.did_you_mean(x, known)
        raise refused(argument, f"expected one of {expected}, got {x!r}{hint}")


def check_dtype(argument: str, dtype: Any, known: Sequence[str] = (*FORMATS, *COMPLEX)) -> str:
    """The name of a dtype; an OptionError unless it is one of the `known` names."""
    try:
        name = name_of(dtype)
    except TypeError:  # not a dtype
        name = dtype
    check_known(argument, name, known)
    return name


def name_of(dtype: Any) -> str:
    """The name, like 'float32', of a dtype of any library, a type, or a string such as '>f4'."""
    name = numpy_name(dtype)
    return "bfloat16" if name == "bfloat16" else np.dtype(name).name


def numpy_name(dtype: Any) -> Any:
    """The dtype as numpy accepts it, with its byte order; 'bfloat16' for bfloat16."""
    text = str(dtype)
    if text.endswith("bfloat16"):
        return "bfloat16"
    return text.removeprefix("torch.") if text.startswith("torch.") else dtype


def format_of(name: str) -> Format:
    """The format of a dtype, or of the parts of a complex dtype."""
    if name == "bfloat16":
        return Format(8, -126, 127)
    info = np.finfo(name)
    return Format(info.nmant + 1, int(info.minexp), int(info.maxexp) - 1)


def names_for(library: str) -> list[str]:
    """The formats of a library; numpy has bfloat16 if ml_dtypes is installed."""
    every = list(FORMATS)
    return every if library != "numpy" or find_spec("ml_dtypes") else every[:3]


def is_bfloat16(dtype: Any) -> bool:
    return name_of(dtype) == "bfloat16"


def bits_of_bfloat16(x: NumpyArray) -> NumpyArray:
    """The bits of float32 numbers truncated to bfloat16."""
    return np.asarray(x.view(np.uint32) >> 16).astype(np.uint16)  # an array, even if 0-d


def layouts_for(library: str, ndim: int, layouts: tuple[str, ...]) -> list[str]:
    """The `layouts` that the library supports and `ndim` axes can have; ["C"] if there are none."""
    possible = {"numpy": LAYOUTS, "torch": ("C", "F", "gaps"), "jax": ("C",)}[library]
    least = {"C": 0, "F": 2, "reversed": 1, "gaps": 1}
    return [x for x in layouts if x in possible and ndim >= least[x]] or ["C"]


def laid_out(x: NumpyArray, layout: str) -> NumpyArray:
    """Copy an array in C order to another layout; for "C", return the array itself."""
    if layout == "F":
        return np.array(x, order="F")
    if layout == "reversed":
        backwards = (slice(None, None, -1),) * x.ndim
        return x[backwards].copy()[backwards]
    if layout == "gaps":
        view = np.zeros([2 * n for n in x.shape], x.dtype)[(slice(None, None, 2),) * x.ndim]
        view[...] = x
        return view
    return x


def to_library(x: NumpyArray, dtype: Any, library: str) -> Any:
    """Convert a numpy array (bits for bfloat16) for a library; a tensor shares the memory."""
    if library == "torch":
        import torch

        if is_bfloat16(dtype):
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)
    if is_bfloat16(dtype):
        import ml_dtypes

        x = x.view(ml_dtypes.bfloat16)
    if library == "jax":
        import jax

        with jax.enable_x64(True):
            return jax.numpy.asarray(x)
    return x


def to_numpy(x: Any) -> NumpyArray:
    """The elements of an array of any library; bfloat16 as float64."""
    x = unwrap(x)
    backend = _backends.find(x)
    elements = np.asarray(x) if backend is None else backend.to_numpy(x)
    return elements.astype(np.float64) if is_bfloat16(elements.dtype) else elements


def times(x: Any, factor: float) -> Any:
    """The array multiplied by a number, in its own dtype."""
    if isinstance(x, np.ndarray):
        return np.asarray(x * factor).astype(x.dtype)
    if _is_tensor(x):
        return x * factor
    import jax

    with jax.enable_x64(True):
        return x * factor


def with_first(x: Any, value: float) -> Any:
    """A copy of the array in which the first element has this value; x itself if it is empty."""
    new = _copy(x)
    if 0 in x.shape:
        return x
    if isinstance(new, np.ndarray) or _is_tensor(new):
        new[(0,) * len(x.shape)] = value
        return new
    import jax

    with jax.enable_x64(True):
        return new.at[(0,) * len(x.shape)].set(value)


def overwrite(x: Any) -> None:
    """Set all elements of an array to NaN in place. Scalars and JAX arrays are immutable."""
    if isinstance(x, np.ndarray):
        x.fill(math.nan)
    elif _is_tensor(x):
        x.detach().fill_(math.nan)


def copied(tree: Any) -> Any:
    """The tree with copies of its arrays, in the memory layouts of the originals."""
    return structure.rebuild(tree, [_copy(x) for x in structure.leaves(tree)])


def pickled(x: Any) -> Any:
    """The object after pickling and unpickling it; float64 arrays of JAX keep their dtype."""
    jax, data = sys.modules.get("jax"), pickle.dumps(x)
    with nullcontext() if jax is None else jax.enable_x64(True):
        return pickle.loads(data)  # noqa: S301  # our own bytes


def _copy(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.size and not x.flags.forc:
        low, high = np.lib.array_utils.byte_bounds(x)
        memory = np.zeros(high - low, np.uint8)
        new = np.ndarray(x.shape, x.dtype, memory, x.ctypes.data - low, x.strides)
        new[...] = x
        return new
    if isinstance(x, np.ndarray):
        return x.copy("K")
    if _is_tensor(x):
        storage = x.detach().untyped_storage().clone()
        return x.new_empty(0).set_(storage, x.storage_offset(), x.size(), x.stride())
    return x


def share_memory(x: Any, y: Any) -> bool:
    """Whether two arrays overlap in memory; False for immutable arrays, such as those of JAX."""
    a, b = (_memory(unwrap(z)) for z in (x, y))
    return a is not None and b is not None and bool(np.may_share_memory(a, b))


def _memory(x: Any) -> NumpyArray | None:
    backend = _backends.find(x)
    return None if backend is None else backend.memory(x)


def _is_tensor(x: Any) -> bool:
    backend = _backends.find(x)
    return backend is not None and backend.name == "torch"
