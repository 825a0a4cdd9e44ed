"""The engine of torch optimizers for parameters on accelerators, and where groups ask for it.

Full checks would take longer than the step on a device, so this engine makes a cheap pre-check.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from lars_tree._backends.base import Leaf, StepResult, Writes
from lars_tree._backends.torch import multi_tensor
from lars_tree._backends.torch.addresses import NUMPY_TYPES
from lars_tree._backends.torch.backend import BACKEND, add_step, is_in_cpu_memory
from lars_tree._backends.torch.sharded import is_sharded, partial_fault, shard_of, sharding_of
from lars_tree._backends.torch.stand_ins import TENSOR_TYPES, address
from lars_tree._backends.torch.transfers import is_capturing
from lars_tree._numerics.formula import Rule


class OptimizerEngine:
    """`base.Engine` for torch optimizers.

    Attributes:
        indices: The indices of the leaves that this engine updates.
        step: The prepared step; None before `update`.
    """

    def __init__(
        self, indices: Collection[int], fusing: Collection[int], unless: Tensor | None
    ) -> None:
        """Triton kernels may update the leaves in `fusing`; nothing is written if `unless` != 0."""
        self.indices = indices
        self.step: multi_tensor.Step | None = None
        self._gradients: dict[int, Tensor] = {}
        self._fusing = fusing
        self._unless = unless

    def trusted(self, leaves: list[Leaf]) -> list[Leaf]:
        """The leaves outside of CPU memory; none if a leaf of the engine fails the pre-check."""
        ours = [leaf for leaf in leaves if leaf.leaf_index in self.indices]
        if not _look_right(ours):
            return []
        return [leaf for leaf in ours if not is_in_cpu_memory(leaf.w)]

    def update(self, leaves: list[Leaf], writes: Writes) -> tuple[list[int], Any]:
        """As in `base.Engine`."""
        pairs = [(leaf, StepResult(leaf.out, leaf.velocity)) for leaf in leaves]
        step = multi_tensor.prepare(pairs, lambda leaf: leaf.leaf_index in self._fusing)
        self._gradients = {leaf.leaf_index: leaf.dcdw for leaf in leaves}
        choices = [(leaf.leaf_index, leaf.rule.nonfinite) for leaf in leaves]
        return self.finish(step, choices, writes)

    def finish(
        self, step: multi_tensor.Step, choices: list[tuple[int, str]], writes: Writes
    ) -> tuple[list[int], Any]:
        """Add the writes of a prepared step, given the option `nonfinite` of each leaf.

        This waits for the device only if an option is "raise".
        """
        self.step = step
        unless, taken = self._unless, True
        if any(choice != "propagate" for _, choice in choices):
            flags = step.nonfinite()
            if any(choice == "raise" for _, choice in choices) and not (
                unless is not None and unless
            ):
                rows = zip(choices, flags.tolist(), strict=True)
                bad = [i for (i, choice), is_bad in rows if is_bad and choice == "raise"]
                if bad:
                    return bad, False
            skips = flags.any()
            taken = ~skips
            unless = skips if unless is None else skips | (unless.to(skips.device) != 0)
        add_step(step, writes, unless)
        return [], taken

    def repeatable(self, gradients: list[Tensor]) -> multi_tensor.Step | None:
        """The step of `update`, to be repeated for the same tensors, given the gradients by index.

        None if an engine does not support this, or if a gradient that overlaps written memory was
        copied: the copy is at another address.
        """
        step = None if self.step is None else self.step.repeatable()
        read = ((x.data_ptr(), gradients[i].data_ptr()) for i, x in self._gradients.items())
        return None if step is None or any(one != other for one, other in read) else step


class Repeatable(NamedTuple):
    """A step that was checked and taken. It is taken again if its signature is the same.

    The signature has all that the checks and the engines use, except the numbers of the rules and
    the elements of the tensors. The step holds no parameters, gradients or buffers, which would
    keep their memory from being freed.
    """

    signature: Hashable
    rules: list[Rule]
    step: multi_tensor.Step


_dtype = attrgetter("dtype")


def signature_of(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> Any:
    """Equal for tensors that the engines and the checks do not distinguish; None if unknown.

    All devices share one address space. This must be fast for 1,000 parameters: to ask each tensor
    for its shape and strides would take longer than all else.
    """
    xs = [*params, *grads, *buffers]
    if not set(TENSOR_TYPES).issuperset(map(type, xs)):
        return None
    if any(map(Tensor.is_conj, grads)) or any(map(Tensor.is_neg, grads)):
        return None  # an engine may use copies
    if any(map(is_capturing, {p.device for p in params})):
        return None  # graphs need tables of their own
    facts = [tuple(map(fact, xs)) for fact in (Tensor.data_ptr, Tensor.numel, _dtype)]
    others = [i for i, dense in enumerate(map(Tensor.is_contiguous, xs)) if not dense]
    return (*facts, tuple((i, xs[i].shape, xs[i].stride()) for i in others))


def _look_right(leaves: list[Leaf]) -> bool:
    """A cheap pre-check of shapes, dtypes and devices; if it fails, full checks report the error.

    It does not find tensors that overlap but start at different addresses.
    """
    starts = []
    for leaf in leaves:
        w, velocity, axis = leaf.w, leaf.velocity, leaf.rule.layer_axis
        given = (w, leaf.dcdw) if velocity is None else (w, leaf.dcdw, velocity)
        if not all(isinstance(x, Tensor) and not x.is_nested for x in given):
            return False  # a nested tensor has no shape
        if len(set(map(_kind, given))) > 1:
            return False
        expected = (BACKEND.velocity_dtype(w), sharding_of(w))
        if velocity is not None and (velocity.dtype, sharding_of(velocity)) != expected:
            return False
        if w.is_meta or any(is_sharded(x) and partial_fault(x) for x in (w, leaf.dcdw)):
            return False
        if w.dtype not in NUMPY_TYPES or not (axis is None or -w.ndim <= axis < w.ndim):
            return False
        shards = [shard_of(x) for x in (w, velocity, leaf.dcdw) if x is not None]
        if type(shards[0]) not in TENSOR_TYPES:
            return False  # a subclass may wrap another tensor
        if any(x.is_conj() or x.is_neg() for x in shards[:-1]):
            return False
        if shards[0].numel():
            addresses = [address(x) for x in shards]
            if not all(addresses):
                return False  # without memory
            starts.append(addresses[0])
    return len(starts) == len(set(starts))


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.device, x.is_complex(), is_sharded(x) and x.device_mesh
