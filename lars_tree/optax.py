"""LARS for optax: `lars` is a GradientTransformation that takes the steps of `lars_tree.Lars`.

`optimizer.py` computes the steps. Errors have the names of `Lars.update`: w are the parameters, and
dcdw the incoming updates. tests/test_optax.py compares the steps with those of `Lars`, and
tests/clients trains models of flax, equinox and haiku.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lars_tree import _backends, errors

with errors.requiring("lars_tree.optax", "optax"):
    import optax

import jax
import jax.numpy as jnp
import numpy as np

from lars_tree._backends.wrapper import rewrapped, unwrap
from lars_tree._core.options import with_hints
from lars_tree._core.types import Axes, Flags, MeshAxes, NonFinites, Numbers, Rates
from lars_tree._numerics.formula import is_zero
from lars_tree._tree import structure
from lars_tree.optimizer import Lars

__all__ = ["LarsState", "lars"]


def __dir__() -> list[str]:
    return __all__


class LarsState(NamedTuple):
    """The state of `lars`, as in `lars_tree.Lars`.

    Attributes:
        step: The number of steps, an int32 array of shape ().
        skipped: The number of steps that nonfinite="skip" skipped, an int32 array of shape ().
        velocity: A tree like the parameters, float32 where they are float16 or bfloat16; None if
            momentum is the number 0.
    """

    step: Any
    skipped: Any
    velocity: Any


@with_hints
def lars(
    learning_rate: Rates,
    *,
    momentum: Numbers = 0.9,
    nesterov: Flags = False,
    weight_decay: Numbers = 0,
    trust_coefficient: Numbers = 0.001,
    eps: Numbers = 1e-8,
    adapt: Flags = True,
    trust_clip: Flags = False,
    joint_norm: Flags = False,
    grad_scale: Numbers = 1.0,
    nonfinite: NonFinites = "propagate",
    layer_axis: Axes = None,
    axis_name: MeshAxes = None,
    stop_gradients: Flags = True,
) -> optax.GradientTransformation:
    """LARS with momentum as an optax transformation; it includes the learning rate.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = lars(0.1, momentum=0.5, trust_coefficient=1.0, eps=0.0)
    >>> params = {"kernel": jnp.array([3.0, 4.0])}
    >>> grads = {"kernel": jnp.array([0.0, 10.0])}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> updates                                 # ratio 5 / 10: a step of 0.05 * [0, 10]
    {'kernel': Array([ 0. , -0.5], dtype=float32)}
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([3. , 3.5], dtype=float32)}
    >>> state.velocity, int(state.step)
    ({'kernel': Array([0. , 0.5], dtype=float32)}, 1)

    Let w be the parameters, and w_new the weights after the step of `lars_tree.Lars` with the same
    options. The updates are w_new - w in the dtype of w. So `optax.apply_updates` returns w_new
    itself, bit for bit, where w_new is between w / 2 and 2 * w. Elsewhere it returns w_new up to
    one unit in the last place of the update. (No update could do better there: the sum of two
    floating-point numbers cannot be every number.)

    Because the updates are already rounded to the precision of the weights, scale gradients and
    rates, not the updates: chain other transformations before `lars`.

    The update of a gradient of None is None. Parameters that are not floating point, with float0
    gradients, have updates of 0. Parameters and states may be numpy arrays, as after loading a
    checkpoint; they are converted to JAX arrays.

    `optax.inject_hyperparams(lars)` makes all numbers part of the state. It takes every function
    for a schedule, and every int for a number to trace, so list the names of other functions, and
    `layer_axis`, in its `static_args`. It rounds numbers to the dtype of the parameters; for
    float16 and bfloat16, pass `hyperparam_dtype=jnp.float32`.

    Args:
        learning_rate: The rate, or a schedule of optax or `lars_tree.schedules`; the lr of `Lars`.
            Unlike the further arguments of `optax.lars`, those of this function have no positions.
        momentum: The factor of the velocity, a number >= 0.
        nesterov: Nesterov momentum.
        weight_decay: Weight decay: the decay_lambda of `lars_update`.
        trust_coefficient: As in `lars_update`, with the default of optax and of the paper.
        eps: As in `Lars`.
        adapt: As in `lars_update`, like all further arguments. False for a leaf is what
            `trust_ratio_mask=False` is in optax.
        trust_clip: LARC: the learning rate is an upper bound of the local rate.
        joint_norm: True computes the ratio as `optax.lars` does.
        grad_scale: The loss scale that the gradients still have.
        nonfinite: "skip" gives updates of 0, and counts the step in `LarsState.skipped`, if new
            weights would not be finite. "raise" works without `jax.jit` only.
        layer_axis: The axis along which a leaf stacks layers.
        axis_name: The mesh axes over which a leaf is sharded, inside `jax.shard_map`.
        stop_gradients: False keeps the step differentiable.

    Returns:
        A GradientTransformation whose state is a `LarsState`. Its update needs the parameters.

    Raises:
        OptionError: An option has an invalid value.
        StructureError: `update` was called without parameters.
        LarsTreeError: As in `Lars.update`.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """
    options = dict(locals())
    optimizer, has_velocity = Lars(options.pop("learning_rate"), **options), not is_zero(momentum)

    def init(params: optax.Params) -> LarsState:
        w = _in_jax(params)
        state = optimizer.init(w)
        # The counters of a tree without arrays are numpy arrays.
        step, skipped = (jnp.asarray(state[name], np.int32) for name in ("step", "skipped"))
        return LarsState(step, skipped, _like(w, state.velocity) if has_velocity else None)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LarsState]:
        old = _in_jax(_fields(state, has_velocity))
        w, dcdw = _in_jax(_given(params)), _in_jax(updates)
        new_w, new = optimizer.update(w, dcdw, old)
        velocity = _like(old["velocity"], new.velocity) if has_velocity else None
        return _differences(new_w, w, dcdw), LarsState(new.step, new.skipped, velocity)

    return optax.GradientTransformation(init, update)


def _given(params: Any) -> Any:
    if params is None:
        headline = "params are missing"
        line = (), "expected the parameters, as in tx.update(grads, state, params), got None"
        raise errors.error(errors.StructureError, "params", headline, [line])
    return params


def _fields(state: Any, has_velocity: bool) -> dict[str, Any]:
    """The state of `Lars`, which has no velocity if momentum is the number 0."""
    if not isinstance(state, LarsState):
        line = (), f"expected a LarsState, as `init` returns, got {errors.describe(state)}"
        raise errors.error(errors.StateError, "state", "state does not belong to lars", [line])
    return {k: x for k, x in state._asdict().items() if k != "velocity" or has_velocity}


def _in_jax(tree: Any) -> Any:
    """Convert numpy arrays to JAX arrays."""

    def converted(x: Any) -> Any:
        is_array = issubclass(type(x), (np.ndarray, np.generic)) and not _backends.is_float0(x)
        return jnp.asarray(x) if is_array else x

    return jax.tree.map(converted, tree)


def _like(tree: Any, velocity: Any) -> Any:
    """A velocity with nodes of the same types as in the tree; that of `Lars` has Containers."""
    return structure.rebuild(tree, structure.leaves(velocity), "state")


def _differences(new: Any, old: Any, dcdw: Any) -> Any:
    """The updates that `optax.apply_updates` adds to the old weights."""
    rows = zip(
        structure.leaves(new),
        structure.leaves(old),
        structure.broadcast("dcdw", old, dcdw),
        strict=True,
    )
    updates = [
        None if g is None else rewrapped(_difference(*map(unwrap, xs)), g) for *xs, g in rows
    ]
    return structure.rebuild(old, updates, "w")


def _difference(new: Any, old: Any) -> Any:
    return new - old if jnp.issubdtype(old.dtype, jnp.inexact) else jnp.zeros_like(old)
