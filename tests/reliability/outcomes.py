"""What a call did: whether it was refused with nothing changed, or gave the right numbers."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import reference
from mpmath import mpc, mpf

from lars_tree import StructureError
from tests.reliability.attack import Attempts
from tests.reliability.calls import LR, MOMENTUM, NAMES, PATHS, RULE, Call, Case, Fault, Leaf, at

Item = TypeVar("Item")
Flat = tuple[complex, ...]


def in_turns(
    rng: np.random.Generator, every: Sequence[Item], kind: Callable[[Item], Hashable]
) -> list[Item]:
    """Shuffle; one item of every kind comes first, then another one of every kind, and so on."""
    shuffled = [every[k] for k in rng.permutation(len(every))]
    seen: Counter[Hashable] = Counter()
    turns = []
    for item in shuffled:
        turns.append(seen[kind(item)])
        seen[kind(item)] += 1
    return [shuffled[k] for k in np.argsort(turns, kind="stable")]


def attempts(
    rng: np.random.Generator,
    every: list[Case],
    valid: Callable[[str, str], Call],
    vary: Callable[[Leaf], Leaf],
    seen: Callable[[Leaf], Any],
    numbers: Callable[[Leaf], Any],
) -> Attempts:
    """Try each case, among leaves of which some need the general path.

    The order is random, but every fault is tried once before any is tried twice.
    """
    for fault, i, mode, function in in_turns(rng, every, lambda case: id(case[0])):
        call = valid(function, mode)
        other = int(rng.integers(7))
        company = ["", "strided", "no gradient", "may skip"][int(rng.integers(4))]
        fault.spoil(call, i)
        if other not in (i, call.partner):
            if company == "strided":
                call.ws[other] = vary(call.ws[other])
            elif company == "no gradient":
                call.gs[other] = None
        if company == "may skip":
            call.options.setdefault("nonfinite", "skip")
        check = refused if fault.error else right
        found = check(call, fault, i, seen, numbers)
        place = call.named[0] if call.named else NAMES[i]
        about = f"{fault.name} at {place}, {function}, {mode}, company: {company or 'none'}"
        yield None if found is None else f"{about}: {found}"


def state_of(call: Call, trees: Sequence[Any], seen: Callable[[Leaf], Any]) -> list[Any]:
    """All that a refused call must not change."""
    return [
        list(map(seen, call.leaves())),
        *map(outline, trees),
        signal.getsignal(signal.SIGINT),
        dict(call.options),
    ]


def outline(node: Any, above: tuple[int, ...] = ()) -> Any:
    """The classes, keys and identities of a tree, which may contain itself or be very deep."""
    if id(node) in above or len(above) > 9:
        return id(node)
    above = (*above, id(node))
    if issubclass(type(node), dict):
        return type(node), id(node), [(key, outline(x, above)) for key, x in dict.items(node)]
    if type(node) in (list, tuple):
        return type(node), id(node), [outline(x, above) for x in node]
    return id(node)


def refused(
    call: Call,
    fault: Fault,
    i: int,
    seen: Callable[[Leaf], Any],
    numbers: Callable[[Leaf], Any],
) -> str | None:
    """What is wrong with the error of the call, or changed despite it; None if nothing."""
    trees = call.trees()
    before = state_of(call, trees, seen)
    try:
        call.run(*trees)
    except Exception as error:
        wrong = wrong_error(error, fault, _named(call, fault, i))
    else:
        wrong = "not refused"
    if state_of(call, trees, seen) != before:
        wrong = f"something has changed{'; ' + wrong if wrong else ''}"
    return wrong


def _named(call: Call, fault: Fault, i: int) -> tuple[str, ...]:
    if call.named:
        return call.named
    if fault.argument == "state" and fault.name.startswith(("step", "skipped")):
        return (fault.name.split()[0],)
    if fault.error is StructureError and fault.argument == "state":
        return (f"velocity/{NAMES[i]}",)
    return (NAMES[i],) if call.partner is None else (NAMES[i], NAMES[call.partner])


def wrong_error(error: Exception, fault: Fault, names: tuple[str, ...]) -> str | None:
    """What is wrong with an error that must name these paths."""
    text = f"{type(error).__name__}: {error}"
    assert fault.error is not None
    if type(error) is not fault.error:
        return f"expected a {fault.error.__name__}, got {text}"
    if error.argument != fault.argument or fault.argument not in str(error).splitlines()[0]:
        return f"expected the argument {fault.argument!r}, got {error.argument!r} in {text}"
    lines = str(error).splitlines()[1:]
    if len(error.paths) != 1 or not any(lines[0].startswith(f"  {name}: ") for name in names):
        return f"expected the path {names[0]}, got {error.paths} in {text}"
    if not all(name in lines[0] for name in names):
        return f"expected the paths {names}, got {text}"
    return None


def right(
    call: Call,
    fault: Fault,
    i: int,
    seen: Callable[[Leaf], Any],
    numbers: Callable[[Leaf], Any],
) -> str | None:
    """What is wrong with the results of the call; None if they are those of the reference."""
    trees = call.trees()
    read = [x for x in (*call.gs, *(call.ws if call.outs is not call.ws else ())) if x is not None]
    read += [*(call.velocities or ()), *call.counters.values()] if call.outs is None else []
    old = [[None if x is None else numbers(x) for x in xs] for xs in _columns(call)]
    before = list(map(seen, read))
    try:
        new, state = call.run(*trees)
    except Exception as error:
        return f"refused, {type(error).__name__}: {error}"
    if list(map(seen, read)) != before and not fault.name.endswith("overlaps"):
        return "an input has changed"
    if outline(new) == outline(trees[0]) and call.outs is not call.ws:
        return "the result is the tree of the input"
    for j, path in enumerate(PATHS):
        try:
            x = at(new, path)
            v = None if state is None else at(state["velocity"], path)
        except (KeyError, IndexError, TypeError) as error:
            return f"the result has no leaf {NAMES[j]}: {error!r}"
        wrong = _wrong_leaf(call, j, x, v, [column[j] for column in old], numbers)
        if wrong:
            return f"{NAMES[j]}: {wrong}"
    if state is not None and [int(state[name]) for name in ("step", "skipped")] != [4, 1]:
        return f"counters are {state['step']} and {state['skipped']}"
    return None


def _columns(call: Call) -> Iterator[list[Leaf]]:
    yield call.ws
    yield call.gs
    yield call.velocities or [None] * 7


def _wrong_leaf(
    call: Call, j: int, x: Leaf, v: Leaf, old: list[Any], numbers: Callable[[Leaf], Any]
) -> str | None:
    w, g, velocity = old
    if call.outs is not None and x is not call.outs[j]:
        return "the result is not the array of out"
    if getattr(call.ws[j], "dtype", None) != getattr(x, "dtype", None) or np.shape(
        w[1]
    ) != np.shape(numbers(x)[1]):
        return f"the result is {x!r}"
    if g is None:
        same = numbers(x)[1].tolist() == w[1].tolist()
        same = same and (v is None or numbers(v)[1].tolist() == velocity[1].tolist())
        return None if same else "weights without a gradient have changed"
    flat = [flattened(y[1]) for y in (w, (None, np.broadcast_to(g[1], w[1].shape)))]
    if v is None:
        return wrong_numbers(*flat, None, flattened(numbers(x)[1]), None, w[0], w[0])
    moved = [flattened(numbers(y)[1]) for y in (x, v)]
    return wrong_numbers(*flat, flattened(velocity[1]), *moved, w[0], numbers(v)[0])


def flattened(x: np.ndarray) -> tuple[complex, ...]:
    return tuple(x.ravel().tolist())


@cache  # most calls have the same numbers at most leaves
def wrong_numbers(
    w: Flat,
    g: Flat,
    v: Flat | None,
    new: Flat,
    new_v: Flat | None,
    name: str,
    v_name: str,
    lr_after: float | None = None,
    ulps: int = 1,
) -> str | None:
    """A text if a number is further from the exact one than the package promises.

    With `lr_after` the rate multiplies the velocity, as in torch.
    """
    step = reference.lars(w, g, LR if lr_after is None else 1.0, **RULE)
    if v is None or new_v is None:
        return _far("weights", new, step.w_new, w, step.u, name, ulps)
    rate = 1.0 if lr_after is None else lr_after
    moved = reference.move(w, v, step, MOMENTUM, rate=rate)
    pairs = list(zip(step.u, moved.v_new, strict=True))
    change = [max(abs(u), abs(x)) for u, x in pairs]
    none = (0.0,) * len(w)
    return _far("weights", new, moved.w_new, w, [rate * x for x in change], name, ulps) or _far(
        "velocity", new_v, moved.v_new, none, change, v_name, ulps
    )


def _far(
    what: str, new: Flat, exact: Any, old: Flat, change: Any, name: str, ulps: int
) -> str | None:
    most = 4 if name == "float64" else ulps
    for x, y, w, u in zip(new, exact, old, change, strict=True):
        number = mpc(x) if isinstance(x, complex) else mpf(x)
        size = max(abs(mpc(w)), abs(u))
        if not abs(number - y) <= most * reference.ulp(size, name):
            return f"expected {what} of {y}, got {x}"
    return None
