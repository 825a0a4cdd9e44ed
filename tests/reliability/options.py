"""Options: a bad value of any option is refused, wherever it is given.

A bad value is given for the whole tree, in a tree of values at a leaf or at a node above it, by
the path of the leaf, by a pattern, or by a function; to `lars_update`, `Container.lars_update`,
`Lars`, `Lars.update`, `lars_tree.optax.lars`, or in any way to `lars_tree.torch.Lars` and its
groups. Each error is an `OptionError`, or says that the values have another structure or shape than
the weights. It names the option and the place of the value, and no byte of any array and no
counter has changed.
"""

from __future__ import annotations

import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from lars_tree import Container, Lars, LarsTreeError, OptionError, ShapeError, StructureError
from lars_tree import lars_update as update
from tests.reliability import bad_arrays as arrays
from tests.reliability import calls, outcomes
from tests.reliability.attack import Attempts, attack
from tests.reliability.calls import NAMES, PATHS

NUMBERS = ("lr", "decay_lambda", "trust_coefficient", "eps", "grad_scale", "momentum")
FLAGS = ("adapt", "trust_clip", "joint_norm", "stop_gradients", "nesterov")
OF_LARS = ("momentum", "nesterov")
NODES: dict[str, Any] = {
    "a list": [0.5],
    "an empty list": [],
    "a tuple": (0.5, 0.5, 0.5),
    "an empty dict": {},
    "a dict": {"x": 0.5},
}
BAD_NUMBERS: dict[str, Any] = {
    **{repr(x): x for x in (float("nan"), float("inf"), -float("inf"), -0.5, -5e-324, -1)},
    **{repr(x): x for x in (True, np.True_, 1j, 1 + 0j, "0.5", b"0.5", None, ..., object)},
    **{repr(x): x for x in (Decimal(-1), Decimal("NaN"), Decimal("sNaN"), Fraction(-1, 2))},
    **{repr(x): x for x in (np.float32("nan"), np.float16(-1), np.longdouble("inf"))},
    "too large": 10**400,
    "a date": datetime.date(2020, 1, 1),
    "a duration": np.timedelta64(1, "s"),
    "an object": object(),
    "a set": {0.5},
    "a masked number": np.ma.masked,
    "a masked array": np.ma.ones((2, 3)),
    "a 0-d bool": np.array(True),
    "a 0-d string": np.array("0.5"),
    "a 0-d object": np.array(0.5, object),
    "a 0-d NaN": np.array(np.nan),
    "a 0-d negative": np.array(-1),
    "an array with NaN": np.array([[1, 1, 1], [1, np.nan, 1]]),
    "a negative array": np.full((2, 3), -1e-30),
    "an array of bool": np.ones((2, 3), bool),
    "a complex array": np.ones((2, 3), complex),
    "an array of objects": np.ones((2, 3), object),
    "a vector of another length": np.ones(4),
    "an array with more axes": np.ones((1, 2, 3)),
    **NODES,
}
BAD_FLAGS: dict[str, Any] = {
    **{repr(x): x for x in (0, 1, 0.0, None, "True", b"", float("nan"), ..., object)},
    "a 0-d bool": np.array(True),
    "an array": np.ones((2, 3), bool),
    **NODES,
}
CHOICES = {
    **{repr(x): x for x in (None, "Raise", "raises", "", True, 0, b"raise", np.array(["raise"]))},
    **NODES,
}
AXES = {
    **{repr(x): x for x in (2, -3, 10**30, 0.5, 0.0, True, np.True_, "0", 1j, np.array([0, 1]))},
    **NODES,
}
# A tuple of names is one value of axis_name, and names need a mesh.
MESH_AXES = {
    **{repr(x): x for x in ("x", 0, True, 1.5, ("x", 0), ("x", None), np.ones(2))},
    "a list": ["x"],
    "a dict": {"x": "y"},
}
BAD = {
    **dict.fromkeys(NUMBERS, BAD_NUMBERS),
    "grad_scale": {**BAD_NUMBERS, "0": 0, "-0.0": -0.0, "a 0-d 0": np.array(0.0)},
    **dict.fromkeys(FLAGS, BAD_FLAGS),
    "nonfinite": CHOICES,
    "layer_axis": AXES,
    "axis_name": MESH_AXES,
}
VALID: dict[str, Any] = {
    **dict.fromkeys(NUMBERS, 0.5),
    **dict.fromkeys(FLAGS, True),
    "nonfinite": "propagate",
    "layer_axis": None,
    "axis_name": None,
}
PLACES = ("whole", "leaf", "node", "path", "pattern", "function")
FUNCTIONS = ("lars_update", "in place", "Container", "Lars", "Lars.update", "Lars in place")


def placed(name: str, function: str, place: str, i: int, bad: Any) -> tuple[Any, tuple[str, ...]]:
    """An option with the bad value at leaf i, and the places of which the error must name one."""
    valid = VALID[name]
    if place == "whole":
        return bad, ("",)
    if place == "leaf":
        tree = calls.tree([bad if j == i else valid for j in range(7)])
        if name == "axis_name":  # a tuple is one value
            tree["blocks"][1] = list(tree["blocks"][1])
        return tree, (NAMES[i],)
    if place == "node":
        key = str(PATHS[i][0])
        return {**dict.fromkeys(("embed", "blocks", "head"), valid), key: bad}, (key,)
    path = "/".join(map(str, PATHS[i]))
    if place in ("path", "pattern"):
        key = path if place == "path" else f"*{path[1:]}"
        return {key: bad, "*": valid}, (key, NAMES[i])
    if name == "lr" and function.startswith("Lars"):
        return lambda step: bad, ("",)
    return lambda path, leaf: bad if path == PATHS[i] else valid, (NAMES[i],)


def run(function: str, name: str, given: Any, call: calls.Call, trees: list[Any]) -> Any:
    """The call with this option."""
    w, dcdw, out, state = trees
    lr = given if name == "lr" else 0.5
    options = {} if name == "lr" else {name: given}
    if function in ("lars_update", "in place"):
        return update(w, dcdw, lr, out=out, **options)
    if function == "Container":
        return Container(w).lars_update(dcdw, lr, **options)
    if name == "decay_lambda":
        options = {"weight_decay": given}
    if function == "Lars":
        return Lars(lr, **options).update(w, dcdw, state)
    return Lars(0.5).update(w, dcdw, state, out=out, lr=lr, **options)


def wrong_error(error: Exception, name: str, named: tuple[str, ...], bad: Any) -> str | None:
    """What is wrong with an error about an option."""
    text = f"{type(error).__name__}: {error}"
    kinds: tuple[type, ...] = (OptionError,)
    is_node = isinstance(bad, (list, tuple, dict)) and name != "axis_name"
    if is_node or (name == "axis_name" and isinstance(bad, (list, dict))):
        kinds = (OptionError, StructureError)
    elif isinstance(bad, np.ndarray) and name == "lr":
        kinds = (OptionError, ShapeError)
    if type(error) not in kinds or not isinstance(error, LarsTreeError):
        return f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {text}"
    if error.argument != name or name not in str(error).splitlines()[0]:
        return f"expected the argument {name}, got {error.argument} in {text}"
    lines = "\n".join(str(error).splitlines()[1:])
    if not error.paths or not any(path in lines for path in named):
        return f"expected the path {' or '.join(named)}, got {error.paths} in {text}"
    return None


@attack(
    "A bad value of an option is refused; the error names the option and where the value was given",
    "bad values of the options of `lars_update`, `Container.lars_update` and `Lars`",
    count=100_000,
    short=600,
)
def values(rng: np.random.Generator) -> Attempts:
    every = [
        (name, label, place, function)
        for name, bad in BAD.items()
        for label in bad
        for place in PLACES
        for function in FUNCTIONS
        if name not in OF_LARS or function.startswith("Lars")
        # A function is a schedule.
        if not (name == "lr" and callable(bad[label]) and function.startswith("Lars"))
    ]
    for name, label, place, function in outcomes.in_turns(rng, every, lambda case: case[:2]):
        i, bad = int(rng.integers(7)), BAD[name][label]
        mode = "in place" if function.endswith("in place") else "new"
        kind = calls.LARS if function.startswith("Lars") else calls.UPDATE
        call = calls.make(kind, mode, arrays.valid, arrays.new_counter)
        given, named = placed(name, function, place, i, bad)
        shown = "weight_decay" if name == "decay_lambda" and kind == calls.LARS else name
        trees = call.trees()
        before = outcomes.state_of(call, trees, arrays.seen)
        try:
            run(function, name, given, call, trees)
        except Exception as error:
            wrong = wrong_error(error, shown, named, bad)
        else:
            wrong = "not refused"
        if outcomes.state_of(call, trees, arrays.seen) != before:
            wrong = f"something has changed; {wrong}"
        about = f"{name}={label} by {place} at {NAMES[i]}, {function}"
        yield None if wrong is None else f"{about}: {wrong}"


@attack(
    "`lars_tree.torch.Lars` refuses bad options of any group",
    "bad values, given to the optimizer, in a group, with a new group, or set later",
    count=100_000,
    short=300,
    needs=("torch",),
)
def groups(rng: np.random.Generator) -> Attempts:
    from tests.reliability import bad_groups

    return bad_groups.attempts(rng)


@attack(
    "`lars_tree.optax.lars` refuses bad options",
    "bad values of the options of `lars_tree.optax.lars`",
    count=3_000,
    short=150,
    needs=("jax", "optax"),
)
def transformations(rng: np.random.Generator) -> Attempts:
    import jax.numpy as jnp

    from lars_tree.optax import lars

    w, g = (calls.tree([jnp.asarray(f(i)) for i in range(7)]) for f in (calls.values, calls.slopes))
    places = [place for place in PLACES if place in ("whole", "leaf", "function")]
    every = [
        (name, label, place)
        for name, bad in BAD.items()
        for label in bad
        for place in places
        if not (name == "lr" and callable(bad[label]))
    ]
    for name, label, place in outcomes.in_turns(rng, every, lambda case: case[:2]):
        i, bad = int(rng.integers(7)), BAD[name][label]
        given, named = placed(name, "Lars", place, i, bad)
        ours = {"lr": "learning_rate", "decay_lambda": "weight_decay"}.get(name, name)
        try:
            tx = lars(**{"learning_rate": 0.5, ours: given})
            tx.update(g, tx.init(w), w)
        except Exception as error:
            wrong = wrong_error(error, "lr" if name == "lr" else ours, named, bad)
        else:
            wrong = "not refused"
        about = f"{name}={label} by {place} at {NAMES[i]}"
        yield None if wrong is None else f"{about}: {wrong}"


SAME: list[tuple[Any, float]] = [
    *((x, 0.5) for x in (np.float16(0.5), np.float64(0.5), np.longdouble(0.5), Decimal("0.5"))),
    *((x, 0.5) for x in (Fraction(1, 2), np.array(0.5), np.array(0.5, ">f4"), np.array(0.5, "f2"))),
    *((x, 1.0) for x in (1, np.int8(1), np.uint64(1), np.array(1), Decimal(1))),
    # 0.1 needs all digits of double.
    *((x, 0.1) for x in (np.float64(0.1), Decimal("0.1"), Fraction(1, 10), np.array(0.1))),
    *((x, float(np.float32(0.1))) for x in (np.float32(0.1), np.array(0.1, "f4"))),
    (np.longdouble(1) / 10, 0.1),
    (5e-324, 5e-324),
    (np.longdouble(2) ** -1080, 0.0),
]


@attack(
    "Every spelling of a number gives the same bits",
    "numbers of Python and numpy, as options of `lars_update` and `Lars`",
    count=100_000,
    short=200,
    plain=True,
)
def spellings(rng: np.random.Generator) -> Attempts:
    every = [
        (name, j, place, function)
        for name in NUMBERS
        for j in range(len(SAME))
        for place in PLACES
        for function in FUNCTIONS
        if name not in OF_LARS or function.startswith("Lars")
        if name not in ("grad_scale", "momentum") or SAME[j][1] > 1e-300
    ]
    for name, j, place, function in outcomes.in_turns(rng, every, lambda case: case[:2]):
        i, results = int(rng.integers(7)), []
        for value in SAME[j]:
            mode = "in place" if function.endswith("in place") else "new"
            kind = calls.LARS if function.startswith("Lars") else calls.UPDATE
            call = calls.make(kind, mode, arrays.valid, arrays.new_counter)
            given, _ = placed(name, function, place, i, value)
            new = run(function, name, given, call, call.trees())
            new = new[0] if isinstance(new, tuple) else new
            results.append([calls.at(new, path).tobytes() for path in PATHS])
        same = results[0] == results[1]
        about = f"{name}={SAME[j][0]!r} by {place} at {NAMES[i]}, {function}"
        yield None if same else f"{about}: other bits than {SAME[j][1]}"
