"""The twin of the native engine: a step over numpy views of CPU memory, whichever library owns it.

It serves the arrays that the kernel does not support (strided, of another byte order, long double,
rates with a shape), and all where it was not built. Each layer that the kernel does support is
given to it. Both give the same bits: `_native/kernel.hpp` says how the numbers are made, and does
the same operations in the same order. First come the norms (`norms.py`), then the step.

Every product and sum is taken in double (in long double for long double), and rounded once into the
dtype of the weights. A leaf is read in chunks, so that a step allocates nothing that grows with it.
An array of uint16 stands for bfloat16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import _native, _rule
from lars_tree._backends import bfloat16
from lars_tree._backends.norms import (
    Norms,
    Precision,
    choose,
    dtype_of,
    norms_of,
    pieces,
    precision_for,
    read_piece,
)
from lars_tree._backends.wide import Wide
from lars_tree._floats import in_default_floats
from lars_tree._rule import Measured, Rule

if TYPE_CHECKING:
    from lars_tree._backends.base import Writes
    from lars_tree._native._kernel import Plan

Array = np.ndarray[Any, Any]


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
    plan = _native.plan()
    for layer in _layers(w, dcdw, out, rule, velocity):
        if not _takes(plan, *layer):
            _update_layer(*layer)
    if plan is not None:
        plan.step()


def prepare(
    w: Array, dcdw: Array, out: Array, rule: Rule, velocity: Array | None, writes: Writes
) -> None:
    """As `update`, but nothing is written before the writes are made."""
    for arrays, its_rule in _layers(w, dcdw, out, rule, velocity):
        if _takes(writes.plan, arrays, its_rule):
            continue
        written = {name: x for name, x in arrays.items() if name in ("out", "velocity")}
        if writes.holds(sum(x.nbytes for x in written.values())):
            new = {name: np.array(x) for name, x in written.items()}
            _update_layer({**arrays, **new}, its_rule)
            for name, values in new.items():
                writes.copy(written[name], values)
        else:
            writes.step_in_chunks(partial(_update_layer, arrays, its_rule))


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
    # Of no concern here.
    rule = rule._replace(nonfinite="propagate", stop_gradients=True, axis_name=None)
    if rule.layer_axis is None:
        yield arrays, rule
        return
    stacks = {name: np.moveaxis(x, rule.layer_axis, 0) for name, x in arrays.items()}
    for i in range(len(stacks["w"])):
        yield (
            {name: stack[i, ...] for name, stack in stacks.items()},
            rule._replace(layer_axis=None),
        )


@in_default_floats
def _update_layer(arrays: dict[str, Array], rule: Rule) -> None:
    """One step over arrays of one shape, by their names in `update`."""
    with np.errstate(all="ignore"):
        _step_layer(arrays, rule)


def _step_layer(arrays: dict[str, Array], rule: Rule) -> None:
    precision = precision_for(arrays["w"], arrays["dcdw"])
    flat = {name: _flat(x) for name, x in _in_memory_order(arrays).items()}
    norms = norms_of(flat["w"], flat["dcdw"], precision, rule)
    share: Callable[[Array], Array] = lambda rates: rates  # noqa: E731
    if "lr" in flat and rule.trust_clip:
        rule, share = _clipping(norms, rule)
    on_dcdw, on_w = _coefficients(norms, rule)
    if norms.total is not None and ("lr" in flat or float(on_w) > 1):
        # g and decay * w may cancel, and what is left is stepped far along.
        flat["dcdw"] = norms.total
        on_dcdw, rule = on_dcdw.scaled(norms.total.exponent), _rule.without_decay(rule)
    factor, exponent = on_dcdw.split()
    by: list[Any] = [_rounded(factor, precision), None]
    if rule.maximize:
        by[0] = -by[0]
    if rule.decay_lambda:
        by[1] = _rounded(on_w, precision)
    checked = _reaches_the_limit(arrays["out"].dtype, precision)
    for piece in pieces(flat["w"]):
        read = {name: read_piece(x, piece, precision) for name, x in flat.items() if name != "out"}
        here = by
        if "lr" in read:
            # complex: a real and an imaginary part for each rate
            rates = share(read["lr"])
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


def _takes(plan: Plan | None, arrays: dict[str, Array], rule: Rule) -> bool:
    """Add a layer to the plan if the native engine supports it; return whether it does."""
    if plan is None or "lr" in arrays:
        return False
    columns = [arrays["w"]], [arrays["dcdw"]], [arrays["out"]], [rule], [arrays.get("velocity")]
    return not plan.prepare(_READER, *columns)


_READER = _native.reader((np.ndarray,), Rule._fields, as_bits=True)


def measure(w: Array, dcdw: Array, rule: Rule) -> Measured:
    """The numbers that `update` steps by: doubles without axes, or a vector for a layer axis."""
    layers = [_measure_layer(*layer) for layer in _layers(w, dcdw, w, rule, None)]
    if rule.layer_axis is None:
        return Measured(*map(np.float64, layers[0]))
    return Measured(*np.array(layers, np.float64).reshape(-1, 4).T.copy())


def measured(plan: Plan) -> Array:
    """What the steps of a plan are made of: a row with the fields of `Measured` for each layer."""
    return np.frombuffer(plan.measure(plan.norms())).reshape(-1, len(Measured._fields))


@in_default_floats
def _measure_layer(arrays: dict[str, Array], rule: Rule) -> tuple[float, ...]:
    with np.errstate(all="ignore"):
        return _measured_layer(arrays, rule)


def _measured_layer(arrays: dict[str, Array], rule: Rule) -> tuple[float, ...]:
    if "lr" in arrays:  # the largest rate matters to trust_clip
        rule = rule._replace(lr=float(np.max(arrays["lr"], initial=0)))
    precision = precision_for(arrays["w"], arrays["dcdw"])
    flat = {name: _flat(x) for name, x in _in_memory_order(arrays).items()}
    norms = norms_of(flat["w"], flat["dcdw"], precision, rule._replace(adapt=True))
    numbers = norms.w, norms.dcdw, norms.numbers(rule), choose, norms.number(1)
    ratio, unclipped = (_rule.trust_ratio(*numbers, bounded=bounded) for bounded in (True, False))
    if norms.total is not None:  # whose norm is not that of the gradient
        separate = rule._replace(adapt=True, joint_norm=False)
        norms = norms_of(flat["w"], flat["dcdw"], precision, separate)
    g_norm = norms.dcdw / norms.number(rule.grad_scale)
    return tuple(map(float, (norms.w, g_norm, ratio, unclipped)))


def _coefficients(norms: Norms, rule: Rule) -> tuple[Wide, Wide]:
    numbers = norms.numbers(rule)
    one = norms.number(1)
    found = _rule.coefficients(norms.w, norms.dcdw, numbers, choose, one)
    on_dcdw, on_w = (x if norms.number is Wide else Wide(x) for x in found)
    return on_dcdw, on_w


def _clipping(norms: Norms, rule: Rule) -> tuple[Rule, Callable[[Array], Array]]:
    """LARC with a rate for each element: a rule without it, and what to multiply its step by."""
    rule = rule._replace(trust_clip=False)
    if not rule.adapt or norms.w == 0 or norms.dcdw == 0:
        return rule, lambda rates: rates
    numbers = norms.numbers(rule)
    ratio = _rule.trust_ratio(norms.w, norms.dcdw, numbers, choose, norms.number(1))
    ratio = ratio if isinstance(ratio, Wide) else Wide(ratio)
    if ratio.high and ratio.exponent < -900:  # no double, or one with few digits
        return rule, lambda rates: np.minimum(np.ldexp(rates, -ratio.exponent) / ratio.high, 1)
    return rule._replace(adapt=False), lambda rates: np.minimum(rates, float(ratio))


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


def _write(flat: Any, piece: slice, values: Array) -> None:
    dtype = dtype_of(flat)
    if dtype.kind == "u":
        values = bfloat16.encode(values)
    elif dtype.kind == "c":
        values = values.view(np.result_type(values.dtype, np.complex64))
    flat[piece] = values


def _reaches_the_limit(dtype: np.dtype[Any], precision: Precision) -> bool:
    """Whether the largest number of the dtype is the largest to compute with."""
    size = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return dtype.kind in "fc" and size >= np.dtype(precision).itemsize
