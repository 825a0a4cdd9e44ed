"""LARS for torch: an optimizer, and the parameter groups that the published recipes use."""

from lars_tree.errors import requiring

with requiring("lars_tree.torch", "torch"):
    import torch as _  # noqa: F401

from lars_tree.torch.groups import param_groups
from lars_tree.torch.optimizer import Lars

__all__ = ["Lars", "param_groups"]


def __dir__() -> list[str]:
    return __all__
