"""Ways to make one leaf of a call of lars_update invalid, and a check of the error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from conftest import need

from lars_tree import OutError, StructureError, lars_update

KEYS = ["a", "b", "c", "d", "e"]


@dataclass
class Call:
    """The arguments of a call of lars_update. A test makes one of the leaves invalid."""

    w: dict[str, Any]
    g: dict[str, Any]
    out: dict[str, Any] | None
    lr: Any = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def spoil(self, side: str, key: str, value: Any) -> None:
        """Put a value into w, g or out. In an update in place, w and out are the same dict."""
        getattr(self, side)[key] = value

    def run(self) -> Any:
        return lars_update(self.w, self.g, self.lr, out=self.out, **self.options)


def numpy_call(mode):
    w = {key: np.arange(1, 7, dtype=np.float32).reshape(2, 3) for key in KEYS}
    g = {key: np.ones((2, 3), np.float32) for key in KEYS}
    out = {"new": None, "in place": w, "into out": {k: np.zeros_like(x) for k, x in w.items()}}
    return Call(w, g, out[mode])


def torch_call(mode):
    torch = need("torch")
    w = {key: torch.arange(1.0, 7).reshape(2, 3) for key in KEYS}
    g = {key: torch.ones(2, 3) for key in KEYS}
    out = {"new": None, "in place": w, "into out": {k: torch.zeros(2, 3) for k in KEYS}}
    return Call(w, g, out[mode])


def contents(call):
    """The bytes of all arrays in w, g and out; for other objects, their ids."""
    found = []
    for tree in (call.w, call.g, call.out or {}):
        for key in KEYS:
            x = tree.get(key)
            if isinstance(x, np.ndarray) and x.dtype != object:
                found.append(x.tobytes())
            elif type(x).__name__ == "Tensor" and not x.is_sparse and x.device.type == "cpu":
                found.append(bytes(x.detach().untyped_storage()))
            else:
                found.append(id(x))
    return found


def put(side, value, **options):
    """A fault: one leaf of an argument has this value, or the result of this function."""

    def spoil(call, key):
        call.spoil(side, key, value() if callable(value) else value)
        call.options |= options

    return spoil


def ones(dtype, shape=(2, 3)):
    return lambda: np.ones(shape, dtype)


def drop(side):
    return lambda call, key: getattr(call, side).pop(key)


def rename(side):
    def spoil(call, key):
        getattr(call, side)[key + "x"] = getattr(call, side).pop(key)

    return spoil


def option(name, value):
    """A fault: an option has this value at one leaf, and valid values at the other leaves."""

    def spoil(call, key):
        prefix = dict.fromkeys(KEYS, 1.0) | {key: value}
        if name == "lr":
            call.lr = prefix
        else:
            call.options[name] = prefix

    return spoil


def other_w_and_out(make):
    """A fault: an invalid leaf in w, and also in out if out is another tree."""

    def spoil(call, key):
        call.w[key] = make()
        if call.out is not None and call.out is not call.w:
            call.out[key] = make()

    return spoil


def tie(call, key):
    other = KEYS[(KEYS.index(key) + 1) % len(KEYS)]
    call.out[key] = call.out[other]


def check(call, key, spoil, kind, argument):
    """Assert that a call with this fault changes nothing, and that its error names the leaf."""
    spoil(call, key)
    before = contents(call)
    with pytest.raises(kind) as caught:
        call.run()
    assert contents(call) == before
    assert type(caught.value) is kind
    assert caught.value.argument == argument
    assert argument in str(caught.value)
    names = [*caught.value.paths, *str(caught.value).split()]
    assert (key,) in names or any(key in str(name) for name in names)
    assert "expected" in str(caught.value) or kind in (StructureError, OutError)
