"""The source distribution: what is in it, and that it installs on a machine without git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import need

ROOT = Path(__file__).parent.parent
STEP = """
import numpy as np, lars_tree
assert lars_tree.native_available()
step = lars_tree.lars_update(np.array([3.0, 4.0]), np.array([0.4, 0.3]), 0.1)
print(lars_tree.__version__, lars_tree.__file__, step.tolist())
"""


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def commit_a_copy(folder):
    """A new repository with the files of this one, a tag, and ignored files such as caches."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    names = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    run("git", "init", "-q", cwd=folder)
    run("git", "add", "--all", cwd=folder)
    run(*git, "commit", "-q", "-m", "files", cwd=folder)
    run(*git, "tag", "-a", "v1.2.3", "-m", "a release", cwd=folder)
    for name in ["lars_tree/__pycache__/a.pyc", "lars_tree/_native/_kernel.abi3.so", "build/b.py"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return names


def path_without_git(folder):
    """A PATH with all programs of the present one except git."""
    folder.mkdir()
    for program in (file for place in os.get_exec_path() for file in Path(place).glob("*")):
        link = folder / program.name
        if program.name != "git" and not link.is_symlink():
            link.symlink_to(program)
    return str(folder)


def test_the_sdist_has_the_files_of_the_repository_and_installs_without_git(tmp_path):
    """Needs a network: pip downloads the build requirements and numpy."""
    need("build.__main__")
    if not (ROOT / ".git").exists():
        pytest.skip("the files of the repository are known only in a clone")
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    names = commit_a_copy(source)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, source)

    with tarfile.open(tmp_path / "lars_tree-1.2.3.tar.gz") as archive:
        archive.extractall(unpacked, filter="data")
    [top] = unpacked.iterdir()
    files = {str(file.relative_to(top)) for file in top.rglob("*") if file.is_file()}
    metadata = {file for file in files if file.startswith("lars_tree.egg-info/")}
    assert files - metadata == names | {"PKG-INFO", "setup.cfg"}
    assert "lars_tree/_native/kernel.hpp" in names

    environment = {**os.environ, "PATH": path_without_git(tmp_path / "bin")}
    environment.pop("PYTHONPATH", None)
    assert shutil.which("git", path=environment["PATH"]) is None
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", top, env=environment)
    version, file, step = run(python, "-c", STEP, cwd=tmp_path, env=environment).split(maxsplit=2)
    assert version == "1.2.3"
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert step == "[2.6, 3.7]\n"
