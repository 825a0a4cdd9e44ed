"""Every example in docstrings, README and docs runs, and shows what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
from conftest import need

import lars_tree

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(lars_tree.__path__, "lars_tree.")
    if not module.name.startswith("lars_tree._backends.")
]
NAMES = {"np": np, "lt": lars_tree} | {name: getattr(lars_tree, name) for name in lars_tree.__all__}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=NAMES, optionflags=FLAGS).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page):
    text = page.read_text()
    for library in ("torch", "jax", "dask.array", "optree"):
        if f"import {library}" in text:
            need(library)
    result = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert result.failed == 0


def test_a_wrong_example_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(">>> 1 + 1\n3\n")
    assert doctest.testfile(str(page), module_relative=False, report=False).failed == 1


@pytest.mark.parametrize("name", ["lars_update", "Container", "Array"])
def test_public_names_show_an_example(name):
    assert ">>>" in getattr(lars_tree, name).__doc__
