"""Reports on layers: trust ratios, a table, their history over a training run.

The numbers are those of the update itself (`_measure.py`), on the device where it takes place;
nothing waits for them before they are shown. matplotlib and rich are imported where they are first
needed. `pip install 'lars-tree[report]'` has both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from math import prod
from typing import Any, Protocol, TypeVar, Unpack, overload

import numpy as np

from lars_tree import _backends, _options, _tree, errors
from lars_tree._core.types import Flags, Numbers
from lars_tree._core.wrapper import unwrap
from lars_tree._history import TrustHistory, TrustRatioWarning, warn
from lars_tree._layer_table import LayerTable
from lars_tree._measure import fetch, layer_paths, measure, unreadable
from lars_tree._options import Options, StepOptions
from lars_tree._rule import Measured
from lars_tree.array import Array
from lars_tree.container import Container

Tree = TypeVar("Tree", bound=Container)

__all__ = [
    "LayerTable",
    "ScalarCallback",
    "TrustHistory",
    "TrustRatioWarning",
    "layer_table",
    "trust_ratios",
]


@overload
def trust_ratios(w: Tree, dcdw: Any, lr: Numbers, /, **options: Unpack[StepOptions]) -> Tree: ...
@overload
def trust_ratios(w: Any, dcdw: Any, lr: Numbers, /, **options: Unpack[StepOptions]) -> Any: ...


def trust_ratios(
    w: Any,
    dcdw: Any,
    lr: Numbers,
    /,
    *,
    decay_lambda: Numbers = 0,
    stop_gradients: Flags = True,
    **options: Unpack[Options],
) -> Any:
    """The trust ratios by which `lars_update` would step, for the same arguments.

    For each array of w, with g = dcdw / grad_scale,

        ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)

    and 1 where `lars_update` takes 1: for adapt=False, and where |w| or |g| is 0. With `trust_clip`
    it is min(ratio, lr) / lr, by which lr is multiplied, and never above 1.

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> trust_ratios(w, g, 0.1).to_dict()
    {'kernel': np.float64(0.5), 'bias': np.float64(1.0)}
    >>> trust_ratios(np.array([[3.0, 4.0], [0.0, 1.0]]), 1.0, 0.1, layer_axis=0) * 2**0.5
    array([5., 1.])

    Args:
        w: Weights, as in `lars_update`. Nothing is modified.
        dcdw: Gradients: the same.
        lr: Rate: of no effect on the ratios, unless there is `trust_clip`. If it has a shape, the
            largest one counts.
        decay_lambda: Weight decay.
        stop_gradients: False keeps the history of the ratios, where `lars_update` would.
        **options: The further options of `lars_update`; `nonfinite` is of no effect.

    Returns:
        A tree like w. At each leaf a number, or a vector with one for each index of `layer_axis`:
        an array of the library and on the device of the weights, which nothing has waited for.
        float64, on accelerators the type that the update computes in. JAX has float32 for weights
        that are not double, unless jax_enable_x64 is set. None where the weights stay as they are.

    Raises:
        LarsTreeError: as `lars_update` does.
    """
    given = _given("trust_ratios()", lr, decay_lambda, stop_gradients, options)
    ratios = []
    steps = measure(w, dcdw, given)
    leaves = _tree.leaves(w)
    if len(leaves) != len(steps):
        raise _tree.changed()
    for old, step in zip(leaves, steps, strict=True):
        ratio = None if step is None else step.measured.ratio
        ratios.append(Array(ratio) if isinstance(old, Array) and step is not None else ratio)
    return _tree.rebuild(w, ratios, "w")


def layer_table(
    w: Any,
    dcdw: Any,
    lr: Numbers,
    /,
    *,
    decay_lambda: Numbers = 0,
    stop_gradients: Flags = True,
    **options: Unpack[Options],
) -> LayerTable:
    """The layers of w beside the step that `lars_update` would take, for the same arguments.

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> layer_table(w, g, 0.1)
    2 layers, 3 parameters
      path    shape  dtype    parameters  |w|  |g|  ratio  |u| / |w|
      kernel  (2,)   float64           2    5   10    0.5        0.1
      bias    (1,)   float64           1    0    1      1        inf

    |w| and |g| are the norms of weights and gradients (without the loss scale), |u| is that of the
    step. An array with a `layer_axis` has one row for each index of it. Shows itself in a terminal,
    in notebooks and in rich, has `to_markdown()`, and `records` for data frames. Steps are computed
    one array at a time; then all numbers are waited for.

    Args:
        w: Weights, as in `lars_update`. Nothing is modified.
        dcdw: Gradients: the same.
        lr: Rate: the same.
        decay_lambda: Weight decay.
        stop_gradients: As in `lars_update`; of no effect.
        **options: The further options of `lars_update`; `nonfinite` is of no effect.

    Raises:
        LarsTreeError: as `lars_update` does, and where values are traced.

    Warns:
        TrustRatioWarning: naming the layers whose ratio is 0, not finite, or clipped.
    """
    given = _given("layer_table()", lr, decay_lambda, stop_gradients, options)
    steps = measure(w, dcdw, given, with_steps=True)
    known = [number for step in steps if step for number in (*step.measured, step.norm)]
    numbers = iter(fetch("w", known))
    records: list[dict[str, Any]] = []
    faults: list[errors.Line] = []
    leaves = list(_tree.walk(w))
    if len(leaves) != len(steps):
        raise _tree.changed()
    for (path, old), step in zip(leaves, steps, strict=True):
        x = unwrap(old)
        backend = _backends.find(x)
        if backend is None:
            continue
        shape, dtype = tuple(backend.facts(x).shape), str(backend.facts(x).dtype)
        if step is None:
            records.append(_record(path, shape, dtype))
            continue
        columns = np.stack(list(islice(numbers, 5)), axis=-1)
        axis = step.rule.layer_axis
        if axis is not None:
            shape = tuple(np.delete(shape, axis).tolist())
        layers = layer_paths(path, columns.shape[:-1])
        for layer, (*measured, norm) in zip(layers, columns.reshape(-1, 5).tolist(), strict=True):
            records.append(_record(layer, shape, dtype, Measured(*measured), norm))
            faults += [(layer, text) for text in _faults(Measured(*measured))]
    warn("some layers have odd trust ratios", faults)
    return LayerTable(records)


def _given(
    function: str, lr: Numbers, decay_lambda: Numbers, stop_gradients: Flags, options: Options
) -> dict[str, Any]:
    _options.check_names(options, function=function)
    given = {"lr": lr, "decay_lambda": decay_lambda, "stop_gradients": stop_gradients}
    return {**_options.DEFAULTS, **given, **options}


def _record(
    path: errors.Path,
    shape: tuple[int, ...],
    dtype: str,
    layer: Measured | None = None,
    step_norm: float = 0.0,
) -> dict[str, Any]:
    record = {
        "path": errors.path_string(path),
        "shape": shape,
        "dtype": dtype,
        "parameters": prod(shape),
        **dict.fromkeys(("w_norm", "g_norm", "ratio", "relative_step")),
        "clipped": False,
    }
    if layer is None:
        return record
    with np.errstate(all="ignore"):
        relative = float(np.divide(step_norm, layer.w_norm)) if step_norm else 0.0
    return {
        **record,
        "w_norm": layer.w_norm,
        "g_norm": layer.g_norm,
        "ratio": layer.ratio,
        "relative_step": relative,
        "clipped": layer.ratio < layer.unclipped,
    }


def _faults(layer: Measured) -> Iterator[str]:
    if not math.isfinite(layer.ratio) or layer.ratio == 0:
        yield f"ratio is {layer.ratio:g}, as |w| is {layer.w_norm:g} and |g| is {layer.g_norm:g}"
    if layer.ratio < layer.unclipped:
        yield f"ratio is clipped to {layer.ratio:g} from {layer.unclipped:.4g}"


class Writer(Protocol):
    """What writes scalars, as a `SummaryWriter` does."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Write one value."""


class ScalarCallback:
    """Writes trust ratios to whatever has `add_scalar(tag, value, step)`, as TensorBoard's has.

    >>> class Writer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, value)
    >>> log = ScalarCallback(Writer(), every=10)
    >>> w = Container(encoder={"kernel": np.array([3.0, 4.0])})
    >>> for step in range(20):
    ...     log(trust_ratios(w, w, 0.1, decay_lambda=1), step)
    0 trust_ratio/encoder/kernel 0.5
    10 trust_ratio/encoder/kernel 0.5

    Only the steps that are written are waited for.

    Args:
        writer: A `SummaryWriter` of torch or tensorboardX, or the like.
        tag: What stands before the path of each layer.
        every: Which steps to write: those that this number divides.

    Raises:
        OptionError: `every` is no whole number, or below 1.
    """

    def __init__(self, writer: Writer, tag: str = "trust_ratio", every: int = 1) -> None:
        self.writer, self.tag = writer, tag
        self.every = errors.whole_number("every", every, least=1)

    def __call__(self, ratios: Any, step: int) -> None:
        """Write the ratios, a tree as `trust_ratios` returns it, of this step.

        Raises:
            LeafError: a leaf is not a number or an array, or an array without data.
        """
        if step % self.every:
            return
        with _tree.explaining({"ratios": ratios}):
            given = [(path, unwrap(x)) for path, x in _tree.walk(ratios) if x is not None]
        faults = [(path, text) for path, x in given if (text := unreadable(x))]
        if faults:
            headline = "ratios holds something that cannot be written"
            raise errors.error(errors.LeafError, "ratios", headline, faults)
        values = fetch("ratios", [x for _, x in given])
        for (path, _), each in zip(given, values, strict=True):
            for layer, value in zip(layer_paths(path, each.shape), each.reshape(-1), strict=True):
                tag = "/".join(filter(None, [self.tag, errors.path_string(layer)]))
                self.writer.add_scalar(tag, float(value), step)
