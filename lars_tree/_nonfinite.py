"""What `nonfinite` asks for: whether results may be written, or what stands in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lars_tree import errors
from lars_tree._backends.base import Backend, Leaf, StepResult, Values

Paths = Callable[[], list[errors.Path]]


def guard(
    leaves: list[Leaf],
    results: dict[int, StepResult],
    paths: Paths,
    words: errors.Words = errors.WORDS,
    native: dict[int, str] | None = None,
) -> tuple[dict[int, StepResult], Any]:
    """The results, or what `nonfinite` asks for where they would hold NaN or infinity.

    And whether the step is taken: a bool, or an array of one that is not known yet.

    Args:
        leaves: Those that the native engine does not take.
        results: Theirs, by place.
        paths: The paths of all leaves.
        words: What the caller calls the arguments.
        native: What `nonfinite` is for those leaves, by place, to which the native engine would
            write NaN or infinity; None if it has no leaves.
    """
    steps = [leaf for leaf in leaves if leaf.dcdw is not None]

    def are_finite(backend: Backend, group: list[Leaf]) -> Any:
        arrays = [x for leaf in group for x in results[leaf.leaf_index] if x is not None]
        return backend.all_finite(arrays)

    bad = [index for index, choice in (native or {}).items() if choice == "raise"]
    bad += [
        leaf.leaf_index
        for leaf in steps
        if leaf.rule.nonfinite == "raise" and not bool(are_finite(leaf.backend, [leaf]))
    ]
    if bad:
        headline = f"{words.dcdw} would make {words.weights} that are not finite"
        text = "expected finite numbers, got NaN or infinity"
        lines = [(paths()[index], text) for index in sorted(bad)]
        raise words.error(errors.NonFiniteError, "dcdw", headline, lines)
    watched = by_backend([leaf for leaf in steps if leaf.rule.nonfinite == "skip"])
    flags = [are_finite(backend, group) for backend, group in watched.items()]
    flags += [False] if native else []
    if not flags:
        return results, True
    values = {leaf.backend.values(leaf.w) for leaf in steps}
    if native is not None:
        values.add(Values.CPU)
    if values != {Values.CPU} and set(watched) == set(by_backend(steps)) and len(flags) == 1:
        # It stays on its device, and unknown where it is traced.
        flag = steps[0].backend.on_all_shards(flags[0], steps)
    elif Values.TRACED in values:
        headline = "nonfinite cannot skip: the values are not known yet"
        text = "expected arrays of one library where some are traced or lazy"
        lines = [
            (paths()[leaf.leaf_index], text) for leaf in steps if leaf.rule.nonfinite == "skip"
        ]
        raise words.error(errors.OptionError, "nonfinite", headline, lines)
    else:
        flag = all(bool(flag) for flag in flags)

    def chosen(leaf: Leaf) -> StepResult:
        pairs = zip(results[leaf.leaf_index], copies(leaf), strict=True)
        return StepResult(
            *(None if a is None else leaf.backend.choose(flag, a, b) for a, b in pairs)
        )

    return {leaf.leaf_index: chosen(leaf) for leaf in steps}, flag


def by_backend(leaves: list[Leaf]) -> dict[Backend, list[Leaf]]:
    """The leaves of each library."""
    groups: dict[Backend, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.backend, []).append(leaf)
    return groups


def copies(leaf: Leaf) -> StepResult:
    """What the leaf has, in memory of its own."""
    old = (leaf.w, leaf.velocity)
    stops = leaf.rule.stop_gradients
    return StepResult(*(None if x is None else leaf.backend.copy(x, stops) for x in old))
