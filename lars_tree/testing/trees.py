"""Strategies of hypothesis for trees: of arrays, of weights and gradients, and prefixes of them.

Everything shrinks towards the least: a bare leaf or an empty dict, key 'a', keys in their order.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from lars_tree import _nodes, _tree
from lars_tree.container import Container
from lars_tree.testing import strategies
from lars_tree.testing.strategies import Draw, Strategy, drawn


class Layer(NamedTuple):
    """A namedtuple, one of the kinds of nodes that `nests` makes."""

    kernel: Any
    bias: Any


NODE_TYPES = (dict, Container, list, tuple, OrderedDict, defaultdict, Layer)

ODD_KEYS = (
    *("", "/", ".", "a/b", "a.b", " ", "0", "items", "keys", "map", "__class__", "<b>", "\n"),
    *("ü", "数", "\N{SNOWMAN}"),
)


def keys() -> Strategy:
    """Keys of a dict, plain or odd: '', '/', '.', names of methods, any text, small integers."""
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
    """Trees of all kinds, also empty ones or a bare leaf.

    Args:
        leaves: A strategy of the leaves; None makes `arrays()`.
        keys: A strategy of the keys of dicts; None is `keys()`.
        node_types: Types of the nodes: of dict, list and tuple, namedtuples, attrs classes.
        max_leaves: Most leaves of a tree, more or less.
        tied: Whether one and the same leaf may be at several places.
    """
    known = _keys() if keys is None else keys

    def nodes(children: Strategy) -> Strategy:
        return st.one_of([_node(cls, known, children) for cls in node_types])

    made = st.recursive(
        strategies.arrays() if leaves is None else leaves, nodes, max_leaves=max_leaves
    )
    return made.flatmap(_tied) if tied else made


_keys = keys


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
    found = _tree.leaves(tree)
    places = [draw(st.just(i) | st.integers(0, i)) for i in range(len(found))]
    return _tree.rebuild(tree, [found[i] for i in places])


def containers(
    leaves: Strategy | None = None,
    *,
    keys: Strategy | None = None,
    max_leaves: int = 6,
    tied: bool = False,
) -> Strategy:
    """Containers, of Containers, lists and tuples.

    >>> from hypothesis import find
    >>> from lars_tree.testing import containers
    >>> len(find(containers(), lambda w: len(w.leaves()) > 1).leaves())
    2

    Args:
        leaves: As in `nests`.
        keys: As in `nests`.
        max_leaves: As in `nests`.
        tied: As in `nests`.
    """
    types = (Container, list, tuple)
    flat = strategies.arrays() if leaves is None else leaves
    inner = nests(leaves, keys=keys, node_types=types, max_leaves=max_leaves)
    known = _keys() if keys is None else keys
    # Two ways, as hypothesis finds from one to the other better than from nested to flat.
    roots = [st.dictionaries(known, values, max_size=3) for values in (flat, inner)]
    made = st.one_of(roots).map(Container)
    return made.flatmap(_tied) if tied else made


class _Pair:
    """A leaf that is two, until the tree is taken apart."""

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.w, self.dcdw = pair


def weights_and_gradients(
    layers: Strategy | None = None,
    *,
    library: Any = "numpy",
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

    Args:
        layers: A strategy of pairs, for the leaves. None makes `layers(library=library)` and leaves
            that are None: both, or the gradient alone.
        library: As in `arrays`; without use if there are `layers`.
        keys: As in `nests`.
        node_types: As in `nests`.
        max_leaves: As in `nests`.
        tied: As in `nests`. `lars_update` refuses to step tied weights in place.
        shuffle_keys: Whether dicts of dcdw may have their keys in another order than those of w.
    """

    def make(draw: Draw) -> tuple[Any, Any]:
        tree = draw(nested)
        pairs = _tree.leaves(tree)
        w = _tree.rebuild(tree, [pair.w for pair in pairs])
        dcdw = _tree.rebuild(tree, [pair.dcdw for pair in pairs])
        return w, draw(shuffled(dcdw)) if shuffle_keys else dcdw

    if layers is None:
        some = strategies.layers(library=library)
        layers = some | some.map(lambda pair: (pair[0], None)) | st.just((None, None))
    leaves = layers.map(_Pair)
    nested = nests(leaves, keys=keys, node_types=node_types, max_leaves=max_leaves, tied=tied)
    return drawn(make)


def shuffled(tree: Any) -> Strategy:
    """The same tree with the keys of its dicts in any order.

    Args:
        tree: A tree.
    """

    @st.composite
    def one(draw: Draw, node: Any) -> Any:
        if _tree.is_leaf(node):
            return node
        children = [draw(one(child)) for _, child in _tree.children(node)]
        return _reordered(draw, _tree.replace_children(node, children))

    return one(tree)


def _reordered(draw: Draw, node: Any) -> Any:
    """A dict of any built-in class with its keys in another order; other nodes as they are."""
    cls = type(node)
    if cls not in (dict, OrderedDict, defaultdict) and not _nodes.is_container(node):
        return node
    items = dict(draw(st.permutations(list(_tree.children(node)))))
    if cls is defaultdict:
        return defaultdict(node.default_factory, items)
    return OrderedDict(items) if cls is OrderedDict else _nodes.with_items(node, items)


def prefixes_of(tree: Any, values: Strategy | None = None) -> Strategy:
    """Prefixes of a tree: its nodes, with keys in any order, cut off anywhere for one value.

    >>> from hypothesis import find, strategies as st
    >>> from lars_tree.testing import prefixes_of
    >>> w = {"encoder": {"kernel": 1, "bias": 2}, "head": 3}
    >>> find(prefixes_of(w, st.floats(0, 1)), lambda lr: isinstance(lr, dict))
    {'encoder': 0.0, 'head': 0.0}

    Args:
        tree: A tree.
        values: A strategy of what stands where the tree is cut; None is integers.
    """
    some = st.integers(0, 9) if values is None else values

    @st.composite
    def one(draw: Draw, node: Any) -> Any:
        if _tree.is_leaf(node) or not draw(st.booleans()):
            return draw(some)
        children = [draw(one(child)) for _, child in _tree.children(node)]
        return _reordered(draw, _tree.replace_children(node, children))

    return one(tree)
