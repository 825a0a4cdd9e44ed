"""Node classes as users write them, which store, copy or read their items unusually."""

from __future__ import annotations

from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, namedtuple
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

import attrs
import numpy as np


class Frozen(dict):
    """Immutable like frozendict: `__copy__` returns the object itself."""

    def __setitem__(self, key, value):
        raise TypeError("immutable")

    __delitem__ = __setitem__

    def __copy__(self):
        return self


class CopiesToItself(dict):
    def __copy__(self):
        return self


class CopiesToDict(dict):
    def __copy__(self):
        return dict(self)


class Stored(dict):
    """Stores its items in an attribute."""

    def __init__(self, items=()):
        self.store = dict(items)

    def __getitem__(self, key):
        return self.store[key]

    def __setitem__(self, key, value):
        self.store[key] = value


class Elsewhere(Stored):
    """The method `items` reads `store` too, as in python-benedict and DotMap."""

    def items(self):
        return self.store.items()


class ElsewhereInAll(Elsewhere):
    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)

    def keys(self):
        return self.store.keys()

    def values(self):
        return self.store.values()


class ElsewhereByKey(Stored):
    """Overrides only `__iter__` and `__len__`; `items()` reads the base dict, which is empty."""

    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)


class Constructed(ElsewhereInAll):
    """Stores its items only when it is made."""

    __setitem__ = dict.__setitem__


class Swapped(dict):
    """Reads each of its two items under the key of the other."""

    def __getitem__(self, key):
        return dict.__getitem__(self, {"a": "b", "b": "a"}[key])


class Sorted(dict):
    def __iter__(self):
        return iter(sorted(dict.keys(self)))


class Copying(dict):
    """Keeps copies of the arrays that are put in."""

    def __init__(self, items):
        for key, value in items.items():
            self[key] = value

    def __setitem__(self, key, value):
        super().__setitem__(key, value.copy() if isinstance(value, np.ndarray) else value)


class Dropping(UserDict):
    """Drops the last of the items that it is made of."""

    def __init__(self, items):
        super().__init__(items)
        self.data.popitem()


class Renaming(UserDict):
    def __init__(self, items):
        super().__init__({f"{key}~": value for key, value in items.items()})


class DotMapLike(MutableMapping, OrderedDict):
    """Converts the dicts among its items to its own class."""

    def __init__(self, items=()):
        self.store = OrderedDict()
        for key, value in dict(items).items():
            self.store[key] = DotMapLike(value) if isinstance(value, dict) else value

    def __getitem__(self, key):
        return self.store[key]

    def __setitem__(self, key, value):
        self.store[key] = value

    def __delitem__(self, key):
        del self.store[key]

    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)

    def items(self):
        return self.store.items()

    def __copy__(self):
        return type(self)(self)


class Mirrored(dict):
    """Stores its items as attributes too, like EasyDict."""

    def __init__(self, items=()):
        for key, value in dict(items).items():
            self[key] = value

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class First(dict):
    """Keeps one of its values as an attribute."""

    def __init__(self, items):
        super().__init__(items)
        self.first = next(iter(self.values()))


class FirstOfPair(namedtuple("FirstOfPair", "a b")):
    def __new__(cls, a, b):
        new = super().__new__(cls, a, b)
        new.first = a
        return new


class Attributes(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class OddAttributes(Attributes):
    def __init__(self, name, items):
        super().__init__(items)


class Named(dict):
    def __init__(self, name="encoder", items=()):
        super().__init__(items)
        self.name = name


class Checked(Named):
    """Also checks its items."""

    def __setitem__(self, key, value):
        assert isinstance(key, str)
        super().__setitem__(key, value)


class Slotted(dict):
    __slots__ = ("name",)


class Rated(UserDict):
    """A UserDict whose constructor requires a further argument."""

    def __init__(self, rate, items):
        super().__init__(items)
        self.rate = rate


class Group(Mapping):
    """Returns a new array each time an item is read, like a group of an h5py file."""

    def __init__(self, file, items):
        self.file, self.stored = file, dict(items)

    def __getitem__(self, key):
        x = self.stored[key]
        return Group(self.file, x) if isinstance(x, dict) else np.array(x)

    def __iter__(self):
        return iter(self.stored)

    def __len__(self):
        return len(self.stored)


class ListCopiesToItself(list):
    def __copy__(self):
        return self


class NamedList(list):
    def __init__(self, name, items):
        super().__init__(items)
        self.name = name


class ListElsewhere(list):
    def __init__(self, items=()):
        self.store = []
        self.extend(items)

    def append(self, item):
        self.store.append(item)

    def extend(self, items):
        self.store.extend(items)

    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)

    def __getitem__(self, key):
        return self.store[key]


class SharedList(ListElsewhere):
    """A list whose constructor requires a further argument."""

    def __init__(self, name, items):
        super().__init__(items)


class Tagged(tuple):
    def __new__(cls, tag, items):
        new = super().__new__(cls, items)
        new.tag = tag
        return new


class Pair(namedtuple("Pair", "a b")):
    __slots__ = ()

    def __new__(cls, both):
        return super().__new__(cls, *both)


@attrs.frozen
class FrozenLayer:
    a: object
    _b: object = attrs.field(validator=attrs.validators.not_(attrs.validators.instance_of(int)))


@attrs.define(slots=False)
class ConvertedLayer:
    a: object = attrs.field(converter=lambda x: x * 2)
    b: object = None


@attrs.frozen
class SingleLayer:
    """Its `__copy__` returns the object itself."""

    a: object
    b: object

    def __copy__(self):
        return self


@attrs.frozen
class CachedLayer(SingleLayer):
    """Has a field that the constructor does not take."""

    cache: object = attrs.field(init=False, default=None)


def mapping(make):
    return lambda a, b: make({"a": a, "b": b})


def sequence(make):
    return lambda a, b: make([a, b])


REBUILT = {
    "frozendict": mapping(Frozen),
    "copies to itself": mapping(CopiesToItself),
    "copies to a dict": mapping(CopiesToDict),
    "elsewhere": mapping(Elsewhere),
    "elsewhere in all methods": mapping(ElsewhereInAll),
    "elsewhere by key": mapping(ElsewhereByKey),
    "constructed": mapping(Constructed),
    "copying": mapping(Copying),
    "like DotMap": mapping(DotMapLike),
    "mirrored": mapping(Mirrored),
    "attributes": mapping(Attributes),
    "attributes, another constructor": mapping(lambda items: OddAttributes("x", items)),
    "another constructor": mapping(lambda items: Named("x", items)),
    "another constructor, checked": mapping(lambda items: Checked("x", items)),
    "OrderedDict": mapping(OrderedDict),
    "defaultdict": mapping(lambda items: defaultdict(list, items)),
    "Counter": mapping(Counter),
    "UserDict": mapping(UserDict),
    "proxy": mapping(MappingProxyType),
    "list that copies to itself": sequence(ListCopiesToItself),
    "list with another constructor": sequence(lambda items: NamedList("x", items)),
    "list elsewhere": sequence(ListElsewhere),
    "UserList": sequence(UserList),
    "tagged": sequence(lambda items: Tagged("x", items)),
    "namedtuple": sequence(Pair),
    "frozen attrs": FrozenLayer,
    "attrs with a converter": lambda a, b: ConvertedLayer(a / 2, b),
    "attrs that copy to themselves": SingleLayer,
}
REFUSED = {
    "ChainMap": lambda a, b: ChainMap({"b": b}, {"a": a}),
    "UserDict with another constructor": mapping(lambda items: Rated(0.1, items)),
    "read anew": mapping(lambda items: Group("file", items)),
    "swapped": lambda a, b: Swapped(a=b, b=a),
    "drops an item": lambda a, b: Dropping({"a": a, "b": b, "c": 0}),
    "renames its keys": mapping(Renaming),
    "list that cannot be made": sequence(lambda items: SharedList("x", items)),
}
ALL = REBUILT | REFUSED
