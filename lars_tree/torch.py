"""Lars as a `torch.optim.Optimizer`, and the parameter groups that the recipes ask for.

One call of `execute` steps all parameters: the native engine takes those in CPU memory, and
multi-tensor operations, which do not wait for the device, take the others. What options mean is in
`_torch_options.py`, what the parameters become in `_torch_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from operator import setitem
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lars_tree import _torch_options
from lars_tree._backends.reader import may_read
from lars_tree._backends.tensors import copy_all
from lars_tree._backends.torch import BACKEND, is_in_cpu_memory, is_shard, results_in_place
from lars_tree._core import locks
from lars_tree._core.execute import execute
from lars_tree._core.types import NonFinite
from lars_tree._options import CALLED_ELSEWHERE, check_names, with_hints
from lars_tree._torch_groups import param_groups, refuse_flat, refuse_flattened_since
from lars_tree._torch_messages import name_of
from lars_tree._torch_rows import Rows
from lars_tree.errors import LarsTreeError

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

__all__ = ["Lars", "param_groups"]

Loss = TypeVar("Loss")


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

    Gradients are only read. A step is taken by all parameters or by none, also when it raises or
    Ctrl-C interrupts it. Buffers are float32 for parameters of half precision. To
    `torch.amp.GradScaler` and to frameworks it is an optimizer like torch's own: the scaler divides
    out the scale, and skips steps; with `fused=True` the step itself does.

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
        trust_clip: True (LARC, as in apex and timm): the local rate is min(ratio, lr) instead of
            lr * ratio; where a norm is 0 it is lr.
        joint_norm: True: the denominator is |g + weight_decay * p| + eps.
        adapt: False: ratio is 1, which makes it SGD, as for biases and norm layers. "decayed": as
            in timm, only groups with weight decay are adapted.
        foreach: True to take multi-tensor operations on the CPU too, as exact as on accelerators;
            False to take parameters one by one on accelerators.
        maximize: Go uphill.
        layer_axis: The axis along which parameters stack layers, with a ratio for each index.
        nonfinite: What to do when a parameter or buffer of the group would become NaN or infinite.
            "propagate" writes it. "raise" raises, and "skip" leaves out the whole step; both look
            at the values, and so wait for the device.
        fused: True: the step divides out the scale of a GradScaler itself, as in torch's fused
            optimizers; Lightning then cannot clip gradients. For all groups; not with foreach.

    Attributes:
        skipped: The number of steps that nonfinite="skip" has left out. Not in the `state_dict`.

    Raises:
        ValueError: A value that the rule is not defined for; no parameters.
        LeafError: A parameter is a part of layers, as with FSDP1 and DeepSpeed's ZeRO.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """

    skipped: int = 0

    @with_hints
    def __init__(
        self,
        params: ParamsT,
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
        adapt: bool | Literal["decayed"] = True,
        foreach: bool | None = None,
        maximize: bool = False,
        layer_axis: int | None = None,
        nonfinite: NonFinite = "propagate",
        fused: bool | None = None,
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
            "nonfinite": nonfinite,
            "fused": fused,
        }
        _torch_options.check(defaults)
        super().__init__(params, defaults)
        self._set_amp_scaling()

    def _set_amp_scaling(self) -> None:
        """As in torch's fused optimizers: GradScaler sets grad_scale and found_inf for a step."""
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in `torch.optim.Optimizer`.

        Raises:
            ValueError: A value that the rule is not defined for.
            TypeError: A key is what another package calls an option of Lars.
            LeafError: A parameter is a part of layers, as with FSDP1.
        """
        name = f"param_groups[{len(self.param_groups)}]"
        if isinstance(param_group, dict):
            # A group may have keys of its own, but not those of other packages for these options.
            foreign = {key: x for key, x in param_group.items() if key in CALLED_ELSEWHERE}
            check_names(foreign, self.defaults, function=name)
            _torch_options.check({**self.defaults, **param_group}, name)
        super().add_param_group(param_group)
        try:
            refuse_flat(self.param_groups[-1], len(self.param_groups) - 1)
        except LarsTreeError:
            del self.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = set(state.get("defaults", vars(self).get("defaults", ())))
        super().__setstate__(state)
        for name in self.defaults.keys() - known:  # torch adds some
            del self.defaults[name]
        for name, option in signature(Lars).parameters.items():  # an older version lacked some
            if name != "params":
                self.defaults.setdefault(name, option.default)
        for group in self.param_groups:  # of an older version, or of another optimizer
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._set_amp_scaling()

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
            # What is not a buffer of p is for the checks of the next step to refuse.
            fits = isinstance(buffer, Tensor) and not buffer.is_meta
            if fits and buffer.is_complex() == p.is_complex():
                moved = buffer.detach().to(p.device, BACKEND.velocity_dtype(p))
                self.state[p]["momentum_buffer"] = moved.clone()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew, and the gradients.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: An option of a group has an invalid value.
            LarsTreeError: Parameters, their gradients or buffers do not fit together, share memory,
                or cannot be written to; none of them was then. (Of parameters on accelerators only
                the first, and whether two start at one address, can be told without delay.)
            NonFiniteError: nonfinite="raise", and the step would not be finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Of threads that step the same parameters, one makes their buffers.
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else locks.writing(lambda: locks.of(self)):
            self._step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def _step(self, grad_scale: Any, found_inf: Any) -> None:
        if any(group["nonfinite"] != "propagate" for group in self.param_groups):
            self._step_if_finite(grad_scale, found_inf)
            return
        found = self._gather(grad_scale, found_inf is not None)
        if found_inf is not None and not found.can_wait:
            if found_inf:
                return
            found_inf = None
        if torch.compiler.is_compiling():
            copy_all(*results_in_place(found.leaves(), found_inf))
            self._keep_buffers(found)
        elif found.all:
            done = [not found.first]
            last = (partial(setitem, done, 0, True),) if found.first else ()
            with self._buffers_kept(found, lambda: done[0]):
                execute(found.columns(), found.caller(found_inf, last))

    @torch._disable_dynamo  # type: ignore[untyped-decorator]  # it looks at the values
    def _step_if_finite(self, grad_scale: Any, found_inf: Any) -> None:
        found = self._gather(None if grad_scale is None else float(grad_scale))
        if found.all and not (found_inf is not None and found_inf):
            counts = {name: np.zeros((), np.int64) for name in ("step", "skipped")}
            with self._buffers_kept(found, lambda: bool(counts["step"])):
                execute(found.columns(counts), found.caller())
            self.skipped += int(counts["skipped"])

    @contextmanager
    def _buffers_kept(self, found: Rows, is_taken: Callable[[], bool]) -> Iterator[None]:
        """Keep buffers that are new if the step is taken; or else the state is what it was."""
        new = [p for p, _ in found.new_buffers()]
        unknown = [p for p in new if p not in self.state]
        try:
            self._keep_buffers(found)
            yield
        finally:
            if not is_taken():
                for p in new:
                    self.state[p].pop("momentum_buffer", None)
                for p in unknown:
                    self.state.pop(p, None)

    def _keep_buffers(self, found: Rows) -> None:
        """Keep those that are new."""
        for p, buffer in found.new_buffers():
            self.state[p]["momentum_buffer"] = buffer

    def _gather(self, grad_scale: Any, may_skip: bool = False) -> Rows:
        """The parameters to be stepped, with what their steps take."""
        found = Rows(self.param_groups, grad_scale)
        rows, far, first = found.all, found.far, found.first
        known, strided = self.state.get, torch.strided
        nothing: dict[str, Any] = {}
        compiling = torch.compiler.is_compiling()
        # Where a process may find out that it must skip the step, all must sum up norms first.
        shards_too = not (compiling or may_skip) and may_read()
        for number, group in enumerate(self.param_groups):
            if not compiling:  # schedulers set what they like
                first_rate = group.get("initial_lr", self.defaults["lr"])
                name = f"param_groups[{number}]"
                _torch_options.check(group, name, waits=False, first_rate=first_rate)
                refuse_flattened_since(group, number)
            moves = group["momentum"] != 0
            many = compiling or group["foreach"]
            kind = None
            for place, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not strided:
                    name = name_of(group, number, place)
                    text = f"Lars does not support sparse gradients: make that of {name} dense"
                    raise RuntimeError(text)
                buffer = known(p, nothing).get("momentum_buffer") if moves else None
                is_first = moves and buffer is None
                if is_first:
                    buffer = BACKEND.zeros(p, BACKEND.velocity_dtype(p))
                is_far = many or not (is_in_cpu_memory(p) or (shards_too and is_shard(p)))
                if kind != (is_far, is_first):  # most often as the one before
                    kind = is_far, is_first
                    rule = found.rule(number, *kind)
                if is_far:
                    far.add(len(rows))
                if is_first:
                    first.append(len(rows))
                rows.append((p, grad, buffer, rule, number, place))
        return found
