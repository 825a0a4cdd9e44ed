"""The step over CPU memory, whichever library owns it: numpy views in, the same views out.

Every product and sum is taken in double (in long double for long double), and rounded once into the
dtype of the weights. A leaf is read in chunks, so that a step allocates nothing that grows with it.
An array of uint16 stands for bfloat16 bits.

The bits of a result depend on nothing but the values and the memory order:

* sums of squares add halves to halves down to `_LANES` partial sums for each chunk of `_CHUNK`
  elements, always the same pairs, and `math.fsum` rounds the sum of all partial sums once;
* norms and coefficients are `decimal.Decimal` numbers of forty digits, whose exponents have no
  bounds, so that no ratio of norms overflows or vanishes on the way to a result that does not.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np

from lars_tree import _rule
from lars_tree._backends import bfloat16
from lars_tree._rule import Rule

Array = np.ndarray[Any, Any]
Wide = type[np.floating[Any]]  # the type in which to compute: float64 or longdouble

_CHUNK = 1 << 14
_LANES = 64

_FORTY_DIGITS = decimal.Context(
    prec=40, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[], clamp=0
)

# A sum of squares between these lost nothing to overflow, and nothing that counts to underflow.
_SAFE_SUM = (2.0**-900, 2.0**1000)

# A coefficient between these may meet any double without leaving the range on the way.
_SAFE_COEFFICIENT = (Decimal("1e-290"), Decimal("1e290"))


def update(w: Array, dcdw: Array, out: Array, rule: Rule) -> None:
    """Write the weights after one step into `out`, which may be w or dcdw themselves.

    dcdw, and lr where it is an array, broadcast to the shape of w; `out` has its shape and dtype.
    The numbers of the rule are floats.
    """
    arrays = [w, np.broadcast_to(dcdw, w.shape), out]
    if isinstance(rule.lr, np.ndarray):
        arrays.append(np.broadcast_to(rule.lr, w.shape))
        rule = rule._replace(lr=1.0)
    with np.errstate(all="ignore"), decimal.localcontext(_FORTY_DIGITS):
        if rule.layer_axis is None:
            _update_layer(arrays, rule)
        else:
            stacks = [np.moveaxis(array, rule.layer_axis, 0) for array in arrays]
            for i in range(len(stacks[0])):
                _update_layer([stack[i, ...] for stack in stacks], rule)


def _update_layer(arrays: list[Array], rule: Rule) -> None:
    """One step over [w, dcdw, out] or [w, dcdw, out, rates], all of one shape."""
    wide: Wide = np.longdouble if any(_is_long(x.dtype) for x in arrays[:2]) else np.float64
    w, dcdw, out, *rates = (_flat(x) for x in _in_memory_order(arrays))
    on_dcdw, on_w = _coefficients(w, dcdw, wide, rule)
    factor, exponent = _split(on_dcdw, wide)
    decay = _rounded(on_w, wide) if rule.decay_lambda else None
    for piece in _pieces(w):
        x, g = _read(w, piece, wide), _read(dcdw, piece, wide)
        lr = [_read(r, piece, wide) for r in rates]
        if lr and x.size > lr[0].size:  # complex: a real and an imaginary part for each rate
            lr = [np.repeat(lr[0], 2)]
        new = _rule.apply(x, np.ldexp(g, exponent) if exponent else g, factor, decay, *lr)
        if _reaches_the_limit(arrays[2].dtype, wide) and not np.isfinite(new).all():
            # A step as long as the largest number may overflow although the new weight does not.
            quarter = _rule.apply(x / 4, np.ldexp(g, exponent - 2), factor, decay, *lr)
            new = np.where(np.isfinite(new), new, 4 * quarter)
        _write(out, piece, new)


def _coefficients(w: Any, dcdw: Any, wide: Wide, rule: Rule) -> tuple[Decimal, Decimal]:
    w_norm = _norm(w, wide) if rule.adapt else None
    dcdw_norm = _norm(dcdw, wide) if rule.adapt else None
    return _rule.coefficients(w_norm, dcdw_norm, _exact(rule), _choose)


@functools.lru_cache(maxsize=256)
def _exact(rule: Rule) -> Rule:
    """The rule with its numbers as Decimal, to the last digit."""
    numbers: dict[str, Any] = {name: Decimal(getattr(rule, name)) for name in _rule.NUMBERS}
    return rule._replace(**numbers)


def _choose(condition: bool, a: Any, b: Any) -> Any:
    return a if condition else b


def _norm(flat: Any, wide: Wide) -> Decimal:
    total = _sum_of_squares(flat, wide, lambda x: x)
    if _SAFE_SUM[0] < total < _SAFE_SUM[1]:
        return total.sqrt()
    largest = wide(0)
    for piece in _pieces(flat):
        largest = np.maximum(largest, np.max(np.abs(_read(flat, piece, wide)), initial=0))
    if largest == 0 or not np.isfinite(largest):
        return _decimal(largest)
    exponent = int(np.frexp(largest)[1])
    total = _sum_of_squares(flat, wide, lambda x: np.ldexp(x, -exponent))
    return total.sqrt() * Decimal(2) ** exponent


def _sum_of_squares(flat: Any, wide: Wide, scale: Callable[[Array], Array]) -> Decimal:
    partial: list[Any] = []
    for piece in _pieces(flat):
        squares = np.square(scale(_read(flat, piece, wide)))
        while (half := squares.size // 2) >= _LANES:
            last = squares[2 * half :]
            squares = squares[:half] + squares[half : 2 * half]
            squares[: last.size] += last
        partial.extend(squares if wide is np.longdouble else squares.tolist())
    if wide is np.longdouble:
        return sum(map(_decimal, partial), Decimal(0))
    try:
        return Decimal(math.fsum(partial))
    except OverflowError:  # of a sum whose terms are finite
        return Decimal("Infinity")


def _decimal(x: Any) -> Decimal:
    """A float64 or longdouble, to the last digit."""
    if not np.isfinite(x):
        return Decimal(float(x))
    mantissa, exponent = np.frexp(x)
    high = float(mantissa)
    return (Decimal(high) + Decimal(float(mantissa - high))) * Decimal(2) ** int(exponent)


def _rounded(x: Decimal, wide: Wide) -> Any:
    high = wide(float(x))
    if wide is np.longdouble and np.isfinite(high):
        return high + wide(float(x - _decimal(high)))
    return high


def _split(x: Decimal, wide: Wide) -> tuple[Any, int]:
    """m, e with x = m 2**e, where e is 0 or, for x far from 1, m is in [1, 2).

    Scaling by 2**e first and multiplying by m then rounds once, and leaves the range of exponents
    only where the product does.
    """
    if not x.is_finite() or x == 0 or _SAFE_COEFFICIENT[0] < x < _SAFE_COEFFICIENT[1]:
        return _rounded(x, wide), 0
    exponent = math.floor(x.adjusted() * math.log2(10))
    exponent += math.frexp(float(x / Decimal(2) ** exponent))[1] - 1
    return _rounded(x / Decimal(2) ** exponent, wide), exponent


def _in_memory_order(arrays: list[Array]) -> list[Array]:
    """The arrays with their axes in the order in which the memory of the first runs."""
    strides = arrays[0].strides
    axes = sorted(range(arrays[0].ndim), key=lambda axis: -abs(strides[axis]))
    return [np.asarray(x).transpose(axes) for x in arrays]


def _flat(x: Array) -> Any:
    """What gives and takes pieces of the elements by slices: a view, or numpy's flat iterator."""
    return x.reshape(-1) if x.flags.c_contiguous else x.flat


def _pieces(flat: Any) -> Iterator[slice]:
    return (slice(i, i + _CHUNK) for i in range(0, len(flat), _CHUNK))


def _read(flat: Any, piece: slice, wide: Wide) -> Array:
    """A piece in the wide type; complex numbers as pairs of real ones."""
    x: Array = flat[piece]
    if x.dtype.kind == "u":
        return bfloat16.decode(x).astype(wide, copy=False)
    if x.dtype.kind == "c":
        return x.astype(np.result_type(wide, np.complex64)).view(wide)
    return x.astype(wide, copy=False)


def _write(flat: Any, piece: slice, values: Array) -> None:
    dtype = flat.base.dtype if isinstance(flat, np.flatiter) else flat.dtype
    if dtype.kind == "u":
        values = bfloat16.encode(values)
    elif dtype.kind == "c":
        values = values.view(np.result_type(values.dtype, np.complex64))
    flat[piece] = values


def _is_long(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize > (16 if dtype.kind == "c" else 8)


def _reaches_the_limit(dtype: np.dtype[Any], wide: Wide) -> bool:
    """Whether the largest number of the dtype is the largest to compute with."""
    return dtype.kind in "fc" and dtype.itemsize >= np.dtype(wide).itemsize
