"""The inputs of one step of a torch optimizer: its parameters with gradients, buffers and rules."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lars_tree import errors
from lars_tree._backends.base import Columns, Leaf
from lars_tree._backends.torch.backend import BACKEND, is_in_cpu_memory, is_shard
from lars_tree._backends.torch.foreach import Foreach
from lars_tree._backends.torch.fused import Fused, is_available, is_interpreted
from lars_tree._backends.torch.layers import Layer, as_real
from lars_tree._backends.torch.multi_tensor import fused_row
from lars_tree._backends.torch.optimizer_engine import OptimizerEngine, signature_of
from lars_tree._backends.torch.reader import may_read
from lars_tree._backends.torch.sharded import shard_of
from lars_tree._backends.torch.stand_ins import TENSOR_TYPES
from lars_tree._core.execute import Caller, Result
from lars_tree._core.options import check as check_options
from lars_tree._numerics.formula import Rule, is_joint
from lars_tree.torch import options
from lars_tree.torch.groups import name_of, refuse_flattened_since

_CONVERTS = (
    "p was changed after a step of the optimizer, as by model.double() or model.to():"
    "\n  opt.load_state_dict(opt.state_dict()) converts the buffers, opt.state.clear() drops them"
)

TORCH_WORDS = errors.Words(
    w="p",
    dcdw="p.grad",
    out="p",
    state="momentum_buffer",
    weights="parameters",
    outs="parameters",
    velocity="momentum_buffer",
    options={"decay_lambda": "weight_decay"},
    path=lambda path: "/".join(map(str, path)),
    hint=_CONVERTS,
)


class ParameterRows:
    """All parameters that have a gradient, by columns: one list is faster than 1,000 tuples.

    Attributes:
        groups: All groups of the optimizer.
        grad_scale: The loss scale that the gradients still carry; None if there is none.
        params: The parameters.
        grads: Their gradients.
        buffers: Their momentum buffers, or None.
        rules: Their rules.
        numbers: The indices of their groups in `groups`.
        for_engine: The indices of the rows that `OptimizerEngine` updates.
        first_steps: The indices of the rows with a new buffer.
        device_can_skip: Whether the device can skip the step without the CPU waiting for it.
    """

    def __init__(self, groups: list[dict[str, Any]], grad_scale: Any) -> None:
        self.groups = groups
        self.grad_scale = grad_scale
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.buffers: list[Tensor | None] = []
        self.rules: list[Rule] = []
        self.numbers: list[int] = []
        self.for_engine: set[int] = set()
        self.first_steps: list[int] = []
        self.device_can_skip = True

    def rule(self, number: int, is_for_engine: bool, is_first: bool) -> Rule:
        """The rule of a group, for the parameters of one engine. `is_first`: buffers are new."""
        group, scale = self.groups[number], self.grad_scale
        # Only this engine can skip a step on the device. The skipped step leaves new buffers
        # behind, so the next step would be dampened although it is the first that is applied.
        is_undampened = is_first and options.may_be_nonzero(group["dampening"])
        self.device_can_skip &= is_for_engine and not is_undampened
        scale = scale if is_for_engine or scale is None else float(scale)
        return options.rule(group, scale, is_first)

    @property
    def device_can_guard(self) -> bool:
        """Whether `OptimizerEngine` can apply `nonfinite`: it updates all rows, on one device."""
        is_alone = self.params and len(self.for_engine) == len(self.params)
        return bool(is_alone and self.device_can_skip) and len({p.device for p in self.params}) == 1

    def columns(self, counters: Mapping[str, Any] | None = None) -> Columns:
        """The arguments of `execute` for an update in place."""
        params, grads, rules = self.params, self.grads, self.rules
        return Columns(params, grads, params, rules, self.buffers, counters or {})

    def keep_buffers(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Put the new buffers into the state of the optimizer."""
        for i in self.first_steps:
            state[self.params[i]]["momentum_buffer"] = self.buffers[i]

    def with_new_buffers(
        self,
        state: dict[Tensor, dict[str, Any]],
        step: Callable[[], Result],
        is_done: Callable[[], bool],
    ) -> Result:
        """Take a step with the new buffers in the state; remove them if the step is not done.

        This is not a context manager, because an exception in its own code would leave them.
        """
        new = [self.params[i] for i in self.first_steps]
        removed: deque[Any] = deque(maxlen=0)
        passes: list[Iterator[Any]] = []
        try:
            try:
                # Prepared here, because there may be no memory left when it is needed.
                ways = [
                    partial(state[p].pop, "momentum_buffer", None)
                    if p in state
                    else partial(state.pop, p, None)
                    for p in new
                ]
                passes += [map(operator.call, ways), map(operator.call, ways)]
                self.keep_buffers(state)
                return step()
            finally:
                if passes and not is_done():
                    removed.extend(passes[0])
        finally:  # if a second exception came in the inner `finally`
            if passes and not is_done():
                removed.extend(passes[1])

    def leaves(self) -> list[Leaf]:
        """The rows as leaves, for a step under `torch.compile`."""
        columns = zip(self.params, self.grads, self.rules, self.buffers, strict=True)
        return [
            Leaf(i, param, grad, param, rule, BACKEND, buffer)
            for i, (param, grad, rule, buffer) in enumerate(columns)
        ]

    def engine(self, found_inf: Tensor | None = None) -> OptimizerEngine | None:
        """The engine that the optimizer chooses for the rows in `for_engine`, if there are any."""
        # With "raise" and "skip", values of one engine may decide about writes of another.
        guards = any(group["nonfinite"] != "propagate" for group in self.groups)
        if self.for_engine and (self.device_can_guard or not guards):
            fusing = {i for i in self.for_engine if may_fuse(self.groups[self.numbers[i]])}
            return OptimizerEngine(self.for_engine, fusing, found_inf)
        return None

    def caller(
        self, engine: OptimizerEngine | None, last: tuple[Callable[[], Any], ...] = ()
    ) -> Caller:
        """The `Caller` argument of `execute`."""
        return Caller(self._paths, same_shapes=True, last=last, words=TORCH_WORDS, engine=engine)

    def signature(self) -> tuple[Hashable | None, list[Rule]]:
        """The signature of `Repeatable`, None if the step cannot be repeated; and all rules."""
        if self.first_steps or len(self.for_engine) < len(self.params):
            return None, []
        if not (all(map(may_fuse, self.groups)) and is_available(self.params[0].device)):
            return None, []  # `Foreach` cannot repeat a step
        params, all_rules = self.params, self.rules
        facts = signature_of(params, self.grads, [x for x in self.buffers if x is not None])
        if facts is None:
            return None, []
        rules = dict(zip(map(id, all_rules), all_rules, strict=True))
        indices = {key: index for index, key in enumerate(rules)}
        static = tuple(
            (is_joint(rule), *(x for x in rule if not _is_number(x))) for rule in rules.values()
        )
        of_rows = tuple([indices[key] for key in map(id, all_rules)])
        without = tuple([i for i, buffer in enumerate(self.buffers) if buffer is None])
        pairs = zip(params, all_rules, strict=True)
        shapes = tuple([p.shape for p, rule in pairs if rule.layer_axis is not None])
        return (facts, static, of_rows, without, shapes), list(rules.values())

    def _paths(self) -> list[errors.Path]:
        found: list[errors.Path] = []
        for number, group in enumerate(self.groups):
            for index, p in enumerate(group["params"]):
                if len(found) < len(self.params) and self.params[len(found)] is p:
                    found.append((name_of(group, number, index),))
        return found


def _is_number(x: Any) -> bool:
    return isinstance(x, (float, Tensor))


def asks_for_engine(group: dict[str, Any]) -> bool:
    """Whether `OptimizerEngine` updates the parameters of a group even in CPU memory."""
    return bool(group["foreach"] or (group["fused"] and is_interpreted()))


def may_fuse(group: dict[str, Any]) -> bool:
    """Whether Triton kernels may update the parameters of a group."""
    return group["fused"] is not False and not group["foreach"]


def engines(optimizer: Optimizer) -> set[str]:
    """The names of the engines that update the parameters, if gradients are like parameters."""
    found = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not asks_for_engine(group) and is_in_cpu_memory(p):
                found.add("native" if may_read() else "twin")
                continue
            if not asks_for_engine(group) and is_shard(p) and may_read():
                found.add("native")
                continue
            x = as_real(shard_of(p))
            layer = Layer(x, x, x, None, options.rule(group, None, is_first=False))
            row = fused_row(layer, may_fuse(group))
            found.add(Foreach.name if row is None else Fused.name)
    return found


class _SparseError(errors.LeafError, RuntimeError):
    """A gradient is sparse, for which torch's own optimizers raise RuntimeError."""


def _sparse_error(name: str) -> errors.LarsTreeError:
    headline = "Lars does not support sparse gradients"
    hint = f"make the gradient of {name} dense, as by torch.nn.Embedding(sparse=False)"
    return errors.error(_SparseError, TORCH_WORDS.dcdw, headline, [((name,), hint)])


def to_measure(optimizer: Optimizer, grad_scale: Any = 1.0) -> tuple[Columns, Caller]:
    """All parameters with the rules of a step without momentum, for a report.

    The path of a parameter is its name, or its position where it has no name of its own.
    """
    check_options({"grad_scale": grad_scale})
    params: list[Tensor] = []
    rules: list[Rule] = []
    paths: dict[errors.Path, None] = {}
    for number, group in enumerate(optimizer.param_groups):
        first_rate = group.get("initial_lr", optimizer.defaults["lr"])
        options.check(group, f"param_groups[{number}]", waits=False, first_rate=first_rate)
        refuse_flattened_since(group, number)
        rule = options.rule({**group, "momentum": 0.0}, grad_scale, is_first=False)
        for index, p in enumerate(group["params"]):
            path = (name_of(group, number, index),)
            paths[(name_of({}, number, index),) if path in paths else path] = None
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise _sparse_error(name_of(group, number, index))
            params.append(p)
            rules.append(rule)
    grads = [p.grad for p in params]
    if all(grad is None for grad in grads):
        headline = "no parameter has a gradient: call backward() before, and zero_grad() after"
        lines = [(path, "expected a gradient, got None") for path in paths]
        raise errors.error(errors.LeafError, TORCH_WORDS.dcdw, headline, lines)
    columns = Columns(params, grads, None, rules)
    return columns, Caller(lambda: list(paths), same_shapes=True, words=TORCH_WORDS)


def gather(optimizer: Optimizer, grad_scale: Any, may_skip: bool = False) -> ParameterRows:
    """Collect the inputs of a step from all groups, and check the options of the groups."""
    found = ParameterRows(optimizer.param_groups, grad_scale)
    params, grads, buffers, rules = found.params, found.grads, found.buffers, found.rules
    get_state, strided = optimizer.state.get, torch.strided
    no_state: dict[str, Any] = {}
    compiling = torch.compiler.is_compiling()
    # If one process may skip the step, `OptimizerEngine` updates the shards, because all
    # processes, even those that skip, must take part in the all-reduce of the norms.
    shards_too = not (compiling or may_skip) and may_read()
    for number, group in enumerate(optimizer.param_groups):
        if not compiling:  # schedulers can set any value
            first_rate = group.get("initial_lr", optimizer.defaults["lr"])
            name = f"param_groups[{number}]"
            options.check(group, name, waits=False, first_rate=first_rate)
            refuse_flattened_since(group, number)
        moves = options.may_be_nonzero(group["momentum"])
        always = compiling or asks_for_engine(group)
        rule, was_for_engine, was_first = None, False, False
        for index, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not strided:
                raise _sparse_error(name_of(group, number, index))
            buffer = get_state(p, no_state).get("momentum_buffer") if moves else None
            is_first = moves and buffer is None
            if is_first:
                buffer = BACKEND.zeros(p, BACKEND.velocity_dtype(p))
            # `is_in_cpu_memory`, without a call
            is_in_cpu = type(p) in TENSOR_TYPES and p.is_cpu
            is_for_engine = always or not (is_in_cpu or (shards_too and is_shard(p)))
            # Usually all parameters of a group have one rule.
            if rule is None or is_for_engine is not was_for_engine or is_first is not was_first:
                was_for_engine, was_first = is_for_engine, is_first
                rule = found.rule(number, is_for_engine, is_first)
            if is_for_engine:
                found.for_engine.add(len(params))
            if is_first:
                found.first_steps.append(len(params))
            params.append(p)
            grads.append(grad)
            buffers.append(buffer)
            rules.append(rule)
        found.numbers += [number] * (len(params) - len(found.numbers))
    return found
