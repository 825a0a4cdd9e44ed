"""JAX: the operations of the formula, by `jax.numpy`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_tree._backends.arrays import NamespaceOps, other_axes


class JaxOps(NamespaceOps):
    """The functions of jax.numpy, with sums and maxima also over mesh axes inside `shard_map`."""

    def __init__(self, axes: tuple[Any, ...] = ()) -> None:
        super().__init__(jnp)
        self.axes = axes

    def over(self, mesh_axes: frozenset[Any]) -> JaxOps:
        return JaxOps(in_order(mesh_axes)) if mesh_axes else self

    def constant(self, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x)

    def round_to_power_of_two(self, x: jax.Array) -> jax.Array:
        # `jnp.frexp` has twenty operations. A subnormal number has the smallest normal exponent.
        limits = jnp.finfo(x.dtype)
        bits = np.dtype(f"int{limits.bits}")
        exponent = np.asarray(np.inf, x.dtype).view(bits)
        x = jnp.maximum(x, limits.smallest_normal)
        x = jax.lax.bitcast_convert_type(x, bits) & exponent
        return jax.lax.bitcast_convert_type(x, limits.dtype)

    def upper_half(self, x: jax.Array) -> jax.Array:
        # This uses no arithmetic, because XLA may change results by fusing products and sums.
        limits = jnp.finfo(x.dtype)
        return jax.lax.reduce_precision(x, limits.nexp, (limits.nmant + 1) // 2 - 1)

    def unscaled_norms(
        self, w: jax.Array, dcdw: jax.Array, layer_axis: int | None
    ) -> tuple[jax.Array, jax.Array]:
        sums = _squared_norms(other_axes(w, layer_axis), w, dcdw)
        if self.axes:
            sums = jax.lax.psum(sums, self.axes)
        return self.root(sums[0]), self.root(sums[1])

    def sum(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        x = super().sum(x, axes)
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        x = super().max(x, axes)
        return jax.lax.pmax(x, self.axes) if self.axes else x


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _squared_norms(
    axes: tuple[int, ...], w: jax.Array, dcdw: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums of squares over these axes, with keepdims.

    On the CPU, XLA would first store the operand of `jnp.sum` in float64, but not the operands of
    a reduction of several arrays. In programs for many devices, such a reduction of a sharded axis
    would be an all-gather for each layer instead of one all-reduce for all layers. The first axis
    is the one that is usually sharded.
    """
    first, others = axes[:1], axes[1:]
    with jax.enable_x64(True):
        sums = _sum_together((w * w, dcdw * dcdw), others)
        if jax.device_count() == 1:
            one, other = _sum_together(sums, first)
        else:
            one, other = (jnp.sum(x, first) for x in sums)
        return jnp.expand_dims(one, axes), jnp.expand_dims(other, axes)


def _sum_together(pair: tuple[Any, Any], axes: tuple[int, ...]) -> tuple[Any, Any]:
    """The sums of two arrays over these axes, in one reduction."""
    zero = np.zeros((), pair[0].dtype)
    one, other = jax.lax.reduce(pair, (zero, zero), _add_pairs, axes) if axes else pair
    return one, other


def _derivative(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    """The sums and their derivatives.

    JAX calls this after the step was traced, outside of the context in which 64 bits are enabled,
    and cannot differentiate a reduction of several arrays twice within a scan.
    """
    with jax.enable_x64(True):
        sums = tuple(jnp.sum(x * x, axes, keepdims=True) for x in primals)
        pairs = zip(primals, tangents, strict=True)
        return sums, tuple(2 * jnp.sum(x * dx, axes, keepdims=True) for x, dx in pairs)


_squared_norms.defjvp(_derivative)


def _add_pairs(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    return a[0] + b[0], a[1] + b[1]


def in_order(axes: Iterable[Any]) -> tuple[Any, ...]:
    """The axes in an order that is the same in all processes."""
    return tuple(sorted(axes, key=repr))
