"""The laws of optimizers. A law is a function of a `Trial`, which draws the arguments.

A law is broken if it raises an AssertionError, or if the update raises any error.
`TREE_LAWS` are about trees and memory, `IN_PLACE_LAWS` about `out=`, `RULE_LAWS` about the
arithmetic of LARS, `STATE_LAWS` about the state of an optimizer, and `MOMENTUM_LAWS` about its
momentum.
"""

from __future__ import annotations

from lars_tree.testing.rule_laws import (
    RULE_LAWS,
    decays_as_in_the_paper,
    decays_plainly_without_a_gradient,
    does_not_round_the_decay,
    does_not_round_the_rate,
    does_not_see_the_scale_of_the_gradient,
    follows_the_rule,
    is_exact,
    is_exact_in_long_layers,
    is_exact_over_the_whole_range,
    is_linear_in_the_rate,
    scales_with_the_weights,
    stands_still_without_a_gradient,
    trains_zero_weights,
)
from lars_tree.testing.run_laws import (
    MOMENTUM_LAWS,
    STATE_LAWS,
    changes_its_rate_by_the_convention,
    follows_the_rule_in_a_run,
    follows_the_rule_with_nesterov,
    keeps_no_inputs,
    keeps_runs_apart,
    keeps_the_structure_in_a_run,
    leaves_its_inputs_alone_in_a_run,
    matches_by_key_in_a_run,
    pauses_without_a_gradient,
    resumes_from_a_saved_state,
    rolls_on_by_its_momentum,
    starts_without_momentum,
    takes_each_layer_on_its_own_in_a_run,
)
from lars_tree.testing.tree_laws import (
    IN_PLACE_LAWS,
    TREE_LAWS,
    Law,
    decays_in_place,
    depends_on_its_arguments_alone,
    is_the_same_in_place,
    keeps_the_structure,
    leaves_its_inputs_alone,
    leaves_its_inputs_alone_with_decay,
    leaves_the_gradients_alone_in_place,
    leaves_weights_without_a_gradient,
    leaves_weights_without_a_gradient_in_place,
    matches_by_key,
    returns_new_arrays,
    returns_new_arrays_without_a_gradient,
    shows_nonfinite_gradients,
    stands_still_at_rate_zero,
    takes_each_layer_on_its_own,
)

LAWS = TREE_LAWS + IN_PLACE_LAWS + RULE_LAWS
"""All laws of an update function, in the order in which they are checked."""

OPTIMIZER_LAWS = TREE_LAWS + RULE_LAWS + STATE_LAWS + MOMENTUM_LAWS
"""All laws of an optimizer, in the order in which they are checked."""

__all__ = [
    "IN_PLACE_LAWS",
    "LAWS",
    "MOMENTUM_LAWS",
    "OPTIMIZER_LAWS",
    "RULE_LAWS",
    "STATE_LAWS",
    "TREE_LAWS",
    "Law",
    "changes_its_rate_by_the_convention",
    "decays_as_in_the_paper",
    "decays_in_place",
    "decays_plainly_without_a_gradient",
    "depends_on_its_arguments_alone",
    "does_not_round_the_decay",
    "does_not_round_the_rate",
    "does_not_see_the_scale_of_the_gradient",
    "follows_the_rule",
    "follows_the_rule_in_a_run",
    "follows_the_rule_with_nesterov",
    "is_exact",
    "is_exact_in_long_layers",
    "is_exact_over_the_whole_range",
    "is_linear_in_the_rate",
    "is_the_same_in_place",
    "keeps_no_inputs",
    "keeps_runs_apart",
    "keeps_the_structure",
    "keeps_the_structure_in_a_run",
    "leaves_its_inputs_alone",
    "leaves_its_inputs_alone_in_a_run",
    "leaves_its_inputs_alone_with_decay",
    "leaves_the_gradients_alone_in_place",
    "leaves_weights_without_a_gradient",
    "leaves_weights_without_a_gradient_in_place",
    "matches_by_key",
    "matches_by_key_in_a_run",
    "pauses_without_a_gradient",
    "resumes_from_a_saved_state",
    "returns_new_arrays",
    "returns_new_arrays_without_a_gradient",
    "rolls_on_by_its_momentum",
    "scales_with_the_weights",
    "shows_nonfinite_gradients",
    "stands_still_at_rate_zero",
    "stands_still_without_a_gradient",
    "starts_without_momentum",
    "takes_each_layer_on_its_own",
    "takes_each_layer_on_its_own_in_a_run",
    "trains_zero_weights",
]
