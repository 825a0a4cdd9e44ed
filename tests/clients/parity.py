"""The tables of the documentation that compare us with other packages.

Every cell is computed by the installed packages. `python -m tests.clients.parity` prints the pages
with these tables, and `--write` writes them; test_parity.py checks that nothing would change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from tests.clients.parity_behaviour import behaviour, names
from tests.clients.parity_steps import Table, rule, steps

DOCS = Path(__file__).parents[2] / "docs"


def markdown(table: Table) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = [
    ("coming-from.md", names),
    ("coming-from.md", steps),
    ("coming-from.md", behaviour),
    ("rule.md", rule),
]


def replaced(page: str, table: str) -> str:
    """The page with this table in place of the one with the same head."""
    head = [part.strip() for part in table.splitlines()[0].split("|")]
    lines = page.splitlines()
    starts = [i for i, line in enumerate(lines) if [x.strip() for x in line.split("|")] == head]
    assert len(starts) == 1, f"{len(starts)} tables with the head {head}"
    end = start = starts[0]
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:start], table, *lines[end:]]) + "\n"


def pages() -> dict[str, str]:
    """The pages with tables that are up to date, by name."""
    found: dict[str, str] = {}
    for page, table in TABLES:
        text = found.get(page) or (DOCS / page).read_text()
        found[page] = replaced(text, markdown(table()))
    return found


def main(arguments: Iterable[str]) -> None:
    for page, text in pages().items():
        if "--write" in arguments:
            (DOCS / page).write_text(text)
        else:
            sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
