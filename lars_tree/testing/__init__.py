"""Tools to test optimizers: hypothesis strategies, assertions on trees, and the laws of LARS.

Strategies make weights, gradients and options (`strategies.py`, `trees.py`), and assertions compare
two trees leaf by leaf (`assertions.py`). `check_update_laws` and `check_optimizer_laws` check any
update function or optimizer against the laws (`laws.py`, `check.py`). The tests of this package use
these tools.
"""

from lars_tree.errors import requiring

with requiring("lars_tree.testing", "'lars-tree[testing]'"):
    import hypothesis as _  # noqa: F401

from lars_tree.testing.adapters import for_optax, for_torch
from lars_tree.testing.assertions import assert_close_ulp, assert_identical
from lars_tree.testing.check import LawError, check_optimizer_laws, check_update_laws
from lars_tree.testing.laws import (
    IN_PLACE_LAWS,
    LAWS,
    MOMENTUM_LAWS,
    OPTIMIZER_LAWS,
    RULE_LAWS,
    STATE_LAWS,
    TREE_LAWS,
)
from lars_tree.testing.strategies import arrays, layers, options
from lars_tree.testing.trees import (
    containers,
    keys,
    nests,
    prefixes_of,
    runs,
    shuffled,
    weights_and_gradients,
)
from lars_tree.testing.trial import Run, Trial

__all__ = [
    "IN_PLACE_LAWS",
    "LAWS",
    "MOMENTUM_LAWS",
    "OPTIMIZER_LAWS",
    "RULE_LAWS",
    "STATE_LAWS",
    "TREE_LAWS",
    "LawError",
    "Run",
    "Trial",
    "arrays",
    "assert_close_ulp",
    "assert_identical",
    "check_optimizer_laws",
    "check_update_laws",
    "containers",
    "for_optax",
    "for_torch",
    "keys",
    "layers",
    "nests",
    "options",
    "prefixes_of",
    "runs",
    "shuffled",
    "weights_and_gradients",
]


def __dir__() -> list[str]:
    return __all__
