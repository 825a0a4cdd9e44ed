"""The optimizers of other packages, at the versions that .ci/run installs."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib.util import find_spec, module_from_spec
from typing import Any


def timm_lars() -> Any:
    """The Lars of timm, without timm's models, which need torchvision."""
    for name in ("timm", "timm.optim"):
        spec = find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
        sys.modules.setdefault(name, module_from_spec(spec))
    from timm.optim.lars import Lars

    return Lars


def ivy_with_numpy() -> Any:
    """The package ivy, which warns when it is imported, and at each update."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ivy

        ivy.set_backend("numpy")
    logging.getLogger().addFilter(lambda record: "does not support autograd" not in record.msg)
    return ivy
