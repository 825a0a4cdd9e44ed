"""docs/reliability.md: the attacks and their results, in the text of `reliability.md.in`."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from tests.reliability.attack import PARTS, ROOT, Attack, Result, attacks

PAGE = ROOT / "docs" / "reliability.md"
TEMPLATE = Path(__file__).parent / "reliability.md.in"
HEADING = """\
| Claim | Tried | Survived | Time | Command |
|---|---|---|---|---|"""
PACKAGES = ("numpy", "torch", "jax", "hypothesis", "mpmath")


def write(results: Mapping[str, Result]) -> None:
    """Write the page."""
    text = Template(TEMPLATE.read_text()).substitute(
        parts="\n\n".join(section(part, results) for part in PARTS),
        total=f"{sum(x.tried for x in results.values()):,}",
        minutes=f"{sum(x.seconds for x in results.values()) / 60:.0f}",
        versions=", ".join(versions()),
    )
    PAGE.write_text(text)


def section(part: str, results: Mapping[str, Result]) -> str:
    """The docstring of a part as title and text, and a row for each attack."""
    documented = importlib.import_module(f"tests.reliability.{part}").__doc__ or ""
    title, _, text = documented.strip().partition("\n")
    rows = [_row(attack, results[attack.key]) for attack in attacks(part)]
    return "\n\n".join([f"## {title.rstrip('.')}", text.strip(), "\n".join([HEADING, *rows])])


def _row(attack: Attack, result: Result) -> str:
    survived = "all" if result.ok else f"**{result.survived:,}**"
    if result.worst is not None:
        survived += f", within {result.worst:.4f} ulp"
    tried = f"{result.tried:,} {attack.tried}"
    cells = [attack.claim, tried, survived, f"{result.seconds:.0f} s", f"`{attack.command}`"]
    return f"| {' | '.join(cells)} |"


def versions() -> list[str]:
    """The system, Python, and the packages that results may depend on."""
    found = [f"{platform.system()} {platform.machine()}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found
