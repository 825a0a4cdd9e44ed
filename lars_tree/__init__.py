"""Update a whole nest of weights in one call, by Layer-wise Adaptive Rate Scaling (LARS)."""

from lars_tree.array import Array
from lars_tree.update import lars_update
