"""Strategies of hypothesis for arrays, for layers with their gradients, and for options.

Everything shrinks towards the least: zeros, float64, C order. Where an argument says "or a
strategy", each value may be drawn anew, as in `hypothesis.extra.numpy`. Trees: `trees.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lars_tree.testing import _arrays

Strategy = st.SearchStrategy[Any]
Draw = Callable[[Strategy], Any]


def arrays(
    dtype: Any = None,
    shape: Any = None,
    *,
    elements: Strategy | None = None,
    library: Any = "numpy",
    layouts: Sequence[str] = _arrays.LAYOUTS,
) -> Strategy:
    """Arrays of real or complex floating-point numbers, as weights may be.

    Without `elements` the numbers are finite and cover the whole range of their format: half of the
    arrays have numbers of all sizes, subnormal ones too; in the others all are near one power of
    two, so that whole arrays are tiny or huge. Equal elements and magnitudes are common.

    >>> from hypothesis import find
    >>> from lars_tree.testing import arrays
    >>> find(arrays("float32"), lambda x: x.size > 1)
    array([0., 0.], dtype=float32)
    >>> find(arrays(), lambda x: 0 < abs(x).max(initial=0) < 1e-300).dtype
    dtype('float64')

    Args:
        dtype: A floating-point or complex dtype or its name, or a strategy; "bfloat16" too. None is
            any of float64, float32, float16 and bfloat16 (with numpy only if ml_dtypes is there).
        shape: A tuple, or a strategy. None is up to three axes of length 0 to 4.
        elements: A strategy of the numbers; those that the format has not are cut to it.
        library: "numpy", "torch" or "jax", or a strategy; imported only when asked for.
        layouts: Which of "C", "F", "reversed" (negative strides) and "gaps" memory may have. Those
            that a library has not are left out: torch cannot reverse, JAX has "C" alone.

    Raises:
        ValueError: There is no such library or layout.
    """
    libraries, shapes = _libraries(library, layouts), SHAPES if shape is None else _strategy(shape)

    def make(draw: Draw) -> Any:
        one = draw(libraries)
        return _array(draw, _dtype(draw, dtype, one), draw(shapes), elements, one, layouts)

    return drawn(make)


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def _strategy(value: Any) -> Strategy:
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


def _libraries(library: Any, layouts: Sequence[str]) -> Strategy:
    if not isinstance(library, st.SearchStrategy):
        _arrays.check_known("library", library, _arrays.LIBRARIES)
    for layout in layouts:
        _arrays.check_known("layouts", layout, _arrays.LAYOUTS)
    return _strategy(library)


def _dtype(draw: Draw, dtype: Any, library: str) -> Any:
    return draw(st.sampled_from(_arrays.names_for(library)) if dtype is None else _strategy(dtype))


@st.composite
def drawn(draw: Draw, make: Callable[[Draw], Any]) -> Any:
    """What a function makes of what it draws."""
    return make(draw)


def _array(
    draw: Draw, dtype: str, shape: Any, elements: Strategy | None, library: str, layouts: Any
) -> Any:
    x = _numbers(draw, dtype, shape, elements)
    layout = draw(st.sampled_from(_arrays.layouts_for(library, x.ndim, layouts)))
    return _arrays.to_library(_arrays.laid_out(x, layout), dtype, library)


def _numbers(draw: Draw, dtype: Any, shape: tuple[int, ...], elements: Strategy | None) -> Any:
    """A new array in C order; bfloat16 as bits."""
    name, dtype = _arrays.name_of(dtype), _arrays.numpy_name(dtype)
    if name == "bfloat16":
        return _arrays.bits_of_bfloat16(_reals(draw, name, "float32", shape, elements))
    if np.dtype(name).kind == "c" and elements is None:
        part = np.empty(0, name).real.dtype.name
        reals = _reals(draw, part, part, (*shape, 2), None)
        return reals.view(name)[..., 0].astype(dtype)
    return _reals(draw, name, name, shape, elements).astype(dtype)


def _reals(
    draw: Draw, name: str, stored: str, shape: tuple[int, ...], elements: Strategy | None
) -> Any:
    if elements is not None:
        return draw(hnp.arrays(stored, shape, elements=elements))
    width: Any = np.dtype(stored).itemsize * 8
    if draw(st.booleans()):
        finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
        return draw(hnp.arrays(stored, shape, elements=finite))
    form = _arrays.format_of(name)
    near_one = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-2, 2, width=width)  # ties are common
    x = draw(hnp.arrays(stored, shape, elements=near_one))
    least, most = form.smallest - form.bits + 1, form.largest - 1
    ends = st.sampled_from([least, form.smallest, most])
    return np.asarray(np.ldexp(x, draw(st.just(0) | ends | st.integers(least, most))))


def layers(
    dtype: Any = None,
    shape: Any = None,
    *,
    elements: Strategy | None = None,
    library: Any = "numpy",
    layouts: Sequence[str] = _arrays.LAYOUTS,
    broadcast: bool = False,
) -> Strategy:
    """Pairs (w, dcdw) of arrays of one dtype and library: one layer and its gradient.

    Args:
        dtype: As in `arrays`.
        shape: That of w; as in `arrays`.
        elements: As in `arrays`, for both.
        library: As in `arrays`.
        layouts: As in `arrays`, for each of both.
        broadcast: The gradient may have fewer axes than w, and broadcast to it.

    Raises:
        ValueError: As for `arrays`.
    """
    libraries, shapes = _libraries(library, layouts), SHAPES if shape is None else _strategy(shape)

    def make(draw: Draw) -> tuple[Any, Any]:
        one = draw(libraries)
        kind, whole = _dtype(draw, dtype, one), draw(shapes)
        part = draw(st.sampled_from([whole, whole[1:], ()])) if broadcast else whole
        w, dcdw = (_array(draw, kind, x, elements, one, layouts) for x in (whole, part))
        return w, dcdw

    return drawn(make)


OPTIONS = {
    "decay_lambda": st.sampled_from([0.0, 1e-4, 0.1]),
    "trust_coefficient": st.sampled_from([1.0, 1e-3]),
    "eps": st.sampled_from([0.0, 1e-8]),
    "adapt": st.sampled_from([True, False]),
    "trust_clip": st.booleans(),
    "joint_norm": st.booleans(),
    "grad_scale": st.sampled_from([1.0, 1024.0]),
}


def options(*names: str) -> Strategy:
    """Keywords of `lars_update`: some of those named, each with a value for all leaves.

    Args:
        *names: Of "decay_lambda", "trust_coefficient", "eps", "adapt", "trust_clip", "joint_norm"
            and "grad_scale"; all of them, if none is named.

    Raises:
        ValueError: There is no option of such a name.
    """
    for name in names:
        _arrays.check_known("names", name, list(OPTIONS))
    return st.fixed_dictionaries({}, optional={name: OPTIONS[name] for name in names or OPTIONS})
