"""What is imported, and in which direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import pytest

import lars_tree

PACKAGE = Path(lars_tree.__file__).parent
HEAVY = {
    "torch",
    "jax",
    "dask",
    "optree",
    "hypothesis",
    "matplotlib",
    "rich",
    "safetensors",
    "sklearn",
    "tree",
}

# Each module may import those in lower rows.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["_commands.parser"],
    ["_commands.diff", "_commands.show", "_commands.update", "demo"],
    ["_commands.output", "_commands.rates"],
    ["_commands"],
    ["__init__"],
    ["testing"],
    ["testing.check"],
    ["testing.laws"],
    ["testing.trial"],
    ["testing.strategies", "testing.assertions"],
    ["testing._arrays"],
    ["io", "optimizer", "torch", "report"],
    ["container", "schedules", "_torch_rows", "_history", "_layer_table", "_plots"],
    ["_torch_groups"],
    ["_torch_options"],
    ["array", "_measure"],
    ["update"],
    ["_core.advance"],
    ["_core.execute"],
    ["_core.native"],
    ["_checks", "_compare", "_counters", "_nonfinite"],
    ["_overlaps"],
    ["_operands"],
    ["_files.formats"],
    ["_files.npz", "_files.safetensors"],
    ["_html"],
    ["_files.arrays", "_options", "_show"],
    ["_backends.foreach"],
    ["_backends.torch", "_backends.jax", "_backends.dask", "_backends.standard"],
    ["_backends.shards"],
    ["_backends.numpy", "_backends.sharded", "_backends.reader"],
    ["_backends.stand_ins"],
    ["_backends.addresses", "_backends.jax_memory"],
    ["_backends.tensors"],
    ["_backends.arrays"],
    ["_backends.cpu", "_backends", "_writes"],
    ["_backends.norms"],
    ["_backends.base", "_backends.bfloat16", "_backends.wide"],
    ["_memory"],
    ["_files.names", "_rule", "_paths", "_pytrees", "_operators", "_conversion"],
    ["_tree"],
    ["_nodes"],
    ["_native"],
    ["_native.threads", "_floats"],
    ["_files.replacing", "errors"],
    ["_files", "_core.locks"],
    ["_core.wrapper", "_core.types"],
    ["_core"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported_by(code):
    code += "\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


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
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if name != "__init__" else name, path


def imports(tree):
    """The modules of the package that are imported when the module is."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lars_tree"):
            base = node.module.removeprefix("lars_tree").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in RANK else base or "__init__"


def test_imports_go_one_way_only():
    assert {name for name, _ in modules()} == set(RANK)
    wrong = [
        f"{name} imports {other}"
        for name, path in modules()
        for other in imports(ast.parse(path.read_text()))
        if RANK[other] <= RANK[name]
    ]
    assert wrong == []


def test_an_import_the_other_way_would_be_seen():
    tree = ast.parse("from lars_tree import update\nfrom lars_tree._backends.cpu import update")
    assert list(imports(tree)) == ["update", "_backends.cpu"]
    assert RANK["update"] < RANK["_tree"]


def test_no_file_is_longer_than_400_lines_or_wider_than_100_columns():
    kinds = ("*.py", "*.hpp", "*.cpp")
    folders = (PACKAGE, Path(__file__).parent)
    files = [path for kind in kinds for folder in folders for path in folder.rglob(kind)]
    lines = {path.name: path.read_text().splitlines() for path in files}
    assert {"harness.cpp", "update.py", "reference.py"} <= lines.keys()
    assert ("module.cpp" in lines) == ("loops.hpp" in lines)  # an installed package has neither
    assert {name for name, found in lines.items() if len(found) > 400} == set()
    assert {name for name, found in lines.items() if max(map(len, found), default=0) > 100} == set()


def test_the_version_is_that_of_the_metadata(monkeypatch):
    assert lars_tree.__version__ == metadata.version("lars-tree")
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert lars_tree.__version__ == "0.0.0+unknown"


def test_there_are_no_other_names():
    with pytest.raises(AttributeError, match="'lars_tree' has no attribute 'lars'"):
        _ = lars_tree.lars


def test_dir_lists_the_public_names_and_the_public_modules_that_are_loaded():
    code = (
        "import lars_tree as lt; names = dir(lt); import lars_tree.io; print(*names, '|', *dir(lt))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    before, after = (text.split() for text in result.stdout.split("|"))
    assert before == sorted([*lars_tree.__all__, "__version__", "errors"])
    assert after == sorted([*before, "io"])
