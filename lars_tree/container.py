"""Container: a dict of dicts with paths and attribute access. Structure only.

What is about arrays is a function; the few methods that look at arrays call them (`_compare.py`,
`_show.py`, `update.py`). `_pytrees.py` makes Container known to JAX, torch and optree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Self, Unpack, overload

from lars_tree import _compare, _conversion, _paths, _pytrees, _show, _tree, errors
from lars_tree._core.types import Flags, Numbers, T
from lars_tree._operators import Arithmetic
from lars_tree._options import Options, StepOptions
from lars_tree.errors import Path, PathAttributeError, PathKeyError, path_string
from lars_tree.update import lars_update


class Container(Arithmetic, dict[Any, Any]):
    """A dict that holds nested Containers, read by key, by attribute or by path.

    >>> w = Container(encoder={"kernel": np.ones((3, 4)), "bias": np.zeros(4)}, head=np.ones(4))
    >>> w
    Container: 3 leaves, 20 parameters, 160 bytes
      encoder/kernel  float64 (3, 4)
      encoder/bias    float64 (4,)
      head            float64 (4,)
    >>> w.encoder.bias is w["encoder"]["bias"] is w["encoder/bias"] is w["encoder", "bias"]
    True
    >>> w["decoder/bias"] = np.zeros(2)               # makes the parent
    >>> list(w.decoder)
    ['bias']
    >>> (2 * w).head
    array([2., 2., 2., 2.])

    Mappings inside become Containers on the way in; lists and tuples stay nodes. Keys are literal
    in the constructor, in `update` and in `|`. Elsewhere the exact key comes first, then the path:
    a string split at '/', or a tuple of keys. Other trees may stand wherever a Container may.

    Args:
        mapping: A mapping or (key, value) pairs, as for dict.
        **keys: Further keys.
    """

    __slots__ = ()

    def __init__(
        self, mapping: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (), /, **keys: Any
    ) -> None:
        super().__init__()
        self.update(mapping, **keys)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _pytrees.register(cls)

    @classmethod
    def _lars_tree_make(cls, items: Mapping[Any, Any] | Iterable[tuple[Hashable, Any]]) -> Self:
        """A Container of children that need no conversion."""
        new = cls.__new__(cls)
        dict.update(new, items)
        return new

    # Reading and writing

    def __getitem__(self, key: Any) -> Any:
        found = _paths.find(self, key)
        if found is _paths.MISSING:
            raise _paths.missing_error(PathKeyError, self, _paths.split(key))
        return found

    def __contains__(self, key: object) -> bool:
        return _paths.find(self, key) is not _paths.MISSING

    def get(self, key: Any, default: Any = None) -> Any:
        """The value at a key or path, or the default."""
        found = _paths.find(self, key)
        return default if found is _paths.MISSING else found

    def __setitem__(self, key: Any, value: Any) -> None:
        _paths.put(self, key, _conversion.taken("value", value, type(self)), type(self))

    def __delitem__(self, key: Any) -> None:
        _paths.remove(self, key)

    def __getattr__(self, name: str) -> Any:
        if _paths.is_special(name):
            raise PathAttributeError(f"no attribute {name!r}; a key is read as w[{name!r}]")
        if dict.__contains__(self, name):
            return dict.__getitem__(self, name)
        raise _paths.missing_error(PathAttributeError, self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_method(name)
        self[(name,)] = value

    def __delattr__(self, name: str) -> None:
        self._refuse_method(name)
        if not dict.__contains__(self, name):
            raise _paths.missing_error(PathAttributeError, self, (name,))
        dict.__delitem__(self, name)

    def _refuse_method(self, name: str) -> None:
        if hasattr(type(self), name) or _paths.is_special(name):
            text = f"{name!r} is an attribute of Container itself: write w[{name!r}] for the key"
            raise PathAttributeError(text)

    def __dir__(self) -> list[str]:
        names = (key for key in self if isinstance(key, str) and key.isidentifier())
        return [*super().__dir__(), *names]

    def _ipython_key_completions_(self) -> list[Any]:
        return list(self)

    # dict's own methods, where dict would not convert or would not give Containers back

    def update(self, mapping: Any = (), /, **keys: Any) -> None:
        """Put in all keys of a mapping or of pairs, literally, as dict.update does."""
        items = dict(_tree.children(mapping) if isinstance(mapping, Mapping) else mapping)
        whole = mapping if isinstance(mapping, Mapping) else items
        with _tree.explaining({"mapping": whole, "keys": keys}):
            taken = _tree.rebuilding("mapping", _conversion.converted, items | keys, type(self))
        dict.update(self, taken)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value at a key or path, which is set to the default first if nothing is there."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove a key or path and return what was there, or the default."""
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    @_conversion.explained
    def copy(self) -> Self:
        """A copy of all nodes that shares the leaves."""
        return _tree.rebuild(self, _tree.leaves(self), "self")

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = type(self).__new__(type(self))
        for key, child in dict.items(self):
            dict.__setitem__(new, copy.deepcopy(key, memo), copy.deepcopy(child, memo))
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def __or__(self, other: Any) -> Self:
        if not isinstance(other, Mapping):
            return NotImplemented
        new = self.copy()
        new.update(other)
        return new

    def __ror__(self, other: Any) -> Self:
        return type(self)(other) | self if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    # Leaves and shapes of trees

    @_conversion.explained
    def leaves(self) -> list[Any]:
        """The leaves in order; None and empty nodes: None is a leaf, an empty node has none."""
        return _tree.leaves(self)

    @_conversion.explained
    def paths(self) -> list[Path]:
        """The path of each leaf, a tuple of keys."""
        return [path for path, _ in _tree.walk(self)]

    @_conversion.explained
    def unflatten(self, leaves: Iterable[Any]) -> Self:
        """A Container like this one with other leaves, given in the order of `leaves()`.

        >>> Container(a=1, b={"c": 2}).unflatten([3, 4]).to_dict()
        {'a': 3, 'b': {'c': 4}}
        """
        leaves, count = list(leaves), len(_tree.leaves(self))
        if len(leaves) != count:
            raise errors.StructureError(f"expected {count} leaves, got {len(leaves)}")
        return _tree.rebuild(self, leaves, "self")

    @_conversion.explained
    def to_flat(self, sep: str = "/") -> dict[str, Any]:
        """The leaves by name, keys joined by `sep`; '.' gives the names of a state_dict.

        An empty node stays, as an empty Container. Of a list the indices become names.

        >>> Container(a={"b": 1, "c": 2}).to_flat(".")
        {'a.b': 1, 'a.c': 2}

        Raises:
            StructureError: a key holds `sep`, or two paths have the same name.
        """
        return _paths.flat(self, sep, type(self))

    @classmethod
    def from_flat(cls, flat: Mapping[Any, Any], sep: str = "/") -> Self:
        """The Container whose leaves have these names, split at `sep`.

        >>> Container.from_flat({"a.b": 1, "a.c": 2}, sep=".").to_dict()
        {'a': {'b': 1, 'c': 2}}

        Raises:
            PathKeyError: two names are the same, or one goes through the leaf of another.
        """
        return cls._from_flat(flat, sep, "flat")

    @classmethod
    def _from_flat(cls, flat: Mapping[Any, Any], sep: str, argument: str) -> Self:
        new = cls()
        for name, leaf in _conversion.taken(argument, flat, cls).items():
            path = tuple(name.split(sep)) if isinstance(name, str) else (name,)
            _paths.put_new(new, path, leaf, cls)
        return new

    @_conversion.explained
    def to_dict(self) -> dict[Any, Any]:
        """Plain nested dicts, sharing the leaves."""
        return _tree.rebuilding("self", _conversion.plain, self)  # type: ignore[no-any-return]

    @_conversion.explained
    def map(self, fn: Callable[..., Any], /, *rest: Any, with_path: bool = False) -> Self:
        """A Container of fn(leaf, ...) for each leaf; None, which holds nothing, stays None.

        >>> Container(a=1, b={"c": 2}).map(lambda x, y: x * y, {"a": 10, "b": 100}).to_dict()
        {'a': 10, 'b': {'c': 200}}

        Args:
            fn: Called with a leaf and with the values that `rest` has for it.
            *rest: Trees like this one, or prefixes: a value at an inner node serves all below it.
            with_path: Whether to call fn(path, leaf, ...), with the path as a tuple of keys.

        Raises:
            StructureError: one of the rest is no prefix of this Container.

        Whatever fn raises gets a note with the path of the leaf.
        """
        columns = [
            _tree.broadcast(f"argument {i}", self, tree, to="the Container")
            for i, tree in enumerate(rest, 1)
        ]
        results = _tree.map_leaves(fn, self, *columns, with_path=with_path)
        taken = [_conversion.taken("the result of fn", result, type(self)) for result in results]
        return _tree.rebuild(self, taken, "self")

    @_conversion.explained
    def filter(self, pred: Callable[[Path, Any], Any], /) -> Self:
        """The leaves for which pred(path, leaf) holds, without the nodes that this empties.

        A list or tuple that keeps one of its leaves keeps its length, with None for the others.

        >>> Container(a={"kernel": 1, "bias": 2}).filter(lambda p, x: p[-1] == "bias").to_dict()
        {'a': {'bias': 2}}
        """
        kept = [bool(pred(path, leaf)) for path, leaf in _tree.walk(self)]
        return self._picked(kept)

    @_conversion.explained
    def partition(self, pred: Callable[[Path, Any], Any], /) -> tuple[Self, Self]:
        """`filter` and its complement."""
        kept = [bool(pred(path, leaf)) for path, leaf in _tree.walk(self)]
        return self._picked(kept), self._picked([not keep for keep in kept])

    def _picked(self, kept: list[bool]) -> Self:
        picked = _tree.pick(self, iter(kept))
        return type(self)() if picked is _tree.NOTHING else picked

    # Comparison, arithmetic, summaries

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and _compare.equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    @_conversion.explained
    def allclose(self, other: Any, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether the keys are the same and all |a - b| <= atol + rtol |b|."""
        return _compare.close(self, other, rtol, atol)

    @_conversion.explained
    def diff(self, other: Any) -> dict[str, str]:
        """The differences from another tree: what they are, by path.

        >>> Container(a=np.ones(2), b=np.ones(3)).diff({"a": np.ones(2), "b": np.zeros(4)})
        {'b': 'float64 (3,) here, float64 (4,) there'}
        """
        return {path_string(path): text for path, text in _compare.differences(self, other)}

    @_conversion.explained
    def _operate(self, operation: Callable[..., Any], *operands: Any) -> Self:
        lead = self
        for other in operands:
            # Of two trees, one may be a prefix of the other.
            if isinstance(other, Mapping) and any(_tree.differences(self, other)):
                lead = self
                if not any(_tree.differences(other, self)):
                    lead = _conversion.taken("one operand", other, Container)
        columns = [
            _tree.broadcast("one operand", lead, operand, to="the other") for operand in operands
        ]
        # The leaves of `lead` say where there is something; the operands are in their own order.
        results = _tree.map_leaves(lambda _, *values: operation(*values), lead, *columns)
        return _tree.rebuild(lead, results, "one operand")

    @_conversion.explained
    def num_leaves(self) -> int:
        """The number of leaves that hold something."""
        return sum(leaf is not None for leaf in _tree.leaves(self))

    @_conversion.explained
    def num_parameters(self) -> int:
        """The number of elements of all arrays."""
        return _show.totals(_tree.leaves(self)).parameters

    @_conversion.explained
    def num_bytes(self) -> int:
        """The memory of all arrays in bytes."""
        return _show.totals(_tree.leaves(self)).bytes

    def __repr__(self) -> str:
        return _show.text(self)

    def _repr_html_(self) -> str:
        return _show.html(self)

    def __rich__(self) -> Any:
        return _show.rich_tree(self)

    @overload
    def lars_update(
        self, dcdw: Any, lr: Numbers, /, *, out: None = None, **options: Unpack[StepOptions]
    ) -> Self: ...
    @overload
    def lars_update(
        self, dcdw: Any, lr: Numbers, /, *, out: T, **options: Unpack[StepOptions]
    ) -> T: ...

    def lars_update(
        self,
        dcdw: Any,
        lr: Numbers,
        /,
        *,
        decay_lambda: Numbers = 0,
        stop_gradients: Flags = True,
        out: Any = None,
        **options: Unpack[Options],
    ) -> Any:
        """Take one LARS step on every array: `lars_tree.lars_update` with self as `w`.

        >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
        >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
        >>> w.lars_update(g, 0.1).kernel         # ratio = 5 / 10: a step of 0.05 * [0, 10]
        array([3. , 3.5])
        >>> w.lars_update(g, {"kernel": 0.1, "bias": 1}, out=w).bias                # in place
        array([-1.])

        Args:
            dcdw: Gradients: an array, a scalar, or a Container or dict that is a prefix of self.
            lr: The rate: the same.
            decay_lambda: Weight decay: the same.
            stop_gradients: False to differentiate through the step.
            out: The Container to write to; may be self.
            **options: The further options of `lars_tree.lars_update`.

        Returns:
            A new Container, or `out`.

        Raises:
            LarsTreeError: as `lars_tree.lars_update` does; nothing was written then.
        """
        return lars_update(
            self,
            dcdw,
            lr,
            decay_lambda=decay_lambda,
            stop_gradients=stop_gradients,
            out=out,
            **options,
        )


_pytrees.register(Container)
_pytrees.trust_in_files(Container)
