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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lars_tree import _native, _rule
from lars_tree._backends import bfloat16
from lars_tree._backends.base import Columns
from lars_tree._backends.wide import SPLITTER, Wide, fast_two_sum, two_product, two_sum
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
    norms = _norms(flat["w"], flat["dcdw"], precision, rule)
    limit = math.inf
    if "lr" in flat and rule.trust_clip and rule.adapt:
        limit = _largest_rate(norms, rule)
        rule = rule._replace(adapt=False)
    on_dcdw, on_w = _coefficients(norms, rule)
    if norms.total is not None and ("lr" in flat or float(on_w) > 1):
        # g and decay * w may cancel, and what is left is stepped far along.
        flat["dcdw"] = norms.total
        on_dcdw, rule = (
            on_dcdw.scaled(norms.total.exponent),
            rule._replace(decay_lambda=0.0, maximize=False),
        )
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
            rates = np.minimum(read["lr"], limit)
            each = np.repeat(rates, read["w"].size // max(1, rates.size))
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
    if isinstance(rule.lr, np.ndarray):  # which matters to trust_clip
        rule = rule._replace(lr=float(np.max(rule.lr, initial=0)))
    with np.errstate(all="ignore"):
        if rule.layer_axis is None:
            return Measured(*map(np.float64, _measure_layer(w, dcdw, rule)))
        w, dcdw = (np.moveaxis(x, rule.layer_axis, 0) for x in (w, dcdw))
        layers = [_measure_layer(w[i, ...], dcdw[i, ...], rule) for i in range(len(w))]
    return Measured(*np.array(layers, np.float64).reshape(-1, 4).T.copy())


def _measure_layer(w: Array, dcdw: Array, rule: Rule) -> tuple[float, ...]:
    flat = {name: _flat(x) for name, x in _in_memory_order({"w": w, "dcdw": dcdw}).items()}
    precision = _precision(w, dcdw)
    norms = _norms(flat["w"], flat["dcdw"], precision, rule._replace(adapt=True))
    numbers = norms.w, norms.dcdw, norms.numbers(rule), _choose, norms.number(1)
    ratio, unclipped = (_rule.trust_ratio(*numbers, bounded=bounded) for bounded in (True, False))
    if norms.total is not None:  # whose norm is not that of the gradient
        separate = rule._replace(adapt=True, joint_norm=False)
        norms = _norms(flat["w"], flat["dcdw"], precision, separate)
    g_norm = norms.dcdw / norms.number(rule.grad_scale)
    return tuple(map(float, (norms.w, g_norm, ratio, unclipped)))


def _precision(w: Array, dcdw: Array) -> Precision:
    return np.longdouble if _is_long(w.dtype) or _is_long(dcdw.dtype) else np.float64


class _Norms(NamedTuple):
    """The norms of a layer, and the kind of number that they are and its coefficients are to be.

    With `joint_norm` that of dcdw is the norm of `total`; without adaptation there are none.
    """

    number: Any
    w: Any = None
    dcdw: Any = None
    total: Total | None = None

    def numbers(self, rule: Rule) -> Rule:
        """The rule in such numbers."""
        names = (*_rule.NUMBERS, "rate")
        return rule._replace(**{name: self.number(getattr(rule, name)) for name in names})


def _norms(w: Any, dcdw: Any, precision: Precision, rule: Rule) -> _Norms:
    number = _number(w, dcdw, rule)
    if not rule.adapt:
        return _Norms(number)
    w_norm = _norm(w, precision, number)
    if not _rule.is_joint(rule):
        return _Norms(number, w_norm, _norm(dcdw, precision, number))
    total = Total(w, dcdw, precision, rule)
    return _Norms(number, w_norm, *_norm_of_total(total, number))


def _coefficients(norms: _Norms, rule: Rule) -> tuple[Wide, Wide]:
    numbers = norms.numbers(rule)
    one = norms.number(1)
    found = _rule.coefficients(norms.w, norms.dcdw, numbers, _choose, one)
    on_dcdw, on_w = (x if norms.number is Wide else Wide(x) for x in found)
    return on_dcdw, on_w


def _largest_rate(norms: _Norms, rule: Rule) -> float:
    """What LARC limits the rates of elements to."""
    if norms.w == 0 or norms.dcdw == 0:
        return math.inf
    numbers = norms.numbers(rule._replace(trust_clip=False))
    return float(_rule.trust_ratio(norms.w, norms.dcdw, numbers, _choose, norms.number(1)))


class Total:
    """dcdw + decay_lambda * grad_scale * w, of which `joint_norm` takes the norm; read in pieces.

    As if each element was rounded once, also where the two cancel. It is to be multiplied by
    2**exponent, which is 0 unless the sum was scaled to stay in range.
    """

    def __init__(
        self, w: Any, dcdw: Any, precision: Precision, rule: Rule, exponent: int | None = None
    ) -> None:
        self.arrays = w, dcdw, precision, rule
        self.precision = precision
        self.dtype = _dtype(w)
        decay = Wide(rule.decay_lambda) * Wide(rule.grad_scale)
        self.shifts, self.exponent = (0, 0), exponent or 0
        if exponent is not None:
            self.shifts = decay.exponent - exponent, -exponent
            decay = decay.scaled(-decay.exponent)
        self.high, self.low = (np.ldexp(x, decay.exponent) for x in (decay.high, decay.low))

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, piece: slice) -> Array:
        *arrays, precision, rule = self.arrays
        w, dcdw = (_read(x, piece, precision) for x in arrays)
        w, dcdw = (
            np.ldexp(x, shift) if shift else x
            for x, shift in zip((w, dcdw), self.shifts, strict=True)
        )
        splitter = SPLITTER if precision is np.float64 else 2.0**32 + 1
        product, error = two_product(self.high, w, splitter)
        total, rest = two_sum(-dcdw if rule.maximize else dcdw, product)
        exact: Array = total + (rest + (error + self.low * w))
        return np.where(np.isfinite(total), exact, total)

    def scaled(self) -> Total | None:
        """The same sum without overflow or underflow; None where elements are not finite."""
        *arrays, precision, rule = self.arrays
        largest = [_largest(x, precision) for x in arrays]
        if not np.isfinite(largest).all():
            return None
        decay = Wide(rule.decay_lambda) * Wide(rule.grad_scale)
        bounds = zip(largest, (decay.exponent + 1, 0), strict=True)
        exponents = [int(np.frexp(x)[1]) + exponent for x, exponent in bounds if x]
        return Total(*self.arrays, exponent=max(exponents, default=0) - _TOTAL_EXPONENT)


# Where scaled sums have their largest elements: squares are in range, and small elements too.
_TOTAL_EXPONENT = 480


def _norm_of_total(total: Total, number: Any) -> tuple[Any, Total]:
    if number is float:
        return _norm(total, total.precision, float), total
    scaled = total.scaled()
    if scaled is None:  # infinite, or NaN
        return Wide(math.sqrt(_sum_of_squares(total, total.precision, lambda x: x)[0])), total
    squares = _sum_of_squares(scaled, scaled.precision, lambda x: x)
    return _wide(squares).sqrt().scaled(scaled.exponent), scaled


def _number(w: Any, dcdw: Any, rule: Rule) -> Any:
    """The kind of number to compute norms and coefficients in."""
    names = (*_rule.NUMBERS, *(["rate"] if rule.trust_clip else []))
    short = all(_dtype(x).itemsize <= (8 if _dtype(x).kind == "c" else 4) for x in (w, dcdw))
    is_moderate = all(_is_moderate(getattr(rule, name)) for name in names)
    return float if short and is_moderate else Wide


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
    largest = _largest(flat, precision)
    if largest == 0 or not np.isfinite(largest):
        return Wide(float(largest))
    exponent = int(np.frexp(largest)[1])
    total = _sum_of_squares(flat, precision, lambda x: np.ldexp(x, -exponent))
    return _wide(total).sqrt().scaled(exponent)


def _largest(flat: Any, precision: Precision) -> Any:
    largest = precision(0)
    for piece in _pieces(flat):
        values = np.abs(_read(flat, piece, precision))
        largest = np.maximum(largest, np.max(values, initial=0))
    return largest


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
    """The arrays with their axes in the order in which the memory of the weights runs.

    Without those of length 1: numpy's flat iterator knows 32 axes, where an array may have 64.
    """
    w = arrays["w"]
    ones = tuple(axis for axis, length in enumerate(w.shape) if length == 1)
    strides = [abs(w.strides[axis]) for axis in range(w.ndim) if w.shape[axis] != 1]
    axes = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    return {name: np.asarray(x).squeeze(ones).transpose(axes) for name, x in arrays.items()}


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
