"""No step of the kernel leaks a reference or memory, whether it succeeds, declines or raises.

A step declines leaves that the kernel does not support. After many calls of each case, the
reference counts of all arguments must be unchanged, and the memory must not have grown.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import need
from leaks import CALLS, check, expecting, raising, returning
from native_steps import numpy_reader, stepped, taken

from lars_tree import _native
from lars_tree._numerics.formula import Rule


def leaves(**changes):
    """The arguments of one step. The last of the three leaves is None."""
    rule = Rule(0.1, 0.01)
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


def one_leaf(w, dcdw):
    return {"ws": [w], "dcdws": [dcdw], "rules": leaves().rules[:1]}


def into_gradients(w, dcdw):
    return {**one_leaf(w, dcdw), "outs": [dcdw]}


def make_vector(w):
    return np.empty_like(w) if w.ndim == 1 else raising()


def make_and_reshape(w):
    """Frees the memory of the old shape, as Python code that runs during a call may."""
    w.resize((w.size, 1) if w.ndim == 1 else (w.size,), refcheck=False)
    return np.empty_like(w)


def with_bits(as_bits):
    bfloat16 = need("ml_dtypes").bfloat16
    return {**one_leaf(np.ones(4, bfloat16), np.ones(4, bfloat16)), "as_bits": as_bits}


def in_place(**changes):
    changes.setdefault("ws", leaves().ws)
    return {"outs": changes["ws"], **changes}


STEPS = {
    "in place": (tuple, in_place),
    "into new arrays": (tuple, dict),
    "into other arrays": (tuple, lambda: {"outs": [*leaves().ws[:2], None]}),
    "into the gradients": (tuple, lambda: into_gradients(np.ones(5), np.ones(5))),
    "no leaves": (tuple, lambda: {"ws": [], "dcdws": [], "rules": []}),
    "empty arrays": (tuple, lambda: one_leaf(np.ones((0, 2)), np.ones((0, 2)))),
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
    "make reshapes w": (None, lambda: {"make": make_and_reshape}),
    "as_bits gives None": (None, lambda: with_bits(lambda x: None)),
    "as_bits gives no array": (None, lambda: with_bits(lambda x: 5)),
    "as_bits gives another dtype": (None, lambda: with_bits(lambda x: x.view(np.uint8))),
    "make raises": (ValueError, lambda: {"make": raising}),
    "make raises for the second": (ValueError, lambda: {"make": make_vector}),
    "lists of several lengths": (ValueError, lambda: {"rules": []}),
    "no list": (TypeError, lambda: {"ws": ()}),
    "tensors are too few": (TypeError, lambda: {"tensors": (None,)}),
    "tensors are no tuple": (TypeError, lambda: {"tensors": [None] * 6}),
    "no capsule": (ValueError, lambda: {"tensors": (None,) * 6}),
    "no rule": (TypeError, lambda: {"rules": [list(Rule(0.1))] * 3}),
    "a rule with fewer fields": (TypeError, lambda: {"rules": [(0.1,)] * 3}),
    "an unknown choice": (tuple, lambda: {"rules": [Rule(0.1, nonfinite=5)] * 3}),
}


def check_step(expected, made, calls=CALLS, take=stepped):
    def call():
        reader = _native.kernel.Reader(
            *(made.types, Rule._fields, made.make, made.copy, made.tensors, made.as_bits)
        )
        columns = made.ws, made.dcdws, made.outs, made.rules, made.velocities
        return take(reader, *columns, counter=made.counter)

    fails = isinstance(expected, type) and issubclass(expected, Exception)
    given = [*made.__dict__.values(), *made.types, *(made.tensors or ())]
    columns = (made.ws, made.dcdws, made.outs, made.rules, made.velocities)
    given += [x for xs in columns for x in xs or ()]
    given += [x for rule in made.rules for x in rule]
    singletons = (None, True, False)
    given = [x for x in given if not any(x is y for y in singletons)]
    check((expecting if fails else returning)(expected, call), given, calls)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_numpy_arrays_leaks_nothing(name):
    expected, changes = STEPS[name]
    check_step(expected, leaves(**changes()))


# ---- Momentum


def moving(first=None, **changes):
    """Changes of `leaves` for a step with momentum, in place unless `outs` is given."""
    rule = Rule(0.1, 0.01, momentum=0.9, nesterov=True)
    first = np.zeros(5) if first is None else first
    velocities = [first, np.zeros((2, 3), np.complex64), None]
    where = {} if "outs" in changes else in_place()
    return {"velocities": velocities, "rules": [rule] * 3, **where, **changes}


def into_new(first=None, **changes):
    return moving(first, outs=None, **changes)


def unchanged(velocity):
    """The first leaf has a velocity and no gradient."""
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
    return into_new(**one_leaf(np.ones(0), np.ones(0)), velocities=[np.ones(0)])


MOMENTUM = {
    "in place": (tuple, moving),
    "into new arrays": (tuple, into_new),
    "into other arrays": (tuple, lambda: moving(outs=[*leaves().ws[:2], None])),
    "weights without a gradient": (tuple, lambda: unchanged(np.zeros(5))),
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
    "another dtype, without a gradient": (None, lambda: unchanged(np.zeros(5, np.float32))),
    "a read-only counter": (None, lambda: counting(frozen(number()))),
    "a counter of another dtype": (None, lambda: counting(np.zeros(()))),
    "a counter of two": (None, lambda: counting(np.zeros(2, np.int64))),
    "a counter without a buffer": (None, lambda: counting(object())),
    "copy gives no array": (None, lambda: into_new(copy=lambda velocity: "five")),
    "copy gives another dtype": (None, lambda: into_new(copy=lambda x: x.real.astype(np.float32))),
    "copy gives a read-only array": (None, lambda: into_new(copy=lambda x: frozen(x.copy()))),
    "copy raises": (ValueError, lambda: into_new(copy=raising)),
    "copy raises for the second": (ValueError, lambda: into_new(copy=copy_vector)),
    "lists of several lengths": (ValueError, lambda: moving(velocities=[np.zeros(5)])),
    "no list": (ValueError, lambda: moving(velocities=())),
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_momentum_leaks_nothing(name):
    expected, changes = MOMENTUM[name]
    check_step(expected, leaves(**changes()))


# ---- Tensors


def tensor_leaves(**changes):
    torch = need("torch")
    from lars_tree._backends.torch.reader import _EXCHANGE, TENSOR_TYPES

    if _EXCHANGE is None:
        pytest.skip("this torch has no exchange of tensors")
    ws, dcdws = ([torch.ones(5), torch.ones(2, 3), None] for _ in range(2))
    changes = {k: v(torch) for k, v in changes.items()}
    made = {"ws": ws, "dcdws": dcdws, "types": TENSOR_TYPES}
    made |= {"make": torch.empty_like, "copy": torch.clone}
    return leaves(**{"tensors": _EXCHANGE, **made, **changes})


def foreign(torch):  # numpy's memory, which the kernel tests for being writable
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
def test_a_step_of_tensors_leaks_nothing(name):
    expected, changes = TENSORS[name]
    # torch's error messages contain the C++ stack, which is slow to collect.
    calls = 200 if name in ("sparse", "meta") else CALLS
    check_step(expected, tensor_leaves(**changes), calls)


def test_a_step_of_tensors_in_place_leaks_nothing():
    made = tensor_leaves(ws=lambda torch: [foreign(torch), torch.ones(2, 3), None])
    made.outs = made.ws
    check_step(tuple, made)


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
    check_step(expected, tensor_leaves(**{"velocities": tensor_velocities, **changes}))


def test_momentum_of_tensors_in_place_leaks_nothing():
    made = tensor_leaves(velocities=tensor_velocities, counter=lambda torch: number())
    made.outs = made.ws
    made.velocities[0] = foreign(need("torch"))
    check_step(tuple, made)
    assert made.counter > CALLS


# ---- Plans


def in_two_passes(*columns, **options):
    """A step by `plan.norms` and `plan.apply`, with calls of other methods between them."""
    plan, news = taken(*columns, **options)
    norms = plan.norms(bounds=True)
    assert len(norms) == 64 * len(plan.indices)
    assert plan.nonfinite(norms) == []
    assert plan.must_be_finite is False
    assert len(plan.written) <= len(plan.spans())
    assert not plan.overlaps([(1, 2)], [(2, 3)])
    plan.apply(norms)
    return news


@pytest.mark.parametrize("changes", [moving, into_new, lambda: counting(number())])
def test_the_two_passes_leak_nothing(changes):
    check_step(tuple, leaves(**changes()), take=in_two_passes)


PLAN_ERRORS = {
    "norms of another size": (ValueError, lambda plan: plan.apply(bytearray(8))),
    "no norms": (ValueError, lambda plan: plan.apply(bytes(128))),
    "norms of nothing": (ValueError, lambda plan: plan.nonfinite(None)),
    "no reader": (TypeError, lambda plan: _native.plan().prepare(None, [], [], [], [])),
    "no list of indices": (
        TypeError,
        lambda plan: _native.plan().prepare(numpy_reader(), [], [], [], [], indices=(1,)),
    ),
    "no number as an index": (
        TypeError,
        lambda plan: _native.plan().prepare(
            numpy_reader(), [None], [None], None, [None], indices=["1"]
        ),
    ),
    "an index out of range": (
        IndexError,
        lambda plan: _native.plan().prepare(numpy_reader(), [], [], [], [], indices=[1]),
    ),
    "nowhere for velocities": (
        ValueError,
        lambda plan: _native.plan().prepare(numpy_reader(), [], [], None, [], [], []),
    ),
    "no pairs of addresses": (TypeError, lambda plan: plan.overlaps([5])),
    "no addresses": (TypeError, lambda plan: plan.overlaps([("a", "b")])),
    "no list of spans": (TypeError, lambda plan: plan.overlaps(((1, 2),))),
    "no truth value": (ValueError, lambda plan: plan.norms(np.ones(2))),
    "no number of threads": (TypeError, lambda plan: type(plan)("1", 0)),
    "a rule without names": (ValueError, lambda plan: new_reader(fields=())),
    "names that are none": (ValueError, lambda plan: new_reader(fields=tuple(range(17)))),
    "no types": (TypeError, lambda plan: new_reader(types=[np.ndarray])),
    **{
        f"a rule without {name}": (ValueError, lambda plan, name=name: new_reader(without(name)))
        for name in Rule._fields
    },
}


def new_reader(fields=Rule._fields, types=(np.ndarray,)):
    return _native.kernel.Reader(types, fields)


def without(name):
    return tuple(x for x in Rule._fields if x != name)


@pytest.mark.parametrize("name", PLAN_ERRORS)
def test_what_a_plan_or_reader_refuses_leaks_nothing(name):
    error, call = PLAN_ERRORS[name]
    w, g = [np.ones(5), np.ones(3)], [np.ones(5), np.ones(3)]
    plan, _ = taken(numpy_reader(), w, g, w, [Rule(0.1)] * 2)
    check(expecting(error, lambda: call(plan)), [plan, *w, *g], CALLS // 5)
    assert all((x == 1).all() for x in w)
