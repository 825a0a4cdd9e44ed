"""One trial of an update function: the values that a law draws, and the expected results.

`exact_step` computes the rule in decimals of 60 digits, with no code of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lars_tree._tree import nodes, structure
from lars_tree.testing import _arrays, strategies
from lars_tree.testing._arrays import Array
from lars_tree.testing.assertions import assert_close_ulp

Update = Callable[..., Any]

SHAPES = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
ELEMENTS = {
    # Nonzero, with few bits, so that products with powers of two are exact in every format.
    "plain": st.integers(1, 64).map(lambda n: n / 8) | st.integers(-64, -1).map(lambda n: n / 8),
    # The squares of these numbers neither overflow nor underflow in float32.
    "moderate": st.floats(-8, 8, width=16, allow_subnormal=False),
    "extreme": None,  # any finite numbers
}

_CONTEXT = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)


@dataclass(frozen=True, eq=False)
class Domain:
    """The arrays and trees that an update function is tried on; see `check_update_laws`."""

    library: _arrays.Library
    dtypes: Sequence[str]
    node_types: Sequence[type]
    nested: bool
    trust_coefficient: float
    joint_norm: bool
    ulp: Mapping[str, float]

    @cached_property
    def pairs(self) -> dict[str, st.SearchStrategy[Any]]:
        """Strategies for weights and gradients, by the kind of their elements."""
        return {kind: self._pairs(elements) for kind, elements in ELEMENTS.items()}

    def _pairs(self, elements: st.SearchStrategy[Any] | None) -> st.SearchStrategy[Any]:
        layers = strategies.layers(
            st.sampled_from(list(self.dtypes)),
            SHAPES,
            elements=elements,
            library=self.library,
        )
        keys = st.sampled_from("abc") | st.sampled_from(strategies.ODD_KEYS)
        if not self.nested:
            pairs = st.dictionaries(keys, layers, max_size=4)
            return pairs.map(lambda d: tuple({k: pair[i] for k, pair in d.items()} for i in (0, 1)))
        nested = strategies.weights_and_gradients(
            layers, keys=keys, node_types=self.node_types, max_leaves=4
        )
        return nested.filter(lambda pair: not structure.is_leaf(pair[0]))


class Trial:
    """The argument of a law: an update function, and methods to try it.

    Calling a trial calls the function with copies of the arguments, so that a function that
    modifies its arguments breaks only the law `leaves_its_inputs_alone`.

    Attributes:
        update: The function itself.
        domain: The arrays and trees that the function is tried on.
    """

    def __init__(self, update: Update, data: st.DataObject, domain: Domain) -> None:
        self.update = update
        self.domain = domain
        self._data = data

    def __call__(self, w: Any, dcdw: Any, lr: float, **options: Any) -> Any:
        """The result of the function for copies of w and dcdw."""
        return self.update(_arrays.copied(w), _arrays.copied(dcdw), lr, **options)

    def draw(self, strategy: st.SearchStrategy[Any], label: str) -> Any:
        """A value of the strategy; the report of a broken law shows it under this label."""
        return self._data.draw(strategy, label)

    def pair(self, kind: str = "plain") -> tuple[Any, Any]:
        """Weights and gradients: two trees of the same structure.

        Args:
            kind: The kind of their elements: "plain", "moderate" or "extreme"; see `ELEMENTS`.
        """
        return self.draw(self.domain.pairs[kind], "w, dcdw")  # type: ignore[no-any-return]

    def power(self, label: str) -> float:
        """A power of two by which "plain" numbers and their squares can be scaled exactly."""
        most = 5 if "float16" in self.domain.dtypes else 20
        exponent: int = self.draw(st.integers(-most, most), label)
        return math.ldexp(1, exponent)

    def assert_rule(
        self, new: Any, w: Any, dcdw: Any, lr: float, decay_lambda: float, ulp: float | None
    ) -> None:
        """Assert that the new weights follow the rule; errors are in ulps of max(|w|, |step|).

        `ulp` is the largest accepted distance; None means the limit of the domain for the dtype.
        """
        domain = self.domain
        for (path, x), g in zip(structure.walk(w), structure.leaves(dcdw), strict=True):
            old, gradient = (_arrays.to_numpy(y).ravel().tolist() for y in (x, g))
            options = lr, decay_lambda, domain.trust_coefficient, None, domain.joint_norm
            expected, scale = exact_step(old, gradient, *options)
            self._assert_leaf_close(path, x, new, expected.reshape(x.shape), scale, ulp)

    def assert_close(self, new: Any, w: Any, expected: Any, scale: Any, ulp: float | None) -> None:
        """Assert that the new weights are close to `expected`, in ulps of the dtype of `w`.

        Ulps are measured at the elements of `scale`. `ulp` is as in `assert_rule`.
        """
        rows = zip(
            structure.walk(w), structure.leaves(expected), structure.leaves(scale), strict=True
        )
        for (path, x), y, size in rows:
            self._assert_leaf_close(path, x, new, y, size, ulp)

    def _assert_leaf_close(
        self, path: Any, x: Any, new: Any, expected: Any, scale: Any, ulp: float | None
    ) -> None:
        leaves = at(new, path), expected, scale.reshape(x.shape)
        actual, wanted, sizes = (_nested(path, leaf) for leaf in leaves)
        most = self.ulp(x) if ulp is None else ulp
        assert_close_ulp(actual, wanted, most, sizes, dtype=x.dtype)

    def ulp(self, x: Any) -> float:
        """The distance that the domain accepts for elements of an array with this dtype."""
        return self.domain.ulp[_arrays.name_of(x.dtype)]


def exact_step(
    w: list[float],
    dcdw: list[float],
    lr: float,
    decay_lambda: float,
    trust_coefficient: float,
    norms: tuple[Decimal, Decimal] | None = None,
    joint_norm: bool = False,
) -> tuple[Array, Array]:
    """The new weights of one layer, and the larger of |w| and |step| for each element.

    If w and dcdw are only a part of the layer, `norms` has to be given: the norms of the whole w
    and dcdw, or with `joint_norm`, those of w and dcdw + decay_lambda * w.
    """
    with localcontext(_CONTEXT):
        rate, decay = Decimal(lr), Decimal(decay_lambda)
        x, g = (np.array([Decimal(y) for y in values], object) for values in (w, dcdw))
        decayed = g + decay * x
        w_norm, g_norm = norms or (_norm(x), _norm(decayed if joint_norm else g))
        ratio = Decimal(1)
        if w_norm and g_norm:
            denominator = g_norm if joint_norm else g_norm + decay * w_norm
            ratio = Decimal(trust_coefficient) * w_norm / denominator
        step = rate * ratio * decayed
        return x - step, np.maximum(abs(x), abs(step))


def exact_norm(value: float, count: int = 1) -> Decimal:
    """The 2-norm of `count` elements of this value."""
    with localcontext(_CONTEXT):
        return (count * Decimal(value) ** 2).sqrt()


def _norm(values: Array) -> Decimal:
    return sum((x * x for x in values), Decimal(0)).sqrt()


def at(tree: Any, path: Any) -> Any:
    """The leaf at a path."""
    for key in path:
        tree = dict(nodes.children(tree))[key]
    return tree


def _nested(path: Any, leaf: Any) -> Any:
    """A tree of dicts with this leaf at the path and nothing else."""
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf


def mapped(fn: Callable[..., Any], *trees: Any) -> Any:
    """A tree like the first; its leaves are fn(x, y, ...) of the matching leaves of all trees."""
    leaves = zip(*map(structure.leaves, trees), strict=True)
    return structure.rebuild(trees[0], [fn(*row) for row in leaves])
