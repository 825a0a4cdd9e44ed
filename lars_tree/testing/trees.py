"""Hypothesis strategies for trees: of arrays, of layers with their gradients, and prefixes.

Values shrink to the simplest: a bare leaf or an empty dict, key 'a', keys in their original order.
`testing/strategies.py` makes the arrays.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from lars_tree._tree import nodes, structure
from lars_tree._tree.nodes import is_container, replace_children, with_items
from lars_tree.container import Container
from lars_tree.testing import _arrays, strategies
from lars_tree.testing.strategies import Draw, Strategy, arrays


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
    """Keys of dicts, also unusual keys: '', '/', '.', names of methods, any text, small ints.

    >>> from hypothesis import find
    >>> from lars_tree.testing import keys
    >>> find(keys(), lambda key: isinstance(key, int) and key < 0)
    -1
    """
    return (
        st.sampled_from("abc")
        | st.sampled_from(ODD_KEYS)
        | st.text(max_size=3)
        | st.integers(-1, 3)
    )


def check_node_types(node_types: Any) -> None:
    """Raise an OptionError unless this is a list of types."""
    for cls in _arrays.items("node_types", node_types, "types such as [dict, list]"):
        if not isinstance(cls, type):
            text = f"expected types such as [dict, list], got {cls!r}"
            raise _arrays.refused("node_types", text)


def nests(
    leaves: Strategy | None = None,
    *,
    keys: Strategy | None = None,
    node_types: Sequence[type] = NODE_TYPES,
    max_leaves: int = 6,
    tied: bool = False,
) -> Strategy:
    """Trees of any structure, including empty trees and bare leaves.

    >>> from hypothesis import find, strategies as st
    >>> from lars_tree.testing import nests
    >>> find(nests(st.just(1), node_types=[dict, list]), lambda tree: isinstance(tree, list))
    []

    Args:
        leaves: A strategy for the leaves; None means `arrays()`.
        keys: A strategy for the keys of dicts; None means `keys()`.
        node_types: Types of the nodes: dict, list, tuple, subclasses, namedtuples, attrs classes.
        max_leaves: The approximate maximum number of leaves.
        tied: Whether one object may be the leaf at several paths.

    Raises:
        OptionError: A ValueError: `node_types` is not a list of types.
    """
    known = _keys() if keys is None else keys
    check_node_types(node_types)

    def nodes(children: Strategy) -> Strategy:
        return st.one_of([_node(cls, known, children) for cls in node_types])

    made = st.recursive(arrays() if leaves is None else leaves, nodes, max_leaves=max_leaves)
    return made.flatmap(_tied) if tied else made


_keys = keys  # for functions with an argument of this name


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


class _Row:
    """The arrays of one layer, as one leaf."""

    def __init__(self, arrays: tuple[Any, ...]) -> None:
        self.arrays = arrays


def columns(rows: Strategy, count: int, trees: Callable[[Strategy], Strategy]) -> Strategy:
    """Tuples of `count` trees of the same structure.

    `rows` draws tuples: the leaves of all trees at one path. `trees` makes a strategy for trees
    from one for their leaves.
    """

    def split(tree: Any) -> tuple[Any, ...]:
        table = [row.arrays for row in structure.leaves(tree)]
        return tuple(structure.rebuild(tree, [row[i] for row in table]) for i in range(count))

    return trees(rows.map(_Row)).map(split)


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

    Raises:
        OptionError: A ValueError: the library is unknown, or `node_types` is not a list of types.
    """
    if layers is None:
        some = strategies.layers(library=library)
        layers = some | some.map(lambda pair: (pair[0], None)) | st.just((None, None))

    def trees(leaves: Strategy) -> Strategy:
        return nests(leaves, keys=keys, node_types=node_types, max_leaves=max_leaves, tied=tied)

    pairs = columns(layers, 2, trees)
    if not shuffle_keys:
        return pairs
    return pairs.flatmap(lambda pair: st.tuples(st.just(pair[0]), shuffled(pair[1])))


def runs(
    layers: Callable[[int], Strategy] | None = None,
    *,
    steps: int | Strategy | None = None,
    missing: bool = False,
    library: _arrays.Library | Strategy = "numpy",
    trees: Callable[[Strategy], Strategy] = nests,
) -> Strategy:
    """Pairs (w, [dcdw, ...]): weights, and the gradients of several steps, in the same structure.

    >>> from hypothesis import find, strategies as st
    >>> from lars_tree.testing import layers, runs
    >>> scalars = lambda steps: layers("float32", (), gradients=steps)
    >>> two = runs(scalars, steps=2, trees=lambda leaves: st.fixed_dictionaries({"a": leaves}))
    >>> w, gradients = find(two, lambda run: True)      # the simplest example
    >>> w, gradients[1], len(gradients)
    ({'a': array(0., dtype=float32)}, {'a': array(0., dtype=float32)}, 2)

    Args:
        layers: A function from the number of steps to a strategy for the tuples (w, dcdw, ...) of
            arrays of one layer. None means `layers(library=library, gradients=steps)`.
        steps: The number of steps, or a strategy for it; None means 1 to 3.
        missing: Whether some gradients are None.
        library: As in `arrays`.
        trees: A function from a strategy for leaves to a strategy for trees.

    Raises:
        OptionError: A ValueError, in the first example: the library is unknown.
    """

    def run(count: int) -> Strategy:
        rows = layers(count) if layers else strategies.layers(library=library, gradients=count)
        found = columns(rows.flatmap(_with_gaps) if missing else rows, count + 1, trees)
        return found.map(lambda columns: (columns[0], list(columns[1:])))

    return strategies.strategy(st.integers(1, 3) if steps is None else steps).flatmap(run)


def _with_gaps(row: tuple[Any, ...]) -> Strategy:
    """The row with some of its gradients replaced by None."""
    w, *gradients = row
    return st.tuples(st.just(w), *(st.sampled_from([g, None]) for g in gradients))


def shuffled(tree: Any) -> Strategy:
    """The same tree with the keys of its dicts in any order.

    >>> from hypothesis import find
    >>> from lars_tree.testing import shuffled
    >>> find(shuffled({"a": 1, "b": [2]}), lambda tree: list(tree)[0] == "b")
    {'b': [2], 'a': 1}
    """
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
