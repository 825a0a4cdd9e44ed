"""JAX: concrete CPU arrays are updated by the kernel or its twin, other arrays by `jax.numpy`.

The other arrays are traced arrays (jit, grad, vmap, scan), sharded arrays and arrays on
accelerators. With `jax.numpy`, transformations compose and shardings propagate. If the default
backend is the CPU, `jax.numpy` also computes in double, whether or not jax_enable_x64 is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_tree import _native
from lars_tree._backends import base
from lars_tree._backends.arrays import ArraysBackend
from lars_tree._backends.base import Columns, Leaf, StepResult, StepResults, Writes
from lars_tree._backends.cpu import twin
from lars_tree._backends.jax_memory import copy, device_to_view, empty_like, put
from lars_tree._backends.jax_ops import JaxOps, in_order
from lars_tree._backends.memory import NumpyArray
from lars_tree._backends.numpy import as_bits, raw
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._numerics.formula import Measured, Rule, mesh_axes

if TYPE_CHECKING:
    from lars_tree._native._kernel import Plan


class JaxBackend(ArraysBackend):
    """jax.Array, concrete or traced."""

    name = "jax"
    ops = JaxOps()

    def facts(self, x: jax.Array) -> base.Facts:
        kind = base.kind_of_numpy(x.dtype) if isinstance(x.dtype, np.dtype) else base.Kind.OTHER
        return base.Facts(x.shape, kind, x.dtype, _device(x))

    def values(self, x: jax.Array) -> base.Values:
        if _is_traced(x):
            return base.Values.TRACED
        on_cpu = {device.platform for device in x.devices()} == {"cpu"}
        return base.Values.CPU if on_cpu and x.is_fully_addressable else base.Values.DEVICE

    def full(self, number: complex, like: jax.Array) -> jax.Array:
        is_complex = isinstance(number, complex) or jnp.iscomplexobj(like)
        with jax.enable_x64(True):
            return jnp.asarray(number, jnp.complex128 if is_complex else jnp.float64)

    def copy(self, x: jax.Array, stop_gradients: bool) -> jax.Array:
        return jax.lax.stop_gradient(x) if stop_gradients else x

    def fault(self, x: jax.Array) -> str | None:
        if not isinstance(x, jax.Array):  # a tracer of a reference
            return "a reference to an array: read it first, as x[...]"
        if x.ndim > base.MAX_AXES:
            return f"an array of {x.ndim} axes, where numpy has {base.MAX_AXES} at most"
        if not _is_traced(x) and x.is_deleted():
            return "an array that was deleted or donated"
        if _has_escaped(x):
            return "a tracer outside of the call of jit, vmap or grad that made it"
        unreduced = _manual_axes(x, "unreduced")
        if unreduced:
            return f"partial sums over the mesh axis {base.named(unreduced)}: reduce them first"
        return None

    def axis_fault(self, w: jax.Array, rule: Rule) -> str | None:
        axes = mesh_axes(rule)
        if axes and not _is_traced(w):
            return f"expected None outside of jax.shard_map, got {base.named(axes)}"
        return _axis_fault(self.varying(w), axes, rule)

    def varying(self, x: jax.Array) -> frozenset[Any]:
        return _manual_axes(x, "varying")

    def on_all_shards(self, flag: Any, leaves: list[Leaf]) -> Any:
        if isinstance(flag, bool):
            return flag
        axes = self.varying(flag).union(*(mesh_axes(leaf.rule) for leaf in leaves))
        return jax.lax.pmin(flag.astype(jnp.int32), in_order(axes)) > 0 if axes else flag

    def out_fault(self, x: jax.Array) -> str | None:
        hint = "leave out `out` and use the returned value (jax.jit reuses memory that is donated)"
        return f"a jax array, which is immutable: {hint}"

    def is_tracked(self, x: jax.Array) -> bool:
        return _is_traced(x)

    def widen(self, x: Any, w: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        double = jax.default_backend() == "cpu" or w.dtype in (np.float64, np.complex128)
        real, complex_ = (jnp.float64, jnp.complex128) if double else (jnp.float32, jnp.complex64)
        return x.astype(complex_ if jnp.iscomplexobj(x) else real)

    def zeros(self, w: jax.Array, dtype: Any) -> jax.Array:
        with jax.enable_x64(True):
            if _is_traced(w):
                return jnp.zeros_like(w, dtype)
            return _zeros(w.shape, dtype, w, w.sharding)

    def counter(self, w: jax.Array) -> jax.Array:
        if _is_traced(w):
            return jnp.zeros((), jnp.int32)
        sharding = w.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):  # the counter is on all devices
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return _zeros((), jnp.int32, w, sharding)

    def compute(
        self,
        w: jax.Array,
        dcdw: jax.Array,
        rule: Rule,
        velocity: jax.Array | None,
        is_short: bool,
    ) -> StepResult:
        new: StepResult = _compute(w, dcdw, velocity, *_split(rule), is_short)
        return new

    def compute_norms(self, w: jax.Array, dcdw: jax.Array, rule: Rule, is_short: bool) -> Measured:
        measured: Measured = _compute_norms(w, dcdw, *_split(rule), is_short)
        return measured

    def measure(self, leaves: list[Leaf]) -> list[Measured]:
        dtypes = _report_dtypes([leaf.w for leaf in leaves])
        with jax.enable_x64(True):
            measured = [_measure(leaf) for leaf in leaves]
            pairs = zip(measured, dtypes, strict=True)
            return [Measured(*(x.astype(dtype) for x in each)) for each, dtype in pairs]

    @without_warnings
    def numbers(self, rows: NumpyArray, ws: list[jax.Array]) -> list[Measured]:
        dtypes = _report_dtypes(ws)
        groups = base.grouped(range(len(ws)), lambda i: (ws[i].sharding, dtypes[i]))
        found: dict[int, Measured] = {}
        for (sharding, dtype), group in groups.items():
            numbers = put(list(rows[group].astype(dtype).flat), sharding, committed=False)
            for k, i in enumerate(group):
                found[i] = Measured(*numbers[4 * k : 4 * k + 4])
        return [found[i] for i in range(len(ws))]

    def fetch(self, xs: list[jax.Array]) -> list[NumpyArray]:
        return [np.asarray(x) for x in jax.device_get(xs)]

    def all_finite(self, xs: list[jax.Array]) -> Any:
        if any(map(_is_traced, xs)):
            return super().all_finite(xs)
        return all(bool(jnp.isfinite(x).all()) for x in xs)

    def prepare(
        self, plan: Plan, columns: Columns, results: StepResults | None, indices: list[int] | None
    ) -> list[int]:
        everything = super().prepare(plan, columns, results, indices)
        if columns.outs is not None:
            return everything
        given = [x for x in (columns.ws, columns.dcdws, columns.velocities) if x is not None]
        # The views keep the memory alive even if another thread donates an array.
        views: list[list[Any]] = [[None] * len(columns.ws) for _ in given]
        dense, rest = [], []
        for index in everything:
            row = [column[index] for column in given]
            devices = {device_to_view(x) for x in row if x is not None}
            if None in devices or len(devices) > 1:
                rest.append(index)
                continue
            for view, x in zip(views, row, strict=True):
                if x is not None:
                    view[index] = np.asarray(x)
            dense.append(index)
        ws, dcdws, *more = views
        arrays = ws, dcdws, None, columns.rules, (more[0] if more else None)
        new_ws, new_velocities = results or (None, None)
        return sorted(rest + plan.prepare(_READER, *arrays, new_ws, new_velocities, indices=dense))

    def finish(self, columns: Columns, results: StepResults, indices: Iterable[int]) -> None:
        groups: dict[Any, list[tuple[list[Any], int]]] = {}
        for index in indices:
            for new in results:
                if new is not None and isinstance(new[index], np.ndarray):
                    w = columns.ws[index]
                    groups.setdefault((w.sharding, w.committed), []).append((new, index))
        for where, group in groups.items():
            xs = put([new[index] for new, index in group], *where)
            for (new, index), x in zip(group, xs, strict=True):
                new[index] = x

    def update(self, leaves: list[Leaf], writes: Writes) -> list[StepResult]:
        with jax.enable_x64(True):
            return [_update(leaf) for leaf in leaves]


def _split(rule: Rule) -> tuple[dict[str, Any], Rule]:
    """The options that are arguments of `_compute`, and the rule without them.

    Numbers other than 0 and 1 are arguments, so that leaves with other numbers share the code.
    """
    arguments = {name: x for name, x in rule._asdict().items() if _is_argument(x)}
    unset: dict[str, Any] = dict.fromkeys(arguments)
    return arguments, rule._replace(**unset)


def _is_argument(option: Any) -> bool:
    is_array = isinstance(option, (jax.Array, np.ndarray))
    return is_array or (isinstance(option, float) and option not in (0, 1))


@partial(jax.jit, static_argnames=("rule", "is_short"))
def _compute(
    w: jax.Array,
    dcdw: jax.Array,
    velocity: jax.Array | None,
    numbers: dict[str, Any],
    rule: Rule,
    is_short: bool,
) -> StepResult:
    """The step of a leaf, which is traced once for all leaves with these shapes and options."""
    (w, dcdw, velocity), rule = _arguments((w, dcdw, velocity), numbers, rule)
    step = super(JaxBackend, BACKEND).compute
    if not jnp.iscomplexobj(w):
        return step(w, dcdw, rule, velocity, is_short)
    pairs = step(*_as_pairs(w, dcdw, rule), _as_pair(velocity), is_short)
    return StepResult(
        *(None if x is None else jax.lax.complex(x[..., 0], x[..., 1]) for x in pairs)
    )


@partial(jax.jit, static_argnames=("rule", "is_short"))
def _compute_norms(
    w: jax.Array, dcdw: jax.Array, numbers: dict[str, Any], rule: Rule, is_short: bool
) -> Measured:
    """Like `_compute`, for the norms and ratios of the step."""
    (w, dcdw), rule = _arguments((w, dcdw), numbers, rule)
    if jnp.iscomplexobj(w):
        w, dcdw, rule = _as_pairs(w, dcdw, rule)
    return super(JaxBackend, BACKEND).compute_norms(w, dcdw, rule, is_short)


def _arguments(arrays: Any, numbers: dict[str, Any], rule: Rule) -> tuple[Any, Rule]:
    """The arrays and the whole rule; they are constants for derivatives if `stop_gradients`."""
    if rule.stop_gradients:
        arrays, numbers = jax.lax.stop_gradient((arrays, numbers))
    return arrays, rule._replace(**numbers)


def _update(leaf: Leaf) -> StepResult:
    w, dcdw, velocity, rule = leaf.w, leaf.dcdw, leaf.velocity, leaf.rule
    if _steps_in_cpu_memory(leaf):
        new = [empty_like(w)] if velocity is None else [empty_like(w), copy(velocity)]
        twin.update(raw(np.asarray(w)), raw(np.asarray(dcdw)), raw(new[0]), rule, *new[1:])
        return StepResult(*put(new, w.sharding, w.committed))
    dcdw, velocity = (None if x is None else _sharded_like(x, w) for x in (dcdw, velocity))
    return BACKEND.step(w, dcdw, rule, velocity)


def _axis_fault(varying: frozenset[Any], axes: frozenset[Any], rule: Rule) -> str | None:
    """Why norms of weights that vary over `varying` cannot be summed over `axes`; None if they can.

    Under `pmap`, `vmap` and `shard_map(check_vma=False)` JAX does not know over which axes weights
    vary.
    """
    for name in in_order(axes):
        try:
            index = jax.lax.axis_index(name)
        except NameError:
            return f"expected an axis of a surrounding jax.shard_map, got {name!r}"
        if _manual_axes(index, "varying") and name not in varying:
            text = f"got {name!r}, over which they are replicated: leave it out"
            return f"expected axes over which the weights are sharded, {text}"
    unnamed = varying - axes
    if not unnamed or not rule.adapt or () in (rule.axis_name or ()):
        return None
    names = [base.named(x) for x in (unnamed, axes, varying)]
    return (
        f"expected {names[0]} if layers are sharded over it, or () if each device has whole"
        f" ones; got {names[1] or None}, and weights that vary over {names[2]}"
    )


def _manual_axes(x: jax.Array, state: str) -> frozenset[Any]:
    """The mesh axes of the surrounding `shard_map` over which x is "varying" or "unreduced"."""
    if not _is_traced(x):
        return frozenset()
    kind = jax.typeof(x)
    # Before JAX 0.10, only "varying" was known.
    axes: frozenset[Any] = getattr(kind, "vma", frozenset()) if state == "varying" else frozenset()
    return getattr(getattr(kind, "manual_axis_type", None), state, axes)


def _varying_over(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # JAX 0.8


def _zeros(shape: tuple[int, ...], dtype: Any, w: jax.Array, sharding: Any) -> jax.Array:
    """Zeros on the devices of w, committed if w is; otherwise JAX would recompile the next step."""
    if w.committed:
        return jnp.zeros(shape, dtype, device=sharding)
    with jax.default_device(next(iter(w.devices()))):
        return jnp.zeros(shape, dtype)


def _report_dtypes(ws: list[jax.Array]) -> list[Any]:
    """float64 if x64 is enabled or w is double, else float32, because JAX would warn of float64."""
    usual = jnp.finfo(jnp.zeros(()).dtype).bits
    return [np.dtype(f"float{max(usual, jnp.finfo(w.dtype).bits)}") for w in ws]


def _measure(leaf: Leaf) -> Measured:
    w, dcdw, rule = leaf.w, leaf.dcdw, leaf.rule
    if _steps_in_cpu_memory(leaf):
        measured = twin.measure(raw(np.asarray(w)), raw(np.asarray(dcdw)), rule)
        with jax.default_device(next(iter(w.devices()))):
            return Measured(*(jnp.asarray(x) for x in measured))
    return BACKEND.measure_leaf(w, _sharded_like(dcdw, w), rule)


def _steps_in_cpu_memory(leaf: Leaf) -> bool:
    arrays = [x for x in (leaf.w, leaf.dcdw, leaf.velocity) if x is not None]
    in_memory = all(device_to_view(x) is not None for x in arrays)
    return in_memory and not any(isinstance(x, jax.Array) for x in leaf.rule)


def _as_pairs(w: jax.Array, dcdw: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array, Rule]:
    """Complex arrays as pairs of real numbers.

    Without jax_enable_x64, complex double arrays cannot be differentiated, because the backward
    pass runs outside of our `enable_x64` context.
    """
    axis = None if rule.layer_axis is None else rule.layer_axis % w.ndim
    lr = rule.lr_before_momentum
    lr = lr[..., None] if getattr(lr, "ndim", 0) else lr
    return _as_pair(w), _as_pair(dcdw), rule._replace(lr_before_momentum=lr, layer_axis=axis)


def _as_pair(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.stack([jnp.real(x), jnp.imag(x)], -1)


def _sharded_like(x: jax.Array, w: jax.Array) -> jax.Array:
    """Give x the shape and, if known, the sharding of w, because the results must have both."""
    x = jnp.broadcast_to(x, w.shape)
    if not _is_traced(x) and not _is_traced(w):
        return jax.device_put(x, w.sharding) if w.committed and x.sharding != w.sharding else x
    missing = BACKEND.varying(w) - BACKEND.varying(x)
    if missing:  # collectives need all operands to vary over the same axes
        x = _varying_over(x, in_order(missing))
    ours = jax.typeof(w).sharding
    if jax.typeof(x).sharding == ours or jax.sharding.AxisType.Explicit not in ours.mesh.axis_types:
        return x  # the compiler chooses the sharding
    return jax.sharding.reshard(x, ours)


def _is_traced(x: jax.Array) -> bool:
    return isinstance(x, jax.core.Tracer)


def _has_escaped(x: jax.Array) -> bool:
    """Whether x is a tracer of a trace that has ended, so that JAX refuses all operations on it."""
    if not _is_traced(x):
        return False
    is_valid = getattr(getattr(x, "_trace", None), "is_valid", None)
    return _no_trace() or (is_valid is not None and not is_valid())


# JAX has no public function for this. Traces of jit stay valid when they have ended.
_no_trace = getattr(getattr(jax._src, "core", None), "trace_state_clean", lambda: False)


def _device(x: jax.Array) -> frozenset[Any] | None:
    """The devices to which x is committed; None if JAX may still move it."""
    return frozenset(x.devices()) if not _is_traced(x) and x.committed else None


_READER = _native.reader((np.ndarray,), Rule._fields, make=empty_like, copy=copy, as_bits=as_bits)
BACKEND = JaxBackend()
