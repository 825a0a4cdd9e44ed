"""The step over CPU memory, whichever library owns it: numpy views in, the same views out.

Plain arrays go to the native kernel, if it was built. What is here serves all others (strided, of
another byte order, long double, rates with a shape) and gives the same bits: `_native/kernel.hpp`
says how the numbers are made, and does the same operations in the same order.

Every product and sum is taken in double (in long double for long double), and rounded once into the
dtype of the weights. A leaf is read in chunks, so that a step allocates nothing that grows with it.
An array of uint16 stands for bfloat16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import _native, _rule
from lars_tree._backends import bfloat16
from lars_tree._backends.base import Columns
from lars_tree._backends.wide import Wide, fast_two_sum, two_sum
from lars_tree._floats import in_default_floats
from lars_tree._rule import Measured, Rule

if TYPE_CHECKING:
    from lars_tree._writes import Writes

Array = np.ndarray[Any, Any]
Precision = type[np.floating[Any]]  # the type in which to compute: float64 or longdouble

_LANES = 16
_SMALLEST_CHUNK = 1 << 14
_MOST_CHUNKS = 1 << 14

# A sum of squares between these lost nothing to overflow, and nothing that counts to underflow.
_SAFE_SUM = (2.0**-900, 2.0**1000)

# Norms of numbers shorter than double, and options like these, make no coefficient that leaves the
# range of double, and none whose rounding errors a result could show.
_MODERATE = (2.0**-100, 2.0**100)


@in_default_floats
def update(
    w: Array,
    dcdw: Array,
    out: Array,
    rule: Rule,
    velocity: Array | None = None,
) -> None:
    """Write the weights after one step into `out`, which may be w or dcdw themselves.

    dcdw, and lr where it is an array, broadcast to the shape of w; `out` has its shape and dtype.
    The numbers of the rule are floats. The velocity, if any, has the shape of w, and is stepped in
    place.
    """
    with np.errstate(all="ignore"):
        for layer, its_rule in _layers(w, dcdw, out, rule, velocity):
            _update_layer(layer, its_rule)


def prepare(
    w: Array, dcdw: Array, out: Array, rule: Rule, velocity: Array | None, writes: Writes
) -> None:
    """As `update`, but nothing is written before the writes are made."""
    layers = list(_layers(w, dcdw, out, rule, velocity))
    if all("lr" not in arrays and _is_plain(arrays, its_rule) for arrays, its_rule in layers):
        for layer in layers:
            writes.step(*layer)
    elif writes.holds(out.nbytes + (0 if velocity is None else velocity.nbytes)):
        new = np.empty_like(out)
        moved = None if velocity is None else np.array(velocity)
        update(w, dcdw, new, rule, moved)
        writes.copy(out, new)
        if velocity is not None and moved is not None:
            writes.copy(velocity, moved)
    else:
        writes.step_in_chunks(partial(update, w, dcdw, out, rule, velocity))


def _layers(
    w: Array, dcdw: Array, out: Array, rule: Rule, velocity: Array | None
) -> Iterator[tuple[dict[str, Array], Rule]]:
    """The arrays of each layer, by their names in `update`, and its rule."""
    arrays = {"w": w, "dcdw": np.broadcast_to(dcdw, w.shape), "out": out}
    if velocity is not None:
        arrays["velocity"] = velocity
    if isinstance(rule.lr, np.ndarray):
        arrays["lr"] = np.broadcast_to(rule.lr, w.shape)
        rule = rule._replace(lr=1.0)
    rule = rule._replace(nonfinite="propagate", stop_gradients=True)  # of no concern here
    if rule.layer_axis is None:
        yield arrays, rule
        return
    stacks = {name: np.moveaxis(x, rule.layer_axis, 0) for name, x in arrays.items()}
    for i in range(len(stacks["w"])):
        yield (
            {name: stack[i, ...] for name, stack in stacks.items()},
            rule._replace(layer_axis=None),
        )


def _update_layer(arrays: dict[str, Array], rule: Rule) -> None:
    """One step over arrays of one shape, by their names in `update`."""
    if "lr" not in arrays and _update_plain(arrays, rule):
        return
    precision = _precision(arrays["w"], arrays["dcdw"])
    flat = {name: _flat(x) for name, x in _in_memory_order(arrays).items()}
    on_dcdw, on_w = _coefficients(flat["w"], flat["dcdw"], precision, rule)
    factor, exponent = on_dcdw.split()
    by: list[Any] = [_rounded(factor, precision), None]
    if rule.maximize:
        by[0] = -by[0]
    if rule.decay_lambda:
        by[1] = _rounded(on_w, precision)
    checked = _reaches_the_limit(arrays["out"].dtype, precision)
    for piece in _pieces(flat["w"]):
        read = {name: _read(x, piece, precision) for name, x in flat.items() if name != "out"}
        here = by
        if "lr" in read:
            # complex: a real and an imaginary part for each rate
            each = np.repeat(read["lr"], read["w"].size // max(1, read["lr"].size))
            here = [each * number if number is not None else None for number in by]
        new = _stepped(read, here, exponent, rule)
        if checked and not all(np.isfinite(x).all() for x in new.values()):
            # A step as long as the largest number may overflow although the new weight does not.
            smaller = {name: x if name == "dcdw" else x / 4 for name, x in read.items()}
            quarter = _stepped(smaller, here, exponent - 2, rule)
            new = {name: np.where(np.isfinite(x), x, 4 * quarter[name]) for name, x in new.items()}
        for name, values in new.items():
            _write(flat[name], piece, values)


def _stepped(read: dict[str, Array], by: list[Any], exponent: int, rule: Rule) -> dict[str, Array]:
    """What is to be written, by the names of the arrays to write it to."""
    w, dcdw = read["w"], read["dcdw"]
    dcdw = np.ldexp(dcdw, exponent) if exponent else dcdw
    if "velocity" not in read:
        return {"out": _rule.apply(w, dcdw, *by)}
    new = _rule.move(w, read["velocity"], _rule.along(w, dcdw, *by), rule)
    return dict(zip(("out", "velocity"), new, strict=True))


def _update_plain(arrays: dict[str, Array], rule: Rule) -> bool:
    return _native.update(_columns(arrays, rule), types=(np.ndarray,), as_bits=True) is not None


def _is_plain(arrays: dict[str, Array], rule: Rule) -> bool:
    return _native.takes(_columns(arrays, rule), types=(np.ndarray,), as_bits=True)


def _columns(arrays: dict[str, Array], rule: Rule) -> Columns:
    ws, dcdws, outs = ([np.asarray(arrays[name])] for name in ("w", "dcdw", "out"))
    return Columns(ws, dcdws, outs, [rule], [arrays.get("velocity")])


@in_default_floats
def measure(w: Array, dcdw: Array, rule: Rule) -> Measured:
    """The numbers that `update` steps by: doubles without axes, or a vector for a layer axis."""
    dcdw = np.broadcast_to(dcdw, w.shape)
    if isinstance(rule.lr, np.ndarray):
        rule = rule._replace(lr=1.0)
    with np.errstate(all="ignore"):
        if rule.layer_axis is None:
            return Measured(*map(np.float64, _measure_layer(w, dcdw, rule)))
        w, dcdw = (np.moveaxis(x, rule.layer_axis, 0) for x in (w, dcdw))
        layers = [_measure_layer(w[i, ...], dcdw[i, ...], rule) for i in range(len(w))]
    return Measured(*np.array(layers, np.float64).reshape(-1, 4).T.copy())


def _measure_layer(w: Array, dcdw: Array, rule: Rule) -> tuple[float, ...]:
    flat = {name: _flat(x) for name, x in _in_memory_order({"w": w, "dcdw": dcdw}).items()}
    number, rule = _in_numbers(flat["w"], flat["dcdw"], rule)
    precision = _precision(w, dcdw)
    w_norm, dcdw_norm = (_norm(x, precision, number) for x in flat.values())
    ratio, unclipped = (
        _rule.trust_ratio(w_norm, dcdw_norm, each, _choose, number(1))
        for each in (rule, rule._replace(trust_clip=False))
    )
    numbers = (w_norm, dcdw_norm / rule.grad_scale, ratio, unclipped)
    return tuple(map(float, numbers))


def _precision(w: Array, dcdw: Array) -> Precision:
    return np.longdouble if _is_long(w.dtype) or _is_long(dcdw.dtype) else np.float64


def _coefficients(w: Any, dcdw: Any, precision: Precision, rule: Rule) -> tuple[Wide, Wide]:
    number, rule = _in_numbers(w, dcdw, rule)
    w_norm, dcdw_norm = (_norm(x, precision, number) if rule.adapt else None for x in (w, dcdw))
    on_dcdw, on_w = _rule.coefficients(w_norm, dcdw_norm, rule, _choose, number(1))
    return (on_dcdw, on_w) if number is Wide else (Wide(on_dcdw), Wide(on_w))


def _in_numbers(w: Any, dcdw: Any, rule: Rule) -> tuple[Any, Rule]:
    """The kind of number to compute norms and coefficients in, and the rule in such numbers."""
    numbers = {name: getattr(rule, name) for name in _rule.NUMBERS}
    short = all(_dtype(x).itemsize <= (8 if _dtype(x).kind == "c" else 4) for x in (w, dcdw))
    number: Any = float if short and all(map(_is_moderate, numbers.values())) else Wide
    return number, rule._replace(**{name: number(value) for name, value in numbers.items()})


def _is_moderate(x: float) -> bool:
    return x == 0 or _MODERATE[0] < x < _MODERATE[1]


def _choose(condition: bool, a: Any, b: Any) -> Any:
    return a if condition else b


def _norm(flat: Any, precision: Precision, number: Any) -> Any:
    total = _sum_of_squares(flat, precision, lambda x: x)
    if number is float:
        return math.sqrt(total[0])
    if _SAFE_SUM[0] < total[0] < _SAFE_SUM[1]:
        return _wide(total).sqrt()
    largest = precision(0)
    for piece in _pieces(flat):
        values = np.abs(_read(flat, piece, precision))
        largest = np.maximum(largest, np.max(values, initial=0))
    if largest == 0 or not np.isfinite(largest):
        return Wide(float(largest))
    exponent = int(np.frexp(largest)[1])
    total = _sum_of_squares(flat, precision, lambda x: np.ldexp(x, -exponent))
    return _wide(total).sqrt().scaled(exponent)


def _sum_of_squares(
    flat: Any, precision: Precision, scale: Callable[[Array], Array]
) -> tuple[Any, Any]:
    """The sum and what rounding took from it.

    Rows of 16 are added by pairs of neighbours, and pairs of pairs, as if zeros followed up to the
    next power of two; then lanes and chunks, with their rounding errors.
    """
    total = (precision(0), precision(0))
    for piece in _pieces(flat):
        values = scale(_read(flat, piece, precision))
        count = 1 << (-(-values.size // _LANES) - 1).bit_length()
        rows = np.zeros((count, _LANES), precision)
        np.square(values, out=rows.reshape(-1)[: values.size])
        while len(rows) > 1:
            rows = rows[0::2] + rows[1::2]
        high, low = rows[0], np.zeros(_LANES, precision)
        while len(high) > 1:
            high, low = _add((high[0::2], low[0::2]), (high[1::2], low[1::2]))
        total = _add(total, (high[0], low[0]))
    # Where the sum is infinite or NaN, the rounding errors are NaN.
    return fast_two_sum(*total) if np.isfinite(total[0]) else (total[0], precision(0))


def _add(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    total, error = two_sum(a[0], b[0])
    return total, error + (a[1] + b[1])


def _wide(pair: tuple[Any, Any]) -> Wide:
    """The sum of two numbers of any precision, the second far smaller."""
    mantissa, exponent = np.frexp(pair[0])
    high = float(mantissa)
    low = float((mantissa - high) + np.ldexp(pair[1], -exponent))
    return Wide(*fast_two_sum(high, low), int(exponent))


def _rounded(x: Wide, precision: Precision) -> Any:
    if precision is np.float64:
        return float(x)
    return np.ldexp(precision(x.high) + precision(x.low), x.exponent)


def _in_memory_order(arrays: dict[str, Array]) -> dict[str, Array]:
    """The arrays with their axes in the order in which the memory of the weights runs."""
    w = arrays["w"]
    axes = sorted(range(w.ndim), key=lambda axis: -abs(w.strides[axis]))
    return {name: np.asarray(x).transpose(axes) for name, x in arrays.items()}


def _flat(x: Array) -> Any:
    """What gives and takes pieces of the elements by slices: a view, or numpy's flat iterator."""
    return x.reshape(-1) if x.flags.c_contiguous else x.flat


def _pieces(flat: Any) -> Iterator[slice]:
    """Chunks: more elements to each in the largest arrays, as in the kernel."""
    numbers = 2 if _dtype(flat).kind == "c" else 1
    size, chunk = len(flat) * numbers, _SMALLEST_CHUNK
    while size // chunk > _MOST_CHUNKS:
        chunk *= 2
    chunk //= numbers
    return (slice(i, i + chunk) for i in range(0, len(flat), chunk))


def _dtype(flat: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = flat.base.dtype if isinstance(flat, np.flatiter) else flat.dtype
    return dtype


def _read(flat: Any, piece: slice, precision: Precision) -> Array:
    """A piece in this precision; complex numbers as pairs of real ones."""
    x: Array = flat[piece]
    if x.dtype.kind == "u":
        return bfloat16.decode(x).astype(precision, copy=False)
    if x.dtype.kind == "c":
        return x.astype(np.result_type(precision, np.complex64)).view(precision)
    return x.astype(precision, copy=False)


def _write(flat: Any, piece: slice, values: Array) -> None:
    dtype = _dtype(flat)
    if dtype.kind == "u":
        values = bfloat16.encode(values)
    elif dtype.kind == "c":
        values = values.view(np.result_type(values.dtype, np.complex64))
    flat[piece] = values


def _is_long(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize > (16 if dtype.kind == "c" else 8)


def _reaches_the_limit(dtype: np.dtype[Any], precision: Precision) -> bool:
    """Whether the largest number of the dtype is the largest to compute with."""
    size = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return dtype.kind in "fc" and size >= np.dtype(precision).itemsize
