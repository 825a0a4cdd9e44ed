"""The examples in docstrings, README and docs run, and print the output that is shown."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re

import numpy as np
import pytest
from conftest import need
from examples import FLAGS, NOT_RUN, ROOT, blocks, is_exempt, need_imports, run_page

import lars_tree

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(lars_tree.__path__, "lars_tree.")
    if not module.name.startswith("lars_tree._backends.")
]
NAMES = {"np": np, "lt": lars_tree} | {name: getattr(lars_tree, name) for name in lars_tree.__all__}


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for library in ("optax", "torch"):
        if library in name:
            need(library)
    module = importlib.import_module(name)
    skipped = None
    for test in doctest.DocTestFinder().find(module, extraglobs=NAMES):
        try:
            need_imports("".join(example.source for example in test.examples))
        except pytest.skip.Exception as reason:
            skipped = reason  # the others run
        else:
            assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0, test.name
    if skipped:
        raise skipped


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), page.name, tmp_path)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```pycon\n>>> 1 + 1\n3\n```", "page, line 1"),
        ("```pycon\n1 + 1\n```", "no prompt"),
        ("```python\nassert 1 == 2\n```", ""),
        ("```python\n# python a.py\nassert 1 == 2, 'it ran'\n```", "it ran"),
        ("```bash\npip install nothing-of-this-is-run\nfalse\n```", "page, line 1: false"),
        ("```console\n$ echo a\na\n$ echo b\nc\n```", "expected\nc\ngot\nb"),
        ("```rust\n```", "unknown language 'rust'"),
        ("```\n1 + 1\n```", "unknown language ''"),
        ("```text\n", "without an end"),
        (">>> 1 + 1", "outside"),
    ],
)
def test_a_wrong_block_fails(page, message, tmp_path):
    with pytest.raises(AssertionError) as error:
        run_page(page, "page", tmp_path)
    assert message in str(error.value)


def test_the_blocks_of_a_page_share_names_and_a_directory(tmp_path):
    page = """
        ```python
        from pathlib import Path
        path = Path.cwd()
        ```
        ```pycon
        >>> _ = path.joinpath("name").write_text("there")
        ```
        ```console
        $ cat name
        there
        ```"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run_page(page, "page", tmp_path)


def test_only_exempt_commands_are_not_run():
    assert is_exempt(".venv/bin/mypy")  # .ci/run contains this line
    assert not is_exempt(".venv/bin/mypy --version")
    assert is_exempt("python -m benchmarks --write")
    assert not is_exempt("lars-tree demo")


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_each_exemption_is_used(pattern):
    """An exemption for a block that no longer exists is an error."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page.read_text())
        if block.language == "bash"
        for line in block.text.splitlines()
    ]
    assert any(re.fullmatch(pattern, line) for line in lines)


def test_links_between_pages_have_a_target():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_two_commands_of_the_readme_set_up_their_environment():
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)


@pytest.mark.parametrize("name", ["lars_update", "Container", "Array", "Lars"])
def test_public_names_have_an_example(name):
    assert ">>>" in getattr(lars_tree, name).__doc__
