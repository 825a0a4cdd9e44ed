"""Parameters, gradients and buffers that a step of `lars_tree.torch.Lars` refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lars_tree import (
    BackendError,
    DtypeError,
    LeafError,
    NonFiniteError,
    OutError,
    ShapeError,
    StateError,
)
from lars_tree.torch import Lars
from tests.reliability import bad_tensors as tensors
from tests.reliability import calls, outcomes, tensor_faults
from tests.reliability.attack import Attempts
from tests.reliability.calls import Fault

NAMES = tuple(f"blocks.{i}.weight" for i in range(7))
GROUPS = (range(3), range(3, 5), range(5, 7))
MOVING = range(5)  # the parameters with momentum
FIRST, LATER, AGAIN = "first step", "later step", "step like the last"
ENGINES = ("native", "foreach")
RULE = {name: x for name, x in calls.RULE.items() if name != "decay_lambda"}


class Model:
    """Seven parameters in three groups, of which the last has no momentum."""

    def __init__(self, when: str, engine: str) -> None:
        self.params = [Parameter(tensors.valid(calls.values(i))) for i in range(7)]
        for i, p in enumerate(self.params):
            p.grad = tensors.valid(calls.slopes(i))
        momenta = (calls.MOMENTUM, calls.MOMENTUM, 0.0)
        groups = [
            {"params": [(NAMES[i], self.params[i]) for i in indices], "momentum": momentum}
            for indices, momentum in zip(GROUPS, momenta, strict=True)
        ]
        foreach = True if engine == "foreach" else None
        self.opt = Lars(groups, calls.LR, weight_decay=0.01, foreach=foreach, **RULE)
        self.partner: int | None = None
        if when == LATER:
            for i in MOVING:
                buffer = tensors.valid(calls.slopes(i + 3) / 2)
                self.opt.state[self.params[i]]["momentum_buffer"] = buffer
        elif when == AGAIN:
            for _ in range(2):
                self.opt.step()

    def buffers(self) -> list[Any]:
        return [self.opt.state.get(p, {}).get("momentum_buffer") for p in self.params]

    def seen(self) -> Any:
        """All that a refused step must not change."""
        grads = [p.grad for p in self.params]
        arrays = [*self.params, *grads, *self.buffers()]
        state = [(id(p), list(x)) for p, x in self.opt.state.items()]
        return (
            list(map(tensors.seen, arrays)),
            outcomes.outline(self.opt.param_groups),
            state,
            self.opt.skipped,
        )


Spoil = Callable[[Model, int], None]


def gradient(convert: Callable[[Tensor], Any], **options: Any) -> Spoil:
    def spoil(model: Model, i: int) -> None:
        p = model.params[i]
        p.grad_dtype = None  # any dtype
        p.grad = convert(p.grad)
        for group in model.opt.param_groups:
            group.update(options)

    return spoil


def data(convert: Callable[[Tensor], Any]) -> Spoil:
    def spoil(model: Model, i: int) -> None:
        model.params[i].data = convert(model.params[i].data)

    return spoil


def both(convert: Callable[[Tensor], Any]) -> Spoil:
    def spoil(model: Model, i: int) -> None:
        p = model.params[i]
        p.grad_dtype = None
        grad, p.grad = p.grad, None
        p.requires_grad_(False)
        p.data = convert(p.data)
        p.grad = convert(grad)

    return spoil


def buffer(convert: Callable[[Tensor], Any]) -> Spoil:
    def spoil(model: Model, i: int) -> None:
        state = model.opt.state[model.params[i]]
        state["momentum_buffer"] = convert(state["momentum_buffer"])

    return spoil


def shared(by: int) -> Spoil:
    """The memory of two parameters overlaps."""

    def spoil(model: Model, i: int) -> None:
        p, q = model.params[i], model.params[tensors.partner(model, i)]
        memory = torch.zeros(12)
        views = [memory[start : start + 6].view(2, 3) for start in (0, by)]
        views[0].copy_(q.data)
        views[1].copy_(p.data)
        q.data, p.data = views

    return spoil


def shared_buffers(by: int) -> Spoil:
    def spoil(model: Model, i: int) -> None:
        model.partner = (i + 2) % 5
        p, q = model.params[i], model.params[model.partner]
        memory = torch.zeros(12)
        for x, start in ((q, 0), (p, by)):
            model.opt.state[x]["momentum_buffer"] = memory[start : start + 6].view(2, 3)

    return spoil


def buffer_is_parameter(model: Model, i: int) -> None:
    p = model.params[i]
    model.opt.state[p]["momentum_buffer"] = p.data


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def convert(x: Tensor) -> Tensor:
        x[1, 1] = value
        return x

    return convert


# torch itself refuses other faulty tensors as gradients or data of a parameter.
GRADIENTS = ("sparse", "freed", "half freed", "a zero tensor", "fake", "functional")
DATA = ("freed", "half freed", "a zero tensor")
DTYPES = {n: f for n, f in tensor_faults.DTYPES.items() if n.startswith("torch.")}
BUFFERS = {n: f for n, f in tensor_faults.FAULTY.items() if n != "lazy"}
LATE = (LATER, AGAIN)


def fault(
    name: str, spoil: Spoil, error: Any, argument: str = "", modes: Any = (FIRST, LATER, AGAIN)
) -> Fault:
    return Fault(name, spoil, error, argument, modes, ENGINES)


FAULTS = [
    *(
        fault(f"p.grad is {n}", gradient(tensor_faults.FAULTY[n]), LeafError, "p.grad")
        for n in GRADIENTS
    ),
    *(fault(f"p.grad is {n}", gradient(f), DtypeError, "p.grad") for n, f in DTYPES.items()),
    fault("p.grad is complex", gradient(tensors.as_type(torch.complex64)), DtypeError, "p.grad"),
    *(
        fault(f"p.grad has {x}", gradient(filled(x), nonfinite="raise"), NonFiniteError, "p.grad")
        for x in (float("nan"), float("inf"))
    ),
    *(
        fault(f"p has shape {s}", data(tensors.reshaped(*s)), ShapeError, "p.grad")
        for s in [(3, 2), (6,), (3,), (1, 3), (2, 1), (), (0,), (1, 2, 3)]
    ),
    *(fault(f"p is {n}", data(tensor_faults.FAULTY[n]), LeafError, "p") for n in DATA),
    *(fault(f"p is {n}", both(f), DtypeError, "p") for n, f in DTYPES.items()),
    fault("p is complex", data(tensors.as_type(torch.complex64)), DtypeError, "p.grad"),
    fault("p repeats a row", data(lambda x: x[:1].expand(2, 3)), OutError, "p"),
    fault("p overlaps itself", data(lambda x: x.as_strided((2, 3), (1, 1))), OutError, "p"),
    fault("p is mapped read-only", data(tensors.read_only_map), OutError, "p"),
    *(fault(f"p is shared by {by}", shared(by), OutError, "p") for by in (0, 1, 5)),
]
BUFFER_FAULTS = [
    *(
        fault(f"buffer is {n}", buffer(f), LeafError, "momentum_buffer", LATE)
        for n, f in BUFFERS.items()
    ),
    *(
        fault(f"buffer is {n}", buffer(f), error, "momentum_buffer", LATE)
        for kinds, error in (
            (tensor_faults.OBJECTS, LeafError),
            (tensor_faults.OTHERS, BackendError),
        )
        for n, f in kinds.items()
    ),
    *(
        fault(f"buffer is {n}", buffer(f), StateError, "momentum_buffer", LATE)
        for n, f in {**tensor_faults.DTYPES, "double": Tensor.double, "half": Tensor.half}.items()
    ),
    *(
        fault(f"buffer has shape {n}", buffer(f), StateError, "momentum_buffer", LATE)
        for n, f in tensor_faults.ALL_SHAPES.items()
    ),
    *(
        fault(f"buffer {n}", spoil, OutError, "momentum_buffer", LATE)
        for n, spoil in {
            "repeats a row": buffer(lambda x: x[:1].expand(2, 3)),
            "overlaps itself": buffer(lambda x: x.as_strided((2, 3), (1, 1))),
            "is mapped read-only": buffer(tensors.read_only_map),
            "is shared by 0": shared_buffers(0),
            "is shared by 1": shared_buffers(1),
            "is the parameter": buffer_is_parameter,
        }.items()
    ),
]
LAYOUTS = {
    "transposed": tensor_faults.LAYOUTS["transposed"],
    "strided": tensors.strided,
    "at an offset": tensor_faults.LAYOUTS["at an offset"],
    "in a file": tensor_faults.LAYOUTS["in a file"],
}
GOOD = [
    *(
        fault(f"p.grad is {n}", gradient(f), None)
        for n, f in {
            **LAYOUTS,
            "repeating a row": lambda x: x[:1].expand(2, 3),
            "mapped read-only": tensors.read_only_map,
            "negated": tensor_faults.VIEWS["negated"],
            **{str(f): tensors.as_type(f) for f in tensor_faults.FORMATS},
        }.items()
    ),
    *(fault(f"p is {n}", data(f), None) for n, f in LAYOUTS.items()),
    *(
        fault(f"p is of {f}", both(tensors.as_type(f)), None, modes=(FIRST,))
        for f in tensor_faults.FORMATS
    ),
    fault("p.grad is None", gradient(lambda x: None), None),
]
GOOD_BUFFERS = [
    *(fault(f"buffer is {n}", buffer(f), None, modes=LATE) for n, f in LAYOUTS.items()),
]


def attempts(rng: np.random.Generator) -> Attempts:
    """Try each case, in the order of `outcomes.in_turns`."""
    every = calls.cases([*FAULTS, *GOOD])
    every += [case for case in calls.cases([*BUFFER_FAULTS, *GOOD_BUFFERS]) if case[1] in MOVING]
    for fault, i, when, engine in outcomes.in_turns(rng, every, lambda case: id(case[0])):
        model = Model(when, engine)
        expected = [] if fault.error else exact_inputs(fault, i, when, engine)
        fault.spoil(model, i)
        check = refused if fault.error else right
        found = check(model, fault, i, when, expected)
        yield None if found is None else f"{fault.name} at {NAMES[i]}, {when}, {engine}: {found}"


def refused(model: Model, fault: Fault, i: int, when: str, expected: Any) -> str | None:
    before = model.seen()
    try:
        model.opt.step()
    except Exception as error:
        wrong = wrong_error(error, fault, model, i)
    else:
        wrong = "not refused"
    return "something has changed" if model.seen() != before else wrong


def wrong_error(error: Exception, fault: Fault, model: Model, i: int) -> str | None:
    text = f"{type(error).__name__}: {error}"
    assert fault.error is not None
    if not isinstance(error, fault.error) or error.argument != fault.argument:
        return f"expected a {fault.error.__name__} about {fault.argument}, got {text}"
    names = [NAMES[i]] if model.partner is None else [NAMES[i], NAMES[model.partner]]
    lines = str(error).splitlines()
    shown = [line for line in lines if line.startswith(tuple(f"  {name}: " for name in names))]
    if len(error.paths) != 1 or len(shown) != 1 or not all(name in shown[0] for name in names):
        return f"expected the paths {names}, got {error.paths} in {text}"
    return None


def exact_inputs(fault: Fault, i: int, when: str, engine: str) -> list[Any]:
    """The numbers before the step, of a model of its own."""
    model = Model(when, engine)
    fault.spoil(model, i)
    columns = [p.detach() for p in model.params], [p.grad for p in model.params], model.buffers()
    return [[None if x is None else tensors.numbers(x) for x in xs] for xs in columns]


def right(model: Model, fault: Fault, i: int, when: str, expected: list[Any]) -> str | None:
    """What is wrong with the results of the step; None if they are those of the reference."""
    grads = [p.grad for p in model.params if p.grad is not None]
    before = list(map(tensors.seen, grads))
    try:
        model.opt.step()
    except Exception as error:
        return f"refused, {type(error).__name__}: {error}"
    if list(map(tensors.seen, grads)) != before:
        return "a gradient has changed"
    for j, (p, v) in enumerate(zip(model.params, model.buffers(), strict=True)):
        ulps = 16 if model.opt.defaults["foreach"] else 1  # it computes in float32
        w, g, old = (column[j] for column in expected)
        wrong = wrong_parameter(p.detach(), v, w, g, old, j in MOVING, ulps)
        if wrong:
            return f"{NAMES[j]}: {wrong}"
    return None


def wrong_parameter(
    p: Tensor, v: Any, w: Any, g: Any, old: Any, moves: bool, ulps: int
) -> str | None:
    name, new = tensors.numbers(p)
    if g is None:
        return None if new.tolist() == w[1].tolist() else "changed without a gradient"
    velocity = np.zeros((2, 3)) if old is None else old[1]
    given = [outcomes.flattened(x) for x in (w[1], g[1], velocity)]
    if not moves:
        return outcomes.wrong_numbers(
            *given[:2], None, outcomes.flattened(new), None, name, name, ulps=ulps
        )
    v_name, new_v = tensors.numbers(v)
    return outcomes.wrong_numbers(
        *given, outcomes.flattened(new), outcomes.flattened(new_v), name, v_name, calls.LR, ulps
    )
