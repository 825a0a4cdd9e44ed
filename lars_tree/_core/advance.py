"""One step of a tree of weights: match, resolve, execute, rebuild.

The modules below this one see flat lists of leaves, not trees.
"""

from __future__ import annotations

from typing import Any

from lars_tree import errors
from lars_tree._backends.base import Columns
from lars_tree._backends.wrapper import unwrap
from lars_tree._core.counters import NAMES, counted
from lars_tree._core.execute import Caller, Result, execute
from lars_tree._core.options import resolve
from lars_tree._core.types import T
from lars_tree._tree import kinds, structure

State = dict[str, Any]


def advance(
    w: T, dcdw: Any, out: T | None, options: dict[str, Any], state: State | None = None
) -> tuple[T, State]:
    """Return the new weights and the new state; with `out`, both are updated in place.

    The state of an optimizer has the checked counters "step" and "skipped", and with momentum
    "velocity", a tree with the structure of w. With a state, gradients must have the shapes of
    their weights.
    """
    try:
        columns, caller = _matched(w, dcdw, out, options, state)
        return _rebuilt(w, out, state or {}, execute(columns, caller))
    except RecursionError:
        trees = {"w": w, "dcdw": dcdw, "out": out, "state": state, **options}
        raise structure.explained(trees) from None
    except RuntimeError as error:  # another thread may have changed a node while it was walked
        raise structure.translated(error, "w") from None


def matched(w: Any, dcdw: Any, options: dict[str, Any]) -> tuple[Columns, Caller]:
    """Match the arguments leaf by leaf, for a caller that only checks or measures them."""
    try:
        return _matched(w, dcdw, None, options, None)
    except RecursionError:
        raise structure.explained({"w": w, "dcdw": dcdw, **options}) from None
    except RuntimeError as error:
        raise structure.translated(error, "w") from None


def _matched(
    w: Any, dcdw: Any, out: Any, options: dict[str, Any], state: State | None
) -> tuple[Columns, Caller]:
    given = state or {}
    ws = structure.leaves(w)
    dcdws = structure.broadcast("dcdw", w, dcdw)
    outs = velocities = None
    if out is not None:
        outs = ws if out is w else structure.broadcast("out", w, out, exact=True)
    if "velocity" in given:
        at = ("velocity",)
        velocities = structure.broadcast("state", w, given["velocity"], exact=True, at=at)
    rules = resolve(w, options, len(ws))
    if any(x is not None and len(x) != len(ws) for x in (dcdws, outs, velocities)):
        raise structure.changed()
    if outs is not None and kinds.may_make_children():
        _refuse_new_children(w, "out", out, outs)
        if velocities is not None:
            _refuse_new_children(w, "state", given["velocity"], velocities, ("velocity",))
    counters = {name: unwrap(given[name]) for name in NAMES if name in given}
    columns = Columns(ws, dcdws, outs, rules, velocities, counters if outs is not None else {})

    found: list[errors.Path] = []

    def paths() -> list[errors.Path]:
        if not found:
            found.extend(structure.paths(w, len(ws)))
        return found

    def refuse_extra() -> None:
        _refuse_extra("out", w, out)
        _refuse_extra("state", w, given.get("velocity"), at=("velocity",))
        _refuse_extra("dcdw", w, dcdw)

    return columns, Caller(paths, refuse_extra, same_shapes=state is not None)


def _refuse_extra(argument: str, w: Any, other: Any, at: errors.Path = ()) -> None:
    """Refuse arrays at leaves where w has None, because they would be ignored silently."""
    theirs = dict(structure.walk(other))
    lines = [
        ((*at, *path), f"expected None, got {errors.describe(theirs[path])}")
        for path, leaf in structure.walk(w)
        if leaf is None and theirs.get(path) is not None
    ]
    if lines:
        headline = f"{argument} does not match w"
        raise errors.error(errors.StructureError, argument, headline, lines)


def _refuse_new_children(
    w: Any, argument: str, tree: Any, found: list[Any], at: errors.Path = ()
) -> None:
    """Refuse nodes that create new arrays at each reading: results written there would be lost."""
    again = structure.broadcast(argument, w, tree, exact=True, at=at)
    text = "expected the same array at each reading, got a new one: give a tree that holds arrays"
    if len(again) != len(found):  # another thread has changed the tree
        return
    rows = zip(structure.walk(w), found, again, strict=False)
    lines = [((*at, *path), text) for (path, _), x, y in rows if x is not y]
    if lines:
        headline = f"{argument} gives other arrays when it is read again"
        raise errors.error(errors.StructureError, argument, headline, lines)


def _rebuilt(w: Any, out: Any, state: State, result: Result) -> tuple[Any, State]:
    if out is not None:
        return out, state
    new = {name: counted(x, name, result.taken) for name, x in state.items() if name in NAMES}
    if result.velocities is not None:
        # The results are in the order of w; the keys of the state may have another order.
        old, indices = state["velocity"], range(len(result.velocities))
        order = structure.broadcast("w", old, w, values=indices, exact=True, to="state")
        moved = [result.velocities[i] for i in order]
        new["velocity"] = structure.rebuild(old, moved, "state", at=("velocity",))
    return structure.rebuild(w, result.ws, "w"), new
