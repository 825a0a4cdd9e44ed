"""Lars: the rule with momentum, as an optimizer over any tree. Its state is a Container.

The step itself is `update.advance`; this module has what stands around it. For parameters of a
torch model with their gradients in them, there is `lars_tree.torch.Lars`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, Unpack, overload

import numpy as np

from lars_tree import (
    _backends,
    _checks,
    _counters,
    _nodes,
    _options,
    _tree,
    errors,
    schedules,
)
from lars_tree._backends.base import FLOATING
from lars_tree._core import locks
from lars_tree._core.advance import advance
from lars_tree._core.types import Flags, Numbers, Rates, Schedule, T
from lars_tree._core.wrapper import unwrap
from lars_tree._floats import in_default_floats
from lars_tree._options import SharedOptions
from lars_tree._rule import is_zero
from lars_tree.array import Array
from lars_tree.container import Container

State = TypeVar("State", bound=dict[str, Any])


class Lars:
    """LARS with momentum, over a tree of weights.

    For the step u of `lars_update`, with `weight_decay` as its decay_lambda, and a velocity v that
    starts at zero,

        v = momentum * v + u
        w = w - v,    or with nesterov    w = w - (u + momentum * v)

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> opt = Lars(0.1, momentum=0.5, trust_coefficient=1.0, eps=0.0)
    >>> state = opt.init(w)
    >>> w, state = opt.update(w, g, state)      # kernel: ratio 5 / 10, a step of 0.05 * [0, 10]
    >>> w.kernel, state.velocity.kernel, int(state.step)
    (array([3. , 3.5]), array([0. , 0.5]), 1)
    >>> w, state = opt.update(w, g, state)      # half of the last step, and the next one
    >>> state.velocity.bias                     # 0.5 * 0.1 + 0.1 * 0.1, as |w| is 0.1 by now
    array([0.06])

    In place, nothing is allocated: `opt.update(w, g, state, out=w)` writes to the weights and to
    the arrays of the state. Under `jax.jit` and `lax.scan` both are simply values.

    The velocity has the dtype of its weights, but float32 where those are float16 or bfloat16, and
    is None where they are no floating-point numbers, which can only be kept. The state is a
    Container and can be saved like weights: `step` counts the steps that were taken, `skipped`
    those that nonfinite="skip" left out, and `velocity` is like w (there is none if momentum is the
    number 0; each step is then that of `lars_update`, to the bit).

    Args:
        lr: The rate: as in `lars_update`, or a schedule: a callable of the number of the step,
            which is 0 at first, such as those in `lars_tree.schedules`; also within a Container.
        momentum: What is left of the velocity after each step, a number >= 0.
        nesterov: Look ahead: the velocity is applied as it will be after one more such gradient.
        weight_decay: Weight decay: the decay_lambda of `lars_update`.
        trust_coefficient: As in `lars_update`, but 0.001, as in the paper and in other packages.
        eps: As in `lars_update`, but 1e-8, so that the rounding noise of a gradient that should be
            0 makes no step of full length.
        stop_gradients: As in `lars_update`; False keeps the history of the velocity too.
        **options: The further options of `lars_update`. All but `lr` are fixed for all steps; each
            may be a Container or dict that is a prefix of w.

    Raises:
        OptionError: A value that the rule is not defined for.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """

    def __init__(
        self,
        lr: Rates,
        momentum: Numbers = 0.9,
        nesterov: Flags = False,
        *,
        weight_decay: Numbers = 0,
        trust_coefficient: Numbers = 0.001,
        eps: Numbers = 1e-8,
        stop_gradients: Flags = True,
        **options: Unpack[SharedOptions],
    ) -> None:
        _options.check_names(options, _options.OPTIMIZER_DEFAULTS, function="Lars()")
        given = {
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "stop_gradients": stop_gradients,
            **options,
        }
        try:
            _options.check({"lr": _without_schedules(lr, lambda _: 0.0), **given})
        except RecursionError:
            raise _tree.explained({"lr": lr, **given}) from None
        self.lr = lr
        self.options = {**_DEFAULTS, **given}

    def __repr__(self) -> str:
        shown = [
            f"{name}={_on_one_line(x)}"
            for name, x in self.options.items()
            if type(x) is not type(_DEFAULTS[name]) or x != _DEFAULTS[name]
        ]
        return f"Lars({', '.join([_on_one_line(self.lr), *shown])})"

    def init(self, w: Any) -> Container:
        """The state before the first step: nothing moves yet.

        >>> Lars(0.1).init({"a": np.ones(3), "b": np.ones(2, np.float16)})
        Container: 4 leaves, 7 parameters, 48 bytes
          step        int64 ()
          skipped     int64 ()
          velocity/a  float64 (3,)
          velocity/b  float32 (2,)

        Args:
            w: The weights: a tree of arrays, or one array.

        Raises:
            StructureError: w holds itself, or has a node that cannot be rebuilt.
            LarsTreeError: as `update` does for weights that cannot be updated, such as a leaf that
                is not an array, or one without data.
        """
        try:
            leaves = _tree.leaves(w)
            bare = list(map(unwrap, leaves))
            _checks.check_weights(bare, lambda: _tree.paths(w, len(bare)))
        except RecursionError:
            raise _tree.explained({"w": w}) from None
        arrays = [x for x in bare if x is not None]
        first = arrays[0] if arrays else np.empty(0)
        backend = _backends.find(first)
        assert backend is not None
        state = Container(step=backend.counter(first), skipped=backend.counter(first))
        if self._moves:
            state["velocity"] = _tree.rebuild(w, [_zeros(x) for x in leaves], "w")
        return state

    @overload
    def update(
        self, w: T, dcdw: Any, state: dict[str, Any], out: None = None
    ) -> tuple[T, Container]: ...
    @overload
    def update(self, w: T, dcdw: Any, state: State, out: T) -> tuple[T, State]: ...

    def update(self, w: Any, dcdw: Any, state: dict[str, Any], out: Any = None) -> tuple[Any, Any]:
        """Take one step: the new weights and the new state.

        With `out`, the step is read, the schedules are called and all is written under the lock of
        updates in place, so each of several threads takes a step of its own. A schedule may itself
        make updates, but must not wait for those of another thread.

        Args:
            w: The weights.
            dcdw: Their gradients, as in `lars_update`, but of the shapes of their weights.
            state: What `init` or the last `update` returned.
            out: Where to write the new weights, such as w itself. The state is then written to
                where it is, too, and is returned.

        Raises:
            StateError, StructureError: the state is not one of these weights; nothing was written.
            LarsTreeError: as `lars_update` does; nothing was written.
        """
        self._check_state(state)
        with nullcontext() if out is None else locks.writing(lambda: _counters.spans(state)):
            _counters.check(state, written=out is not None)
            options = {"lr": _rates(self.lr, state["step"]), **self.options}
            new_w, new = advance(w, dcdw, out, options, state)
        if out is not None:
            return new_w, state
        return new_w, Container({name: new[name] for name in state})

    @property
    def _moves(self) -> bool:
        return not is_zero(self.options["momentum"])

    def _check_state(self, state: Any) -> None:
        names = ["step", "skipped", *(["velocity"] if self._moves else [])]
        if not isinstance(state, dict):
            text = f"expected what `init` returns, got {errors.describe(state)}"
        elif state.keys() != set(names):
            text = errors.key_differences(names, list(state))
        else:
            return
        headline = f"state is not one of {self!r}"
        raise errors.error(errors.StateError, "state", headline, [((), text)])


_DEFAULTS = {"momentum": 0.9, "nesterov": False, **_options.OPTIMIZER_DEFAULTS}


def _zeros(x: Any) -> Any:
    """A velocity for one leaf of the weights; None for one that can only be left as it is."""
    array = unwrap(x)
    backend = _backends.find(array)
    if backend is None or backend.facts(array).kind not in FLOATING:
        return None
    zeros = backend.zeros(array, backend.velocity_dtype(array))
    return Array(zeros) if isinstance(x, Array) else zeros


def _on_one_line(x: Any) -> str:
    return " ".join(repr(x.to_dict() if isinstance(x, Container) else x).split())


def _rates(lr: Any, step: Any) -> Any:
    step = schedules.value(unwrap(step))
    return _without_schedules(lr, lambda schedule: _rate(schedule, step))


@in_default_floats
def _rate(schedule: Schedule, step: Any) -> Any:
    return schedule(step)


def _without_schedules(lr: Any, rate: Callable[[Any], Any]) -> Any:
    """The rate with rate(schedule) for each schedule, which may have the type of a tree."""
    if callable(lr):
        return rate(lr)
    if _tree.is_leaf(lr):
        return lr
    new = [_without_schedules(child, rate) for _, child in _tree.children(lr)]
    return _nodes.replace_for_reading(lr, new)
