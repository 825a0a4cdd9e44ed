"""One trial of an update function: what a law draws from, and the calls of the function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lars_tree import _tree
from lars_tree.testing import _arrays, _exact, strategies, trees
from lars_tree.testing.assertions import assert_close_ulp

Update = Callable[..., Any]

# Few bits, so that they and their multiples by powers of two are exact in every format.
PLAIN = st.integers(1, 64).map(lambda n: n / 8) | st.integers(-64, -1).map(lambda n: n / 8)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
MODERATE = st.floats(-8, 8, width=16, allow_subnormal=False)


@dataclass(frozen=True, eq=False)
class Domain:
    """What an update function is tried on; see `check_update_laws`."""

    library: str
    dtypes: Sequence[str]
    node_types: Sequence[type]
    nested: bool
    trust_coefficient: float
    joint_norm: bool
    ulp: Mapping[str, float]

    @cached_property
    def plain(self) -> st.SearchStrategy[Any]:
        """Weights and gradients that are plain numbers, and not 0."""
        return self._pairs(PLAIN)

    @cached_property
    def moderate(self) -> st.SearchStrategy[Any]:
        """Weights and gradients of moderate size, whose squares no format of 32 bits loses."""
        return self._pairs(MODERATE)

    @cached_property
    def extreme(self) -> st.SearchStrategy[Any]:
        """Weights and gradients of all finite numbers."""
        return self._pairs(None)

    def _pairs(self, elements: st.SearchStrategy[Any] | None) -> st.SearchStrategy[Any]:
        layers = strategies.layers(
            st.sampled_from(list(self.dtypes)),
            SHAPES,
            elements=elements,
            library=self.library,
        )
        keys = st.sampled_from("abc") | st.sampled_from(trees.ODD_KEYS)
        if not self.nested:
            pairs = st.dictionaries(keys, layers, max_size=4)
            return strategies.drawn(lambda draw: _flat(draw(pairs)))
        found = trees.weights_and_gradients(
            layers, keys=keys, node_types=self.node_types, max_leaves=4
        )
        return found.filter(lambda pair: not _tree.is_leaf(pair[0]))


def _flat(pairs: dict[Any, tuple[Any, Any]]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return {k: w for k, (w, _) in pairs.items()}, {k: dcdw for k, (_, dcdw) in pairs.items()}


class Trial:
    """What a law is given: an update function, and the means to try it on something.

    Called like the function, it calls that on copies of what it is given, so that a law is broken
    by nothing but what it is about.

    Attributes:
        update: The function itself.
        domain: What it is tried on.
    """

    def __init__(self, update: Update, data: st.DataObject, domain: Domain) -> None:
        self.update = update
        self.domain = domain
        self._data = data

    def __call__(self, w: Any, dcdw: Any, lr: float, **options: Any) -> Any:
        """What the function makes of copies of w and dcdw."""
        return self.update(_arrays.copied(w), _arrays.copied(dcdw), lr, **options)

    def draw(self, strategy: st.SearchStrategy[Any], label: str) -> Any:
        """A value, which is shown by its label if the law is found to be broken."""
        return self._data.draw(strategy, label)

    def pair(self, kind: str = "plain") -> tuple[Any, Any]:
        """Weights and gradients: trees of arrays of the domain, in the same structure.

        Args:
            kind: Of their numbers: "plain", "moderate" or "extreme".
        """
        return self.draw(getattr(self.domain, kind), "w, dcdw")  # type: ignore[no-any-return]

    def power(self, label: str) -> float:
        """A power of two with which plain numbers can be scaled exactly, squares included."""
        most = 5 if "float16" in self.domain.dtypes else 20
        exponent: int = self.draw(st.integers(-most, most), label)
        return math.ldexp(1, exponent)

    def assert_rule(
        self, new: Any, w: Any, dcdw: Any, lr: float, decay_lambda: float, ulp: float | None
    ) -> None:
        """Assert that the new weights are those of the rule, in ulps of the larger of |w| and |u|.

        Args:
            new: The weights after the step.
            w: The weights before.
            dcdw: The gradients.
            lr: The rate.
            decay_lambda: The decay.
            ulp: The most that an element may be off; None is what the domain says for its dtype.
        """
        wanted: list[Any] = []
        scale: list[Any] = []
        for x, g in zip(_tree.leaves(w), _tree.leaves(dcdw), strict=True):
            old, gradient = (_arrays.to_numpy(y).ravel().tolist() for y in (x, g))
            exact = _exact.step(
                old,
                gradient,
                lr,
                decay_lambda,
                self.domain.trust_coefficient,
                joint_norm=self.domain.joint_norm,
            )
            for values, found in zip(exact, (wanted, scale), strict=True):
                found.append(_objects(values, tuple(x.shape)))
        self.assert_close(new, w, _tree.rebuild(w, wanted), _tree.rebuild(w, scale), ulp)

    def assert_close(self, new: Any, w: Any, expected: Any, scale: Any, ulp: float | None) -> None:
        """Assert that weights are as expected, in ulps of the format of `w`, whatever they are in.

        Args:
            new: The weights after the step.
            w: The weights before.
            expected: What they should be.
            scale: The size at which an ulp is measured, of each element.
            ulp: As in `assert_rule`.
        """
        for (path, x), y, size in zip(
            _tree.walk(w), _tree.leaves(expected), _tree.leaves(scale), strict=True
        ):
            actual, wanted, sizes = (nested(path, z) for z in (at(new, path), y, size))
            most = self.ulp(x) if ulp is None else ulp
            assert_close_ulp(actual, wanted, most, sizes, dtype=x.dtype)

    def ulp(self, x: Any) -> float:
        """How far off the domain lets the elements of such an array be."""
        return self.domain.ulp[_arrays.name_of(x.dtype)]


def _objects(values: list[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def at(tree: Any, path: Any) -> Any:
    """The leaf at a path."""
    for key in path:
        tree = dict(_tree.children(tree))[key]
    return tree


def nested(path: Any, leaf: Any) -> Any:
    """A tree of dicts that holds this leaf alone."""
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf


def mapped(fn: Callable[..., Any], *trees: Any) -> Any:
    """The first tree with fn of the leaves of all, which have one structure."""
    leaves = zip(*map(_tree.leaves, trees), strict=True)
    return _tree.rebuild(trees[0], [fn(*row) for row in leaves])
