"""Every example in docstrings, README and docs runs, and shows what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
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
def test_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "lars_tree.torch":
        need("torch")
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=NAMES, optionflags=FLAGS).failed == 0


def failures(text, name):
    """How many examples of a Markdown page fail; fences end an output as blank lines do."""
    lines = ["" if line.startswith("```") else line for line in text.splitlines()]
    test = doctest.DocTestParser().get_doctest("\n".join(lines), {}, name, name, 0)
    return doctest.DocTestRunner(optionflags=FLAGS).run(test).failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for library in ("torch", "jax", "dask.array", "optree", "safetensors"):
        if f"import {library}" in text:
            need(library)
    assert failures(text, page.name) == 0


def test_a_wrong_example_would_be_seen():
    assert failures("```pycon\n>>> 1 + 1\n3\n```\n", "page") == 1


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_has_two_commands_that_do_all_the_set_up():
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert all(command.startswith("python3.11 -m venv .venv && ") for command in commands)


@pytest.mark.parametrize("name", ["lars_update", "Container", "Array", "Lars"])
def test_public_names_show_an_example(name):
    assert ">>>" in getattr(lars_tree, name).__doc__
