"""Run the fenced code blocks of a Markdown page, in order.

The language of the fence determines how a block is run. All blocks of a page share one namespace
and one directory.

    pycon    a doctest
    python   code. If its first line is a comment with a command, such as `# python step.py`, the
             block is written to the file that the command names, and the command is run.
    bash     commands, one per line; exempt commands are skipped (see `is_exempt`)
    console  each line that begins with `$ ` is a command, followed by its expected output
    text     not run: a drawing or a formula

Other languages, and prompts outside a block, are errors.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import need

ROOT = Path(__file__).parent.parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

# Patterns of the commands in pages that the tests do not run, with the reasons.
NOT_RUN = {
    r"(\.venv/bin/)?pip install .*": "sets up an environment",
    r"python3 -m venv .*": "sets up an environment; .ci/run runs those of the README",
    r"git (tag|push) .*": "makes a release",
    r"\.venv/bin/python -m pytest": "would run these pages again",
    r"\.venv/bin/coverage .*": "runs all tests",
    r"(\.venv/bin/)?python -m (benchmarks|tests\.mutation).*": "takes minutes",
}

# Packages with which the pages compare lars_tree. No extra installs them, so if one is
# missing, even on CI, the rest of the page is skipped.
PEERS = {"ivy", "pytorch_optimizer", "timm"}


class Block(NamedTuple):
    """A code block: its language, its text, and the line number of its opening fence."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    opened: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.splitlines(), 1):
        fence = re.fullmatch(r"( *)(?:```+|~~~+)(.*)", line)
        if fence and opened is None:
            opened, lines = (fence[1], fence[2].strip(), number), []
        elif fence:
            assert opened is not None
            assert not fence[2].strip(), f"line {number}: a fence within a block"
            found.append(Block(opened[1], "\n".join(lines) + "\n", opened[2]))
            opened = None
        elif opened is not None:
            lines.append(line.removeprefix(opened[0]))
        else:
            assert ">>> " not in line, f"line {number}: a prompt outside of a block"
    assert opened is None, f"line {opened[2]}: a block without an end"
    return found


def run_page(page: str, name: str, directory: Path) -> None:
    """Run the blocks of a page in a directory, up to the first that needs a missing package."""
    names: dict[str, Any] = {"__name__": name}
    for block in blocks(page):
        where = f"{name}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: unknown language {block.language!r}"
        LANGUAGES[block.language](block, where, names, directory)


def _pycon(block: Block, where: str, names: dict[str, Any], directory: Path) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, {}, where, where, block.line)
    assert test.examples, f"{where}: no prompt"
    need_imports("".join(example.source for example in test.examples))
    test.globs = names
    results = doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False)
    assert results.failed == 0, f"{where}: see above"


# If a thread of gloo releases a tensor while Python shuts down, the process aborts (pytorch issue
# 190489). A barrier makes this rare; on a busy machine it still happens.
GLOO_SETTLES = "\nimport time\n\ntime.sleep(1)\n"


def _python(block: Block, where: str, names: dict[str, Any], directory: Path) -> None:
    need_imports(block.text)
    command = re.match(r"# ((?:python|torchrun) .*?(\w+\.py))\n", block.text)
    if command:
        end = GLOO_SETTLES if command[1].startswith("torchrun") else ""
        (directory / command[2]).write_text(block.text + end)
        _run(command[1], where, directory)
    else:
        code = compile("\n" * block.line + block.text, where, "exec", dont_inherit=True)
        exec(code, names)


def _bash(block: Block, where: str, names: dict[str, Any], directory: Path) -> None:
    for command in _commands(block.text):
        if not is_exempt(command):
            _run(command, where, directory)


def _console(block: Block, where: str, names: dict[str, Any], directory: Path) -> None:
    assert block.text.startswith("$ "), f"{where}: no prompt"
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        actual = _run(command, where, directory)
        same = doctest.OutputChecker().check_output(expected, actual, FLAGS)
        assert same, f"{where}: expected\n{expected}got\n{actual}"


LANGUAGES = {
    "bash": _bash,
    "console": _console,
    "pycon": _pycon,
    "python": _python,
    "text": lambda *_: None,
}


def _commands(text: str) -> list[str]:
    """The commands of a block: its lines without comments; a backslash at the end joins lines."""
    lines = text.replace("\\\n", "").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def is_exempt(command: str) -> bool:
    """Whether a command is not run: it matches NOT_RUN, or `.ci/run` contains the same line."""
    ours = (ROOT / ".ci" / "run").read_text().splitlines()
    return command in ours or any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def _run(command: str, where: str, directory: Path) -> str:
    """The output of a command, stderr included."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{where}: {command}\n{result.stdout}"
    return result.stdout


def need_imports(source: str) -> None:
    """Skip, or fail on CI, if the source imports a package that is not installed."""
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            top = module.partition(".")[0]
            if top in PEERS:
                if find_spec(top) is None:
                    pytest.skip(f"{top} is not installed: the rest of the page was not run")
            else:
                need(module if top == "lars_tree" else top)
