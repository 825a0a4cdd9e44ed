"""lars_update: one LARS step on every array of a tree of weights, computed by `_core`."""

from __future__ import annotations

from typing import Any, Self, Unpack, overload

from lars_tree._core.advance import advance
from lars_tree._core.options import Options, StepOptions, with_hints
from lars_tree._core.types import Axes, Flags, MeshAxes, NonFinites, Numbers, T


@with_hints
def lars_update(
    w: T,
    dcdw: Any,
    lr: Numbers,
    /,
    *,
    decay_lambda: Numbers = 0,
    stop_gradients: Flags = True,
    out: T | None = None,
    trust_coefficient: Numbers = 1.0,
    eps: Numbers = 0.0,
    adapt: Flags = True,
    trust_clip: Flags = False,
    joint_norm: Flags = False,
    grad_scale: Numbers = 1.0,
    nonfinite: NonFinites = "propagate",
    layer_axis: Axes = None,
    axis_name: MeshAxes = None,
) -> T:
    """Take one LARS step on every array of a tree of weights.

    Each array is one layer. For weights w and gradient g = dcdw / grad_scale,

        ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)
        w_new = w - lr * ratio * (g + decay_lambda * w)

    |.| is the 2-norm over the layer. Where |w| or |g| is 0, ratio is 1. With decay the result
    differs from ivy's, which divides by decay_lambda * |w| alone: see the page on the rule.

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> lars_update(w, g, 0.1).kernel       # ratio = 5 / 10: a step of 0.05 * [0, 10]
    array([3. , 3.5])
    >>> lars_update(w, g, 0.1, adapt={"kernel": False, "bias": True}).kernel      # plain SGD
    array([3., 3.])

    >>> lars_update(w, g, 0.1, adapt={"*bias": True, "*": False}).kernel          # by path
    array([3., 3.])
    >>> lars_update(w, g, 0.1, adapt=lambda path, leaf: leaf.size < 2).kernel
    array([3., 3.])

    Every argument except w and out takes one value for all leaves, or a Container or dict that is a
    prefix of w: a value at an inner node applies to all leaves below it. Keys match by name. lr and
    the options also take a function of (path, leaf), where the path is a tuple of keys; or a
    mapping of paths and patterns, with "*" for all other leaves, as in {"*/bias": False, "*": True}
    or {"head": 1.0, "*": 0.1}. In patterns, * also matches "/", and a leading */ also matches
    nothing. The key of a leaf itself decides. Otherwise, the key of the nearest node above the leaf
    and all patterns that match the leaf must agree. The order of the keys has no effect.

    On the CPU the result is computed in at least double precision and rounded once; it does not
    depend on the tree, on threads, or on whether numpy, torch or JAX owns the memory.

    Args:
        w: Weights: floating-point or complex arrays of any shape in any tree (Container, dict,
            list, tuple, namedtuple, attrs, any class that is registered as a pytree), or one array;
            None is a leaf without weights. Never modified, unless `out` is w.
        dcdw: Gradient of the cost, in units of cost per weight: arrays that broadcast to the arrays
            of w, of the same library and device. None leaves what is below it unchanged, also
            leaves that are not arrays, such as the functions in a module of equinox.
        lr: Learning rate >= 0. It has no unit if ratio is not 1, because the units of cost and
            weights then cancel. May be an array that broadcasts to the weights.
        decay_lambda: Weight decay >= 0, in cost per weight squared.
        stop_gradients: True: the result has no autograd graph, and has the `requires_grad` of w.
            False: the step is differentiable in w, dcdw, lr and decay_lambda.
        out: The arrays to write the result to: a tree like w, or w itself for an update in place.
        trust_coefficient: The paper's eta, a pure number >= 0; published recipes use 0.001.
        eps: Added to the denominator, in units of the gradient.
        adapt: False: ratio is 1 (SGD with decay), as is usual for biases and norm layers.
        trust_clip: True (LARC): the rate of a layer is min(ratio, lr) instead of lr * ratio. If a
            norm is 0, the rate is lr.
        joint_norm: True: the denominator is |g + decay_lambda * w| + eps, as in SimCLR, BYOL and
            optax; ratio is 1 where |w| or the norm of this sum is 0.
        grad_scale: The loss scale > 0 by which dcdw was multiplied; the step divides dcdw by it.
        nonfinite: What to do when a new weight would be NaN or infinite. "propagate" writes it,
            "raise" raises before anything is written, "skip" leaves all weights unchanged.
        layer_axis: The axis along which an array stacks layers; each index has its own ratio.
        axis_name: In a JAX `shard_map`, the mesh axes over which an array is sharded: a name or a
            tuple of names. Norms include all shards along these axes. (): each device
            has whole layers.

    Returns:
        The new weights, with the node types, key order, dtypes, shapes and devices of w; `out` if
        given.

    Raises:
        StructureError: dcdw, out or an option does not match w; `paths` has every differing path.
            Or w is cyclic. Or, without `out`, w has a node that cannot be rebuilt.
        LeafError: A leaf is not an array, or is unsupported: sparse, freed or meta, for example.
        DtypeError: Weights or gradients are not floating point, or mix complex and real.
        ShapeError: An array does not broadcast to its weights.
        BackendError: The arrays of one leaf are of different libraries or devices.
        OptionError: An option has an invalid value: negative, NaN, infinite, or not a number.
        OutError: `out` cannot be written to: an array is read-only, immutable, of another shape or
            dtype, or overlaps itself; or two arrays share memory.
        NonFiniteError: A new weight would be NaN or infinite, and nonfinite="raise" was given.

    All are LarsTreeErrors. If an error is raised, nothing was written.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """
    options = {
        "lr": lr,
        "decay_lambda": decay_lambda,
        "trust_coefficient": trust_coefficient,
        "eps": eps,
        "grad_scale": grad_scale,
        "adapt": adapt,
        "trust_clip": trust_clip,
        "joint_norm": joint_norm,
        "nonfinite": nonfinite,
        "layer_axis": layer_axis,
        "axis_name": axis_name,
        "stop_gradients": stop_gradients,
    }
    return advance(w, dcdw, out, options)[0]


class Updatable:
    """The method `lars_update` of Container and Array."""

    __slots__ = ()

    @overload
    def lars_update(
        self, dcdw: Any, lr: Numbers, /, *, out: None = None, **options: Unpack[StepOptions]
    ) -> Self: ...
    @overload
    def lars_update(
        self, dcdw: Any, lr: Numbers, /, *, out: T, **options: Unpack[StepOptions]
    ) -> T: ...

    @with_hints
    def lars_update(
        self,
        dcdw: Any,
        lr: Numbers,
        /,
        *,
        decay_lambda: Numbers = 0,
        stop_gradients: Flags = True,
        out: Any = None,
        **options: Unpack[Options],
    ) -> Any:
        """Take one LARS step on every array: `lars_tree.lars_update` with self as `w`.

        >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
        >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
        >>> w.lars_update(g, 0.1).kernel         # ratio = 5 / 10: a step of 0.05 * [0, 10]
        array([3. , 3.5])
        >>> w.lars_update(g, {"kernel": 0.1, "bias": 1}, out=w).bias                # in place
        array([-1.])
        >>> Array(np.array([3.0, 4.0])).lars_update(np.array([0.4, 0.3]), 0.1, decay_lambda=0.1)
        Array([2.65, 3.65])

        Arguments and errors are those of `lars_tree.lars_update`. `out` may be self, and is
        returned.
        """
        return lars_update(
            self,
            dcdw,
            lr,
            decay_lambda=decay_lambda,
            stop_gradients=stop_gradients,
            out=out,
            **options,
        )
