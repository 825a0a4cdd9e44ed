"""The site builds in strict mode, documents every public name, and loads nothing remote."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import types

import pytest
from conftest import need
from examples import ROOT

PACKAGE = ROOT / "lars_tree"

need("mkdocs")
need("mkdocstrings_handlers.python")


def build(root, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; return its directory."""
    directory = tmp_path_factory.mktemp("site")
    result = build(ROOT, directory)
    assert result.returncode == 0, result.stderr
    return directory


def test_every_public_name_is_documented(site):
    pages = {path.stem: path.read_text() for path in (site / "api").glob("*.html")}
    ids = set(re.findall(r'id="([\w.]+)"', "".join(pages.values())))
    assert {
        "lars_tree",
        "lars_tree.errors",
        "lars_tree.schedules",
        "lars_tree.torch",
    } <= pages.keys()
    for module_name, text in pages.items():
        if module_name in ("lars_tree.optax", "lars_tree.torch"):
            need(module_name.rpartition(".")[2])
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                assert value.__name__ in pages
            else:
                home = getattr(value, "__module__", module_name)  # constants have no __module__
                assert {f"{module_name}.{name}", f"{home}.{name}"} & ids, name
            assert re.search(rf">{name}<", text), f"{name} is not on the page of {module_name}"


def test_the_pages_load_nothing_remote(site):
    """Links may lead to other sites, but what a browser loads automatically is part of the site."""
    tags = r"<(?:script|img|link|iframe|source|object)\b"
    loads = tags + r"[^>]*?(?:src|href|data)=\"?((?:https?:)?//[^\" >]+)"
    for path in site.rglob("*.html"):
        assert re.findall(loads, path.read_text()) == [], path.name
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        found = re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", path.read_text())
        assert found == [], path.name


@pytest.fixture
def copy(tmp_path):
    """A copy of the site's sources that a test may modify."""
    root = tmp_path / "root"
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copytree(PACKAGE, root / "lars_tree", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for path in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml"]:
        shutil.copy(path, root)
    return root


def append(path, text):
    path.write_text(path.read_text() + text)


def test_what_mkdocs_warns_about_fails_the_build(copy, tmp_path):
    """The build fails on broken links, pages missing in the navigation and invalid docstrings."""
    targets = ["no.md", "errors.md#no", "api/lars_tree.md#lars_tree.no", "../LICENSE"]
    links = "".join(f"[a]({target})\n" for target in targets) + "![a](images/no.svg)\n"
    append(copy / "docs" / "rule.md", f"\n{links}")
    append(copy / "README.md", "\n[a](docs/rule.md#nowhere)\n")
    (copy / "docs" / "stray.md").write_text("# Stray\n")
    code = 'def a():\n "A\\n\\nRaises:\\n  b"'
    append(copy / "lars_tree" / "schedules.py", f'\n__all__ += ["a"]\n{code}\n')
    result = build(copy, tmp_path / "site")
    assert result.returncode != 0
    for part in [
        *targets,
        "images/no.svg",
        "rule.md#nowhere",
        "stray.md",
        "lars_tree/schedules.py",
    ]:
        assert part in result.stderr, part


def test_undocumented_names_fail_the_build(copy, tmp_path):
    code = """
class Bare: pass
class Documented:
    "A"
    def method(self): 0
    @property
    def value(self): 0
__all__ += ["Bare", "Documented", "Undefined"]
"""
    append(copy / "lars_tree" / "schedules.py", code)
    result = build(copy, tmp_path / "site")
    assert result.returncode != 0
    for name in ["Bare", "Documented.method", "Documented.value", "Undefined"]:
        assert f"schedules.{name}" in result.stderr, name
    assert "schedules.Documented," not in result.stderr


def test_a_module_without_exports_fails_the_build(copy, tmp_path):
    (copy / "lars_tree" / "fresh.py").write_text('"""Fresh."""\n')
    result = build(copy, tmp_path / "site")
    assert result.returncode != 0
    assert "lars_tree.fresh has no __all__" in result.stderr
