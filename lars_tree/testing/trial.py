"""One trial of an update function or an optimizer: the values that a law draws, and its calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from hypothesis import strategies as st

from lars_tree._tree import nodes, structure
from lars_tree.testing import _arrays, strategies, trees
from lars_tree.testing.assertions import assert_close_ulp
from lars_tree.testing.exact import Convention, ExactRule

Update = Callable[..., Any]

ELEMENTS = {
    # Nonzero, with few bits, so that products with powers of two are exact in every format.
    "plain": st.integers(1, 64).map(lambda n: n / 8) | st.integers(-64, -1).map(lambda n: n / 8),
    # The squares of these numbers neither overflow nor underflow in float32.
    "moderate": st.floats(-8, 8, width=16, allow_subnormal=False),
    "extreme": None,  # any finite numbers
}


@dataclass(frozen=True, eq=False)
class Domain:
    """What an update function or an optimizer is tried on; see `check_update_laws`."""

    library: _arrays.Library
    dtypes: Sequence[str]
    node_types: Sequence[type]
    nested: bool
    key_order: bool
    shapes: st.SearchStrategy[tuple[int, ...]]
    rule: ExactRule
    ulp: Mapping[str, float]
    convention: Convention = "paper"
    momentum: float | None = 0.5

    @cached_property
    def pairs(self) -> dict[str, st.SearchStrategy[Any]]:
        """Strategies for weights and gradients, by the kind of their elements."""
        return {
            kind: trees.columns(self._layers(elements, 1), 2, self._trees)
            for kind, elements in ELEMENTS.items()
        }

    @cached_property
    def runs(self) -> dict[bool, st.SearchStrategy[Any]]:
        """Strategies for weights and the gradients of several steps; with True, some are None."""
        layers = lambda steps: self._layers(ELEMENTS["plain"], steps)  # noqa: E731
        steps = st.integers(2, 3)
        return {
            missing: trees.runs(layers, steps=steps, missing=missing, trees=self._trees)
            for missing in (False, True)
        }

    def _layers(self, elements: Any, gradients: int) -> st.SearchStrategy[Any]:
        return strategies.layers(
            st.sampled_from(list(self.dtypes)),
            self.shapes,
            elements=elements,
            library=self.library,
            gradients=gradients,
        )

    def _trees(self, leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        keys = st.sampled_from("abc") | st.sampled_from(trees.ODD_KEYS)
        if not self.nested:
            return st.dictionaries(keys, leaves, max_size=4)
        nested = trees.nests(leaves, keys=keys, node_types=self.node_types, max_leaves=4)
        return nested.filter(lambda tree: not structure.is_leaf(tree))


class Trial:
    """The argument of a law: an update function, and methods to try it.

    Calling a trial calls the function with copies of the arguments, so that a function that
    modifies its arguments breaks only the law `leaves_its_inputs_alone`. For an optimizer, the
    function is the first step of a run, and `run` makes further steps.

    >>> from hypothesis import strategies as st
    >>> from lars_tree.testing import Trial, check_update_laws
    >>> def goes_downhill(trial: Trial) -> None:
    ...     w, dcdw = trial.pair()
    ...     rate = trial.draw(st.floats(0, 1), "lr")
    ...     new = trial(w, dcdw, rate)
    ...     assert all(((w[key] - new[key]) * dcdw[key] >= 0).all() for key in w)
    >>> check_update_laws(lars_update, laws=[goes_downhill], nested=False)

    Attributes:
        update: The function itself.
        domain: The arrays and trees that the function is tried on.
        optimizer: The function that makes an optimizer, if `check_optimizer_laws` was called.
    """

    def __init__(
        self, update: Update, data: st.DataObject, domain: Domain, optimizer: Any = None
    ) -> None:
        self.update = update
        self.domain = domain
        self.optimizer = optimizer
        self._data = data

    def __call__(self, w: Any, dcdw: Any, lr: float, **options: Any) -> Any:
        """The result of the function for copies of w and dcdw."""
        return self.update(_arrays.copied(w), _arrays.copied(dcdw), lr, **options)

    def draw(self, strategy: st.SearchStrategy[Any], label: str) -> Any:
        """A value of the strategy; the report of a broken law shows it under this label."""
        return self._data.draw(strategy.map(_Shown), label).value

    def pair(self, kind: str = "plain") -> tuple[Any, Any]:
        """Weights and gradients: two trees of the same structure.

        Args:
            kind: The kind of their elements: "plain", "moderate" or "extreme"; see `ELEMENTS`.
        """
        return self.draw(self.domain.pairs[kind], "w, dcdw")  # type: ignore[no-any-return]

    def steps(self, *, missing: bool = False) -> tuple[Any, list[Any]]:
        """Weights and the gradients of two or three steps, as in `runs`."""
        w, gradients = self.draw(self.domain.runs[missing], "w, [dcdw, ...]")
        return w, gradients

    def run(self, w: Any, **options: Any) -> Run:
        """A run of the optimizer that starts with copies of these weights.

        Args:
            w: The weights.
            **options: Options of the optimizer, besides its rate. The momentum is that of
                `check_optimizer_laws` unless it is given here.
        """
        if self.domain.momentum is not None:
            options = {"momentum": self.domain.momentum, **options}
        return Run(self.optimizer, _arrays.copied(w), options)

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
        for (path, x), y, g in zip(
            structure.walk(w), matched(w, new), matched(w, dcdw), strict=True
        ):
            exact = self.domain.rule.step(numbers(x), numbers(g), lr, decay_lambda)
            self.assert_leaf_close(path, x, y, *exact, ulp)

    def assert_close(self, new: Any, w: Any, expected: Any, scale: Any, ulp: float | None) -> None:
        """Assert that the new weights are close to `expected`, in ulps of the dtype of `w`.

        Ulps are measured at the elements of `scale`. `ulp` is as in `assert_rule`.
        """
        columns = (matched(w, tree) for tree in (new, expected, scale))
        for (path, x), y, e, size in zip(structure.walk(w), *columns, strict=True):
            self.assert_leaf_close(path, x, y, e, size, ulp)

    def assert_leaf_close(
        self, path: Any, x: Any, new: Any, expected: Any, scale: Any, ulp: float | None
    ) -> None:
        """`assert_close` for the leaf of w at one path; `expected` may have another shape."""
        leaves = new, expected.reshape(x.shape), scale.reshape(x.shape)
        actual, wanted, sizes = (_nested(path, leaf) for leaf in leaves)
        most = self.ulp(x) if ulp is None else ulp
        assert_close_ulp(actual, wanted, most, sizes, dtype=x.dtype)

    def ulp(self, x: Any) -> float:
        """The distance that the domain accepts for elements of an array with this dtype."""
        return self.domain.ulp[_arrays.name_of(x.dtype)]


class Optimizer(Protocol):
    """What `check_optimizer_laws` needs of an optimizer: the interface of `lars_tree.Lars`."""

    def init(self, w: Any) -> Any:
        """The state before the first step."""

    def update(self, w: Any, dcdw: Any, state: Any) -> tuple[Any, Any]:
        """The new weights and the new state. `state` itself may be modified."""


@runtime_checkable
class Saving(Protocol):
    """What an optimizer may have in addition, if pickling its state is not how it is saved."""

    def save(self, state: Any) -> Any:
        """What has to be stored to continue with this state."""

    def load(self, w: Any, saved: Any) -> Any:
        """The state for these weights from what `save` returned."""


class Run:
    """A run of an optimizer, which `Trial.run` starts.

    >>> from functools import partial
    >>> from lars_tree.testing import Run
    >>> w, g = {"a": np.array([3.0, 4.0])}, {"a": np.array([0.0, 10.0])}
    >>> run = Run(partial(Lars, trust_coefficient=1.0, eps=0.0), w, {"momentum": 0.5})
    >>> run.step(g, lr=0.1)["a"]                # ratio 5 / 10: a step of 0.05 * [0, 10]
    array([3. , 3.5])
    >>> run.resume()
    >>> run.step({"a": None})["a"], run.step({"a": np.zeros(2)})["a"]   # half of the first step
    (array([3. , 3.5]), array([3.  , 3.25]))

    Attributes:
        w: The weights after the last step.
    """

    def __init__(self, make: Callable[..., Optimizer], w: Any, options: Mapping[str, Any]) -> None:
        self.w = w
        self._make, self._options = make, options
        self._optimizers: dict[float, Optimizer] = {}
        self._state: list[Any] = []  # empty before the first step

    def step(self, dcdw: Any, lr: float = 0.5, *, copy: bool = True) -> Any:
        """Take a step and return the new weights; with `copy` on copies of weights and gradients.

        An optimizer is made for each new rate; it gets the state of the one before.
        """
        w, g = _arrays.copied([self.w, dcdw]) if copy else (self.w, dcdw)
        optimizer = self._optimizer(lr)
        state = self._state.pop() if self._state else optimizer.init(w)
        self.w, state = optimizer.update(w, g, state)
        self._state.append(state)
        return self.w

    def resume(self, lr: float = 0.5) -> None:
        """Save the state and continue with it in a new optimizer, as after a restart.

        Uses the methods `save(state)` and `load(w, saved)` of the optimizer if it has them, and
        pickle if not.
        """
        old, state = self._optimizer(lr), self._state.pop()
        self._optimizers.clear()
        new = self._optimizer(lr)
        if isinstance(old, Saving) and isinstance(new, Saving):
            self._state.append(new.load(_arrays.copied(self.w), old.save(state)))
        else:
            self._state.append(_arrays.pickled(state))

    def _optimizer(self, lr: float) -> Optimizer:
        if lr not in self._optimizers:
            self._optimizers[lr] = self._make(lr, **self._options)
        return self._optimizers[lr]


def first_step(make: Callable[..., Optimizer], momentum: float | None) -> Update:
    """The update function that takes the first step of an optimizer."""

    def update(w: Any, dcdw: Any, lr: float, decay_lambda: float | None = None) -> Any:
        options = {"momentum": momentum, "weight_decay": decay_lambda}
        given = {name: x for name, x in options.items() if x is not None}
        return Run(make, w, given).step(dcdw, lr, copy=False)

    return update


class _Shown:
    """A drawn value; its repr shows the arrays in Containers too."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.pretty(_visible(self.value))


class _Items(dict[Any, Any]):
    """The items of a Container."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        with printer.group(1, "Container(", ")"):
            printer.pretty(dict(self))


def _visible(node: Any) -> Any:
    """A tree with `_Items` for its Containers, whose own repr shows no values."""
    if structure.is_leaf(node):
        return node
    values = [_visible(child) for _, child in nodes.children(node)]
    if nodes.is_container(node):
        return _Items(zip(node, values, strict=True))
    return nodes.replace_children(node, values)


def numbers(x: Any) -> list[float]:
    """The elements of an array of any library."""
    return _arrays.to_numpy(x).ravel().tolist()


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


def matched(tree: Any, other: Any) -> list[Any]:
    """For each leaf of `tree`, the leaf of `other` at the same path, whatever the order of keys."""
    return structure.broadcast("the result", tree, other, exact=True)


def mapped(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A tree like the first; its leaves are fn(x, y, ...) of the leaves of all trees, by key."""
    columns = (matched(tree, other) for other in others)
    rows = zip(structure.leaves(tree), *columns, strict=True)
    return structure.rebuild(tree, [fn(*row) for row in rows])


def as_numbers(tree: Any) -> Any:
    """The tree with its arrays as float64 arrays of numpy."""
    return mapped(lambda x: _arrays.to_numpy(x).astype(float), tree)
