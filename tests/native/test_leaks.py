"""No call of the kernel leaks a reference or memory, whether it succeeds, declines or raises.

Each case is called 10,000 times; then there are as many references to each object that it was given
as before. Then it is called further, and the memory of the process does not grow with the calls.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CI, need

from lars_tree import _native, _tree, native_available
from lars_tree._rule import Rule

# AddressSanitizer is slow, and keeps freed memory, to see its use.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
CALLS = 1_000 if SANITIZED else 10_000
MOST_BYTES = 16  # of growth for each call: less than any object or block has


@pytest.fixture(autouse=True)
def _kernel():
    if not native_available():
        assert not CI or os.environ.get("LARS_TREE_NATIVE") == "0", "the kernel was not built"
        pytest.skip("the native kernel is not built")


def check(call, given, calls=CALLS):
    """Call it many times; `given` are the objects whose references are counted."""
    call()  # fills caches
    gc.collect()
    shared = [None, True, False, NotImplemented, np.ndarray, ValueError, RuntimeError]
    before = [sys.getrefcount(x) for x in given], [sys.getrefcount(x) for x in shared]
    objects = len(gc.get_objects())
    for _ in range(calls):
        call()
    gc.collect()
    assert [sys.getrefcount(x) for x in given] == before[0]
    for x, count in zip(shared, before[1], strict=True):
        assert abs(sys.getrefcount(x) - count) < calls // 10, x
    assert len(gc.get_objects()) - objects < calls // 10
    if SANITIZED:
        return
    # A leak is there in every round; what else the process does is not.
    for measure in (allocated, resident):
        growths = (growth(measure, call, calls) for _ in range(3))
        assert any(x < MOST_BYTES * calls for x in growths), "the memory of the process grows"


def growth(measure, call, calls):
    before = measure()
    for _ in range(calls):
        call()
    return measure() - before


NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class MallInfo(ctypes.Structure):
    """What glibc tells of its memory, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def allocated():
    """The bytes that malloc has given out, where the C library tells: to the byte."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident():
    """The bytes of memory that the process has in use, where the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def raising(*_):
    raise ValueError("on purpose")


def expecting(error, call):
    """The call, which is to raise this error."""

    def checked():
        try:
            call()
        except error:
            return
        pytest.fail(f"expected {error.__name__}")

    return checked


def giving(expected, call):
    def checked():
        result = call()
        assert result is expected or type(result) is expected

    return checked


# ---- update


def leaves(**changes):
    """What one call of `update` takes; the last of three leaves has no weights."""
    rule = Rule(0.1, 0.01, 1.0, 0.0, 1.0)
    made = SimpleNamespace(
        ws=[np.ones(5), np.ones((2, 3), np.complex64), None],
        dcdws=[np.ones(5, np.float32), np.ones((2, 3), np.complex128), None],
        outs=None,
        rules=[rule, rule, rule],
        types=(np.ndarray,),
        make=np.empty_like,
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
    "in place": (list, in_place),
    "in place, with begin": (list, lambda: in_place(begin=lambda written: None)),
    "into new arrays": (list, dict),
    "into other arrays": (list, lambda: {"outs": [*leaves().ws[:2], None]}),
    "into the gradients": (list, lambda: into_gradients(np.ones(5), np.ones(5))),
    "no leaves": (list, lambda: {"ws": [], "dcdws": [], "rules": []}),
    "empty arrays": (list, lambda: one(np.ones((0, 2)), np.ones((0, 2)))),
    "bfloat16": (list, lambda: with_bits(lambda x: x.view(np.uint16))),
    "bfloat16 in place": (list, lambda: in_place(**with_bits(lambda x: x.view(np.uint16)))),
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
            *(made.ws, made.dcdws, made.outs, made.rules, made.make, made.begin),
            *(made.types, made.tensors, made.as_bits, 1, _native.instruction_set),
        )

    fails = isinstance(expected, type) and issubclass(expected, Exception)
    given = [*made.__dict__.values(), *made.types, *(made.tensors or ())]
    given += [x for xs in (made.ws, made.dcdws, made.outs or [], made.rules) for x in xs]
    given += [x for rule in made.rules for x in rule]
    singletons = (None, True, False)
    given = [x for x in given if not any(x is y for y in singletons)]
    check((expecting if fails else giving)(expected, call), given, calls)


@pytest.mark.parametrize("name", UPDATES)
def test_update_of_numpy_arrays_leaks_nothing(name):
    expected, changes = UPDATES[name]
    check_update(expected, leaves(**changes()))


def tensor_leaves(**changes):
    torch = need("torch")
    from lars_tree._backends.torch import _EXCHANGE, _TYPES

    if _EXCHANGE is None:
        pytest.skip("this torch has no exchange of tensors")
    ws, dcdws = ([torch.ones(5), torch.ones(2, 3), None] for _ in range(2))
    changes = {k: v(torch) if k != "begin" else v for k, v in changes.items()}
    made = {"ws": ws, "dcdws": dcdws, "make": torch.empty_like, "types": _TYPES}
    return leaves(**{"tensors": _EXCHANGE, **made, **changes})


def foreign(torch):  # memory of numpy's, which is looked at before it is written
    return torch.from_numpy(np.ones(5, np.float32))


TENSORS = {
    "into new tensors": (list, {}),
    "bfloat16": (list, {"ws": lambda torch: [torch.ones(5).bfloat16(), torch.ones(2, 3), None]}),
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
    check_update(list, made)
    made.begin = raising
    check_update(ValueError, made)


# ---- collect and match


class Key:
    """A key that is equal to another of its name, or raises when it is compared."""

    def __init__(self, name, fails=False):
        self.name, self.fails = name, fails

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        if self.fails:
            raise ValueError("on purpose")
        return self.name == other.name


class Other(list):  # not walked natively
    pass


def nest(key="b", **others):
    return {"a": [object(), (object(), Other([object()]))], Key(key, **others): {"c": object()}}


def objects(node):
    """A nest and all that is in it."""
    yield node
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, (list, tuple)):
        for x in node:
            yield from objects(x)


def without(tree, key):
    return {k: v for k, v in tree.items() if k is not key}


def walk(*trees, kind_of=_tree._kind, others=None, exact=False):
    found = []
    if len(trees) == 1:
        others = others or _tree._collect_in_python
        _native.kernel.collect(*trees, found, _tree._KINDS, kind_of, others)
        return None
    others = others or _tree._match_in_python
    return _native.kernel.match(*trees, found, exact, _tree._KINDS, kind_of, others)


def changing(tree):
    """What is called for an `Other`: adds to the nest that is being read, and takes from it."""

    def others(node, *_):
        tree[0.5] = tree.pop(0.5, None)
        tree.pop(1.5, None) if 1.5 in tree else tree.setdefault(1.5)
        return True

    return others


def unknown():  # its type is new, so its kind must be asked for
    return type("New", (), {})()


COLLECTS = {
    "nest": (None, nest, {}),
    "leaf": (None, object, {}),
    "the kind raises": (ValueError, unknown, {"kind_of": raising}),
    "the kind is no number": (TypeError, unknown, {"kind_of": lambda node: "leaf"}),
    "another node raises": (ValueError, nest, {"others": raising}),
}


@pytest.mark.parametrize("name", COLLECTS)
def test_collect_leaks_nothing(name):
    expected, make, options = COLLECTS[name]
    tree = make()
    call = expecting if expected else giving
    check(call(expected, lambda: walk(tree, **options)), [*objects(tree), *options.values()])


OK, NO = (True, {}), (False, {})
MATCHES = {
    "nests": (*OK, nest, nest),
    "a value for all": (*OK, lambda: Other([object()]), object),
    "not exact": (False, {"exact": True}, lambda: [object()], object),
    "another key": (*NO, nest, lambda: nest("other")),
    "a key too few": (*NO, nest, lambda: without(nest(), "a")),
    "another length": (*NO, lambda: [object()], lambda: [object(), object()]),
    "a node for a leaf": (*NO, object, nest),
    "a list for a dict": (*NO, nest, lambda: [object()]),
    "keys raise": (ValueError, {}, lambda: nest(fails=True), lambda: nest(fails=True)),
    "the kind raises": (ValueError, {"kind_of": raising}, unknown, unknown),
    "another node raises": (ValueError, {"others": raising}, nest, nest),
    "another node gives None": (False, {"others": lambda *_: None}, nest, nest),
}


@pytest.mark.parametrize("name", MATCHES)
def test_match_leaks_nothing(name):
    expected, options, make, make_prefix = MATCHES[name]
    tree, prefix = make(), make_prefix()
    call = giving if isinstance(expected, bool) else expecting
    given = [*objects(tree), *objects(prefix), *options.values()]
    given = [x for x in given if x is not True]
    check(call(expected, lambda: walk(tree, prefix, **options)), given)


def test_a_nest_that_is_changed_while_it_is_read_leaks_nothing():
    tree = {"a": [Other()], "b": object()}
    call = expecting(RuntimeError, lambda: walk(tree, others=changing(tree)))
    check(call, [tree, *tree.values()])
    call = expecting(RuntimeError, lambda: walk(tree, dict(tree), others=changing(tree)))
    check(call, [tree, tree["a"], tree["b"]])


def test_a_nest_that_holds_itself_leaks_nothing():
    tree = []
    tree.append(tree)
    check(expecting(RecursionError, lambda: walk(tree)), [tree], calls=100)
    check(expecting(RecursionError, lambda: walk(tree, tree)), [tree], calls=100)
