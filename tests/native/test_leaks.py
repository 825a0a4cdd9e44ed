"""No update of the kernel leaks a reference or memory, whether it succeeds, declines or raises.

Each case is called 10,000 times; then there are as many references to each object that it was given
as before. Then it is called further, and the memory of the process does not grow with the calls.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import need
from leaks import CALLS, check, expecting, giving, raising

from lars_tree import _native
from lars_tree._rule import Rule


def leaves(**changes):
    """What one call of `update` takes; the last of three leaves has no weights."""
    rule = Rule(0.1, 0.01, 1.0, 0.0, 1.0)
    made = SimpleNamespace(
        ws=[np.ones(5), np.ones((2, 3), np.complex64), None],
        dcdws=[np.ones(5, np.float32), np.ones((2, 3), np.complex128), None],
        outs=None,
        rules=[rule, rule, rule],
        velocities=None,
        counter=None,
        types=(np.ndarray,),
        make=np.empty_like,
        copy=np.copy,
        begin=None,
        tensors=None,
        as_bits=None,
    )
    made.__dict__.update(changes)
    return made


def strided(x):
    return np.zeros((*x.shape, 2), x.dtype)[..., 0]


def frozen(x):
    x.flags.writeable = False
    return x


def first(x):
    return [x, *leaves().ws[1:]]


def one(w, dcdw):
    return {"ws": [w], "dcdws": [dcdw], "rules": leaves().rules[:1]}


def into_gradients(w, dcdw):
    return {**one(w, dcdw), "outs": [dcdw]}


def make_vector(w):
    return np.empty_like(w) if w.ndim == 1 else raising()


def with_bits(as_bits):
    bfloat16 = need("ml_dtypes").bfloat16
    return {**one(np.ones(4, bfloat16), np.ones(4, bfloat16)), "as_bits": as_bits}


def in_place(**changes):
    changes.setdefault("ws", leaves().ws)
    return {"outs": changes["ws"], **changes}


UPDATES = {
    "in place": (tuple, in_place),
    "in place, with begin": (tuple, lambda: in_place(begin=lambda written: None)),
    "into new arrays": (tuple, dict),
    "into other arrays": (tuple, lambda: {"outs": [*leaves().ws[:2], None]}),
    "into the gradients": (tuple, lambda: into_gradients(np.ones(5), np.ones(5))),
    "no leaves": (tuple, lambda: {"ws": [], "dcdws": [], "rules": []}),
    "empty arrays": (tuple, lambda: one(np.ones((0, 2)), np.ones((0, 2)))),
    "bfloat16": (tuple, lambda: with_bits(lambda x: x.view(np.uint16))),
    "bfloat16 in place": (tuple, lambda: in_place(**with_bits(lambda x: x.view(np.uint16)))),
    "a gradient without weights": (None, lambda: {"dcdws": [*leaves().dcdws[:2], np.ones(2)]}),
    "weights without a gradient": (None, lambda: {"dcdws": [leaves().dcdws[0], None, None]}),
    "integers": (None, lambda: {"ws": first(np.ones(5, int))}),
    "objects": (None, lambda: {"ws": first(np.ones(5, object))}),
    "dates": (None, lambda: {"ws": first(np.ones(5, "M8[s]"))}),
    "no array": (None, lambda: {"ws": first("five")}),
    "a gradient that is no array": (None, lambda: {"dcdws": first(1.0)}),
    "another shape": (None, lambda: {"dcdws": first(np.ones(4))}),
    "gaps": (None, lambda: {"ws": first(strided(np.ones(5)))}),
    "read-only": (None, lambda: in_place(ws=first(frozen(np.ones(5))))),
    "a result of another dtype": (None, lambda: {"outs": first(np.ones(5, np.float32))}),
    "a result that is no array": (None, lambda: {"outs": first(None)}),
    "tied": (None, lambda: in_place(ws=leaves().ws[:1] * 3, dcdws=leaves().dcdws[:1] * 3)),
    "a rate with a shape": (None, lambda: {"rules": [Rule(np.ones(5))] * 3}),
    "an axis of layers": (None, lambda: {"rules": [Rule(0.1, layer_axis=0)] * 3}),
    "make gives no array": (None, lambda: {"make": lambda w: "five"}),
    "make gives a strided array": (None, lambda: {"make": strided}),
    "as_bits gives None": (None, lambda: with_bits(lambda x: None)),
    "as_bits gives no buffer": (None, lambda: with_bits(lambda x: 5)),
    "as_bits gives another dtype": (None, lambda: with_bits(lambda x: x.view(np.uint8))),
    "make raises": (ValueError, lambda: {"make": raising}),
    "make raises for the second": (ValueError, lambda: {"make": make_vector}),
    "begin raises": (ValueError, lambda: in_place(begin=raising)),
    "lists of several lengths": (ValueError, lambda: {"rules": []}),
    "no list": (TypeError, lambda: {"ws": ()}),
    "tensors are too few": (TypeError, lambda: {"tensors": (None,)}),
    "no capsule": (ValueError, lambda: {"tensors": (None,) * 6}),
}


def check_update(expected, made, calls=CALLS):
    def call():
        return _native.kernel.update(
            *(made.ws, made.dcdws, made.outs, made.rules, made.velocities, made.counter),
            *(made.make, made.copy, made.begin, made.types, made.tensors, made.as_bits),
            *(1, _native.instruction_set),
        )

    fails = isinstance(expected, type) and issubclass(expected, Exception)
    given = [*made.__dict__.values(), *made.types, *(made.tensors or ())]
    columns = (made.ws, made.dcdws, made.outs, made.rules, made.velocities)
    given += [x for xs in columns for x in xs or ()]
    given += [x for rule in made.rules for x in rule]
    singletons = (None, True, False)
    given = [x for x in given if not any(x is y for y in singletons)]
    check((expecting if fails else giving)(expected, call), given, calls)


@pytest.mark.parametrize("name", UPDATES)
def test_update_of_numpy_arrays_leaks_nothing(name):
    expected, changes = UPDATES[name]
    check_update(expected, leaves(**changes()))


# ---- Momentum


def moving(first=None, **changes):
    """What to change for momentum: `first` is the first velocity. In place, if not told where."""
    rule = Rule(0.1, 0.01, momentum=0.9, nesterov=True)
    first = np.zeros(5) if first is None else first
    velocities = [first, np.zeros((2, 3), np.complex64), None]
    where = {} if "outs" in changes else in_place()
    return {"velocities": velocities, "rules": [rule] * 3, **where, **changes}


def into_new(first=None, **changes):
    return moving(first, outs=None, **changes)


def kept(velocity):
    """The first weights stay as they are."""
    return moving(velocity, dcdws=[None, *leaves().dcdws[1:]])


def over_weights():
    ws = leaves().ws
    return moving(ws[0], **in_place(ws=ws))


def copy_vector(velocity):
    return velocity.copy() if velocity.ndim == 1 else raising()


def counting(counter, **changes):
    return moving(counter=counter, **changes)


def number():
    return np.zeros((), np.int64)


def empty():
    return into_new(**one(np.ones(0), np.ones(0)), velocities=[np.ones(0)])


MOMENTUM = {
    "in place": (tuple, moving),
    "in place, with begin": (tuple, lambda: moving(begin=lambda written: None)),
    "into new arrays": (tuple, into_new),
    "into other arrays": (tuple, lambda: moving(outs=[*leaves().ws[:2], None])),
    "weights that are kept": (tuple, lambda: kept(np.zeros(5))),
    "empty arrays": (tuple, empty),
    "a counter": (tuple, lambda: counting(number())),
    "another dtype": (None, lambda: moving(np.zeros(5, np.float32))),
    "another dtype, into new arrays": (None, lambda: into_new(np.zeros(5, np.float32))),
    "another shape": (None, lambda: moving(np.zeros(4))),
    "gaps": (None, lambda: moving(strided(np.zeros(5)))),
    "read-only": (None, lambda: moving(frozen(np.zeros(5)))),
    "no array": (None, lambda: into_new("five")),
    "the weights themselves": (None, over_weights),
    "none for weights": (None, lambda: moving(velocities=[None] * 3)),
    "one for no weights": (
        None,
        lambda: moving(velocities=[*moving()["velocities"][:2], number()]),
    ),
    "another dtype, of kept weights": (None, lambda: kept(np.zeros(5, np.float32))),
    "a read-only counter": (None, lambda: counting(frozen(number()))),
    "a counter of another dtype": (None, lambda: counting(np.zeros(()))),
    "a counter of two": (None, lambda: counting(np.zeros(2, np.int64))),
    "a counter without a buffer": (None, lambda: counting(object())),
    "copy gives no array": (None, lambda: into_new(copy=lambda velocity: "five")),
    "copy gives another dtype": (None, lambda: into_new(copy=lambda x: x.astype(np.float32))),
    "copy gives a read-only array": (None, lambda: into_new(copy=lambda x: frozen(x.copy()))),
    "copy raises": (ValueError, lambda: into_new(copy=raising)),
    "copy raises for the second": (ValueError, lambda: into_new(copy=copy_vector)),
    "begin raises": (ValueError, lambda: counting(number(), begin=raising)),
    "lists of several lengths": (ValueError, lambda: moving(velocities=[np.zeros(5)])),
    "no list": (ValueError, lambda: moving(velocities=())),
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_leaks_nothing(name):
    expected, changes = MOMENTUM[name]
    check_update(expected, leaves(**changes()))


# ---- Tensors


def tensor_leaves(**changes):
    torch = need("torch")
    from lars_tree._backends.reader import _EXCHANGE, PLAIN_TYPES

    if _EXCHANGE is None:
        pytest.skip("this torch has no exchange of tensors")
    ws, dcdws = ([torch.ones(5), torch.ones(2, 3), None] for _ in range(2))
    changes = {k: v(torch) if k != "begin" else v for k, v in changes.items()}
    made = {"ws": ws, "dcdws": dcdws, "types": PLAIN_TYPES}
    made |= {"make": torch.empty_like, "copy": torch.clone}
    return leaves(**{"tensors": _EXCHANGE, **made, **changes})


def foreign(torch):  # memory of numpy's, which is looked at before it is written
    return torch.from_numpy(np.ones(5, np.float32))


TENSORS = {
    "into new tensors": (tuple, {}),
    "bfloat16": (tuple, {"ws": lambda torch: [torch.ones(5).bfloat16(), torch.ones(2, 3), None]}),
    "sparse": (None, {"ws": lambda torch: [torch.ones(5).to_sparse(), None, None]}),
    "meta": (None, {"ws": lambda torch: [torch.ones(5, device="meta"), None, None]}),
    "negated": (None, {"ws": lambda torch: [torch._neg_view(torch.ones(5)), None, None]}),
    "integers": (None, {"ws": lambda torch: [torch.ones(5, dtype=torch.int32), None, None]}),
    "gaps": (None, {"ws": lambda torch: [torch.ones(5, 2)[:, 0], None, None]}),
    "another shape": (None, {"dcdws": lambda torch: [torch.ones(4), None, None]}),
    "a numpy array": (None, {"dcdws": lambda torch: [np.ones(5), None, None]}),
    "make raises": (ValueError, {"make": lambda torch: raising}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_update_of_tensors_leaks_nothing(name):
    expected, changes = TENSORS[name]
    # What torch refuses has the C++ stack in its message, which takes long.
    calls = 200 if name in ("sparse", "meta") else CALLS
    check_update(expected, tensor_leaves(**changes), calls)


def test_update_of_tensors_in_place_leaks_nothing():
    made = tensor_leaves(ws=lambda torch: [foreign(torch), torch.ones(2, 3), None])
    made.outs = made.ws
    check_update(tuple, made)
    made.begin = raising
    check_update(ValueError, made)


def tensor_velocities(torch):
    return [torch.zeros(5), torch.zeros(2, 3), None]


TENSOR_MOMENTUM = {
    "into new tensors": (tuple, {}),
    "copy raises": (ValueError, {"copy": lambda torch: raising}),
    "copy gives another dtype": (None, {"copy": lambda torch: torch.Tensor.double}),
    "another dtype": (None, {"velocities": lambda torch: [torch.zeros(5).double(), None, None]}),
    "gaps": (None, {"velocities": lambda torch: [torch.zeros(5, 2)[:, 0], None, None]}),
}


@pytest.mark.parametrize("name", TENSOR_MOMENTUM)
def test_momentum_of_tensors_leaks_nothing(name):
    expected, changes = TENSOR_MOMENTUM[name]
    check_update(expected, tensor_leaves(**{"velocities": tensor_velocities, **changes}))


def test_momentum_of_tensors_in_place_leaks_nothing():
    made = tensor_leaves(velocities=tensor_velocities, counter=lambda torch: number())
    made.outs = made.ws
    made.velocities[0] = foreign(need("torch"))
    check_update(tuple, made)
    assert made.counter > CALLS
