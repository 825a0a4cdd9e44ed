"""The option `nonfinite`: decides whether results are written or the old values are kept."""

from __future__ import annotations

from typing import Any

from lars_tree import errors
from lars_tree._backends.base import Leaf, StepResult, Values, grouped
from lars_tree._core.checks import Paths


def guard(
    leaves: list[Leaf],
    results: dict[int, StepResult],
    paths: Paths,
    words: errors.Words = errors.WORDS,
    native: dict[int, str] | None = None,
) -> tuple[dict[int, StepResult], Any]:
    """Apply the option `nonfinite`: raise, replace all results by old values, or keep the results.

    `leaves` does not include the leaves of the native engine. `native` maps the index of each leaf
    for which the native engine would write NaN or infinity to the option `nonfinite` of the leaf;
    `native` is None if the native engine has no leaves. Returns the results, and whether the step
    applies, as in `execute.Result.taken`.
    """
    steps = [leaf for leaf in leaves if leaf.dcdw is not None]

    def are_finite(group: list[Leaf]) -> Any:  # a group of leaves with the same backend
        arrays = [x for leaf in group for x in results[leaf.leaf_index] if x is not None]
        return group[0].backend.all_finite(arrays)

    bad = [index for index, choice in (native or {}).items() if choice == "raise"]
    bad += [
        leaf.leaf_index
        for leaf in steps
        if leaf.rule.nonfinite == "raise" and not bool(are_finite([leaf]))
    ]
    if bad:
        raise error(bad, paths, words)
    watched = [leaf for leaf in steps if leaf.rule.nonfinite == "skip"]
    flags = [are_finite(group) for group in grouped(watched, lambda leaf: leaf.backend).values()]
    flags += [False] if native else []
    if not flags:
        return results, True
    values = {leaf.backend.values(leaf.w) for leaf in steps}
    if native is not None:
        values.add(Values.CPU)
    backends = {leaf.backend for leaf in steps}
    if values != {Values.CPU} and len(flags) == 1 and backends == {x.backend for x in watched}:
        # The flag is not read here, so it may be on a device or traced.
        flag = steps[0].backend.on_all_shards(flags[0], steps)
    elif Values.TRACED in values:
        headline = "nonfinite cannot skip: the values are not known yet"
        text = "expected arrays of one library where some are traced or lazy"
        lines = [(paths()[leaf.leaf_index], text) for leaf in watched]
        raise words.error(errors.OptionError, "nonfinite", headline, lines)
    else:
        flag = all(bool(flag) for flag in flags)

    def chosen(leaf: Leaf) -> StepResult:
        pairs = zip(results[leaf.leaf_index], copies(leaf), strict=True)
        return StepResult(
            *(None if a is None else leaf.backend.choose(flag, a, b) for a, b in pairs)
        )

    return {leaf.leaf_index: chosen(leaf) for leaf in steps}, flag


def error(bad: list[int], paths: Paths, words: errors.Words) -> errors.LarsTreeError:
    """The error for leaves, given by their indices, that would not be finite."""
    headline = f"{words.dcdw} would make {words.weights} that are not finite"
    text = "expected finite numbers, got NaN or infinity"
    lines = [(paths()[index], text) for index in sorted(bad)]
    return words.error(errors.NonFiniteError, "dcdw", headline, lines)


def copies(leaf: Leaf) -> StepResult:
    """Copies of the weights and the velocity of a leaf."""
    old = (leaf.w, leaf.velocity)
    stops = leaf.rule.stop_gradients
    return StepResult(*(None if x is None else leaf.backend.copy(x, stops) for x in old))
