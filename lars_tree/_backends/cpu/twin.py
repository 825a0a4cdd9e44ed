"""The twin of the native engine: the LARS step in numpy, for arrays of any library in CPU memory.

The twin updates the arrays that the kernel does not support (strided, of another byte order, long
double, learning rates with a shape), and all arrays if the kernel was not built. Layers that the
kernel supports are passed on to it. The twin and the kernel give the same bits:
`_native/kernel.hpp` describes the arithmetic, and the twin does the same operations in the same
order, first for the norms (`norms.py`), then for the step.

Every product and sum is computed in double (long double for long double arrays) and rounded once to
the dtype of the weights. Leaves are read in chunks, so temporary memory does not grow with their
size. An array of uint16 holds the bits of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lars_tree import _native
from lars_tree._backends.cpu.norms import (
    Norms,
    Precision,
    dtype_of,
    norms_of,
    pieces,
    precision_for,
    read_piece,
)
from lars_tree._backends.memory import NumpyArray
from lars_tree._numerics import bfloat16, formula
from lars_tree._numerics.double_double import DoubleDouble
from lars_tree._numerics.float_environment import in_default_floats, without_warnings
from lars_tree._numerics.formula import Measured, Rule

if TYPE_CHECKING:
    from lars_tree._backends.base import Writes
    from lars_tree._native._kernel import Plan


def update(
    w: NumpyArray, dcdw: NumpyArray, out: NumpyArray, rule: Rule, velocity: NumpyArray | None = None
) -> None:
    """Write the weights after one step to `out`, which may be the array w or dcdw itself.

    dcdw and an array of learning rates broadcast to the shape of w. `out` has the shape and dtype
    of w. The velocity has the shape of w and is updated in place. All other numbers of the rule
    are floats.
    """
    plan = _native.plan()
    for layer in _layers(w, dcdw, out, rule, velocity):
        if not _add_to_plan(plan, *layer):
            _update_layer(*layer)
    if plan is not None:
        plan.step()


def prepare(
    w: NumpyArray,
    dcdw: NumpyArray,
    out: NumpyArray,
    rule: Rule,
    velocity: NumpyArray | None,
    writes: Writes,
) -> None:
    """Like `update`, but nothing is written before `writes.make()`."""
    for arrays, layer_rule in _layers(w, dcdw, out, rule, velocity):
        if _add_to_plan(writes.plan, arrays, layer_rule):
            continue
        written = {name: x for name, x in arrays.items() if name in ("out", "velocity")}
        if writes.holds(sum(x.nbytes for x in written.values())):
            new = {name: np.array(x) for name, x in written.items()}
            _update_layer({**arrays, **new}, layer_rule)
            for name, values in new.items():
                writes.copy(written[name], values)
        else:
            writes.step_in_chunks(partial(_update_layer, arrays, layer_rule))


def _layers(
    w: NumpyArray, dcdw: NumpyArray, out: NumpyArray, rule: Rule, velocity: NumpyArray | None
) -> Iterator[tuple[dict[str, NumpyArray], Rule]]:
    """The arrays of each layer by name (w, dcdw, out, velocity, lr), and its rule."""
    arrays = {"w": w, "dcdw": np.broadcast_to(dcdw, w.shape), "out": out}
    if velocity is not None:
        arrays["velocity"] = velocity
    if isinstance(rule.lr_before_momentum, np.ndarray):
        arrays["lr"] = np.broadcast_to(rule.lr_before_momentum, w.shape)
        rule = rule._replace(lr_before_momentum=1.0)
    # These options do not affect the step of a layer; the kernel supports only the values set here.
    rule = rule._replace(nonfinite="propagate", stop_gradients=True, axis_name=None)
    if rule.layer_axis is None:
        yield arrays, rule
        return
    stacks = {name: np.moveaxis(x, rule.layer_axis, 0) for name, x in arrays.items()}
    rule = rule._replace(layer_axis=None)
    for i in range(len(stacks["w"])):
        yield {name: stack[i, ...] for name, stack in stacks.items()}, rule


@in_default_floats
@without_warnings
def _update_layer(arrays: dict[str, NumpyArray], rule: Rule) -> None:
    precision = precision_for(arrays["w"], arrays["dcdw"])
    flat = _flattened(arrays)
    norms = norms_of(flat["w"], flat["dcdw"], precision, rule)
    clipped: Callable[[NumpyArray], NumpyArray] | None = None
    if "lr" in flat and rule.trust_clip:
        rule, clipped = _clipping(norms, rule)
    found = formula.coefficients(norms.trust_ratio(rule), norms.numbers(rule))
    gradient_coefficient, decay_coefficient = map(_to_double_double, found)
    if norms.joint is not None and ("lr" in flat or float(decay_coefficient) > 1):
        # g and decay * w may cancel, and a long step would magnify the rounding error of their sum.
        flat["dcdw"] = norms.joint
        gradient_coefficient = gradient_coefficient.scaled(norms.joint.exponent)
        rule = formula.without_decay(rule)
    factor, exponent = gradient_coefficient.split()
    coefficients: list[Any] = [_rounded(factor, precision), None]
    if rule.maximize:
        coefficients[0] = -coefficients[0]
    if rule.decay_lambda:
        coefficients[1] = _rounded(decay_coefficient, precision)
    may_overflow = _has_range_of(precision, arrays["out"].dtype)
    for piece in pieces(flat["w"]):
        read = {name: read_piece(x, piece, precision) for name, x in flat.items() if name != "out"}
        local = coefficients
        if "lr" in read:
            rates = read["lr"] if clipped is None else clipped(read["lr"])
            # One rate applies to the real and the imaginary part of a complex element.
            rates = np.repeat(rates, read["w"].size // max(1, rates.size))
            local = [x if x is None else rates * x for x in coefficients]
        new = _step_piece(read, local, exponent, rule)
        if may_overflow and not all(np.isfinite(x).all() for x in new.values()):
            # The step may overflow even if the new weight is finite: compute with all terms / 4.
            smaller = {name: x if name == "dcdw" else x / 4 for name, x in read.items()}
            quarter = _step_piece(smaller, local, exponent - 2, rule)
            new = {name: np.where(np.isfinite(x), x, 4 * quarter[name]) for name, x in new.items()}
        for name, values in new.items():
            _write(flat[name], piece, values)


def _step_piece(
    read: dict[str, NumpyArray], coefficients: list[Any], exponent: int, rule: Rule
) -> dict[str, NumpyArray]:
    """The new values of the arrays to write to, by name."""
    w, dcdw = read["w"], read["dcdw"]
    dcdw = np.ldexp(dcdw, exponent) if exponent else dcdw
    if "velocity" not in read:
        return {"out": formula.apply_step(w, dcdw, *coefficients)}
    u = formula.increment(w, dcdw, *coefficients)
    new_w, velocity = formula.apply_momentum(w, read["velocity"], u, rule)
    return {"out": new_w, "velocity": velocity}


def _add_to_plan(plan: Plan | None, arrays: dict[str, NumpyArray], rule: Rule) -> bool:
    """Add a layer to the plan of the native engine; False if the kernel does not support it."""
    if plan is None or "lr" in arrays:
        return False
    columns = [arrays["w"]], [arrays["dcdw"]], [arrays["out"]], [rule], [arrays.get("velocity")]
    return not plan.prepare(_READER, *columns)


_READER = _native.reader((np.ndarray,), Rule._fields, as_bits=True)


def measure(w: NumpyArray, dcdw: NumpyArray, rule: Rule) -> Measured:
    """The norms and ratios of `update`: numbers, or vectors if there is a layer axis."""
    layers = [_measure_layer(*layer) for layer in _layers(w, dcdw, w, rule, None)]
    if rule.layer_axis is None:
        return Measured(*map(np.float64, layers[0]))
    return Measured(*np.array(layers, np.float64).reshape(-1, 4).T.copy())


def measured(plan: Plan) -> NumpyArray:
    """The norms and ratios in a plan: for each layer a row with the fields of `Measured`."""
    return np.frombuffer(plan.measure(plan.norms())).reshape(-1, len(Measured._fields))


@in_default_floats
@without_warnings
def _measure_layer(arrays: dict[str, NumpyArray], rule: Rule) -> tuple[float, ...]:
    if "lr" in arrays:  # an array of rates: trust_clip is reported for the largest
        rule = rule._replace(lr_before_momentum=float(np.max(arrays["lr"], initial=0)))
    precision = precision_for(arrays["w"], arrays["dcdw"])
    flat = _flattened(arrays)
    norms = norms_of(flat["w"], flat["dcdw"], precision, rule._replace(adapt=True))
    ratio, unclipped = norms.trust_ratio(rule), norms.trust_ratio(rule, clip=False)
    if norms.joint is not None:  # then norms.dcdw is the norm of the joint gradient
        separate = rule._replace(adapt=True, joint_norm=False)
        norms = norms_of(flat["w"], flat["dcdw"], precision, separate)
    g_norm = norms.dcdw / norms.number(rule.grad_scale)
    return tuple(map(float, (norms.w, g_norm, ratio, unclipped)))


def _to_double_double(x: DoubleDouble | float) -> DoubleDouble:
    return x if isinstance(x, DoubleDouble) else DoubleDouble(x)


def _clipping(norms: Norms, rule: Rule) -> tuple[Rule, Callable[[NumpyArray], NumpyArray] | None]:
    """For `trust_clip` with a rate per element: a simpler rule, and a function to clip rates."""
    rule = rule._replace(trust_clip=False)
    if not rule.adapt or norms.w == 0 or norms.dcdw == 0:
        return rule, None
    ratio = _to_double_double(norms.trust_ratio(rule))
    if ratio.high and ratio.exponent < -900:  # as a double, the ratio may be 0 or inexact
        return rule, lambda rates: np.minimum(np.ldexp(rates, -ratio.exponent) / ratio.high, 1)
    return rule._replace(adapt=False), lambda rates: np.minimum(rates, float(ratio))


def _rounded(x: DoubleDouble, precision: Precision) -> Any:
    return np.ldexp(precision(x.high) + precision(x.low), x.exponent)


def _flattened(arrays: dict[str, NumpyArray]) -> dict[str, Any]:
    """The elements in the memory order of w: 1-d views, or flat iterators if memory has gaps.

    Axes of length 1 are dropped, because numpy's iterators support at most 32 axes, and its arrays
    have up to 64.
    """
    w = arrays["w"]
    ones = tuple(axis for axis, length in enumerate(w.shape) if length == 1)
    strides = [abs(w.strides[axis]) for axis in range(w.ndim) if w.shape[axis] != 1]
    axes = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    ordered = {name: np.asarray(x).squeeze(ones).transpose(axes) for name, x in arrays.items()}
    return {name: x.reshape(-1) if x.flags.c_contiguous else x.flat for name, x in ordered.items()}


def _write(flat: Any, piece: slice, values: NumpyArray) -> None:
    dtype = dtype_of(flat)
    if dtype.kind == "u":
        values = bfloat16.encode(values)
    elif dtype.kind == "c":
        values = values.view(np.result_type(values.dtype, np.complex64))
    flat[piece] = values


def _has_range_of(precision: Precision, dtype: np.dtype[Any]) -> bool:
    """Whether the dtype has the same largest number as the precision."""
    size = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return dtype.kind in "fc" and size >= np.dtype(precision).itemsize
