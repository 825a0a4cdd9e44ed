"""`param_groups`, the groups of the usual recipe, and the check for flattened parameters."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import translate
from itertools import compress
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from lars_tree import errors
from lars_tree._core.options import check_names
from lars_tree._tree import by_path
from lars_tree.torch.options import NAMES, ByName, GroupOptions, adapts

_Named = tuple[str, Tensor]


def param_groups(
    model: Module,
    *,
    exclude: Callable[[str, Tensor], bool] | None = None,
    excluded_lr: ByName[float | Tensor | None] = None,
    named: bool = False,
    **options: Unpack[GroupOptions],
) -> list[dict[str, Any]]:
    """Parameter groups by the usual recipe: no decay and no adaptation for biases and norm layers.

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

    These parameters are excluded from decay and adaptation: those of norm layers (torch's, and
    classes whose names end in Norm, Norm2d and the like) and of PReLU; the magnitudes of
    weight_norm; parameters named bias; parameters with at most one axis, not counting `layer_axis`;
    and parameters without weight decay by the conventions of other packages: names or patterns
    that `no_weight_decay()` of the model or of a module in it returns, as in timm, such as
    {"pos_embed", "cls_token"}; names that contain what `no_weight_decay_keywords()` returns, as in
    Swin; and parameters with a true attribute `_no_weight_decay`, as in Mamba.

    Excluded parameters take SGD steps. Without `excluded_lr` they take them at the rate of all
    others, as in the published recipes. If this rate is in the tens, it is too large for them:

    >>> lr, trust_coefficient = 30.0, 0.001
    >>> groups = param_groups(model, lr=lr, excluded_lr=lr * trust_coefficient)
    >>> [group["lr"] for group in groups]
    [30.0, 0.03]

    Options may depend on the parameter: a function of (name, parameter), or a mapping whose keys
    are names of parameters or of modules, or patterns for them. "*" stands for all others.

    >>> groups = param_groups(model, lr={"1": 0.5, "*": 2.0})
    >>> [group["lr"] for group in groups]
    [2.0, 2.0, 0.5]

    Args:
        model: The model. Each parameter that requires a gradient is in one group.
        exclude: A function that replaces these rules: exclude(name, parameter) returns whether to
            exclude the parameter.
        excluded_lr: The rate of the excluded parameters; None: the rate of all others. A mapping
            needs values for excluded parameters only. We recommend lr * trust_coefficient: see
            "Does it train?" in the docs. Schedulers that scale the rate of each group keep the
            ratio of both rates; `OneCycleLR` needs a list of rates.
        named: True: the groups contain (name, parameter) pairs, so that errors and states show the
            names. False: the groups contain only parameters, as some frameworks require.
        **options: Options of `Lars`. Excluded parameters have weight_decay=0, adapt=False and
            layer_axis=None in any case.

    Returns:
        The groups: one for each combination of values; those of adapted parameters first.

    Raises:
        TypeError: `model` is not a module; an option is not one of `Lars`.
        StructureError: A mapping has no value for a parameter, or a key that matches none.
        OptionError: A mapping or function gives excluded parameters a value of their own that they
            would ignore; `no_weight_decay()` does not return a collection of strings.
        ValueError: A lazy parameter has no shape yet.
        LeafError: A parameter is flattened or partitioned, as by FSDP1 and DeepSpeed's ZeRO.

    Source: Chen, Kornblith, Norouzi, Hinton (2020), arXiv:2002.05709 (SimCLR), and Grill et al.
    (2020), arXiv:2006.07733 (BYOL): both exclude biases and batch normalization.
    """
    if not isinstance(model, Module):
        got = "a generator" if isinstance(model, Iterator) else errors.describe(model)
        raise TypeError(f"param_groups needs the model itself, which has the names, got {got}")
    check_names(options, NAMES, function="param_groups()")
    parameters = list(model.named_parameters())
    _refuse_flat_parameters(parameters)
    for name, p in parameters:
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run the model once to initialise it")
    given: dict[str, Any] = {**options}
    values = {option: _by_name(option, x, parameters) for option, x in given.items()}
    if exclude is None:
        axes = values.get("layer_axis", [None] * len(parameters))
        most_axes = {id(p): 1 + (x is not None) for (_, p), x in zip(parameters, axes, strict=True)}
        usual = {id(p) for p in _usually_excluded(model, most_axes)}
        is_excluded = [id(p) in usual for _, p in parameters]
    else:
        is_excluded = [bool(exclude(name, p)) for name, p in parameters]
    for option in _EXCLUDED.keys() & given.keys():
        _refuse_ignored(option, given[option], values[option], parameters, is_excluded)
    of_excluded = list(compress(parameters, is_excluded))
    found = _by_name("excluded_lr", excluded_lr, of_excluded, to="the excluded parameters")
    rates = {name: rate for (name, _), rate in zip(of_excluded, found, strict=True)}
    groups: dict[Any, dict[str, Any]] = {}
    for excluded in (False, True):
        for i, (name, p) in enumerate(parameters):
            if is_excluded[i] is excluded and p.requires_grad:
                group = {option: column[i] for option, column in values.items()}
                if excluded:
                    group |= _EXCLUDED
                    group |= {} if rates[name] is None else {"lr": rates[name]}
                key = excluded, *map(_comparable, group.values())
                params = groups.setdefault(key, {"params": [], **group})["params"]
                params.append((name, p) if named else p)
    return list(groups.values())


# The options of excluded parameters.
_EXCLUDED = {"weight_decay": 0.0, "adapt": False, "layer_axis": None}


def _is_by_name(given: Any) -> bool:
    return isinstance(given, Mapping) or (callable(given) and not isinstance(given, Tensor))


def _by_name(
    option: str, given: Any, parameters: list[_Named], to: str = "the parameters"
) -> list[Any]:
    """The value of an option for each parameter."""
    if isinstance(given, Mapping):
        rows = [(tuple(name.split(".")), p) for name, p in parameters]
        return by_path.resolve(option, given, rows, sep=".", to=to)
    if not _is_by_name(given):
        return [given] * len(parameters)
    values = []
    for name, p in parameters:
        try:
            values.append(given(name, p))
        except Exception as error:
            error.add_note(f"{option} at {name}")
            raise
    return values


def _refuse_ignored(
    option: str, given: Any, values: list[Any], parameters: list[_Named], is_excluded: list[bool]
) -> None:
    """Refuse values by name that only excluded parameters have, because these would ignore them."""
    if not _is_by_name(given) or all(is_excluded):
        return
    keys = list(map(_comparable, values))
    used = {key for key, excluded in zip(keys, is_excluded, strict=True) if not excluded}
    used.add(_EXCLUDED[option])
    rows = zip(parameters, values, keys, strict=True)
    lines = [
        (
            (name,),
            f"excluded, so it has {_EXCLUDED[option]}: expected no other value, got {value!r}",
        )
        for (name, _), value, key in rows
        if key not in used
    ]
    if lines:
        headline = f"{option} has values that are not used (`exclude` chooses these parameters)"
        raise errors.error(errors.OptionError, option, headline, lines)


def _comparable(x: Any) -> Any:
    """A number or string itself, so that equal values share a group; the identity of a tensor."""
    return x if isinstance(x, (bool, int, float, str, np.generic, type(None))) else id(x)


# Modules whose weights are kernels, even if the name of a subclass ends in Norm.
_KERNELS = (
    *(_ConvNd, torch.nn.Linear, torch.nn.Bilinear, torch.nn.RNNBase, torch.nn.RNNCellBase),
    *(torch.nn.Embedding, torch.nn.EmbeddingBag),
)
# Modules whose parameters are excluded, whatever their shapes.
_NORMS = (_NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.PReLU)
_NORM_NAME = re.compile(r"norm(alization)?(act)?(\d+d)?(act)?$", re.IGNORECASE)
# Methods that list parameters without decay, with the pattern for a name that they return.
_NO_DECAY = {"no_weight_decay": "{}", "no_weight_decay_keywords": "*{}*"}
_BIAS_NAME = re.compile(r"(^|_)bias$|^bias_")  # torch has bias_k and bias_ih_l0


def _usually_excluded(model: Module, most_axes: dict[int, int]) -> Iterator[Tensor]:
    """The parameters to exclude. A shared parameter is excluded if any of its uses is."""
    for path, module in model.named_modules():
        owner, used_as = module, None
        if isinstance(module, ParametrizationList):  # its path ends in parametrizations.weight
            used_as = path.rpartition(".")[2]
            owner = model.get_submodule(
                path.removesuffix(f"parametrizations.{used_as}").rstrip(".")
            )
        is_norm = _is_norm(owner)
        for name, p in _own_parameters(module).items():
            is_bias = _BIAS_NAME.search(used_as or name)
            is_marked = getattr(p, "_no_weight_decay", False) or _is_magnitude(module, name)
            if p.ndim <= most_axes[id(p)] or is_norm or is_bias or is_marked:
                yield p
        matches = _listed(path, module)
        if matches:
            every = module.named_parameters(remove_duplicate=False)
            yield from (p for name, p in every if matches(name))


def _listed(path: str, module: Module) -> Callable[[str], Any] | None:
    """A function that says whether the module lists the name as a parameter without decay."""
    patterns: list[str] = []
    for method, pattern in _NO_DECAY.items():
        function = getattr(module, method, None)
        if callable(function):
            returned = function()
            is_one = isinstance(returned, str) or not isinstance(returned, Iterable)
            names = [returned] if is_one else list(returned)
            if is_one or not all(isinstance(name, str) for name in names):
                text = f"expected a collection of names, got {errors.enumerated(names, shown=repr)}"
                line = ((*path.split("."), method) if path else (method,), text)
                headline = f"{method}() of the model or of a part of it does not return names"
                raise errors.error(errors.OptionError, "model", headline, [line])
            patterns += [pattern.format(name) for name in names]
    return re.compile("|".join(map(translate, patterns))).match if patterns else None


def _own_parameters(module: Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _is_norm(module: Module) -> bool:
    if isinstance(module, _NORMS):
        return True
    # A scripted module has a different class; it keeps only the name of the original class.
    names = [getattr(module, "original_name", ""), *(x.__name__ for x in type(module).__mro__)]
    return not isinstance(module, _KERNELS) and any(map(_NORM_NAME.search, names))


def _is_magnitude(module: Module, name: str) -> bool:
    """Whether a parameter is the magnitude g of weight_norm, in its new or old implementation."""
    if isinstance(module, ParametrizationList):
        return name == "original0" and any(isinstance(x, _WeightNorm) for x in module)
    stem = name.removesuffix("_g")
    return stem != name and f"{stem}_v" in _own_parameters(module)


def name_of(group: dict[str, Any], number: int, index: int) -> str:
    """The name of a parameter for messages: as given by the user, or its position in the groups."""
    names = group.get("param_names", ())
    return names[index] if index < len(names) else f"param_groups[{number}]['params'][{index}]"


def refuse_flat(group: dict[str, Any], number: int) -> None:
    """Raise LeafError if a framework has flattened or partitioned parameters of a group."""
    _refuse_flat_parameters((name_of(group, number, i), p) for i, p in enumerate(group["params"]))


def _refuse_flat_parameters(parameters: Iterable[_Named]) -> None:
    lines = [((name,), text) for name, p in parameters if (text := _flattened_by(p))]
    if lines:
        raise _flat_error(lines)


def _flattened_by(p: Tensor) -> str:
    if getattr(p, "_fsdp_flattened", False):
        return "flattened by FSDP1: use FSDP2 (fully_shard) instead"
    return "partitioned by DeepSpeed's ZeRO-3: use FSDP2 instead" if hasattr(p, "ds_id") else ""


def refuse_flattened_since(group: dict[str, Any], number: int) -> None:
    """Raise LeafError if the parameters of a group were flattened after the group was added.

    Checks the first parameter only, because every step calls this function.
    """
    params = group["params"]
    if params and _flattened_by(params[0]):
        refuse_flat(group, number)
    # DeepSpeed replaces the parameters of a group with one flat tensor that is not a Parameter.
    is_flat = len(params) == 1 and type(params[0]) is Tensor and params[0].ndim == 1
    if is_flat and "deepspeed" in sys.modules and adapts(group):
        text = "flattened by DeepSpeed's ZeRO: use ZeRO stage 0, or FSDP2, instead"
        raise _flat_error([((name_of(group, number, 0),), text)])


def _flat_error(lines: Iterable[errors.Line]) -> errors.LarsTreeError:
    headline = "params holds parts of layers: LARS needs each layer as one tensor"
    return errors.error(errors.LeafError, "params", headline, lines)
