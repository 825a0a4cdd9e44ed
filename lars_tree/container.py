"""Container: a dict of dicts with paths and attribute access.

This module handles structure only. `update.py` and `_display/` handle the arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from sys import intern
from typing import Any, Self

from lars_tree import errors
from lars_tree._display import compare, show
from lars_tree._tree import conversion, nodes, paths, pytrees, structure
from lars_tree._tree.operators import Arithmetic
from lars_tree.errors import Path, PathAttributeError, PathKeyError, path_string
from lars_tree.update import Updatable


class Container(Updatable, Arithmetic, dict[Any, Any]):
    """A dict of nested Containers, read by key, by attribute or by path.

    >>> w = Container(encoder={"kernel": np.ones((3, 4)), "bias": np.zeros(4)}, head=np.ones(4))
    >>> w
    Container: 3 leaves, 20 parameters, 160 bytes
      encoder/kernel  float64 (3, 4)
      encoder/bias    float64 (4,)
      head            float64 (4,)
    >>> w.encoder.bias is w["encoder"]["bias"] is w["encoder/bias"] is w["encoder", "bias"]
    True
    >>> w["decoder", "bias"] = np.zeros(2)            # creates the parent
    >>> list(w.decoder), w.get("decoder/kernel", "none"), w.num_parameters(), w.num_bytes()
    (['bias'], 'none', 22, 176)
    >>> (2 * w).head
    array([2., 2., 2., 2.])

    Mappings become Containers when they are put in; lists and tuples stay lists and tuples.
    To read or delete a value, the exact key is looked up first, then a path: a tuple of keys, or a
    string split at '/'. To write a value, a string is one key, as in a dict, and a tuple of keys is
    a path. Methods that take another Container also take any other tree.

    Args:
        mapping: A mapping or (key, value) pairs, as for dict.
        **keys: Further items, as for dict.

    Raises:
        StructureError: The mapping (in methods: self) contains itself, or cannot be rebuilt.
        PathKeyError (a KeyError), PathAttributeError (an AttributeError): A key or path is missing.
    """

    __slots__ = ()

    def __init__(
        self, mapping: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (), /, **keys: Any
    ) -> None:
        super().__init__()
        self.update(mapping, **keys)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytrees.register(cls)

    @classmethod
    def _lars_tree_make(cls, items: Mapping[Any, Any] | Iterable[tuple[Hashable, Any]]) -> Self:
        """Make a Container of children in which all mappings are Containers already."""
        new = cls.__new__(cls)
        dict.update(new, items)
        return new

    # Reading and writing

    def __getitem__(self, key: Any) -> Any:
        found = paths.find(self, key)
        if found is structure.MISSING:
            raise paths.missing_error(PathKeyError, self, paths.split(key))
        return found

    def __contains__(self, key: object) -> bool:
        return paths.find(self, key) is not structure.MISSING

    def get(self, key: Any, default: Any = None) -> Any:
        """The value at a key or path, or the default."""
        found = paths.find(self, key)
        return default if found is structure.MISSING else found

    def __setitem__(self, key: Any, value: Any) -> None:
        value = conversion.convert("value", value, type(self))
        if isinstance(key, tuple):
            paths.put(self, key, value)
        else:
            dict.__setitem__(self, key, value)

    def __delitem__(self, key: Any) -> None:
        paths.remove(self, key)

    def __getattr__(self, name: str) -> Any:
        if paths.is_special(name):
            text = f"no attribute {name!r}; a key is read as w[{name!r}]"
            raise errors.error(PathAttributeError, "name", text, paths=[(name,)])
        if dict.__contains__(self, name):
            return dict.__getitem__(self, name)
        raise paths.missing_error(PathAttributeError, self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_method(name)
        self[name] = value

    def __delattr__(self, name: str) -> None:
        self._refuse_method(name)
        if not dict.__contains__(self, name):
            raise paths.missing_error(PathAttributeError, self, (name,))
        dict.__delitem__(self, name)

    def _refuse_method(self, name: str) -> None:
        if hasattr(type(self), name) or paths.is_special(name):
            text = f"{name!r} is an attribute of Container itself: write w[{name!r}] for the key"
            raise errors.error(PathAttributeError, "name", text, paths=[(name,)])

    def __dir__(self) -> list[str]:
        names = (key for key in self if isinstance(key, str) and key.isidentifier())
        return [*super().__dir__(), *names]

    def _ipython_key_completions_(self) -> list[str]:
        """The names that IPython and notebooks offer after `w['`: keys and paths, nodes first."""
        return paths.completions(self)

    # Methods of dict that must convert mappings or return Containers

    def update(self, mapping: Any = (), /, **keys: Any) -> None:
        """Write all items of a mapping or of (key, value) pairs. Keys are never paths."""
        items = dict(nodes.items(mapping) if isinstance(mapping, Mapping) else mapping)
        whole = mapping if isinstance(mapping, Mapping) else items
        with structure.explaining({"mapping": whole, "keys": keys}):
            new = structure.rebuilding("mapping", conversion.convert_node, items | keys, type(self))
        dict.update(self, new)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value at a key or a path (a tuple). A missing value is set to the default first."""
        if not (key in self if isinstance(key, tuple) else dict.__contains__(self, key)):
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove a key or path and return its value; if it is missing, return the default, if any.

        >>> w = Container(a={"b": 1, "c": 2})
        >>> w.pop("a/b"), w.pop("a/b", 0), w.to_dict()
        (1, 0, {'a': {'c': 2}})
        """
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    @conversion.explain_cycles
    def copy(self) -> Self:
        """A copy with new nodes and the same leaves."""
        return structure.rebuild(self, structure.leaves(self), "self")

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

    @conversion.explain_cycles
    def merge(self, other: Mapping[Any, Any], /) -> Self:
        """The leaves of both trees; where both have a leaf, that of `other`.

        Mappings are merged key by key at every depth, whereas `|` replaces whole values at the top.
        Lists, tuples and leaves are replaced.

        >>> Container(a={"b": 1, "c": 2}).merge({"a": {"b": 3}, "d": 4}).to_dict()
        {'a': {'b': 3, 'c': 2}, 'd': 4}

        Raises:
            StructureError: `other` is not a mapping, or contains itself.
        """
        if not isinstance(other, Mapping):
            text = f"expected a mapping, got {errors.describe(other)}"
            raise errors.error(errors.StructureError, "other", f"other: {text}", paths=[()])
        new = self.copy()
        paths.merge(new, Container.copy(conversion.convert("other", other, type(self))))
        return new

    def __ror__(self, other: Any) -> Self:
        return type(self)(other) | self if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    # Leaves, names, selection

    @conversion.explain_cycles
    def leaves(self) -> list[Any]:
        """The leaves in order. None counts as a leaf; an empty node has no leaves."""
        return structure.leaves(self)

    @conversion.explain_cycles
    def paths(self) -> list[Path]:
        """The path of each leaf: a tuple of keys.

        >>> Container(a=1, b=[2, 3]).paths()
        [('a',), ('b', 0), ('b', 1)]
        """
        return [path for path, _ in structure.walk(self)]

    @conversion.explain_cycles
    def unflatten(self, leaves: Iterable[Any]) -> Self:
        """A Container with the same nodes and new leaves, in the order of `leaves()`.

        >>> Container(a=1, b={"c": 2}).unflatten([3, 4]).to_dict()
        {'a': 3, 'b': {'c': 4}}

        JAX, torch and optree sort the keys of a Container: their leaves are in another order. Put
        these back with their own function, such as
        `jax.tree.unflatten(jax.tree.structure(w), leaves)`, which restores the order of the keys.

        Raises:
            StructureError: the number of leaves differs.
        """
        leaves, count = list(leaves), len(structure.leaves(self))
        if len(leaves) != count:
            text = f"expected {count} leaves, got {len(leaves)}"
            raise errors.error(errors.StructureError, "leaves", text, paths=[()])
        return structure.rebuild(self, leaves, "self")

    @conversion.explain_cycles
    def to_flat(self, sep: str = "/") -> dict[str, Any]:
        """The leaves by name. Names are keys joined by `sep`; '.' gives those of a state_dict.

        Items of lists are named by index. An empty node becomes an empty Container.

        >>> Container(a={"b": 1, "c": 2}).to_flat(".")
        {'a.b': 1, 'a.c': 2}

        Raises:
            StructureError: a key contains `sep`, or two paths have the same name.
        """
        return paths.flat(self, sep)

    @classmethod
    def from_flat(cls, flat: Mapping[Any, Any], sep: str = "/") -> Self:
        """A Container of leaves given by name; a name split at `sep` is the path of the leaf.

        >>> Container.from_flat({"a.b": 1, "a.c": 2}, sep=".").to_dict()
        {'a': {'b': 1, 'c': 2}}

        Raises:
            PathKeyError: one name is the beginning of another, such as 'a' and 'a.b'.
        """
        return cls._from_flat(flat, sep, "flat")

    @classmethod
    def _from_flat(cls, flat: Mapping[Any, Any], sep: str, argument: str) -> Self:
        new = cls()
        for name, leaf in conversion.convert(argument, flat, cls).items():
            # One object for equal keys saves memory, and makes matching two trees faster.
            path = tuple(map(intern, name.split(sep))) if isinstance(name, str) else (name,)
            paths.put_new(new, path, leaf)
        return new

    @conversion.explain_cycles
    def to_dict(self) -> dict[Any, Any]:
        """The same tree as nested dicts. The leaves are shared."""
        dicts: dict[Any, Any] = structure.rebuilding("self", conversion.to_dicts, self)
        return dicts

    @conversion.explain_cycles
    def map(self, fn: Callable[..., Any], /, *rest: Any, with_path: bool = False) -> Self:
        """A Container of fn(leaf, ...) for each leaf. None stays None.

        >>> Container(a=1, b={"c": 2}).map(lambda x, y: x * y, {"a": 10, "b": 100}).to_dict()
        {'a': 10, 'b': {'c': 200}}

        Args:
            fn: Called with a leaf and the values that `rest` has for it. If it raises, a note with
                the path is added to the exception.
            *rest: Trees of the same structure, or prefixes: a value at a node applies to all leaves
                below it.
            with_path: Whether to call fn(path, leaf, ...), where the path is a tuple of keys.

        Raises:
            StructureError: one of `rest` is not a prefix of this Container.
        """
        columns = [
            structure.broadcast(f"argument {i}", self, tree, to="the Container")
            for i, tree in enumerate(rest, 1)
        ]
        results = structure.map_leaves(fn, self, *columns, with_path=with_path)
        new = [conversion.convert("the result of fn", x, type(self)) for x in results]
        return structure.rebuild(self, new, "self")

    @conversion.explain_cycles
    def filter(self, pred: Callable[[Path, Any], Any], /) -> Self:
        """The leaves for which pred(path, leaf) is true. Nodes without such leaves are removed.

        A list or tuple that is not removed keeps its length: None replaces the removed items.

        >>> Container(a={"kernel": 1, "bias": 2}).filter(lambda p, x: p[-1] == "bias").to_dict()
        {'a': {'bias': 2}}
        """
        kept = [bool(pred(path, leaf)) for path, leaf in structure.walk(self)]
        return structure.pick(self, kept)

    @conversion.explain_cycles
    def partition(self, pred: Callable[[Path, Any], Any], /) -> tuple[Self, Self]:
        """Two Containers: one of the leaves that `filter` keeps, one of the other leaves.

        >>> [part.to_dict() for part in Container(a=1, b=2).partition(lambda path, x: x > 1)]
        [{'b': 2}, {'a': 1}]
        """
        kept = [bool(pred(path, leaf)) for path, leaf in structure.walk(self)]
        return structure.pick(self, kept), structure.pick(self, [not keep for keep in kept])

    # Comparison, arithmetic, summaries

    @conversion.explain_cycles
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and compare.equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    @conversion.explain_cycles
    def allclose(self, other: Any, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether the keys are the same and |a - b| <= atol + rtol |b| for all elements."""
        return compare.close(self, other, rtol, atol)

    @conversion.explain_cycles
    def diff(self, other: Any) -> dict[str, str]:
        """The differences from another tree, by path.

        >>> Container(a=np.ones(2), b=np.ones(3)).diff({"a": np.ones(2), "b": np.zeros(4)})
        {'b': 'float64 (3,) here, float64 (4,) there'}
        """
        return {path_string(path): text for path, text in compare.differences(self, other)}

    @conversion.explain_cycles
    def _operate(self, operation: Callable[..., Any], *operands: Any) -> Self:
        lead = self
        for other in operands:
            if not isinstance(other, Mapping) or not any(structure.differences(self, other)):
                continue
            if not any(structure.differences(other, self)):  # self is a prefix of `other`
                lead = conversion.convert("one operand", other, Container)
        columns = [structure.broadcast("one operand", lead, x, to="the other") for x in operands]
        # The leaves of `lead` are not passed to the operation. If one is None, so is the result.
        results = structure.map_leaves(lambda _, *values: operation(*values), lead, *columns)
        return structure.rebuild(lead, results, "one operand")

    @conversion.explain_cycles
    def num_leaves(self) -> int:
        """The number of leaves that are not None."""
        return sum(leaf is not None for leaf in structure.leaves(self))

    @conversion.explain_cycles
    def num_parameters(self) -> int:
        """The number of elements of all arrays."""
        return show.totals(structure.leaves(self)).parameters

    @conversion.explain_cycles
    def num_bytes(self) -> int:
        """The number of bytes of all arrays."""
        return show.totals(structure.leaves(self)).bytes

    def __repr__(self) -> str:
        return show.text(self)

    def _repr_html_(self) -> str:
        from lars_tree._display import html  # needed only in notebooks

        return html.tree(self)

    def __rich__(self) -> Any:
        return show.rich_tree(self)


pytrees.register(Container)
pytrees.trust_in_files(Container)
