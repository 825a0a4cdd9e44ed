"""Hypothesis strategies for arrays, layers with their gradients, options, and trees.

Values shrink to the simplest: float64 zeros in C order, a bare leaf or an empty dict, key 'a',
keys in their original order. If a strategy is given for an argument such as `dtype`, the value is
drawn anew for each example, as in `hypothesis.extra.numpy`.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lars_tree._tree import nodes, structure
from lars_tree._tree.nodes import is_container, replace_children, with_items
from lars_tree.container import Container
from lars_tree.testing import _arrays

Strategy = st.SearchStrategy[Any]
Draw = Callable[[Strategy], Any]


def arrays(
    dtype: Any = None,
    shape: Any = None,
    *,
    elements: Strategy | None = None,
    library: _arrays.Library | Strategy = "numpy",
    layouts: Sequence[str] = _arrays.LAYOUTS,
) -> Strategy:
    """Arrays of real or complex floating-point numbers.

    Without `elements`, the elements are finite and cover the whole range of their format: half of
    the arrays mix elements of all sizes, also subnormal; in the other half, all elements are near
    one power of two, so that whole arrays are tiny or huge. Equal elements and magnitudes are
    common.

    >>> from hypothesis import find
    >>> from lars_tree.testing import arrays
    >>> find(arrays("float32"), lambda x: x.size > 1)
    array([0., 0.], dtype=float32)
    >>> find(arrays(), lambda x: 0 < abs(x).max(initial=0) < 1e-300).dtype
    dtype('float64')

    Args:
        dtype: A floating-point or complex dtype, its name (also "bfloat16"), or a strategy. None
            means any of float64, float32, float16 and bfloat16 (for numpy only with ml_dtypes).
        shape: A tuple, or a strategy. None means up to three axes of length 0 to 4.
        elements: A strategy for the elements, which are rounded to the format.
        library: "numpy", "torch" or "jax", or a strategy; a library is imported only when needed.
        layouts: Memory layouts: any of "C", "F", "reversed" (negative strides) and "gaps". A
            layout that the library lacks is ignored: torch lacks "reversed", JAX has only "C".

    Raises:
        ValueError: The library or a layout is unknown.
    """
    shapes = _strategy(SHAPES if shape is None else shape).map(lambda shape: [shape])
    return _groups(dtype, shapes, elements, library, layouts).map(lambda found: found[0])


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def _groups(
    dtype: Any, shapes: Strategy, elements: Strategy | None, library: Any, layouts: Sequence[str]
) -> Strategy:
    """Tuples of arrays with one dtype and library; `shapes` draws the list of their shapes."""
    if not isinstance(library, st.SearchStrategy):
        _arrays.check_known("library", library, _arrays.LIBRARIES)
    for layout in layouts:
        _arrays.check_known("layouts", layout, _arrays.LAYOUTS)

    def make(draw: Draw) -> tuple[Any, ...]:
        name = draw(_strategy(library))
        kind = draw(_strategy(st.sampled_from(_arrays.names_for(name)) if dtype is None else dtype))
        return tuple(_array(draw, kind, x, elements, name, layouts) for x in draw(shapes))

    return drawn(make)


def _strategy(value: Any) -> Strategy:
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


@st.composite
def drawn(draw: Draw, make: Callable[[Draw], Any]) -> Any:
    """The results of `make`, a function that takes `draw`."""
    return make(draw)


def _array(
    draw: Draw, dtype: str, shape: Any, elements: Strategy | None, library: str, layouts: Any
) -> Any:
    x = _numbers(draw, dtype, shape, elements)
    layout = draw(st.sampled_from(_arrays.layouts_for(library, x.ndim, layouts)))
    return _arrays.to_library(_arrays.laid_out(x, layout), dtype, library)


def _numbers(draw: Draw, dtype: Any, shape: tuple[int, ...], elements: Strategy | None) -> Any:
    """A new array in C order; bfloat16 as bits."""
    name, dtype = _arrays.name_of(dtype), _arrays.numpy_name(dtype)
    if name == "bfloat16":
        return _arrays.bits_of_bfloat16(_reals(draw, name, "float32", shape, elements))
    if np.dtype(name).kind == "c" and elements is None:
        part = np.empty(0, name).real.dtype.name
        reals = _reals(draw, part, part, (*shape, 2), None)
        return reals.view(name)[..., 0].astype(dtype)
    return _reals(draw, name, name, shape, elements).astype(dtype)


def _reals(
    draw: Draw, name: str, stored: str, shape: tuple[int, ...], elements: Strategy | None
) -> Any:
    if elements is not None:
        return draw(hnp.arrays(stored, shape, elements=elements))
    width: Any = np.dtype(stored).itemsize * 8
    if draw(st.booleans()):
        finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
        return draw(hnp.arrays(stored, shape, elements=finite))
    form = _arrays.format_of(name)
    near_one = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-2, 2, width=width)  # ties are common
    x = draw(hnp.arrays(stored, shape, elements=near_one))
    least, most = form.smallest - form.bits + 1, form.largest - 1
    ends = st.sampled_from([least, form.smallest, most])
    return np.asarray(np.ldexp(x, draw(st.just(0) | ends | st.integers(least, most))))


def layers(
    dtype: Any = None,
    shape: Any = None,
    *,
    elements: Strategy | None = None,
    library: _arrays.Library | Strategy = "numpy",
    layouts: Sequence[str] = _arrays.LAYOUTS,
    broadcast: bool = False,
) -> Strategy:
    """Pairs (w, dcdw) of arrays of one dtype and library: one layer and its gradient.

    With `broadcast`, the gradient may have fewer axes than w, and broadcasts to it. `shape` is the
    shape of w. The other arguments have the same meaning as in `arrays()`, with the same errors.
    """

    def pairs(shape: tuple[int, ...]) -> Strategy:
        parts = [shape, shape[1:], ()] if broadcast else [shape]
        return st.sampled_from([(shape, part) for part in parts])

    shapes = _strategy(SHAPES if shape is None else shape).flatmap(pairs)
    return _groups(dtype, shapes, elements, library, layouts)


OPTIONS = {
    "decay_lambda": st.sampled_from([0.0, 1e-4, 0.1]),
    "trust_coefficient": st.sampled_from([1.0, 1e-3]),
    "eps": st.sampled_from([0.0, 1e-8]),
    "adapt": st.sampled_from([True, False]),
    "trust_clip": st.booleans(),
    "joint_norm": st.booleans(),
    "grad_scale": st.sampled_from([1.0, 1024.0]),
}


def options(*names: str) -> Strategy:
    """Keyword arguments of `lars_update`: any of the named options, with one value for all leaves.

    Args:
        *names: Any of "decay_lambda", "trust_coefficient", "eps", "adapt", "trust_clip",
            "joint_norm" and "grad_scale". Without names, all options can be drawn.

    Raises:
        ValueError: A name is not one of these.
    """
    for name in names:
        _arrays.check_known("names", name, list(OPTIONS))
    return st.fixed_dictionaries({}, optional={name: OPTIONS[name] for name in names or OPTIONS})


# Trees


class Layer(NamedTuple):
    """A namedtuple: one of the node types of `nests`."""

    kernel: Any
    bias: Any


NODE_TYPES = (dict, Container, list, tuple, OrderedDict, defaultdict, Layer)

ODD_KEYS = (
    *("", "/", ".", "a/b", "a.b", " ", "0", "items", "keys", "map", "__class__", "<b>", "\n"),
    *("ü", "数", "\N{SNOWMAN}"),
)


def keys() -> Strategy:
    """Keys of dicts, also unusual keys: '', '/', '.', names of methods, any text, small ints."""
    return (
        st.sampled_from("abc")
        | st.sampled_from(ODD_KEYS)
        | st.text(max_size=3)
        | st.integers(-1, 3)
    )


def nests(
    leaves: Strategy | None = None,
    *,
    keys: Strategy | None = None,
    node_types: Sequence[type] = NODE_TYPES,
    max_leaves: int = 6,
    tied: bool = False,
) -> Strategy:
    """Trees of any structure, including empty trees and bare leaves.

    Args:
        leaves: A strategy for the leaves; None means `arrays()`.
        keys: A strategy for the keys of dicts; None means `keys()`.
        node_types: Types of the nodes: dict, list, tuple, subclasses, namedtuples, attrs classes.
        max_leaves: The approximate maximum number of leaves.
        tied: Whether one object may be the leaf at several paths.
    """
    known = _keys() if keys is None else keys

    def nodes(children: Strategy) -> Strategy:
        return st.one_of([_node(cls, known, children) for cls in node_types])

    made = st.recursive(arrays() if leaves is None else leaves, nodes, max_leaves=max_leaves)
    return made.flatmap(_tied) if tied else made


_keys, _layers = keys, layers  # for functions whose arguments have these names


def _node(cls: type, keys: Strategy, children: Strategy) -> Strategy:
    if issubclass(cls, dict):
        make: Any = (lambda items: cls(list, items)) if issubclass(cls, defaultdict) else cls
        return st.dictionaries(keys, children, max_size=3).map(make)
    fields = getattr(cls, "_fields", getattr(cls, "__attrs_attrs__", None))
    if fields is not None:
        return st.tuples(*[children] * len(fields)).map(lambda values: cls(*values))
    return st.lists(children, max_size=3).map(cls)


@st.composite
def _tied(draw: Draw, tree: Any) -> Any:
    found = structure.leaves(tree)
    indices = [draw(st.just(i) | st.integers(0, i)) for i in range(len(found))]
    return structure.rebuild(tree, [found[i] for i in indices])


def containers(
    leaves: Strategy | None = None,
    *,
    keys: Strategy | None = None,
    max_leaves: int = 6,
    tied: bool = False,
) -> Strategy:
    """Containers of Containers, lists and tuples.

    >>> from hypothesis import find
    >>> from lars_tree.testing import containers
    >>> len(find(containers(), lambda w: len(w.leaves()) > 1).leaves())
    2

    The arguments are as in `nests`.
    """
    types = (Container, list, tuple)
    flat = arrays() if leaves is None else leaves
    inner = nests(leaves, keys=keys, node_types=types, max_leaves=max_leaves)
    known = _keys() if keys is None else keys
    # Flat and nested roots, because hypothesis does not reliably shrink nested trees to flat trees.
    roots = [st.dictionaries(known, values, max_size=3) for values in (flat, inner)]
    made = st.one_of(roots).map(Container)
    return made.flatmap(_tied) if tied else made


class _Pair:
    """A layer and its gradient, as one leaf."""

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.w, self.dcdw = pair


def weights_and_gradients(
    layers: Strategy | None = None,
    *,
    library: _arrays.Library | Strategy = "numpy",
    keys: Strategy | None = None,
    node_types: Sequence[type] = NODE_TYPES,
    max_leaves: int = 6,
    tied: bool = False,
    shuffle_keys: bool = False,
) -> Strategy:
    """Pairs (w, dcdw) of trees of the same structure, as `lars_update` takes them.

    >>> from hypothesis import find
    >>> from lars_tree.testing import weights_and_gradients
    >>> find(weights_and_gradients(node_types=[dict]), lambda pair: isinstance(pair[0], dict))
    ({}, {})

    `layers` is a strategy for the pairs of arrays; without it, pairs are drawn from
    `layers(library=library)`, and in some pairs the gradient or both arrays are None. `library`
    is as in `arrays`. With `shuffle_keys`, the dicts of dcdw may have their keys in another order
    than in w. The other arguments are as in `nests`; tied weights cannot be updated in place.
    """
    if layers is None:
        some = _layers(library=library)
        layers = some | some.map(lambda pair: (pair[0], None)) | st.just((None, None))
    pairs = layers.map(_Pair)
    trees = nests(pairs, keys=keys, node_types=node_types, max_leaves=max_leaves, tied=tied)

    def make(draw: Draw) -> tuple[Any, Any]:
        tree = draw(trees)
        leaves = structure.leaves(tree)
        w = structure.rebuild(tree, [pair.w for pair in leaves])
        dcdw = structure.rebuild(tree, [pair.dcdw for pair in leaves])
        return w, draw(shuffled(dcdw)) if shuffle_keys else dcdw

    return drawn(make)


def shuffled(tree: Any) -> Strategy:
    """The same tree with the keys of its dicts in any order."""
    return _rebuilt(tree, None)


@st.composite
def _rebuilt(draw: Draw, node: Any, cut: Strategy | None) -> Any:
    """The node with its keys in any order. Values of `cut` replace its leaves and some subtrees."""
    if cut is not None and (structure.is_leaf(node) or not draw(st.booleans())):
        return draw(cut)
    if structure.is_leaf(node):
        return node
    children = [draw(_rebuilt(child, cut)) for _, child in nodes.children(node)]
    return _reordered(draw, replace_children(node, children))


def _reordered(draw: Draw, node: Any) -> Any:
    """A dict or Container with its keys in any order; other nodes unchanged."""
    cls = type(node)
    if cls not in (dict, OrderedDict, defaultdict) and not is_container(node):
        return node
    items = dict(draw(st.permutations(list(nodes.children(node)))))
    if cls is defaultdict:
        return defaultdict(node.default_factory, items)
    return OrderedDict(items) if cls is OrderedDict else with_items(node, items)


def prefixes_of(tree: Any, values: Strategy | None = None) -> Strategy:
    """Prefixes of a tree: values replace its leaves and some subtrees; keys are in any order.

    >>> from hypothesis import find, strategies as st
    >>> from lars_tree.testing import prefixes_of
    >>> w = {"encoder": {"kernel": 1, "bias": 2}, "head": 3}
    >>> find(prefixes_of(w, st.floats(0, 1)), lambda lr: isinstance(lr, dict))
    {'encoder': 0.0, 'head': 0.0}

    Args:
        tree: The tree.
        values: A strategy for the values; None means integers.
    """
    return _rebuilt(tree, st.integers(0, 9) if values is None else values)
