"""The modules that an import loads, and the allowed imports between modules of the package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import need

import lars_tree

PACKAGE = Path(lars_tree.__file__).parent
HEAVY = {
    "torch",
    "jax",
    "dask",
    "flax",
    "optree",
    "hypothesis",
    "matplotlib",
    "optax",
    "rich",
    "safetensors",
    "sklearn",
    "tree",
}

# The folders and files of the package. Each may import only from itself and from later entries.
LAYERS = [
    "__main__",
    "cli",
    "_commands",
    "__init__",
    "testing",
    "io",
    "optax",
    "optimizer",
    "report",
    "torch",
    "array",
    "container",
    "schedules",
    "update",
    "_files",
    "_report",
    "_core",
    "_display",
    "_backends",
    "_numerics",
    "_tree",
    "_native",
    "errors",
]


def printed(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def imported_by(code):
    names = printed(f"{code}\nimport sys; print(*sys.modules)").split()
    return {name.partition(".")[0] for name in names}


def test_importing_the_package_loads_nothing_heavy():
    assert imported_by("import lars_tree") & HEAVY == set()


def test_updating_numpy_arrays_loads_nothing_heavy():
    code = """if 1:
        import numpy as np, lars_tree as lt
        w = lt.Container(a={"b": np.ones(2)}, c=[np.ones(2)])
        w.lars_update(w, 0.1, out=w), repr(w), w + 1, w == w"""
    assert imported_by(code) & HEAVY == set()


@pytest.mark.parametrize("module", ["hypothesis", "tree"])
def test_a_heavy_import_would_be_seen(module):
    assert module in imported_by(f"import lars_tree, {module}") & HEAVY


def modules():
    """The name, without "lars_tree.", and the syntax tree of each module of the package."""
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imports(tree, names):
    """The modules of the package that a module imports, even in functions or for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lars_tree"):
            base = node.module.removeprefix("lars_tree").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in names else base or "__init__"


def layer(name):
    return LAYERS.index(name.partition(".")[0])


def upward(graph):
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if layer(other) < layer(name)
    ]


@pytest.fixture(scope="module")
def graph():
    found = dict(modules())
    return {name: set(imports(tree, found)) - {name} for name, tree in found.items()}


def test_imports_go_one_way_only(graph):
    assert {name.partition(".")[0] for name in graph} == set(LAYERS)
    assert upward(graph) == []


def test_no_modules_import_each_other(graph):
    without_kernel = {name: others & graph.keys() for name, others in graph.items()}
    assert len(list(TopologicalSorter(without_kernel).static_order())) == len(graph)


def test_an_import_the_other_way_would_be_seen():
    tree = ast.parse("from lars_tree import update\nfrom lars_tree._core.execute import execute")
    found = set(imports(tree, {"update", "_core.execute"}))
    assert found == {"update", "_core.execute"}
    assert upward({"_core.advance": found}) == ["_core.advance imports update"]


def test_no_file_is_longer_than_400_lines_or_wider_than_100_columns():
    kinds = ("*.py", "*.hpp", "*.cpp")
    folders = (PACKAGE, Path(__file__).parent)
    files = [path for kind in kinds for folder in folders for path in folder.rglob(kind)]
    lines = {path: path.read_text().splitlines() for path in files}
    seen = {path.name for path in files}
    assert {"harness.cpp", "update.py", "reference.py"} <= seen
    assert ("module.cpp" in seen) == ("loops.hpp" in seen)  # an installed package has neither
    assert {name for name, found in lines.items() if len(found) > 400} == set()
    assert {name for name, found in lines.items() if max(map(len, found), default=0) > 100} == set()


def test_the_version_is_that_of_the_metadata(monkeypatch):
    assert lars_tree.__version__ == metadata.version("lars-tree")
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert lars_tree.__version__ == "0.0.0+unknown"


def test_modules_are_imported_at_their_first_use():
    for name in ("io", "optax", "report", "testing", "torch"):
        need(f"lars_tree.{name}")
        full = f"lars_tree.{name}"
        code = f"import lars_tree as lt, sys; print({full!r} in sys.modules, lt.{name}.__name__)"
        assert printed(code) == f"False {full}"


@pytest.mark.parametrize(
    ("hidden", "use", "hint"),
    [
        ("torch", "lt.torch", "lars_tree.torch needs torch: pip install torch"),
        ("optax", "lt.optax", "lars_tree.optax needs optax: pip install optax"),
        (
            "hypothesis",
            "lt.testing",
            "lars_tree.testing needs hypothesis: pip install 'lars-tree[testing]'",
        ),
        (
            "matplotlib",
            "lt.report.TrustHistory().plot()",
            "TrustHistory.plot needs matplotlib: pip install 'lars-tree[report]'",
        ),
        (
            "ml_dtypes",
            "from lars_tree._files.arrays import dtype_named; dtype_named('bfloat16')",
            "dtype bfloat16 needs ml_dtypes: pip install 'lars-tree[io]'",
        ),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(hidden, use, hint):
    code = f"""if 1:
        import sys, lars_tree as lt
        sys.modules[{hidden!r}] = None
        try:
            {use}
        except ModuleNotFoundError as error:
            print(error, "|", error.name)"""
    assert printed(code) == f"{hint} | {hidden}"


@pytest.mark.parametrize(
    "name", ["errors", "io", "optax", "report", "schedules", "testing", "torch"]
)
def test_public_modules_list_only_public_names(name):
    module = need(f"lars_tree.{name}")
    assert sorted(dir(module)) == sorted(module.__all__)


def test_there_are_no_other_names():
    with pytest.raises(AttributeError, match="'lars_tree' has no attribute 'lars'"):
        _ = lars_tree.lars


def imported(setting, missing=True):
    """What a new process prints that imports the package, with or without the kernel."""
    block = "sys.modules['lars_tree._native._kernel'] = None; " if missing else ""
    code = f"import sys; {block}import lars_tree; print(lars_tree.native_available())"
    environment = {**os.environ, "LARS_TREE_NATIVE": setting}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr


def test_a_missing_kernel_warns_once_or_is_an_error():
    for setting in ("", "1"):
        available, text = imported(setting)
        assert available == "False"
        assert text.count("RuntimeWarning: lars_tree works without its C++ kernel") == 1
    assert imported("0") == ("False", "")
    available, text = imported("require")
    assert available == ""
    assert "ImportError: LARS_TREE_NATIVE=require, but the C++ kernel cannot be used: " in text
    available, text = imported("yes", missing=False)
    assert "ValueError: LARS_TREE_NATIVE: expected 0, 1 or require, got 'yes'" in text


def test_a_kernel_that_a_newer_python_built_works_in_an_older_one():
    """These macros return no new reference there, so that None would be freed in Python 3.11."""
    for file in (PACKAGE / "_native").glob("*.[ch]pp"):
        assert not re.search(r"\bPy_RETURN_\w+;", file.read_text()), file
