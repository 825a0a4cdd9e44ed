"""Type checkers accept a correct script, and find every error in an incorrect one."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from conftest import need

import lars_tree as lt

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOOD, WRONG = TESTS / "typing_good.py", TESTS / "typing_wrong.py"


def check(*command: str) -> str:
    """The output of a type checker, run as a module, for both scripts."""
    need(command[0])
    result = subprocess.run(
        [sys.executable, "-m", *command, str(GOOD), str(WRONG)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def mypy() -> set[tuple[str, int]]:
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'typing'}"
    # As for a user, ignore the configuration of this project and errors in other files.
    output = check("mypy", "--strict", "--config-file=", "--follow-imports=silent", cache)
    errors = re.findall(r"^(.+):(\d+): error: ", output, re.MULTILINE)
    return {(Path(name).name, int(line)) for name, line in errors}


def pyright() -> set[tuple[str, int]]:
    report = json.loads(check("pyright", "--outputjson", f"--pythonpath={sys.executable}"))
    errors = [x for x in report["generalDiagnostics"] if x["severity"] == "error"]
    return {(Path(x["file"]).name, x["range"]["start"]["line"] + 1) for x in errors}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_checker_reports_the_marked_lines_and_no_others(checker):
    need("torch")
    marked = {
        (path.name, number)
        for path in (GOOD, WRONG)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# error")
    }
    assert checker() == marked
    assert len(marked) > 50


def is_instance(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(map(is_instance, value, arguments))
    if origin is dict:
        return all(is_instance(x, arguments[1]) for x in value.values())
    return kind is Any or isinstance(value, origin or kind)


def test_the_values_have_the_types_that_checkers_infer(tmp_path, monkeypatch):
    need("torch")
    checked = []

    def assert_type(value, kind):
        assert is_instance(value, kind), (value, kind)
        checked.append(kind)

    monkeypatch.setattr(typing, "assert_type", assert_type)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(GOOD))
    assert len(checked) > 30


@pytest.mark.parametrize(
    ("value", "kind"),
    [(1, str), ({"a": 1}, dict[str, str]), ((1, "a"), tuple[int, int])],
)
def test_a_value_of_another_type_is_seen(value, kind):
    assert not is_instance(value, kind)


@pytest.mark.parametrize(
    "function",
    [lt.lars_update, lt.Container.lars_update, lt.Array.lars_update, lt.Lars, lt.Lars.update],
)
def test_annotations_can_be_read_at_run_time(function):
    hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    assert "return" in hints
