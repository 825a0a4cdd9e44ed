"""Lars: LARS with momentum, an optimizer for any tree of weights. Its state is a Container.

`_core.advance` computes the step. For the parameters of a torch model, with their gradients in
`p.grad`, use `lars_tree.torch.Lars`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from inspect import Parameter, signature
from typing import Any, TypeVar, Unpack, overload

import numpy as np

from lars_tree import _backends, errors, schedules
from lars_tree._backends.base import FLOATING
from lars_tree._backends.wrapper import unwrap
from lars_tree._core import checks, counters, locks
from lars_tree._core.advance import advance
from lars_tree._core.options import (
    DEFAULTS,
    OptimizerOptions,
    SharedOptions,
    check,
    check_names,
    is_function,
)
from lars_tree._core.types import Flags, Numbers, Rates, Schedule, T
from lars_tree._core.values import comparable, hashed
from lars_tree._numerics.float_environment import in_default_floats
from lars_tree._numerics.formula import is_zero
from lars_tree._tree import nodes, structure
from lars_tree.array import Array
from lars_tree.container import Container

State = TypeVar("State", bound=dict[str, Any])


class Lars:
    """LARS with momentum, over a tree of weights.

    Let u be the step of `lars_update` with decay_lambda=weight_decay, and v a velocity that starts
    at zero. Then a step is

        v = momentum * v + u
        w = w - v,    or with nesterov    w = w - (u + momentum * v)

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> opt = Lars(0.1, momentum=0.5, trust_coefficient=1.0, eps=0.0)
    >>> state = opt.init(w)
    >>> w, state = opt.update(w, g, state)      # kernel: ratio 5 / 10, a step of 0.05 * [0, 10]
    >>> w.kernel, state.velocity.kernel, int(state.step)
    (array([3. , 3.5]), array([0. , 0.5]), 1)
    >>> w, state = opt.update(w, g, state)      # half of the last step, and a new one
    >>> state.velocity.bias                     # 0.5 * 0.1 + 0.1 * 0.1, as |w| is now 0.1
    array([0.06])

    `opt.update(w, g, state, out=w)` works in place: it writes to the weights and to the arrays of
    the state, and allocates nothing. Under `jax.jit` and `lax.scan`, weights and state are ordinary
    pytrees. Optimizers with equal options are equal and have the same hash, so a `Lars` can be a
    static argument of `jax.jit`.

    A velocity has the dtype of its weights, or float32 if they are float16 or bfloat16. Leaves that
    are not floating point are never updated and have no velocity (None). The state is a Container
    and can be saved like weights: `step` counts the steps, `skipped` the steps that
    nonfinite="skip" skipped, and `velocity` is a tree like w. If momentum is the number 0, there is
    no velocity, and each step gives the same results as `lars_update`, bit for bit.

    Args:
        lr: The rate, as in `lars_update`; or a schedule, a function from the number of the step
            (the first is 0) to the rate, as in `lars_tree.schedules`. A tree can contain both.
        momentum: The factor of the velocity, a number >= 0.
        nesterov: Nesterov momentum: the second formula for w.
        weight_decay: Weight decay: the decay_lambda of `lars_update`.
        trust_coefficient: As in `lars_update`, with the default of the paper and other packages.
        eps: As in `lars_update`. The default keeps the step small if a gradient is 0 except for
            rounding errors.
        stop_gradients: As in `lars_update`; False keeps the autograd graph of the velocity too.
        **options: The further options of `lars_update`. Each option may give its values by path,
            as in `lars_update`. A function is a schedule for `lr`, and a function of (path, leaf)
            for all other options. A callable node of a tree, such as a module, is a tree of values
            if it is a prefix of w, and a function otherwise.

    Raises:
        OptionError: An option has an invalid value.

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
        arguments = {**locals(), **options}
        check_names(options, _DEFAULTS, function="Lars()")
        given = {name: arguments[name] for name in _DEFAULTS if name in arguments}
        try:
            check({"lr": _without_schedules(lr, lambda _: 0.0), **given})
        except RecursionError:
            raise structure.explained({"lr": lr, **given}) from None
        self.lr = lr
        self.options = {**_DEFAULTS, **given}

    def __repr__(self) -> str:
        shown = [
            f"{name}={_on_one_line(x)}"
            for name, x in self.options.items()
            if type(x) is not type(_DEFAULTS[name]) or x != _DEFAULTS[name]
        ]
        return f"Lars({', '.join([_on_one_line(self.lr), *shown])})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or self._comparable() == other._comparable()

    def __hash__(self) -> int:
        return hash((type(self), hashed(self._comparable())))

    def _comparable(self) -> dict[str, Any]:
        options = {"lr": self.lr, **self.options}
        values = {name: comparable(name, x) for name, x in options.items()}
        return {**values, "has velocity": self._has_velocity}

    def init(self, w: Any) -> Container:
        """The state before the first step, with velocities of zeros.

        >>> Lars(0.1).init({"a": np.ones(3), "b": np.ones(2, np.float16)})
        Container: 4 leaves, 7 parameters, 48 bytes
          step        int64 ()
          skipped     int64 ()
          velocity/a  float64 (3,)
          velocity/b  float32 (2,)

        Args:
            w: The weights: a tree of arrays, or one array.

        Raises:
            StructureError: w contains itself, or has a node that cannot be rebuilt.
            LarsTreeError: w cannot be updated: a leaf is not an array, or has no data. A model with
                other leaves needs None in their place: `opt.init(equinox.filter(model,
                equinox.is_array))`. `update` takes the whole model.
        """
        try:
            leaves = structure.leaves(w)
            arrays = list(map(unwrap, leaves))
            checks.check_weights(arrays, lambda: structure.paths(w, len(arrays)))
        except RecursionError:
            raise structure.explained({"w": w}) from None
        first = next((x for x in arrays if x is not None), np.empty(0))
        backend = _backends.find(first)
        assert backend is not None
        state = Container(step=backend.counter(first), skipped=backend.counter(first))
        if self._has_velocity:
            state["velocity"] = structure.rebuild(w, [_zeros(x) for x in leaves], "w")
        return state

    @overload
    def update(
        self,
        w: T,
        dcdw: Any,
        state: dict[str, Any],
        out: None = None,
        **overrides: Unpack[OptimizerOptions],
    ) -> tuple[T, Container]: ...
    @overload
    def update(
        self, w: T, dcdw: Any, state: State, out: T, **overrides: Unpack[OptimizerOptions]
    ) -> tuple[T, State]: ...

    def update(
        self,
        w: Any,
        dcdw: Any,
        state: dict[str, Any],
        out: Any = None,
        **overrides: Unpack[OptimizerOptions],
    ) -> tuple[Any, Any]:
        """Take one step and return the new weights and the new state.

        With `out`, a lock is held until all results are written, so that steps of several threads
        run one after another. Schedules and functions of paths are called under this lock: they may
        call `update`, but must not wait for an update of another thread.

        >>> w, g = np.array([3.0, 4.0]), np.array([0.8, 0.6])
        >>> opt = Lars(0.1, trust_coefficient=1.0, eps=0.0)
        >>> opt.update(w, g, opt.init(w))[0]                # ratio 5: a step of 0.5 * g
        array([2.6, 3.7])
        >>> opt.update(w, 1024 * g, opt.init(w), grad_scale=1024.0)[0]
        array([2.6, 3.7])
        >>> opt.update(w, g, opt.init(w), lr=0.2)[0]
        array([2.2, 3.4])

        Args:
            w: The weights.
            dcdw: The gradients, as in `lars_update`, but with the same shapes as the weights.
            state: The result of `init` or of the last `update`.
            out: The tree to write the new weights to, often w itself. The state is then written in
                place too, and returned.
            **overrides: Options of `Lars`, for this step instead of those of the optimizer. An
                optimizer with momentum 0 has no velocity, so its momentum must stay 0.

        Raises:
            StateError, StructureError: The state does not match w. Nothing was written.
            LarsTreeError: As in `lars_update`. Nothing was written.
        """
        if overrides:
            self._check_overrides(overrides)
        self._check_state(state)
        with nullcontext() if out is None else locks.writing(lambda: counters.spans(state)):
            counters.check(state, written=out is not None)
            given: dict[str, Any] = {"lr": self.lr, **self.options, **overrides}
            options = {**given, "lr": _rates(given["lr"], state["step"], w)}
            new_w, new = advance(w, dcdw, out, options, state)
        if out is not None:
            return new_w, state
        return new_w, Container({name: new[name] for name in state})

    @property
    def _has_velocity(self) -> bool:
        return not is_zero(self.options["momentum"])

    def _check_overrides(self, overrides: OptimizerOptions) -> None:
        check_names(overrides, OptimizerOptions.__annotations__, function="Lars.update()")
        momentum = overrides.get("momentum", 0)
        if not (self._has_velocity or is_zero(momentum)):
            text = "expected 0, because the state of a Lars with momentum=0 has no velocity, got"
            line = ((), f"{text} {_on_one_line(momentum)}")
            headline = "momentum cannot be changed for one step"
            raise errors.error(errors.OptionError, "momentum", headline, [line])

    def _check_state(self, state: Any) -> None:
        names = ["step", "skipped", *(["velocity"] if self._has_velocity else [])]
        if not isinstance(state, dict):
            text = f"expected what `init` returns, got {errors.describe(state)}"
        elif state.keys() != set(names):
            text = errors.key_differences(names, list(state))
        else:
            return
        headline = f"state does not belong to {self!r}"
        raise errors.error(errors.StateError, "state", headline, [((), text)])


_DEFAULTS = {
    **{
        name: parameter.default
        for name, parameter in signature(Lars).parameters.items()
        if parameter.default is not Parameter.empty
    },
    **{name: DEFAULTS[name] for name in SharedOptions.__annotations__},
}


def _zeros(x: Any) -> Any:
    """The initial velocity of a leaf, zeros; None if the leaf is not floating point."""
    array = unwrap(x)
    backend = _backends.find(array)
    if backend is None or backend.facts(array).kind not in FLOATING:
        return None
    zeros = backend.zeros(array, backend.velocity_dtype(array))
    return Array(zeros) if isinstance(x, Array) else zeros


def _on_one_line(x: Any) -> str:
    return " ".join(repr(x.to_dict() if isinstance(x, Container) else x).split())


def _rates(lr: Any, step: Any, w: Any) -> Any:
    step = schedules.value(unwrap(step))
    try:
        return _without_schedules(lr, lambda schedule: _rate(schedule, step), w)
    except RecursionError:  # also of a schedule
        if structure.cycle(lr) is None:
            raise
        raise structure.explained({"lr": lr}) from None


@in_default_floats
def _rate(schedule: Schedule, step: Any) -> Any:
    try:
        return schedule(step)
    except Exception as error:
        reason = "" if structure.is_leaf(schedule) else ", because it is not a prefix of w"
        error.add_note(f"lr was called as a schedule, a function of the step{reason}")
        raise


def _without_schedules(lr: Any, rate: Callable[[Any], Any], w: Any = None) -> Any:
    """Replace each schedule of a tree by rate(schedule)."""
    if is_function(lr, w):
        return rate(lr)
    if structure.is_leaf(lr):
        return lr
    weights = {} if structure.is_leaf(w) else dict(nodes.children(w))
    new = [(key, _without_schedules(x, rate, weights.get(key))) for key, x in nodes.children(lr)]
    return nodes.for_reading(lr, new)
