"""lars_update: one LARS step on every array of a nest of weights.

Reads as a table of contents. Structure is matched in `_tree.py`, options are resolved in
`_options.py`, arrays are checked in `_checks.py`; only then do the `_backends` compute, each on all
its leaves at once, by the formula in `_rule.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from lars_tree import _backends, _checks, _memory, _options, _tree, errors
from lars_tree._backends.base import Values
from lars_tree._checks import Leaf
from lars_tree.array import Array, unwrap

if TYPE_CHECKING:
    from lars_tree._backends.base import Backend
    from lars_tree._rule import Rule

Paths = Callable[[], list[errors.Path]]


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
    grad_scale: Any = 1.0,
    nonfinite: Any = "propagate",
    layer_axis: Any = None,
) -> Any:
    """Take one LARS step on every array of a nest of weights.

    Each array is one layer. For weights w and gradient g = dcdw / grad_scale,

        ratio = trust_coefficient * |w| / (|g| + decay_lambda * |w| + eps)
        w_new = w - lr * ratio * (g + decay_lambda * w)

    |.| is the 2-norm over the layer. Where |w| or the denominator is 0, ratio is 1.

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
        trust_clip: True (LARC): ratio is never above 1.
        grad_scale: The loss scale that dcdw still carries, > 0.
        nonfinite: What to do when a new weight would be NaN or infinite. "propagate" writes it,
            "raise" raises before anything is written, "skip" leaves all weights as they are.
        layer_axis: The axis along which an array stacks layers: each index has its own ratio.

    Returns:
        The new weights, in the types, key order, dtypes, shapes and devices of w; `out` if given.

    Raises:
        StructureError: dcdw, out or an option does not match w; names every differing path.
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
        "nonfinite": nonfinite,
        "layer_axis": layer_axis,
        "stop_gradients": stop_gradients,
    }
    try:
        return _update(w, dcdw, out, options)
    except RecursionError:
        raise _explained({"w": w, "dcdw": dcdw, "out": out, **options}) from None


def _update(w: Any, dcdw: Any, out: Any, options: dict[str, Any]) -> Any:
    @cache
    def paths() -> list[errors.Path]:
        return [path for path, _ in _tree.walk(w)]

    old = _tree.leaves(w)
    dcdws = _tree.broadcast("dcdw", w, dcdw)
    outs = old if out is w else [None] * len(old)
    if out is not None and out is not w:
        outs = _tree.broadcast("out", w, out, exact=True)
    rules = _options.resolve(w, options, len(old))
    news = _update_plain(old, dcdws, None if out is None else outs, rules)
    if news is not None:
        return _tree.rebuild(w, news) if out is None else out
    _refuse_surplus(w, dcdw, old, dcdws, "dcdw")
    if out is not None:
        _refuse_surplus(w, out, old, outs, "out")
    leaves = _arrays(old, dcdws, outs, rules, out is not None, paths)
    _checks.check(leaves, paths)
    with nullcontext() if out is None else _memory.uninterrupted():
        results = _run(_checks.detach_inputs(leaves), paths)
    if out is not None:
        return out
    new = list(old)
    for leaf, result in zip(leaves, results, strict=True):
        new[leaf.place] = Array(result) if isinstance(old[leaf.place], Array) else result
    return _tree.rebuild(w, new)


def _update_plain(
    old: list[Any], dcdws: list[Any], outs: list[Any] | None, rules: list[Rule]
) -> list[Any] | None:
    """The quick way, for plain arrays of one library: checked and stepped in one native call.

    None, with nothing written, for all else, and for whatever is wrong: the long way has the
    checks with their messages, and gives the same bits.
    """
    backend = next((_backends.find(unwrap(x)) for x in old if x is not None), None)
    if backend is None:
        return None
    # Python handles signals when a native call is over, so there is no need to hold them off.
    with nullcontext() if outs is None else _memory.serialised():
        return backend.update_plain(old, dcdws, outs, rules)


def _arrays(
    old: list[Any],
    dcdws: list[Any],
    outs: list[Any],
    rules: list[Rule],
    writes: bool,
    paths: Paths,
) -> list[Leaf]:
    """The leaves that hold arrays, out of their wrappers; others must stay as they are."""
    leaves: list[Leaf] = []
    strangers: dict[str, list[errors.Line]] = {"w": [], "out": []}
    for place, row in enumerate(zip(old, dcdws, outs, strict=True)):
        x, dcdw, out = map(unwrap, row)
        if x is None:
            continue
        backend = _backends.find(x)
        if backend is None:
            if dcdw is not None or (writes and out is not x):
                text = f"expected an array, got {errors.describe(x)}"
                strangers["w"].append((paths()[place], text))
        elif writes and out is None:
            strangers["out"].append((paths()[place], "expected an array, got None"))
        else:
            if isinstance(dcdw, (int, float, complex)) and not isinstance(dcdw, bool):
                dcdw = backend.full(_machine_number(dcdw), x)
            leaves.append(Leaf(place, x, dcdw, out, rules[place], backend))
    for argument, lines in strangers.items():
        if lines:
            headline = f"{argument} holds something that is no array"
            raise errors.error(errors.LeafError, argument, headline, lines)
    return leaves


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


def _run(leaves: list[Leaf], paths: Paths) -> list[Any]:
    """The new arrays, in the order of the leaves; those with an `out` are written to it."""
    guarded = any(leaf.rule.nonfinite != "propagate" for leaf in leaves if leaf.dcdw is not None)
    results: dict[int, Any] = {}
    for backend, group in _by_backend(leaves).items():
        steps = [leaf for leaf in group if leaf.dcdw is not None]
        outs = [None if guarded else leaf.out for leaf in steps]
        news = backend.update(
            [leaf.w for leaf in steps],
            [leaf.dcdw for leaf in steps],
            outs,
            [leaf.rule for leaf in steps],
        )
        results |= {leaf.place: new for leaf, new in zip(steps, news, strict=True)}
    if guarded:
        results = _guard(leaves, results, paths)
    for leaf in leaves:
        if leaf.dcdw is None:
            results[leaf.place] = _kept(leaf)
        elif guarded and leaf.out is not None:
            leaf.backend.write(leaf.out, results[leaf.place])
    return [results[leaf.place] for leaf in leaves]


def _by_backend(leaves: list[Leaf]) -> dict[Backend, list[Leaf]]:
    groups: dict[Backend, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.backend, []).append(leaf)
    return groups


def _kept(leaf: Leaf) -> Any:
    """Weights without a gradient: as they are, in memory of their own."""
    if leaf.out is None:
        return leaf.backend.copy(leaf.w, leaf.rule.stop_gradients)
    if leaf.out is not leaf.w:
        leaf.backend.write(leaf.out, leaf.w)
    return leaf.out


def _guard(leaves: list[Leaf], results: dict[int, Any], paths: Paths) -> dict[int, Any]:
    """The results, or what `nonfinite` asks for where they would hold NaN or infinity."""
    steps = [leaf for leaf in leaves if leaf.dcdw is not None]
    bad = [
        paths()[leaf.place]
        for leaf in steps
        if leaf.rule.nonfinite == "raise"
        and not bool(leaf.backend.all_finite([results[leaf.place]]))
    ]
    if bad:
        headline = "dcdw would make weights that are not finite"
        lines = [(path, "expected finite numbers, got NaN or infinity") for path in bad]
        raise errors.error(errors.NonFiniteError, "dcdw", headline, lines)
    watched = _by_backend([leaf for leaf in steps if leaf.rule.nonfinite == "skip"])
    flags = [
        backend.all_finite([results[leaf.place] for leaf in group])
        for backend, group in watched.items()
    ]
    if not flags:
        return results
    values = {leaf.backend.values(leaf.w) for leaf in steps}
    if values != {Values.HERE} and set(watched) == set(_by_backend(steps)) and len(flags) == 1:
        flag = flags[0]  # stays on its device, and unknown where it is traced
    elif Values.LATER in values:
        headline = "nonfinite cannot skip: the values are not known yet"
        text = "expected arrays of one library where some are traced or lazy"
        lines = [(paths()[leaf.place], text) for leaf in steps if leaf.rule.nonfinite == "skip"]
        raise errors.error(errors.OptionError, "nonfinite", headline, lines)
    else:
        flag = all(bool(flag) for flag in flags)
    return {
        leaf.place: leaf.backend.choose(
            flag, results[leaf.place], leaf.backend.copy(leaf.w, leaf.rule.stop_gradients)
        )
        for leaf in steps
    }


def _explained(arguments: dict[str, Any]) -> Exception:
    """What to say of a nest that was too deep to walk."""
    for name, tree in arguments.items():
        found = _tree.cycle(tree)
        if found:
            earlier, path = found
            text = f"expected a tree, got the node at {errors.path_string(earlier) or name} again"
            return errors.error(errors.StructureError, name, f"{name} holds itself", [(path, text)])
    return RecursionError("a nest is deeper than the recursion limit: sys.setrecursionlimit")
