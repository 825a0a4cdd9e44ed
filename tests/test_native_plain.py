"""Which numpy arrays the native kernel supports, and how it walks trees."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_steps import numpy_reader, stepped
from test_native import dtype_of, run, without_kernel

from lars_tree import Container, Lars, LarsTreeError, StructureError, _native, lars_update
from lars_tree._backends.numpy import NumpyBackend
from lars_tree._numerics.formula import Rule
from lars_tree._tree import nodes, structure


class Subclass(np.ndarray):
    pass


ONES = np.arange(1.0, 7.0)
OTHER = np.frombuffer(b"\0" + ONES.tobytes(), np.float64, offset=1)  # misaligned, read-only
BASE = np.arange(1.0, 13.0)
READ_ONLY = ONES.copy()
READ_ONLY.flags.writeable = False
SQUARE = np.arange(1.0, 10.0).reshape(3, 3)
GRID = np.arange(1.0, 7.0).reshape(2, 3)


# Functions that return new w, dcdw, out ("w" means in place) and options for each test.
# fmt: off
CASES = {
    "read-only out": lambda: (ONES, ONES, READ_ONLY, {}),
    "read-only w in place": lambda: ([READ_ONLY], [ONES], "w", {}),
    "out of another dtype": lambda: (ONES, ONES, np.zeros(6, np.float32), {}),
    "out of another shape": lambda: (ONES, ONES, np.zeros((2, 3)), {}),
    "integers": lambda: (np.arange(6), ONES, None, {}),
    "integer gradient": lambda: (ONES, np.arange(6), None, {}),
    "uint16": lambda: (np.full(6, 16256, np.uint16), np.full(6, 16256, np.uint16), None, {}),
    "uint16 gradient": lambda: (ONES, np.full(6, 16256, np.uint16), None, {}),
    "uint16 out": lambda: (*[ONES.astype(dtype_of("bfloat16"))] * 2, np.zeros(6, np.uint16), {}),
    "complex gradient": lambda: (ONES, ONES + 1j, None, {}),
    "real gradient": lambda: (ONES + 1j, ONES, None, {}),
    "long double": lambda: (ONES.astype(np.longdouble), ONES, None, {}),
    "strided w": lambda: (BASE[::2], ONES, None, {}),
    "strided in place": lambda: (BASE.copy()[::2], BASE[::2], "w", {}),
    "reversed in place": lambda: (ONES.copy()[::-1], ONES[::-1], "w", {}),
    "strided gradient": lambda: (ONES, BASE[::2], None, {}),
    "strided out": lambda: (ONES, ONES, BASE.copy()[::2], {}),
    "negative strides": lambda: (ONES[::-1], ONES[::-1], None, {}),
    "other order": lambda: (GRID, np.asfortranarray(GRID), None, {}),
    "other order of out": lambda: (GRID, GRID, np.asfortranarray(GRID), {}),
    "broadcast gradient": lambda: (GRID, GRID[0], None, {}),
    "stretched gradient": lambda: (GRID, np.broadcast_to(GRID[0], GRID.shape), None, {}),
    "out overlaps itself": lambda: (
        GRID, GRID, np.lib.stride_tricks.as_strided(BASE.copy(), (2, 3), (8, 8)), {}
    ),
    "byte-swapped w": lambda: (ONES.astype(">f8"), ONES, None, {}),
    "byte-swapped gradient": lambda: (ONES, ONES.astype(">f4"), None, {}),
    "misaligned w": lambda: (OTHER, ONES, None, {}),
    "misaligned gradient": lambda: (ONES, OTHER, None, {}),
    "subclass": lambda: (ONES.view(Subclass), ONES, None, {}),
    "masked": lambda: (np.ma.array(ONES), ONES, None, {}),
    "masked gradient": lambda: (ONES, np.ma.array(ONES), None, {}),
    "structured": lambda: (np.zeros(6, [("a", "f8")]), ONES, None, {}),
    "a numpy scalar": lambda: (np.float64(3.0), np.float64(1.0), None, {}),
    "a number": lambda: (ONES, 1.0, None, {}),
    "a list of numbers": lambda: ({"a": ONES}, {"a": [1.0]}, None, {}),
    "layer_axis": lambda: (GRID, GRID[::-1].copy(), None, {"layer_axis": 0}),
    "a rate for each": lambda: (ONES, ONES, None, {"lr": ONES / 9}),
    "overlapping outs": lambda: (
        [ONES[:3]] * 2, [ONES[:3]] * 2, [(b := BASE.copy())[:3], b[2:5]], {}
    ),
    "out is the transposed w": lambda: ((b := SQUARE.copy()), SQUARE, b.T, {}),
    "out is the transposed dcdw": lambda: (SQUARE, (b := SQUARE.copy()).T, b, {}),
    "tied weights": lambda: ([(b := ONES.copy()), b], [ONES, ONES], "w", {}),
    "out is another w": lambda: (
        [(b := BASE.copy())[:3], b[3:6]], [ONES[:3]] * 2, [b[4:7], b[8:11]], {}
    ),
    "out is another dcdw": lambda: (
        [ONES[:3], ONES[:3]], [(b := BASE.copy())[:3], b[2:5]], [b[2:5], b[5:8]], {}
    ),
    "out overlaps dcdw": lambda: (ONES[:4], (b := BASE.copy())[:4], b[1:5], {}),
    "out is dcdw of other size": lambda: (
        ONES.astype("f2"), (b := BASE.astype("f4"))[:6], b.view("f2")[:6], {}
    ),
    "an array for None": lambda: ([None, ONES], [ONES, ONES], None, {}),
    "None for an array, out": lambda: ([ONES], [ONES], [None], {}),
    "no gradient": lambda: ([ONES, ONES], [None, ONES], None, {}),
    "tied, no gradient": lambda: ([(b := ONES.copy()), b], [ONES, None], "w", {}),
    "masked, no gradient": lambda: ([ONES.copy(), np.ma.array(ONES)], [ONES, None], "w", {}),
}
SUPPORTED = {
    "raise": lambda: (ONES, ONES * np.inf, None, {"nonfinite": "raise"}),
    "raise, in place": lambda: ([ONES.copy(), ONES.copy()], [ONES, ONES * np.inf], "w",
                                {"nonfinite": "raise"}),
    "raise, finite": lambda: (ONES, ONES, ONES.copy(), {"nonfinite": "raise"}),
    "skip": lambda: (ONES, ONES * np.nan, ONES.copy(), {"nonfinite": "skip"}),
    "skip, new": lambda: ([ONES, ONES], [ONES, ONES * np.nan], None, {"nonfinite": "skip"}),
    "skip, finite": lambda: (ONES.copy(), ONES, "w", {"nonfinite": "skip"}),
    "skip, partly supported": lambda: ([ONES, BASE[::2]], [ONES * np.nan, ONES],
                                       [ONES.copy(), ONES.copy()], {"nonfinite": "skip"}),
    "skip, one unsupported": lambda: ([ONES.copy(), BASE.copy()[::2]], [ONES, ONES * np.nan], "w",
                                      {"nonfinite": "skip"}),
}
# fmt: on


def build(case):
    w, g, out, options = (CASES | SUPPORTED)[case]()
    out = w if isinstance(out, str) else out
    return w, g, out, options, [x for tree in (w, g, out) for x in structure.leaves(tree)]


def shown(xs):
    return [(type(x), getattr(x, "dtype", None), repr(np.asarray(x).tolist())) for x in xs]


def outcome(update, case):
    """The result or the error, and what all arrays that were passed contain after the call."""
    w, g, out, options, given = build(case)
    try:
        new = shown(structure.leaves(update(w, g, options.pop("lr", 0.1), out=out, **options)))
    except LarsTreeError as error:
        new = f"{type(error).__name__}: {error}"
    return new, shown(given)


@pytest.mark.parametrize("case", CASES | SUPPORTED)
def test_unsupported_leaves_take_the_general_path(case):
    assert outcome(lars_update, case) == outcome(without_kernel, case)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_does_not_touch_unsupported_leaves(case):
    w, g, out, options, given = build(case)
    before = shown(given)
    outs = None if out is None else structure.leaves(out)
    rules = [Rule(options.pop("lr", 0.1), **options)] * len(structure.leaves(w))
    news = stepped(numpy_reader(), structure.leaves(w), structure.leaves(g), outs, rules)
    if "no gradient" not in case:
        assert news is None
        assert shown(given) == before


@pytest.mark.parametrize("dtype", ["f2", "bfloat16", "f4", "f8", "c8"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_memory_maps_are_supported_and_the_results_are_not_memory_maps(
    mode, dtype, tmp_path, monkeypatch
):
    dtype = dtype_of(dtype)
    (GRID + 1).astype(dtype).tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", dtype, mode, shape=GRID.shape)
    plain = np.array(mapped)
    lars = Lars(0.1, momentum=0.5)
    expected = [lars_update(plain, plain, 0.1), *lars.update(plain, plain, lars.init(plain))]
    state = lars.init(plain)
    monkeypatch.setattr(NumpyBackend, "update", lambda *_: pytest.fail("not the kernel"))
    for w, g in ((mapped, mapped), (mapped, plain), (plain, mapped)):
        new = [lars_update(w, g, 0.1), *lars.update(w, g, state)]
        assert shown(structure.leaves(new)) == shown(structure.leaves(expected))


def test_lists_of_different_lengths_are_refused():
    one = [ONES]
    rules = [Rule(0.1)]
    (new,), velocities = stepped(numpy_reader(), one, one, None, rules)
    assert new.tolist() == (ONES * 0.9).tolist()
    assert velocities is None
    for lists in (
        (one, [], None, rules),
        (one, one, [], rules),
        (one, one, None, []),
        (one, one, None, rules, []),
        ([], one, None, []),
    ):
        with pytest.raises(ValueError, match="one length"):
            stepped(numpy_reader(), *lists)


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("name", ["make", "copy", "as_bits"])
def test_exceptions_of_callbacks_propagate_and_nothing_is_written(name):
    """While a callback runs, Python may also run a signal handler, which may raise."""

    def interrupt(*_):
        raise Interrupt

    w = ONES.astype(dtype_of("bfloat16"))
    v, counter = ONES.astype(np.float32), np.zeros((), np.int64)
    outs = [w] if name == "as_bits" else None
    columns = [w], [w.copy()], outs, [Rule(0.5, momentum=0.5)], [v]
    with pytest.raises(Interrupt):
        stepped(numpy_reader(**{name: interrupt}), *columns, counter=counter)
    assert w.tolist() == v.tolist() == ONES.tolist()
    assert counter == 0


# ---- Walks over trees

Pair = namedtuple("Pair", ["a", "b"])


class Reversed(dict):
    def __iter__(self):
        return iter(reversed(list(super().__iter__())))

    def keys(self):
        return list(self)

    def values(self):
        return [self[key] for key in self]

    def items(self):
        return [(key, self[key]) for key in self]


class Named(dict):
    pass


def with_first_key_last(items):
    new = OrderedDict(items)
    if new:
        new.move_to_end(next(iter(new)))
    return new


KEYS = st.sampled_from(["a", "b", "c", "d", "items"])
DICTS = [dict, dict, Container, Container, Named, OrderedDict, with_first_key_last, Reversed]
LEAVES = st.builds(object) | st.builds(object) | st.none()  # no two objects are equal


def tree_nodes(children):
    lists = st.lists(children, max_size=3)
    dicts = st.dictionaries(KEYS, children, max_size=4)
    return (
        st.builds(lambda make, x: make(x), st.sampled_from(DICTS), dicts)
        | st.builds(lambda make, x: make(x), st.sampled_from([list, tuple]), lists)
        | st.builds(Pair, children, children)
    )


@st.composite
def prefixes(draw, tree):
    """Trees, mostly prefixes of `tree`; types of nodes and the order of keys may differ."""
    if structure.is_leaf(tree):
        return draw(LEAVES)
    change = draw(st.integers(0, 15))
    if change < 2:
        return draw(LEAVES if change else tree_nodes(LEAVES))
    pairs = [(key, draw(prefixes(child))) for key, child in nodes.children(tree)]
    if not isinstance(tree, dict):
        return draw(st.sampled_from([list, tuple]))(child for _, child in pairs)
    if change == 2:
        pairs = pairs[1:]
    elif change == 3:
        pairs.append(("e", 0))
    return draw(st.sampled_from(DICTS))(draw(st.permutations(pairs)))


def walked(tree, prefix, exact):
    found = structure.leaves(tree)
    values = []
    matched = structure.match(tree, prefix, values, exact)
    new = structure.rebuild(tree, range(len(found)))
    return found, matched, values if matched else None, new, types_of_nodes(new)


def types_of_nodes(tree):
    return type(tree), [types_of_nodes(child) for _, child in nodes.children(tree)]


@given(
    tree=tree_nodes(st.recursive(LEAVES, tree_nodes, max_leaves=10)),
    data=st.data(),
    exact=st.booleans(),
)
def test_native_walks_find_the_same_as_their_twins(tree, data, exact):
    prefix = data.draw(prefixes(tree))
    actual = walked(tree, prefix, exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "kernel", None)
        expected = walked(tree, prefix, exact)
    assert actual == expected


@pytest.mark.parametrize("limit", [1000, 10**7])
def test_a_tree_that_is_too_deep_does_not_end_the_process(limit):
    code = f"""if 1:
        import sys
        from lars_tree._tree import structure
        sys.setrecursionlimit({limit})
        for parent in (lambda tree: [tree], lambda tree: (tree,), lambda tree: {{"a": tree}}):
            tree = 1
            for _ in range(100_000):
                tree = parent(tree)
            for walk in (
                structure.leaves,
                lambda tree: structure.broadcast("dcdw", tree, tree),
                lambda tree: structure.leaves(structure.rebuild(tree, [1])),
            ):
                try:
                    print(walk(tree) == [1])
                except RecursionError:
                    print(True)"""
    assert run(code) == ["True"] * 9


@pytest.mark.parametrize(
    "change", [dict.clear, lambda x: x.update(d=4), lambda x: x.pop("c", None)]
)
@pytest.mark.parametrize(
    "walk",
    [
        structure.leaves,
        lambda x: structure.broadcast("dcdw", x, dict(x)),
        lambda x: structure.rebuild(x, range(10)),
    ],
)
def test_a_dict_that_changes_while_it_is_read(walk, change):
    class Meddling(list):
        def __iter__(self):
            change(tree)
            return super().__iter__()

    tree = {"a": 1, "b": Meddling([2]), "c": 3}
    with pytest.raises(StructureError, match="was changed while it was read"):
        walk(tree)


def test_the_path_of_a_node_that_cannot_be_rebuilt():
    tree = {"a": [1, {"b": (2, {"c": ChainMap({"d": 3})})}]}
    with pytest.raises(StructureError, match="\n  a/1/b/1/c: expected a node that can be rebuilt"):
        structure.rebuild(tree, range(3))


@pytest.mark.parametrize("count", [1, 3])
def test_a_tree_is_rebuilt_with_as_many_leaves_as_it_has(count):
    with pytest.raises(StructureError, match="was changed while it was read"):
        structure.rebuild({"a": [1], "b": 2}, range(count))


def test_a_subclass_of_container_whose_new_makes_something_else_is_not_filled():
    class Odd(Container):
        def __new__(cls, *arguments):
            return 5

    odd = dict.__new__(Odd)
    dict.update(odd, a=1)
    with pytest.raises(TypeError, match="descriptor 'update'"):
        structure.rebuild({"b": odd}, [2])
