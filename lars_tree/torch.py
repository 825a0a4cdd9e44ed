"""Lars as a `torch.optim.Optimizer`, and the parameter groups that the recipes ask for.

Parameters in CPU memory are stepped by `update.advance`, in one native call. All others (on
accelerators, DTensor, under `torch.compile`) by multi-tensor operations that wait for no device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from inspect import signature
from operator import setitem
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lars_tree._backends.torch import BACKEND, is_in_cpu_memory
from lars_tree._memory import serialised
from lars_tree._torch_batches import (
    Batch,
    check_elsewhere,
    named,
    step_elsewhere,
    step_in_cpu_memory,
)
from lars_tree._writes import Writes
from lars_tree.errors import did_you_mean

__all__ = ["Lars", "param_groups"]


class Lars(Optimizer):  # type: ignore[misc]  # torch is not looked into
    """LARS with momentum for the parameters of a model, with the conventions of torch.

    For each parameter p with gradient g (of opposite sign if `maximize`),

        ratio  = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)
        d      = ratio * (g + weight_decay * p)
        buffer = momentum * buffer + (1 - dampening) * d
        p      = p - lr * buffer,    or with nesterov    p = p - lr * (d + momentum * buffer)

    |.| is the 2-norm over the parameter, over all shards of a DTensor. Where |p| or |g| is 0, ratio
    is 1. As in `torch.optim.SGD` the rate multiplies the buffer, so a new rate acts at
    once, and the first step is not dampened; at a constant rate it is the paper's rule.

    >>> import torch
    >>> from lars_tree.torch import Lars
    >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = Lars([p], lr=0.1, momentum=0.5, trust_coefficient=1.0)
    >>> p.grad = torch.tensor([0.0, 10.0])
    >>> opt.step()                              # ratio 5 / 10: a step of 0.1 * [0, 5]
    >>> p.data
    tensor([3.0000, 3.5000])
    >>> opt.state[p]["momentum_buffer"]
    tensor([0., 5.])

    Gradients are only read. CPU parameters are checked before the first of them is written. Buffers
    are float32 for parameters that are shorter. With `torch.amp.GradScaler` the loss scale is
    divided out in the step itself, and steps with infinite gradients are skipped.

    Args:
        params: Parameters, named parameters or parameter groups; a group may override each of the
            following. `param_groups` makes those of the recipes.
        lr: The rate, a number or a tensor of one.
        momentum: What is left of the buffer after each step; without it there is no buffer.
        dampening: How much of each step but the first the buffer does not take in.
        weight_decay: Weight decay, in the ratio and in the step.
        nesterov: Look ahead; needs a momentum and no dampening.
        trust_coefficient: The paper's eta.
        eps: Added to the denominator.
        trust_clip: True (LARC, as in apex and timm): lr is an upper bound of lr * ratio, which is
            then min(ratio, lr).
        joint_norm: True: the denominator is |g + weight_decay * p| + eps.
        adapt: False: ratio is 1, which makes it SGD, as for biases and norm layers.
        foreach: True to take multi-tensor operations on the CPU too, as exact as on accelerators;
            False to take parameters one by one on accelerators.
        maximize: Go uphill.
        layer_axis: The axis along which parameters stack layers, with a ratio for each index.

    Raises:
        ValueError: A value that the rule is not defined for; no parameters.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf for a step

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        joint_norm: bool = False,
        adapt: bool = True,
        foreach: bool | None = None,
        maximize: bool = False,
        layer_axis: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_clip": trust_clip,
            "joint_norm": joint_norm,
            "adapt": adapt,
            "foreach": foreach,
            "maximize": maximize,
            "layer_axis": layer_axis,
        }
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in `torch.optim.Optimizer`.

        Raises:
            ValueError: A value that the rule is not defined for.
        """
        if isinstance(param_group, dict):
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an older version, or of another optimizer
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in `torch.optim.Optimizer`; also that of a `torch.optim.SGD`.

        Options that its groups lack stay as they are in each group here.
        """
        final: dict[str, Any] = {}
        before = [{name: group[name] for name in self.defaults} for group in self.param_groups]
        # The last hook before sees what the others made of the state; the first one after lets the
        # others see, and change, what is loaded.
        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, given: final.update(given)),
            self.register_load_state_dict_post_hook(
                lambda _: self._finish_loading(final, before), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _finish_loading(self, final: dict[str, Any], before: list[dict[str, Any]]) -> None:
        groups = zip(self.param_groups, final["param_groups"], before, strict=True)
        for group, given, options in groups:
            group.update((name, x) for name, x in options.items() if name not in given)
        # torch gives all of a state the dtype of its parameter, and may share it with the source.
        saved = (i for group in final["param_groups"] for i in group["params"])
        ours = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(saved, ours, strict=True):
            buffer = final["state"].get(i, {}).get("momentum_buffer")
            if buffer is not None:
                moved = buffer.detach().to(p.device, BACKEND.velocity_dtype(p))
                self.state[p]["momentum_buffer"] = moved.clone()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew, and the gradients.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse.
            LarsTreeError: Parameters, their gradients or buffers do not fit together, share memory,
                or cannot be written to; none of them was then. (Of parameters on accelerators only
                the first, and whether two start at one address, can be told without delay.)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Of threads that step the same parameters, one makes their buffers.
        with nullcontext() if torch.compiler.is_compiling() else serialised():
            self._step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def _step(self, grad_scale: Any, found_inf: Any) -> None:
        here, elsewhere = self._batches()
        first = any(batch.is_first for batch in here + elsewhere)
        if found_inf is not None and (here or any(batch.is_undamped for batch in elsewhere)):
            # What is in CPU memory cannot wait to know, and only a step that is taken is the first.
            if found_inf:
                return
            found_inf = None
        compiling = torch.compiler.is_compiling()
        leaves = [leaf for batch in elsewhere for leaf in batch.leaves(grad_scale)]
        with named(elsewhere):
            if not compiling:
                check_elsewhere(leaves, elsewhere)
        # Ctrl-C must not part a first step from its buffers, nor some parameters from others.
        parts = bool(here) + bool(elsewhere) + first
        writes = Writes() if parts > 1 and not compiling else None
        with named(here):
            if here:
                step_in_cpu_memory(here, 1.0 if grad_scale is None else float(grad_scale), writes)
                self._keep_buffers(here, writes)
            if elsewhere:
                step_elsewhere(leaves, elsewhere, found_inf, writes)
                self._keep_buffers(elsewhere, writes)
            if writes is not None:
                writes.make()

    def _batches(self) -> tuple[list[Batch], list[Batch]]:
        """What there is to be stepped in CPU memory, and elsewhere."""
        batches: dict[tuple[int, bool, bool], Batch] = {}
        state = self.state
        compiling = torch.compiler.is_compiling()
        for number, group in enumerate(self.param_groups):
            if not compiling:  # schedulers set what they like
                _check(group, waits=False)
            moves = group["momentum"] != 0
            many = group["foreach"] or compiling
            kind = None
            for place, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError("Lars does not support sparse gradients: make them dense")
                buffer = state[p].get("momentum_buffer") if moves else None
                is_first = moves and buffer is None
                if is_first:
                    buffer = BACKEND.zeros(p, BACKEND.velocity_dtype(p))
                is_here = not many and is_in_cpu_memory(p)
                if kind != (is_here, is_first):  # most often as the one before
                    kind = is_here, is_first
                    key = (number, *kind)
                    if key not in batches:
                        batches[key] = Batch(group, number, is_first)
                    rows = batches[key].rows
                rows.append((place, p, grad, buffer))
        found = list(batches.items())
        return [x for key, x in found if key[1]], [x for key, x in found if not key[1]]

    def _keep_buffers(self, batches: list[Batch], writes: Writes | None) -> None:
        """Keep those that are new, when the writes are made if there are any."""
        for batch in batches:
            if batch.is_first:
                for _, p, _, buffer in batch.rows:
                    keep = partial(setitem, self.state[p], "momentum_buffer", buffer)
                    if writes is None:
                        keep()
                    else:
                        self.state[p].setdefault("momentum_buffer")  # then it needs no memory
                        writes.then(keep)


def _check(options: dict[str, Any], waits: bool = True) -> None:
    """Raise ValueError for what the rule is not defined for.

    Unless it waits, tensors on a device are not looked into.
    """
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    words = {"lr": "learning rate", "momentum": "momentum value"}
    for name in ("lr", "momentum", "dampening", "weight_decay", "trust_coefficient", "eps"):
        x = options[name]
        if isinstance(x, Tensor) and not (waits or x.is_cpu):
            continue
        if isinstance(x, bool) or not 0 <= x < float("inf"):
            raise ValueError(f"Invalid {words.get(name, name)}: {x}")
    if options["dampening"] > 1:
        raise ValueError(f"Invalid dampening: {options['dampening']}")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    for name in ("nesterov", "trust_clip", "joint_norm", "adapt", "maximize"):
        if not isinstance(options[name], bool):
            raise ValueError(f"Invalid {name}: expected True or False, got {options[name]!r}")
    axis = options["layer_axis"]
    if axis is not None and (isinstance(axis, bool) or not hasattr(axis, "__index__")):
        raise ValueError(f"Invalid layer_axis: expected an axis or None, got {axis!r}")


def param_groups(
    model: torch.nn.Module,
    *,
    exclude: Callable[[str, Tensor], bool] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups by the usual recipe: biases and norm layers without decay or adaptation.

    >>> import torch
    >>> from lars_tree.torch import Lars, param_groups
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    >>> groups = param_groups(model, weight_decay=1e-4)
    >>> for group in groups:
    ...     names = [name for name, _ in group["params"]]
    ...     print(names, group["weight_decay"], group.get("adapt", True))
    ['0.weight'] 0.0001 True
    ['0.bias', '1.weight', '1.bias'] 0.0 False
    >>> opt = Lars(groups, lr=0.1)

    Args:
        model: Its parameters that require a gradient are taken, by name.
        exclude: Says of a name and parameter whether it is left out of decay and adaptation; by
            default those of at most one axis, not counting `layer_axis` where that is given.
        **options: Options of `Lars` for all groups.

    Returns:
        The groups that are not empty, the adapted parameters first.

    Raises:
        TypeError: An option is not one of `Lars`.
        ValueError: A parameter has no shape yet.
    """
    known = signature(Lars).parameters.keys() - {"params"}
    for name in options.keys() - known:
        hint = did_you_mean(name, known)
        raise TypeError(f"param_groups got an unexpected keyword argument {name!r}{hint}")
    few = 1 if options.get("layer_axis") is None else 2
    left_out = exclude or (lambda _, p: p.ndim <= few)
    adapted: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run the model once to initialise it")
        if p.requires_grad:
            (others if left_out(name, p) else adapted).append((name, p))
    groups = [
        {"params": adapted, **options},
        {"params": others, **options, "weight_decay": 0.0, "adapt": False, "layer_axis": None},
    ]
    return [group for group in groups if group["params"]]
