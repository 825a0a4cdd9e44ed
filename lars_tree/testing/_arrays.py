"""Arrays for tests: the float formats, memory layouts, and the libraries that hold them.

bfloat16, which numpy has not, is kept as bits (uint16) until a library takes it, so that torch
needs no ml_dtypes. A library is imported when an array of it is asked for, never before.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from lars_tree import _backends, _tree, errors
from lars_tree._core.wrapper import unwrap

Array = np.ndarray[Any, Any]

LIBRARIES = ("numpy", "torch", "jax")
LAYOUTS = ("C", "F", "reversed", "gaps")


class Format(NamedTuple):
    """A float format: bits of the significand, exponents of the smallest normal and the largest."""

    bits: int
    smallest: int
    largest: int


def check_known(argument: str, x: Any, known: Sequence[str]) -> None:
    """A ValueError unless x is one of these names."""
    if x not in known:
        expected = errors.enumerated(map(repr, known), most=len(known))
        hint = errors.did_you_mean(x, known)
        raise ValueError(f"{argument}: expected one of {expected}, got {x!r}{hint}")


def name_of(dtype: Any) -> str:
    """'float32' of whatever names it: a dtype of any library, a type, a string such as '>f4'."""
    plain = numpy_name(dtype)
    return "bfloat16" if plain == "bfloat16" else np.dtype(plain).name


def numpy_name(dtype: Any) -> Any:
    """What numpy takes for a dtype, byte order kept; 'bfloat16' for that, which it may not know."""
    text = str(dtype)
    if text.endswith("bfloat16"):
        return "bfloat16"
    return text.removeprefix("torch.") if text.startswith("torch.") else dtype


def format_of(name: str) -> Format:
    """The format of the numbers of a dtype, or of the parts of its complex numbers."""
    if name == "bfloat16":
        return Format(8, -126, 127)
    info = np.finfo(name)
    return Format(info.nmant + 1, int(info.minexp), int(info.maxexp) - 1)


def names_for(library: str) -> list[str]:
    """The formats that a library has; numpy has bfloat16 where ml_dtypes is installed."""
    every = ["float64", "float32", "float16", "bfloat16"]
    return every if library != "numpy" or find_spec("ml_dtypes") else every[:3]


def is_bfloat16(dtype: Any) -> bool:
    """Whether a dtype, or its name, is this one."""
    return name_of(dtype) == "bfloat16"


def bits_of_bfloat16(x: Array) -> Array:
    """float32 numbers, cut to bfloat16, as bits."""
    return np.asarray(x.view(np.uint32) >> 16).astype(np.uint16)  # no numpy scalar of 0-d ones


def layouts_for(library: str, ndim: int, layouts: tuple[str, ...]) -> list[str]:
    """Those of the layouts that such an array can have and that differ from C; C, if none can."""
    possible = {"numpy": LAYOUTS, "torch": ("C", "F", "gaps"), "jax": ("C",)}[library]
    least = {"C": 0, "F": 2, "reversed": 1, "gaps": 1}
    return [x for x in layouts if x in possible and ndim >= least[x]] or ["C"]


def laid_out(x: Array, layout: str) -> Array:
    """An array in C order as one with another layout: all axes reversed, or with gaps."""
    if layout == "F":
        return np.array(x, order="F")
    if layout == "reversed":
        turned = (slice(None, None, -1),) * x.ndim
        return x[turned].copy()[turned]
    if layout == "gaps":
        view = np.zeros([2 * n for n in x.shape], x.dtype)[(slice(None, None, 2),) * x.ndim]
        view[...] = x
        return view
    return x


def to_library(x: Array, dtype: Any, library: str) -> Any:
    """A numpy array, of bits if dtype is bfloat16, as one of a library; shares its memory."""
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


def to_numpy(x: Any) -> Array:
    """The elements of an array of any library; bfloat16 as the double it is."""
    x = unwrap(x)
    backend = _backends.find(x)
    numbers = np.asarray(x) if backend is None else backend.to_numpy(x)
    return numbers.astype(np.float64) if is_bfloat16(numbers.dtype) else numbers


def times(x: Any, factor: float) -> Any:
    """An array multiplied by a number, in its own dtype."""
    if isinstance(x, np.ndarray):
        return np.asarray(x * factor).astype(x.dtype)
    if _is_tensor(x):
        return x * factor
    import jax

    with jax.enable_x64(True):
        return x * factor


def copied(tree: Any) -> Any:
    """The tree with copies of its arrays, which lie in memory as the originals do."""
    return _tree.rebuild(tree, [_copy(x) for x in _tree.leaves(tree)])


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
        return x.new_empty(0).set_(x.detach().untyped_storage().clone(), *_place(x))
    return x


def _is_tensor(x: Any) -> bool:
    backend = _backends.find(x)
    return backend is not None and backend.name == "torch"


def _place(x: Any) -> tuple[Any, ...]:
    return x.storage_offset(), x.size(), x.stride()
