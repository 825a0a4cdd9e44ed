"""Which parameters of a model are layers: `param_groups`, and those that are none any more.

Public in `lars_tree.torch`. Decides by the type of the module, by name, then by the number of axes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from lars_tree import errors
from lars_tree._options import check_names
from lars_tree._torch_messages import name_of
from lars_tree._torch_options import NAMES, GroupOptions, adapts

_Named = tuple[str, Tensor]


def param_groups(
    model: Module,
    *,
    exclude: Callable[[str, Tensor], bool] | None = None,
    named: bool = False,
    **options: Unpack[GroupOptions],
) -> list[dict[str, Any]]:
    """Parameter groups by the usual recipe: biases and norm layers without decay or adaptation.

    >>> import torch
    >>> from lars_tree.torch import Lars, param_groups
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    >>> groups = param_groups(model, named=True, weight_decay=1e-4)
    >>> for group in groups:
    ...     names = [name for name, _ in group["params"]]
    ...     print(names, group["weight_decay"], group.get("adapt", True))
    ['0.weight'] 0.0001 True
    ['0.bias', '1.weight', '1.bias'] 0.0 False
    >>> opt = Lars(groups, lr=0.1)

    Left out of decay and adaptation are: the parameters of norm layers (those of torch, and classes
    whose names end in Norm, Norm2d and the like), of PReLU, and the magnitudes of weight_norm;
    whatever is called bias; what the model's own `no_weight_decay()` lists, as in timm; and all
    that has at most one axis, not counting `layer_axis`.

    Args:
        model: The model. Its parameters that require a gradient are taken, each once.
        exclude: Decides instead, given a name and a parameter, whether it is left out.
        named: True: the groups hold (name, parameter) pairs, so that errors and states show the
            names. False: they hold parameters, which every framework takes.
        **options: Options of `Lars` for all groups.

    Returns:
        The groups that are not empty, the adapted parameters first.

    Raises:
        TypeError: `model` is not a module; an option is not one of `Lars`.
        ValueError: A parameter has no shape yet.
        LeafError: A parameter is no longer a layer, as in FSDP1 and DeepSpeed's ZeRO.
    """
    if not isinstance(model, Module):
        given = "a generator" if isinstance(model, Iterator) else errors.describe(model)
        raise TypeError(f"param_groups needs the model itself, which has the names, got {given}")
    check_names(options, NAMES, function="param_groups()")
    parameters = list(model.named_parameters())
    _refuse_flat(parameters)
    for name, p in parameters:
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run the model once to initialise it")
    few = 1 if options.get("layer_axis") is None else 2
    usual = {id(p) for p in _usually_left_out(model, few)} if exclude is None else set()
    adapted: list[_Named] = []
    others: list[_Named] = []
    for name, p in parameters:
        if p.requires_grad:
            left_out = id(p) in usual if exclude is None else exclude(name, p)
            (others if left_out else adapted).append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": adapted, **options},
        {"params": others, **options, "weight_decay": 0.0, "adapt": False, "layer_axis": None},
    ]
    if not named:
        for group in groups:
            group["params"] = [p for _, p in group["params"]]
    return [group for group in groups if group["params"]]


# Modules whose weights are kernels, whatever the names of their classes.
_KERNELS = (
    *(_ConvNd, torch.nn.Linear, torch.nn.Bilinear, torch.nn.RNNBase, torch.nn.RNNCellBase),
    *(torch.nn.Embedding, torch.nn.EmbeddingBag),
)
# Modules whose parameters scale and shift, whatever their shapes.
_VECTORS = (_NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.PReLU)
_NORM_CLASS = re.compile(r"norm(alization)?(act)?(\d+d)?(act)?$", re.IGNORECASE)
_BIAS = re.compile(r"(^|_)bias$|^bias_")  # bias_k and bias_ih_l0 are of torch's own modules


def _usually_left_out(model: Module, few: int) -> Iterator[Tensor]:
    """Parameters to leave out; one that is used in several places, if it is in any of them."""
    for path, module in model.named_modules():
        owner, used_as = module, None
        if isinstance(module, ParametrizationList):  # at ...parametrizations.weight
            used_as = path.rpartition(".")[2]
            owner = model.get_submodule(
                path.removesuffix(f"parametrizations.{used_as}").rstrip(".")
            )
        is_vector = _is_vector_module(owner)
        for name, p in _own_parameters(module).items():
            called_bias = _BIAS.search(used_as or name)
            if p.ndim <= few or is_vector or called_bias or _is_magnitude(module, name):
                yield p
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names = set(listed())
            every = module.named_parameters(remove_duplicate=False)
            yield from (p for name, p in every if name in names)


def _own_parameters(module: Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _is_vector_module(module: Module) -> bool:
    if isinstance(module, _VECTORS):
        return True
    # Of a scripted module the class is lost, and its name kept.
    names = [getattr(module, "original_name", ""), *(x.__name__ for x in type(module).__mro__)]
    return not isinstance(module, _KERNELS) and any(map(_NORM_CLASS.search, names))


def _is_magnitude(module: Module, name: str) -> bool:
    """Whether this is the g of weight_norm, in its new form or in the old one."""
    if isinstance(module, ParametrizationList):
        return name == "original0" and any(isinstance(x, _WeightNorm) for x in module)
    stem = name.removesuffix("_g")
    return stem != name and f"{stem}_v" in _own_parameters(module)


_PARTS = "params holds parts of layers: LARS needs each layer as one tensor"


def refuse_flat(group: dict[str, Any], number: int) -> None:
    """Raise LeafError for parameters of a group that are no longer layers."""
    _refuse_flat((name_of(group, number, i), p) for i, p in enumerate(group["params"]))


def _refuse_flat(parameters: Iterable[_Named]) -> None:
    lines: list[errors.Line] = []
    for name, p in parameters:
        if getattr(p, "_fsdp_flattened", False):
            lines.append(((name,), "flattened by FSDP1: use FSDP2 (fully_shard) instead"))
        elif hasattr(p, "ds_id"):
            lines.append(((name,), "partitioned by DeepSpeed's ZeRO-3: use FSDP2 instead"))
    if lines:
        raise errors.error(errors.LeafError, "params", _PARTS, lines)


def refuse_flattened_since(group: dict[str, Any], number: int) -> None:
    """Raise LeafError where a framework has flattened the parameters that a group was made of.

    Looks at the first of them alone: it is asked at each step.
    """
    params = group["params"]
    if not params:
        return
    p = params[0]
    if getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id"):
        refuse_flat(group, number)
    # DeepSpeed puts one flat tensor, which is not a Parameter, in the place of all of a group.
    is_flat = type(p) is Tensor and p.ndim == 1 and len(params) == 1
    if is_flat and "deepspeed" in sys.modules and adapts(group):
        text = "flattened by DeepSpeed's ZeRO: use ZeRO stage 0, or FSDP2, instead"
        raise errors.error(
            errors.LeafError, "params", _PARTS, [((name_of(group, number, 0),), text)]
        )
