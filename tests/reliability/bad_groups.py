"""Bad values of options of `lars_tree.torch.Lars`, in each way in which a group can get them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lars_tree import OptionError
from lars_tree.torch import Lars
from tests.reliability import bad_tensors as tensors
from tests.reliability import calls, outcomes
from tests.reliability.attack import Attempts
from tests.reliability.options import AXES, BAD_FLAGS, BAD_NUMBERS, CHOICES

_TENSORS: dict[str, Any] = {
    "a tensor of NaN": torch.tensor(float("nan")),
    "a negative tensor": torch.tensor([-0.5]),
    "an infinite tensor": torch.tensor(float("inf")),
    "a tensor of bool": torch.tensor(True),
    "a complex tensor": torch.tensor(0.5 + 0j),
    "a tensor of two": torch.tensor([0.5, 0.5]),
    "an empty tensor": torch.ones(0),
    "a meta tensor": torch.ones((), device="meta"),
}
# A 0-d array of objects is read as a number here.
_NUMBERS = {**BAD_NUMBERS, **_TENSORS}
del _NUMBERS["a 0-d object"]
_NOT_NONE = {name: x for name, x in BAD_FLAGS.items() if x is not None}
_NAMES = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
BAD = {
    **dict.fromkeys(_NAMES, _NUMBERS),
    "dampening": {**_NUMBERS, "2": 2, "1.5": 1.5, "a tensor of 2": torch.tensor(2.0)},
    **dict.fromkeys(("nesterov", "trust_clip", "joint_norm", "maximize"), BAD_FLAGS),
    **dict.fromkeys(("foreach", "fused"), _NOT_NONE),
    "adapt": {**BAD_FLAGS, "'decay'": "decay"},
    "nonfinite": CHOICES,
    "layer_axis": AXES,
}
PLACES = ("constructor", "group", "added group", "changed group")


def groups() -> list[dict[str, Any]]:
    found = []
    for number, indices in enumerate((range(3), range(3, 5), range(5, 7))):
        params = []
        for i in indices:
            p = torch.nn.Parameter(tensors.valid(calls.values(i)))
            p.grad = tensors.valid(calls.slopes(i))
            params.append((f"blocks.{number}.{i}", p))
        found.append({"params": params})
    return found


def attempts(rng: np.random.Generator) -> Attempts:
    """Try each bad value of each option, in each place and group."""
    every = [
        (name, label, place, number)
        for name, bad in BAD.items()
        for label in bad
        for place in PLACES
        for number in range(1 if place == "constructor" else 3)
        # A schedule may end at a rate that is negative by rounding.
        if (name, label, place) != ("lr", "-5e-324", "changed group")
    ]
    for name, label, place, number in outcomes.in_turns(rng, every, lambda case: case[:2]):
        found = attempt(name, BAD[name][label], place, number)
        about = f"{name}={label} by {place} {number}"
        yield None if found is None else f"{about}: {found}"


def attempt(name: str, bad: Any, place: str, number: int) -> str | None:
    given = groups()
    options = {name: bad} if place == "constructor" else {}
    if place == "group":
        given[number][name] = bad
    if place == "added group":
        number = 2
        opt = Lars(given[:2], 0.5)
        given[2][name] = bad
    elif place == "changed group":
        opt = Lars(given, 0.5)
        opt.param_groups[number][name] = bad
    params = [p for group in given for _, p in group["params"]]
    before = [tensors.seen(x) for p in params for x in (p, p.grad)]
    count = len(opt.param_groups) if place in ("added group", "changed group") else 0
    try:
        if place in ("constructor", "group"):
            opt = Lars(given, **options)
        elif place == "added group":
            opt.add_param_group(given[2])
            count += 1
        opt.step()
    except Exception as error:
        wrong = wrong_error(error, name, place, number)
    else:
        wrong = "not refused"
    if [tensors.seen(x) for p in params for x in (p, p.grad)] != before:
        return f"something has changed; {wrong}"
    if count and (len(opt.param_groups) != count or opt.state):
        return f"a group or a buffer was kept; {wrong}"
    return wrong


def wrong_error(error: Exception, name: str, place: str, number: int) -> str | None:
    text = f"{type(error).__name__}: {error}"
    if type(error) is not OptionError or error.argument != name or name not in str(error):
        return f"expected an OptionError about {name}, got {text}"
    named = "" if place == "constructor" else f"param_groups[{number}]"
    is_axis = "is no axis of the parameters" in text and f"  blocks.{number}." in text
    if not (is_axis or named in str(error).splitlines()[0]):
        return f"expected the group {number}, got {text}"
    if named and not (is_axis or error.paths == ((named,),)):
        return f"expected the path {named}, got {error.paths}"
    return None
