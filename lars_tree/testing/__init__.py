"""Tools to test optimizers: hypothesis strategies, assertions on trees, and the laws of LARS.

Strategies make weights, gradients and options (`strategies.py`), assertions compare two trees leaf
by leaf (`assertions.py`), and `check_update_laws` checks any update function against the laws
(`laws.py`, `check.py`). The tests of this package use these tools.
"""

from lars_tree.errors import requiring

with requiring("lars_tree.testing", "'lars-tree[testing]'"):
    import hypothesis as _  # noqa: F401

from lars_tree.testing.assertions import assert_close_ulp, assert_identical
from lars_tree.testing.check import LawError, check_update_laws
from lars_tree.testing.laws import LAWS, RULE_LAWS, TREE_LAWS
from lars_tree.testing.strategies import (
    arrays,
    containers,
    keys,
    layers,
    nests,
    options,
    prefixes_of,
    shuffled,
    weights_and_gradients,
)
from lars_tree.testing.trial import Trial

__all__ = [
    "LAWS",
    "RULE_LAWS",
    "TREE_LAWS",
    "LawError",
    "Trial",
    "arrays",
    "assert_close_ulp",
    "assert_identical",
    "check_update_laws",
    "containers",
    "keys",
    "layers",
    "nests",
    "options",
    "prefixes_of",
    "shuffled",
    "weights_and_gradients",
]


def __dir__() -> list[str]:
    return __all__
