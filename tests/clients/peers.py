"""Packages that we compare with and that cannot simply be imported."""

from __future__ import annotations

import logging
import warnings
from contextlib import chdir
from tempfile import TemporaryDirectory
from typing import Any


def ivy_with_numpy() -> Any:
    """The package ivy, which warns when it is imported, and at each update."""
    with warnings.catch_warnings(), TemporaryDirectory() as folder, chdir(folder):
        # ivy writes a log and a cache to the working directory
        warnings.simplefilter("ignore")
        import ivy

        ivy.set_backend("numpy")
    logging.getLogger().addFilter(lambda record: "does not support autograd" not in record.msg)
    return ivy
