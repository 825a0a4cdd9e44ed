"""lars_update: one LARS step on every array of a nest of weights.

Reads as a table of contents. Structure is matched in `_tree.py`, options are resolved in
`_options.py`, arrays are checked in `_checks.py`; only then do the `_backends` compute, each on all
its leaves at once, by the formula in `_rule.py`. `advance` is the same with the state of an
optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

from lars_tree import (
    _backends,
    _checks,
    _counters,
    _memory,
    _nodes,
    _nonfinite,
    _options,
    _overlaps,
    _tree,
    errors,
)
from lars_tree._backends.base import FLOATING, Backend, Columns, Leaf, New
from lars_tree._operands import Row
from lars_tree._rule import Rule, is_zero
from lars_tree._writes import Writes
from lars_tree.array import rewrapped, unwrap

State = dict[str, Any]
Paths = Callable[[], list[errors.Path]]


@_options.with_hints
def lars_update(
    w: Any,
    dcdw: Any,
    lr: Any,
    /,
    *,
    decay_lambda: Any = 0,
    stop_gradients: Any = True,
    out: Any = None,
    trust_coefficient: Any = 1.0,
    eps: Any = 0.0,
    adapt: Any = True,
    trust_clip: Any = False,
    joint_norm: Any = False,
    grad_scale: Any = 1.0,
    nonfinite: Any = "propagate",
    layer_axis: Any = None,
    axis_name: Any = None,
) -> Any:
    """Take one LARS step on every array of a nest of weights.

    Each array is one layer. For weights w and gradient g = dcdw / grad_scale,

        ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)
        w_new = w - lr * ratio * (g + decay_lambda * w)

    |.| is the 2-norm over the layer. Where |w| or |g| is 0, ratio is 1. With decay this is not what
    ivy computes, which divides the rate by decay_lambda * |w| alone: see the page on the rule.

    >>> w = Container(kernel=np.array([3.0, 4.0]), bias=np.array([0.0]))
    >>> g = Container(kernel=np.array([0.0, 10.0]), bias=np.array([1.0]))
    >>> lars_update(w, g, 0.1).kernel       # ratio = 5 / 10: a step of 0.05 * [0, 10]
    array([3. , 3.5])
    >>> lars_update(w, g, 0.1, adapt={"kernel": False, "bias": True}).kernel      # plain SGD
    array([3., 3.])

    Every argument but w and out takes one value for all leaves, or a Container or dict that is a
    prefix of w: a value at an inner node holds for all that lies below it. Keys match by name.

    On the CPU the result is computed in at least double precision and rounded once; it does not
    depend on the nest, on threads, or on whether numpy, torch or JAX owns the memory.

    Args:
        w: Weights: floating-point or complex arrays of any shape in any nest (Container, dict,
            list, tuple, namedtuple, attrs), or one array; None is a leaf without weights. Never
            modified, unless `out` is w.
        dcdw: Gradient of the cost, in units of cost per weight: arrays that broadcast to those of
            w, of the same library and device. None leaves the weights below it as they are.
        lr: Rate, a pure number >= 0: where ratio is not 1, the units of cost and weights cancel.
            May be an array that broadcasts to the weights.
        decay_lambda: Weight decay >= 0, in cost per weight squared.
        stop_gradients: True: the result has no history, and requires a gradient where w did. False:
            the step is differentiable in w, dcdw, lr and decay_lambda.
        out: Where to write the result: a nest of arrays like w, or w itself, to update in place.
        trust_coefficient: The paper's eta, a pure number >= 0; recipes use 0.001.
        eps: Added to the denominator, in units of the gradient.
        adapt: False: ratio is 1, plain SGD with decay, as for biases and norm layers.
        trust_clip: True (LARC): the local rate is min(ratio, lr) instead of lr * ratio; where a
            norm is 0 it is lr.
        joint_norm: True: the denominator is |g + decay_lambda * w| + eps, as in SimCLR, BYOL and
            optax; ratio is 1 where |w| or that norm is 0.
        grad_scale: The loss scale that dcdw still carries, > 0.
        nonfinite: What to do when a new weight would be NaN or infinite. "propagate" writes it,
            "raise" raises before anything is written, "skip" leaves all weights as they are.
        layer_axis: The axis along which an array stacks layers: each index has its own ratio.
        axis_name: JAX, inside `shard_map`: the mesh axes over which an array is sharded, a name or
            a tuple of names. Norms are summed over them. (): each device has whole layers.

    Returns:
        The new weights, in the types, key order, dtypes, shapes and devices of w; `out` if given.

    Raises:
        StructureError: dcdw, out or an option does not match w; names every differing path. Or w
            holds itself, or has a node of a class that cannot be rebuilt (only `out` needs no new
            nodes).
        LeafError: A leaf is no array, or one that cannot be computed with (sparse, freed, meta).
        DtypeError: Weights or gradients are not floating point, or complex meets real.
        ShapeError: An array does not broadcast to its weights.
        BackendError: Arrays that meet at a leaf are of different libraries or devices.
        OptionError: A value that the rule is not defined for: negative, NaN, infinite, no number.
        OutError: `out` cannot be written to: read-only, immutable, of another shape or dtype,
            overlapping itself, or with two leaves that share memory.
        NonFiniteError: nonfinite="raise", and a new weight would be NaN or infinite.

    All are LarsTreeError. Whatever is raised, nothing was written.

    Source: You, Gitman, Ginsburg (2017), arXiv:1708.03888, Algorithm 1.
    """
    options = {
        "lr": lr,
        "decay_lambda": decay_lambda,
        "trust_coefficient": trust_coefficient,
        "eps": eps,
        "grad_scale": grad_scale,
        "adapt": adapt,
        "trust_clip": trust_clip,
        "joint_norm": joint_norm,
        "nonfinite": nonfinite,
        "layer_axis": layer_axis,
        "axis_name": axis_name,
        "stop_gradients": stop_gradients,
    }
    return advance(w, dcdw, out, options, {})[0]


def advance(
    w: Any,
    dcdw: Any,
    out: Any,
    options: dict[str, Any],
    state: State,
    writes: Writes | None = None,
) -> tuple[Any, State]:
    """The new weights, and the state after the step: if there is `out`, the same one, written to.

    Args:
        w: As in `lars_update`.
        dcdw: The same.
        out: The same.
        options: By name: those of the `Rule`.
        state: "velocity", a nest like w, for momentum; "step" and "skipped", which count, and have
            been checked. Each may be missing.
        writes: Where there is an `out`: what is to be written is added to these, for the caller to
            make; by default it is written at once.
    """
    try:
        return _update(w, dcdw, out, options, state, writes)
    except RecursionError:
        raise _tree.explained(
            {"w": w, "dcdw": dcdw, "out": out, "state": state, **options}
        ) from None


def _update(
    w: Any,
    dcdw: Any,
    out: Any,
    options: dict[str, Any],
    state: State,
    writes: Writes | None,
) -> tuple[Any, State]:
    @cache
    def paths() -> list[errors.Path]:
        return _tree.paths(w, len(old))

    columns = _matched(w, dcdw, out, options, state)
    old, _, outs, _, velocities, _ = columns
    # The kernel does not read axis_name: the general path refuses it where it has no meaning.
    is_quick = writes is None and options.get("axis_name") in (None, ())
    plain = _update_plain(columns) if is_quick else None
    if plain is not None:
        return _result(w, out, state, *plain, True)
    if outs is not None:
        _refuse_surplus(w, out, old, outs, "out")
    if velocities is not None:
        _refuse_surplus(w, state["velocity"], old, velocities, "state")
    # An optimizer has a state, and gradients of the shapes of their weights.
    rows = checked(w, dcdw, columns, paths, same_shapes=bool(state))
    leaves = [row.leaf for row in rows]
    if out is not None:
        _counters.check_apart(state, leaves, paths)
    written = Writes() if writes is None else writes
    with nullcontext() if out is None else _memory.serialised():
        news, taken = _run(_overlaps.detach_inputs(rows), paths, written)
        if out is not None:
            _counters.count_in_place(state, taken, written)
            if writes is None:
                written.make()
    new_ws, new_velocities = list(old), list(velocities or ())
    for leaf, new in zip(leaves, news, strict=True):
        new_ws[leaf.place] = rewrapped(new.w, old[leaf.place])
        if velocities is not None:
            new_velocities[leaf.place] = rewrapped(new.velocity, velocities[leaf.place])
    return _result(w, out, state, new_ws, new_velocities, taken)


def _matched(w: Any, dcdw: Any, out: Any, options: dict[str, Any], state: State) -> Columns:
    """What the arguments have for each leaf of w."""
    ws = _tree.leaves(w)
    dcdws = _tree.broadcast("dcdw", w, dcdw)
    outs = velocities = None
    if out is not None:
        outs = ws if out is w else _tree.broadcast("out", w, out, exact=True)
    if "velocity" in state:
        at = ("velocity",)
        velocities = _tree.broadcast("state", w, state["velocity"], exact=True, at=at)
    rules = _options.resolve(w, options, len(ws))
    if any(x is not None and len(x) != len(ws) for x in (dcdws, outs, velocities)):
        raise _tree.changed()
    if outs is not None and _nodes.may_make_children():
        _refuse_new_children(w, "out", out, outs)
        if velocities is not None:
            _refuse_new_children(w, "state", state["velocity"], velocities, ("velocity",))
    counter = None if outs is None else unwrap(state.get("step"))
    return Columns(ws, dcdws, outs, rules, velocities, counter)


def _refuse_new_children(
    w: Any, argument: str, tree: Any, found: list[Any], at: errors.Path = ()
) -> None:
    """Refuse nodes that make their children when they are read: what is written would be lost."""
    again = _tree.broadcast(argument, w, tree, exact=True, at=at)
    text = "expected the same array at each reading, got a new one: give a tree that holds arrays"
    if len(again) != len(found):  # another thread has changed it
        return
    rows = zip(_tree.walk(w), found, again, strict=False)
    lines = [((*at, *path), text) for (path, _), x, y in rows if x is not y]
    if lines:
        headline = f"{argument} gives other arrays when it is read again"
        raise errors.error(errors.StructureError, argument, headline, lines)


def checked(
    w: Any, dcdw: Any, columns: Columns, paths: Paths, *, same_shapes: bool = False
) -> list[Row]:
    """The leaves that hold arrays, with nothing wrong with them.

    `same_shapes` says whether gradients must have the shapes of their weights.
    """
    _refuse_surplus(w, dcdw, columns.ws, columns.dcdws, "dcdw")
    leaves = _arrays(columns, paths)
    return _checks.check(leaves, paths, same_shapes=same_shapes)


def _result(
    w: Any, out: Any, state: State, ws: list[Any], velocities: list[Any], taken: Any
) -> tuple[Any, State]:
    if out is not None:
        return out, state
    new = {
        name: _counters.counted(x, name, taken)
        for name, x in state.items()
        if name in _counters.NAMES
    }
    if "velocity" in state:
        # They are in the order of w, whose keys may be in another one than those of the state.
        old, places = state["velocity"], range(len(velocities))
        order = _tree.broadcast("w", old, w, values=places, exact=True, to="state")
        moved = [velocities[i] for i in order]
        new["velocity"] = _tree.rebuild(old, moved, "state", at=("velocity",))
    return _tree.rebuild(w, ws, "w"), new


def _update_plain(columns: Columns) -> tuple[list[Any], list[Any]] | None:
    """The quick way, for plain arrays of one library: checked and stepped in one native call.

    None, with nothing written, for all else, and for whatever is wrong: the long way has the
    checks with their messages, and gives the same bits.
    """
    found = (_backends.find(unwrap(x)) for x in columns.ws if x is not None)
    backend = next(found, None)
    if backend is None:
        return None
    # Python handles signals when a native call is over: before this one, or after it.
    with nullcontext() if columns.outs is None else _memory.serialised():
        return backend.update_plain(columns)


def _arrays(columns: Columns, paths: Paths) -> list[Leaf]:
    """The leaves that hold arrays, out of their wrappers; others must stay as they are."""
    leaves: list[Leaf] = []
    strangers: dict[str, list[errors.Line]] = {"w": [], "out": [], "state": []}
    nothing = [None] * len(columns.ws)
    writes, moves = columns.outs is not None, columns.velocities is not None
    ws, dcdws = columns.ws, columns.dcdws
    rows = zip(ws, dcdws, columns.outs or nothing, columns.velocities or nothing, strict=True)
    for place, row in enumerate(rows):
        x, dcdw, out, velocity = map(unwrap, row)
        if x is None:
            continue
        backend = _backends.find(x)
        if backend is None:
            if dcdw is not None or (writes and out is not x):
                text = f"expected an array, got {errors.describe(x)}"
                strangers["w"].append((paths()[place], text))
        elif writes and out is None:
            strangers["out"].append((paths()[place], "expected an array, got None"))
        elif moves and velocity is None and _needs_velocity(backend, x, columns.rules[place], dcdw):
            strangers["state"].append((paths()[place], "expected a velocity, got None"))
        else:
            if issubclass(type(dcdw), (int, float, complex)) and not isinstance(dcdw, bool):
                dcdw = backend.full(_machine_number(dcdw), x)
            leaves.append(Leaf(place, x, dcdw, out, columns.rules[place], backend, velocity))
    for argument, lines in strangers.items():
        if lines:
            headline = f"{argument} holds something that is no array"
            raise errors.error(errors.LeafError, argument, headline, lines)
    return leaves


def _needs_velocity(backend: Backend, x: Any, rule: Rule, dcdw: Any) -> bool:
    if dcdw is None or is_zero(rule.momentum):
        return False
    # What is wrong with weights that cannot move is for the checks to say.
    return bool(backend.fault(x)) or backend.facts(x).kind in FLOATING


def _machine_number(x: complex) -> complex:
    """The number as a float or complex: an int may be longer than any."""
    if isinstance(x, complex):
        return x
    try:
        return float(x)
    except OverflowError:
        return math.copysign(math.inf, x > 0 or -1)


def _refuse_surplus(w: Any, other: Any, old: list[Any], values: list[Any], argument: str) -> None:
    """Refuse arrays that stand just where the weights have None: nothing is dropped silently."""
    if not any(x is None and value is not None for x, value in zip(old, values, strict=True)):
        return
    theirs = dict(_tree.walk(other))
    lines = [
        (path, f"expected None, got {errors.describe(theirs[path])}")
        for path, leaf in _tree.walk(w)
        if leaf is None and theirs.get(path) is not None
    ]
    if lines:
        headline = f"{argument} does not match w"
        raise errors.error(errors.StructureError, argument, headline, lines)


def _run(leaves: list[Leaf], paths: Paths, writes: Writes) -> tuple[list[New], Any]:
    """The results in the order of the leaves, and whether the step is taken (a bool, or an array
    that is not known yet).

    Those of leaves with an `out` are there when the writes are made.
    """
    guarded = any(leaf.rule.nonfinite != "propagate" for leaf in leaves if leaf.dcdw is not None)
    results: dict[int, New] = {}
    for backend, group in _nonfinite.by_backend(leaves).items():
        steps = [leaf for leaf in group if leaf.dcdw is not None]
        given = [leaf._replace(out=None) for leaf in steps] if guarded else steps
        news = backend.update(given, writes)
        results |= {leaf.place: new for leaf, new in zip(steps, news, strict=True)}
    taken: Any = True
    if guarded:
        results, taken = _nonfinite.guard(leaves, results, paths)
    for leaf in leaves:
        if leaf.dcdw is None:
            results[leaf.place] = _kept(leaf, writes)
        elif guarded:
            results[leaf.place] = writes.result(leaf, results[leaf.place])
    return [results[leaf.place] for leaf in leaves], taken


def _kept(leaf: Leaf, writes: Writes) -> New:
    """Weights without a gradient: as they are, in memory of their own; and so their velocity."""
    if leaf.out is None:
        return _nonfinite.copies(leaf)
    if leaf.out is not leaf.w:
        writes.add(leaf.backend, leaf.out, leaf.w)
    return New(leaf.out, leaf.velocity)
