"""Lars as a `torch.optim.Optimizer`.

Each step is one call of `execute` for all parameters: the native engine updates parameters in CPU
memory; multi-tensor operations update all other parameters, without waiting for the device. Under
`torch.compile`, `traced.step_in_place` is traced instead.
`torch/options.py` checks the options, `torch/rows.py` collects the inputs of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import partial
from inspect import signature
from operator import setitem
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lars_tree._backends.torch import traced
from lars_tree._backends.torch.backend import BACKEND
from lars_tree._backends.torch.optimizer_engine import OptimizerEngine, Repeatable
from lars_tree._backends.torch.tensors import without_autograd
from lars_tree._backends.torch.transfers import is_capturing
from lars_tree._core import locks
from lars_tree._core.execute import execute
from lars_tree._core.options import with_hints
from lars_tree._core.types import NonFinite
from lars_tree._core.writes import Writes
from lars_tree._numerics.formula import Rule
from lars_tree._report.measure import measure_columns
from lars_tree.errors import LarsTreeError
from lars_tree.torch.groups import param_groups, refuse_flat
from lars_tree.torch.options import NAMES, can_compile, check, check_keys
from lars_tree.torch.rows import ParameterRows, engines, gather, to_measure

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

__all__ = ["Lars", "param_groups"]

Loss = TypeVar("Loss")


class Lars(Optimizer):  # type: ignore[misc]  # mypy does not read torch
    """LARS with momentum for the parameters of a model, with the conventions of torch.

    For each parameter p with gradient g (-g with `maximize`),

        ratio  = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)
        d      = ratio * (g + weight_decay * p)
        buffer = momentum * buffer + (1 - dampening) * d
        p      = p - lr * buffer,    or with nesterov    p = p - lr * (d + momentum * buffer)

    |.| is the 2-norm of the parameter; for a DTensor, over all shards. Where |p| or |g| is 0,
    ratio is 1. As in `torch.optim.SGD`, the rate multiplies the buffer, so a new rate takes effect
    at once, and the first step is not dampened. With a constant rate this is the paper's rule.

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

    Gradients are never modified. A step updates all parameters or none, even if it raises or
    Ctrl-C interrupts it. Buffers of half-precision parameters are float32. `torch.amp.GradScaler`
    works as with torch's own optimizers: the scaler unscales the gradients and skips steps; with
    `fused=True` the step itself does both.

    Args:
        params: Parameters, named parameters or parameter groups. A group may override each of the
            options below. `param_groups` makes the groups of the usual recipes.
        lr: The rate, without a unit if ratio is not 1. This and the other numbers may be tensors
            with one element. `torch.compile` then does not compile again when they change, but
            cannot check their values.
        momentum: The factor of the buffer; the number 0 for no buffer.
        dampening: Scales d by 1 - dampening in each step except the first.
        weight_decay: Weight decay, in the ratio and in the step; in loss per weight squared.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        trust_coefficient: The paper's eta.
        eps: Added to the denominator, in units of the gradient.
        trust_clip: True (LARC, as in apex and timm): the local rate is min(ratio, lr) instead of
            lr * ratio. If a norm is 0, the local rate is lr.
        joint_norm: True: the denominator is |g + weight_decay * p| + eps.
        adapt: False: ratio is 1 (SGD), as is usual for biases and norm layers. "decayed": the ratio
            applies only to groups with weight decay, as in timm.
        foreach: True: update all parameters, also on the CPU, by multi-tensor operations in float32
            (float64 for float64 parameters). None and False: use the fastest engine.
        maximize: Maximize the objective.
        layer_axis: The axis along which parameters stack layers; each index has its own ratio.
        nonfinite: What to do if a parameter or buffer of the group would become NaN or infinite:
            "propagate" writes it, "raise" raises NonFiniteError, "skip" skips the step of all
            parameters. "raise" waits for the device, and "skip" does if there are several devices.
        fused: None: use Triton kernels for parameters on devices that Triton supports. False: never
            use Triton. True: like None, and the step itself unscales the gradients of a GradScaler,
            as torch's fused optimizers do; Lightning then refuses to clip gradients. True applies
            to all groups, and cannot be combined with foreach.

    Attributes:
        skipped: The number of steps skipped by nonfinite="skip"; reading it waits for the device.
            Not in the `state_dict`.
        engine: The engines that update the parameters, such as "fused"; see "GPUs" in the docs.

    Raises:
        OptionError: An option has an invalid value. ValueError: There are no parameters.
        RuntimeError: `foreach` and `fused` are both True, as in torch's own optimizers.
        LeafError: A parameter is flattened or partitioned, as by FSDP1 and DeepSpeed's ZeRO.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """

    _skipped: int | Tensor = 0
    _last: Repeatable | None = None

    @with_hints
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float | Tensor = 0.9,
        dampening: float | Tensor = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float | Tensor = 0.001,
        eps: float | Tensor = 1e-8,
        trust_clip: bool = False,
        joint_norm: bool = False,
        adapt: bool | Literal["decayed"] = True,
        foreach: bool | None = None,
        maximize: bool = False,
        layer_axis: int | None = None,
        nonfinite: NonFinite = "propagate",
        fused: bool | None = None,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in NAMES}
        check(defaults)
        super().__init__(params, defaults)
        self._set_amp_scaling()

    def _set_amp_scaling(self) -> None:
        """If fused, make GradScaler set `grad_scale` and `found_inf`, as for torch's optimizers."""
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    @property
    def skipped(self) -> int:
        """The number of steps skipped by nonfinite="skip".

        >>> import torch
        >>> from lars_tree.torch import Lars
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = Lars([p], nonfinite="skip")
        >>> p.grad = torch.tensor([0.0, torch.inf])
        >>> opt.step()
        >>> opt.skipped, p.data
        (1, tensor([3., 4.]))
        """
        return int(self._skipped)

    @property
    def engine(self) -> str:
        """The names of the engines that update the parameters, separated by commas."""
        return ", ".join(sorted(engines(self)))

    def trust_ratios(self, *, grad_scale: float | Tensor = 1.0) -> dict[str, Tensor | None]:
        """The trust ratio of each parameter by name, with the options of its group.

        >>> import torch
        >>> from lars_tree.torch import Lars
        >>> kernel, bias = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
        >>> others = {"params": [("bias", bias)], "adapt": False}
        >>> opt = Lars([{"params": [("kernel", kernel)]}, others], 0.1, trust_coefficient=0.5)
        >>> kernel.grad = bias.grad = torch.tensor([0.0, 10.0])
        >>> {name: round(ratio.item(), 6) for name, ratio in opt.trust_ratios().items()}
        {'kernel': 0.25, 'bias': 1.0}

        Call it between `backward` and `step`, for DTensors in all processes. It does not wait for
        devices. A ratio is a 0-d tensor, or a vector with `layer_axis`: 1 if the group does not
        adapt. It is None without a gradient. Without names, the keys are positions.

        Args:
            grad_scale: The loss scale that the gradients still carry, `scaler.get_scale()`.

        Raises:
            LarsTreeError: As in `step`; or no parameter has a gradient.
        """
        columns, caller = to_measure(self, grad_scale)
        found = zip(caller.paths(), measure_columns(columns, caller), strict=True)
        return {str(*path): x.measured.ratio if x.measured else None for path, x in found}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in `torch.optim.Optimizer`. A key that is no option warns.

        Raises:
            OptionError: An option has an invalid value.
            TypeError: A key is another package's name for an option of Lars.
            LeafError: A parameter is flattened, as by FSDP1.
        """
        name = f"param_groups[{len(self.param_groups)}]"
        if isinstance(param_group, dict):
            check_keys(param_group, self.defaults, name)
            check({**self.defaults, **param_group}, name)
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
        self._skipped = self.__dict__.pop("skipped", 0)
        for name in self.defaults.keys() - known:  # options that torch's __setstate__ added
            del self.defaults[name]
        # Options that a state of an older version lacks.
        for name, option in signature(Lars).parameters.items():
            if name != "params":
                self.defaults.setdefault(name, option.default)
        for group in self.param_groups:  # groups saved by another optimizer lack our options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._set_amp_scaling()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of `torch.optim.SGD`, as in `torch.optim.Optimizer`.

        Options that are missing in a loaded group keep their current values.

        Raises:
            ValueError: The state has other numbers of groups or parameters.
        """
        final: dict[str, Any] = {}
        before = [{name: group[name] for name in self.defaults} for group in self.param_groups]
        # Our pre-hook runs last, so it sees the changes of all other pre-hooks. Our post-hook runs
        # first, so the user's post-hooks can still change the loaded values.
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
        # torch casts buffers to the dtype of the parameter, and may share them with `state_dict`.
        saved = (i for group in final["param_groups"] for i in group["params"])
        ours = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(saved, ours, strict=True):
            buffer = final["state"].get(i, {}).get("momentum_buffer")
            # A value that does not fit is loaded unchanged; the next step raises an error about it.
            fits = isinstance(buffer, Tensor) and not buffer.is_meta
            if fits and buffer.is_complex() == p.is_complex():
                moved = buffer.detach().to(p.device, BACKEND.velocity_dtype(p))
                self.state[p]["momentum_buffer"] = moved.clone()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @without_autograd
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Recomputes the loss and the gradients.

        Returns:
            The result of the closure.

        Raises:
            RuntimeError: A gradient is sparse. It is also a LeafError.
            OptionError: An option of a group has an invalid value.
            LarsTreeError: Parameters, gradients or buffers differ in shape, dtype or device, share
                memory, or are read-only. Nothing was written. (On accelerators, shared memory is
                detected only if two parameters start at the same address.)
            NonFiniteError: nonfinite="raise", and a result would be NaN or infinite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # The lock ensures that only one of several threads makes the buffers.
        compiling = torch.compiler.is_compiling()
        with nullcontext() if compiling else locks.writing(lambda: locks.of(self)):
            self._step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def _step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if any(group["nonfinite"] != "propagate" for group in self.param_groups):
            self._step_if_finite(grad_scale, found_inf)
            return
        if torch.compiler.is_compiling() and not all(map(can_compile, self.param_groups)):
            self._step_uncompiled(grad_scale, found_inf)
            return
        inputs = gather(self, grad_scale, may_skip=found_inf is not None)
        if found_inf is not None and not inputs.device_can_skip:
            if found_inf:
                return
            found_inf = None
        if torch.compiler.is_compiling():
            leaves = inputs.leaves()
            if all(map(traced.supports, leaves)):
                traced.step_in_place(leaves, found_inf)
                inputs.keep_buffers(self.state)
            else:
                self._step_uncompiled(grad_scale, found_inf)
        else:
            self._execute(inputs, found_inf)

    def _execute(self, inputs: ParameterRows, found_inf: Tensor | None) -> Any:
        """Take the step, unless `found_inf` is not 0. Returns whether it applies, see `Result`."""
        if not inputs.params:
            return True
        if inputs.first_steps and any(is_capturing(p.device) for p in inputs.params):
            text = "The first step makes momentum buffers, which each replay of a captured graph"
            raise RuntimeError(f"{text} would set to zero: take one step before the capture")
        engine = inputs.engine(found_inf)
        signature, rules = inputs.signature()
        if engine is not None and signature is not None:
            taken = self._taken_again(engine, signature, rules, inputs)
            if taken is not None:
                return taken
        done = [not inputs.first_steps]
        last = (partial(setitem, done, 0, True),) if inputs.first_steps else ()
        step = partial(execute, inputs.columns(), inputs.caller(engine, last))
        taken = inputs.with_new_buffers(self.state, step, lambda: done[0]).taken
        if engine is not None and signature is not None:
            again = engine.repeatable(inputs.grads)
            self._last = None if again is None else Repeatable(signature, rules, again)
        return taken

    def _taken_again(
        self, engine: OptimizerEngine, signature: Hashable, rules: list[Rule], inputs: ParameterRows
    ) -> Any:
        """Repeat the last step if its signature is the same: return as `_execute`, or None."""
        last = self._last
        if last is None or last.signature != signature:
            return None
        by_id = {id(old): new for old, new in zip(last.rules, rules, strict=True)}
        pairs = zip(inputs.params, inputs.buffers, strict=True)
        outs = [x for pair in pairs for x in pair if x is not None]
        step = last.step.again(by_id, outs)
        writes = Writes()
        choices = [(i, rule.nonfinite) for i, rule in enumerate(inputs.rules)]
        bad, taken = engine.finish(step, choices, writes)
        if bad:  # `execute` raises the error
            return None
        writes.make()
        return taken

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def _step_uncompiled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take the step without the compiler, which also reports errors in the inputs."""
        self._step(grad_scale, found_inf)

    @torch._disable_dynamo  # type: ignore[untyped-decorator]  # the step may read values
    def _step_if_finite(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        inputs = gather(self, grad_scale, may_skip=found_inf is not None)
        if inputs.device_can_guard:
            skips = ~torch.as_tensor(self._execute(inputs, found_inf))
            if found_inf is not None:
                skips = skips & (found_inf.to(skips.device) == 0)
            if not (isinstance(self._skipped, Tensor) and self._skipped.device == skips.device):
                self._skipped = torch.full((), self.skipped, dtype=torch.int64, device=skips.device)
            self._skipped += skips  # in place, so that each replay of a CUDA graph counts
            return
        inputs = gather(self, None if grad_scale is None else float(grad_scale))
        if inputs.params and not (found_inf is not None and found_inf):
            counts = {name: np.zeros((), np.int64) for name in ("step", "skipped")}
            step = partial(execute, inputs.columns(counts), inputs.caller(None))
            inputs.with_new_buffers(self.state, step, lambda: bool(counts["step"]))
            self._skipped += int(counts["skipped"])
