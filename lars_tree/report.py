"""Reports on layers: trust ratios, a table, and the history of ratios over a training run.

`_report/measure.py` computes the numbers with the code of the update, on the device of the weights;
only showing the numbers waits for the device. matplotlib and rich are imported when needed;
`pip install 'lars-tree[report]'` installs both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Unpack, overload

import numpy as np

from lars_tree import _backends, errors
from lars_tree._backends.wrapper import rewrapped, unwrap
from lars_tree._core.options import DEFAULTS, StepOptions, with_hints
from lars_tree._core.types import Numbers
from lars_tree._numerics.float_environment import without_warnings
from lars_tree._numerics.formula import Measured
from lars_tree._report.history import TrustHistory, TrustRatioWarning, warn
from lars_tree._report.layer_table import LayerTable
from lars_tree._report.measure import fetch, layer_paths, measure, measure_columns, unreadable
from lars_tree._tree import structure
from lars_tree.container import Container

if TYPE_CHECKING:
    from lars_tree.torch import Lars as Optimizer

Tree = TypeVar("Tree", bound=Container)

_NOT_GIVEN: Any = object()

__all__ = [
    "LayerTable",
    "ScalarCallback",
    "TrustHistory",
    "TrustRatioWarning",
    "layer_table",
    "trust_ratios",
]


def __dir__() -> list[str]:
    return __all__


@overload
def trust_ratios(w: Tree, dcdw: Any, lr: Numbers, /, **options: Unpack[StepOptions]) -> Tree: ...
@overload
def trust_ratios(w: Any, dcdw: Any, lr: Numbers, /, **options: Unpack[StepOptions]) -> Any: ...
@overload
def trust_ratios(optimizer: Optimizer, /, *, grad_scale: Any = 1.0) -> dict[str, Any]: ...


@with_hints
def trust_ratios(w: Any, dcdw: Any = _NOT_GIVEN, lr: Any = _NOT_GIVEN, /, **options: Any) -> Any:
    """The trust ratios that `lars_update` uses for the same arguments.

    For each array of w, with g = dcdw / grad_scale,

        ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)

    The ratio is 1 with adapt=False, and where |w| or |g| is 0. With `trust_clip` the result is
    min(ratio, lr) / lr, the factor by which lr is multiplied, at most 1.

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> trust_ratios(w, g, 0.1).to_dict()
    {'kernel': np.float64(0.5), 'bias': np.float64(1.0)}
    >>> trust_ratios(np.array([[3.0, 4.0], [0.0, 1.0]]), 1.0, 0.1, layer_axis=0) * 2**0.5
    array([5., 1.])

    A `lars_tree.torch.Lars`, also as wrapped by Accelerate, may take the place of w, dcdw and lr:
    see `Lars.trust_ratios`.

    The arguments and their defaults are those of `lars_update`. `lr` has an effect only with
    `trust_clip`; if it is an array, its largest element is used. `nonfinite` has no effect.
    `stop_gradients=False` keeps the autograd graph of the ratios. Nothing is modified.

    Returns:
        A tree like w, with arrays of the same library and device: 0-d arrays, or with `layer_axis`
        vectors with one element for each index. None replaces weights that are not updated. The
        dtype is float64; on accelerators, the dtype in which the update computes; in JAX, float32
        for weights that are not float64, unless jax_enable_x64 is set.

    Raises:
        LarsTreeError: As in `lars_update`.
        TypeError: One of w, dcdw and lr is missing; or an optimizer is given with other arguments
            than grad_scale.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """
    optimizer = _optimizer("trust_ratios()", w, dcdw, lr, options)
    if optimizer is not None:
        return optimizer.trust_ratios(**options)
    given = {**DEFAULTS, "lr": lr, **options}
    ratios = [
        None if report.measured is None else rewrapped(report.measured.ratio, report.w)
        for report in measure(w, dcdw, given)
    ]
    return structure.rebuild(w, ratios, "w")


@overload
def layer_table(
    w: Any, dcdw: Any, lr: Numbers, /, **options: Unpack[StepOptions]
) -> LayerTable: ...
@overload
def layer_table(optimizer: Optimizer, /, *, grad_scale: Any = 1.0) -> LayerTable: ...


@with_hints
def layer_table(
    w: Any, dcdw: Any = _NOT_GIVEN, lr: Any = _NOT_GIVEN, /, **options: Any
) -> LayerTable:
    """A table of the layers of w and of the step that `lars_update` would take.

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> layer_table(w, g, 0.1)
    2 layers, 3 parameters
      path    shape  dtype    parameters  |w|  |g|  ratio  |u| / |w|
      kernel  (2,)   float64           2    5   10    0.5        0.1
      bias    (1,)   float64           1    0    1      1        inf

    |w|, |g| and |u| are the norms of weights, gradients (without the loss scale) and step. An array
    with a `layer_axis` has one row for each index. Terminals, notebooks and rich show the table.
    `to_markdown()` returns it as Markdown, and `records` can be made a data frame. The steps are
    computed one array at a time; then the function waits for all values.

    A `lars_tree.torch.Lars`, also as wrapped by Accelerate, may take the place of w, dcdw and lr,
    between `backward` and `step`. The table then has its parameters, with the options of their
    groups and without momentum; `grad_scale` is the loss scale that the gradients still carry.

    The arguments and their defaults are those of `lars_update`; `nonfinite` and `stop_gradients`
    have no effect. Nothing is modified.

    Raises:
        LarsTreeError: As in `lars_update`; or a value is traced.
        TypeError: As in `trust_ratios`.

    Warns:
        TrustRatioWarning: Names the layers whose ratio is 0, not finite, or clipped.
    """
    optimizer = _optimizer("layer_table()", w, dcdw, lr, options)
    if optimizer is not None:
        from lars_tree.torch.rows import to_measure

        matched, caller = to_measure(optimizer, **options)
        reports, paths = measure_columns(matched, caller, with_steps=True), caller.paths()
    else:
        reports = measure(w, dcdw, {**DEFAULTS, "lr": lr, **options}, with_steps=True)
        paths = structure.paths(w, len(reports))
    numbers = [x for report in reports for x in (*(report.measured or ()), report.step_norm)]
    values = iter(fetch("w", [x for x in numbers if x is not None]))
    records: list[dict[str, Any]] = []
    faults: list[errors.Line] = []
    for path, report in zip(paths, reports, strict=True):
        x, axis = unwrap(report.w), report.rule.layer_axis
        backend = _backends.find(x)
        if backend is None:
            continue
        shape, dtype = tuple(backend.facts(x).shape), str(backend.facts(x).dtype)
        if report.measured is None:
            step = {**_NO_STEP, "adapted": report.rule.adapt}
            records.append(_record(path, shape, dtype, step))
            continue
        columns = np.stack(list(islice(values, 5)), axis=-1)
        if axis is not None:
            shape = tuple(np.delete(shape, axis).tolist())
        layers = layer_paths(path, columns.shape[:-1])
        for layer, (*row, step_norm) in zip(layers, columns.reshape(-1, 5).tolist(), strict=True):
            measured = Measured(*row)
            step = {**_step_fields(measured, step_norm), "adapted": report.rule.adapt}
            records.append(_record(layer, shape, dtype, step))
            faults += [(layer, text) for text in _faults(measured)]
    warn("some layers have odd trust ratios", faults)
    return LayerTable(records)


def _optimizer(
    function: str, w: Any, dcdw: Any, lr: Any, options: dict[str, Any]
) -> Optimizer | None:
    """The torch optimizer that was given in the place of w, dcdw and lr, if there is one."""
    cls = getattr(sys.modules.get("lars_tree.torch"), "Lars", ())
    given = [x is not _NOT_GIVEN for x in (dcdw, lr)]
    # Accelerate, and so Hugging Face's Trainer, wraps the optimizer.
    found = (x for x in (w, getattr(w, "optimizer", None)) if isinstance(x, cls))
    optimizer: Optimizer | None = next(found, None)
    if optimizer is not None:
        if any(given) or options.keys() - {"grad_scale"}:
            text = "takes no other arguments with an optimizer, except grad_scale"
            raise TypeError(f"{function} {text}: its groups have gradients, rates and options")
        return optimizer
    if not all(given):
        raise TypeError(f"{function} needs w, dcdw and lr, or a lars_tree.torch.Lars")
    return None


_NO_STEP = {**dict.fromkeys(("w_norm", "g_norm", "ratio", "relative_step")), "clipped": False}


def _record(
    path: errors.Path, shape: tuple[int, ...], dtype: str, step: dict[str, Any]
) -> dict[str, Any]:
    layer = {"path": errors.path_string(path), "shape": shape, "dtype": dtype}
    return {**layer, "parameters": prod(shape), **step}


@without_warnings
def _step_fields(layer: Measured, step_norm: float) -> dict[str, Any]:
    relative = float(np.divide(step_norm, layer.w_norm)) if step_norm else 0.0
    return {
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
    """An object that writes scalars, such as a `SummaryWriter`."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Write one value."""


class ScalarCallback:
    """Writes trust ratios to a TensorBoard writer, or any object with the same `add_scalar`.

    >>> class Writer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, value)
    >>> log = ScalarCallback(Writer(), every=10)
    >>> w = Container(encoder={"kernel": np.array([3.0, 4.0])})
    >>> for step in range(20):
    ...     log(trust_ratios(w, w, 0.1, decay_lambda=1), step)
    0 trust_ratio/encoder/kernel 0.5
    10 trust_ratio/encoder/kernel 0.5

    Only calls that write wait for the device.

    Args:
        writer: A `SummaryWriter` of torch or tensorboardX, or any object with
            `add_scalar(tag, value, step)`.
        tag: The first part of each tag; the path of the layer is the rest.
        every: Only steps that are multiples of this number are written.

    Raises:
        OptionError: `every` is not a whole number >= 1.
    """

    def __init__(self, writer: Writer, tag: str = "trust_ratio", every: int = 1) -> None:
        self.writer, self.tag = writer, tag
        self.every = errors.whole_number("every", every, least=1)

    def __call__(self, ratios: Any, step: int) -> None:
        """Write the ratios of this step, a tree as returned by `trust_ratios`.

        Raises:
            LeafError: A leaf is neither a number, a vector nor None, or its data is missing.
        """
        if step % self.every:
            return
        with structure.explaining({"ratios": ratios}):
            given = [(path, unwrap(x)) for path, x in structure.walk(ratios) if x is not None]
        faults = [(path, text) for path, x in given if (text := unreadable(x))]
        if faults:
            headline = "ratios has a leaf that is not a trust ratio"
            raise errors.error(errors.LeafError, "ratios", headline, faults)
        values = fetch("ratios", [x for _, x in given])
        for (path, _), of_leaf in zip(given, values, strict=True):
            layers = layer_paths(path, of_leaf.shape)
            for layer, value in zip(layers, of_leaf.reshape(-1), strict=True):
                tag = "/".join(filter(None, [self.tag, errors.path_string(layer)]))
                self.writer.add_scalar(tag, float(value), step)
