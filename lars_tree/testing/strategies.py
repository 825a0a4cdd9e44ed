"""Hypothesis strategies for arrays, layers with their gradients, and options.

Values shrink to the simplest: float64 zeros in C order. If a strategy is given for an argument such
as `dtype`, the value is drawn anew for each example, as in `hypothesis.extra.numpy`.
`testing/trees.py` makes trees of these arrays.
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
    library: _arrays.Library | Strategy = "numpy",
    layouts: Sequence[str] = _arrays.LAYOUTS,
) -> Strategy:
    """Arrays of real or complex floating-point numbers.

    Without `elements`, the elements are finite and cover the whole range of their format: half of
    the arrays mix elements of all sizes, also subnormal; in the other half, all elements are near
    one power of two, so that whole arrays are tiny or huge. Equal elements and magnitudes are
    common.

    >>> from hypothesis import find
    >>> from lars_tree.testing import arrays
    >>> find(arrays("float32"), lambda x: x.size > 1)
    array([0., 0.], dtype=float32)
    >>> find(arrays(), lambda x: 0 < abs(x).max(initial=0) < 1e-300).dtype
    dtype('float64')

    Args:
        dtype: A floating-point or complex dtype, its name (also "bfloat16"), or a strategy. None
            means any of float64, float32, float16 and bfloat16 (for numpy only with ml_dtypes).
        shape: A tuple, or a strategy. None means up to three axes of length 0 to 4.
        elements: A strategy for the elements, which are rounded to the format.
        library: "numpy", "torch" or "jax", or a strategy; a library is imported only when needed.
        layouts: Memory layouts: any of "C", "F", "reversed" (negative strides) and "gaps". A
            layout that the library lacks is ignored: torch lacks "reversed", JAX has only "C".

    Raises:
        OptionError: A ValueError: the dtype is not floating point or complex, or the library or a
            layout is unknown.
    """
    shapes = strategy(SHAPES if shape is None else shape).map(lambda shape: [shape])
    return _groups(dtype, shapes, elements, library, layouts).map(lambda found: found[0])


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def _groups(
    dtype: Any, shapes: Strategy, elements: Strategy | None, library: Any, layouts: Sequence[str]
) -> Strategy:
    """Tuples of arrays with one dtype and library; `shapes` draws the list of their shapes."""
    if not isinstance(library, st.SearchStrategy):
        _arrays.check_known("library", library, _arrays.LIBRARIES)
    for layout in _arrays.items("layouts", layouts, 'layouts such as ["C"]'):
        _arrays.check_known("layouts", layout, _arrays.LAYOUTS)
    if dtype is not None and not isinstance(dtype, st.SearchStrategy):
        _arrays.check_dtype("dtype", dtype)

    def make(draw: Draw) -> tuple[Any, ...]:
        name = draw(strategy(library))
        kind = draw(strategy(st.sampled_from(_arrays.names_for(name)) if dtype is None else dtype))
        _arrays.check_dtype("dtype", kind)
        return tuple(_array(draw, kind, x, elements, name, layouts) for x in draw(shapes))

    return drawn(make)


def strategy(value: Any) -> Strategy:
    """The strategy itself, or one that always gives this value."""
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


@st.composite
def drawn(draw: Draw, make: Callable[[Draw], Any]) -> Any:
    """The results of `make`, a function that takes `draw`."""
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
    library: _arrays.Library | Strategy = "numpy",
    layouts: Sequence[str] = _arrays.LAYOUTS,
    broadcast: bool = False,
    gradients: int = 1,
) -> Strategy:
    """Tuples (w, dcdw) of arrays of one dtype and library: one layer and its gradient.

    >>> from hypothesis import find
    >>> from lars_tree.testing import layers
    >>> w, dcdw = find(layers("float32", (2,)), lambda pair: pair[0].any())
    >>> w.dtype, dcdw.shape
    (dtype('float32'), (2,))

    With `broadcast`, the gradient may have fewer axes than w, and broadcasts to it. `shape` is the
    shape of w. `gradients` is the number of gradients in a tuple: (w, dcdw, dcdw, ...). The other
    arguments have the same meaning as in `arrays()`, with the same errors.
    """

    def rows(shape: tuple[int, ...]) -> Strategy:
        parts = [shape, shape[1:], ()] if broadcast else [shape]
        return st.sampled_from([(shape, *[part] * gradients) for part in parts])

    shapes = strategy(SHAPES if shape is None else shape).flatmap(rows)
    return _groups(dtype, shapes, elements, library, layouts)


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
    """Keyword arguments of `lars_update`: any of the named options, with one value for all leaves.

    >>> from hypothesis import find
    >>> from lars_tree.testing import options
    >>> find(options("eps", "adapt"), lambda given: len(given) == 2)
    {'eps': 0.0, 'adapt': True}

    Args:
        *names: Any of "decay_lambda", "trust_coefficient", "eps", "adapt", "trust_clip",
            "joint_norm" and "grad_scale". Without names, all options can be drawn.

    Raises:
        OptionError: A ValueError: a name is not one of these.
    """
    for name in names:
        _arrays.check_known("names", name, list(OPTIONS))
    return st.fixed_dictionaries({}, optional={name: OPTIONS[name] for name in names or OPTIONS})
