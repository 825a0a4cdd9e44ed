"""torch.load(weights_only=True) creates Containers, and crafted files cannot call other code."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
from conftest import need

from lars_tree import Array, Container, PathAttributeError

torch = need("torch")


made = []


class Weights(Container):
    """A user's subclass, whose constructor could do anything."""

    def __init__(self, *args, **keys):
        made.append(dict(*args, **keys))
        super().__init__(*args, **keys)


class Called:
    """An object that a file may create but must not call."""

    def __call__(self, *args):
        pytest.fail("a file called it")

    update = __call__


class Crafted:
    """An object whose `__reduce__` returns the given values."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


def loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_subclass_is_not_called_before_its_user_trusts_it():
    file = saved(Crafted(Weights, ({"path": "of an attacker"},)))
    made.clear()
    with pytest.raises(pickle.UnpicklingError, match=r"Weights was not an allowed global"):
        loaded(file)
    assert made == []
    with torch.serialization.safe_globals([Weights]):
        assert type(loaded(file)) is Weights
    assert made == [{"path": "of an attacker"}]


def test_what_torch_trusts_does_not_change_with_subclasses():
    before = set(torch.serialization.get_safe_globals())
    type("Later", (Container,), {})
    assert set(torch.serialization.get_safe_globals()) == before >= {Container, Array}


@pytest.mark.parametrize("state", ["text", {"a": 1}, (None, {"__setstate__": 1}), (1, 2)])
@pytest.mark.parametrize("key", ["__setstate__", "__dict__"])
def test_a_crafted_state_does_not_call_values_of_special_keys(key, state):
    file = saved(Crafted(Container, ({key: Called()},), state))
    with torch.serialization.safe_globals([Called]), pytest.raises(Exception, match=r"__|unpack"):
        loaded(file)


def test_special_names_are_keys_but_not_attributes():
    w = Container({"__deepcopy__": 1.0, "__x__": {"__array__": 2.0}, "_y_": 3.0})
    assert copy.deepcopy(w) == w
    assert not hasattr(w, "__x__")
    assert (w["__x__"]["__array__"], w._y_) == (2.0, 3.0)
    with pytest.raises(PathAttributeError, match=r"no attribute '__x__'; a key is read as w\['__x"):
        w.__x__  # noqa: B018
    with pytest.raises(PathAttributeError, match=r"write w\['__z__'\] for the key"):
        w.__z__ = 1
    with pytest.raises(PathAttributeError, match=r"write w\['__x__'\] for the key"):
        del w.__x__
