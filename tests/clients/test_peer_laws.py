"""The table of docs/testing.md that shows which laws the optimizers of other packages keep.

`python tests/clients/test_peer_laws.py` writes the table; the tests compare it with the laws that
are checked here. All optimizers have the options with which they keep the most laws. Float32
matrices are enough to tell them apart; `tests/test_testing_runs.py` checks ours on more.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # to be run as a script too

from conftest import need  # noqa: E402

from lars_tree import Lars  # noqa: E402
from lars_tree.testing import (  # noqa: E402
    OPTIMIZER_LAWS,
    LawError,
    check_optimizer_laws,
    for_optax,
    for_torch,
)

PAGE = ROOT / "docs" / "testing.md"
ARGUMENTS: dict[str, Any] = {
    "dtypes": ["float32"],
    "shapes": [(2, 3), (3, 1)],
    "ulp": 16,
    "settings": settings(
        max_examples=12,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    ),
}
PLAIN = {"trust_coefficient": 1.0, "eps": 0.0}


def _our_torch() -> Any:
    need("torch")
    from lars_tree.torch import Lars

    return for_torch(Lars, **PLAIN)


def _timm() -> Any:
    if find_spec("timm") is None:  # to import all of it would need torchvision
        need("timm")
    from benchmarks.contestants import timm_lars

    return for_torch(timm_lars(), trust_coeff=1.0, eps=0.0, always_adapt=True)


OPTIMIZERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "`lars_tree.Lars`": (lambda: partial(Lars, **PLAIN), {}),
    "`lars_tree.torch.Lars`": (_our_torch, {}),
    "`lars_tree.optax.lars`": (
        lambda: for_optax(need("lars_tree.optax").lars, **PLAIN),
        {"key_order": False},
    ),
    "timm": (_timm, {}),
    "pytorch_optimizer": (
        lambda: for_torch(need("pytorch_optimizer").LARS, trust_coefficient=1.0),
        {},
    ),
    "optax": (
        lambda: for_optax(need("optax").lars, trust_coefficient=1.0),
        {"key_order": False, "joint_norm": True},
    ),
    "torch SGD": (lambda: for_torch(need("torch").optim.SGD), {}),
}


def column(name: str) -> list[str]:
    """For each law, "yes" or "no"."""
    make, options = OPTIMIZERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make()
        broken: set[str] = set()
        try:
            check_optimizer_laws(optimizer, **ARGUMENTS, **options)
        except LawError as error:
            broken = set(error.laws)
    return ["no" if law.__name__ in broken else "yes" for law in OPTIMIZER_LAWS]


def table(columns: dict[str, list[str]]) -> str:
    rows = [["law", *columns], ["---"] * (len(columns) + 1)]
    for i, law in enumerate(OPTIMIZER_LAWS):
        rows.append([f"`{law.__name__}`", *(cells[i] for cells in columns.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


_TABLE = re.compile(r"(?<=<!-- written by tests/clients/test_peer_laws\.py -->\n)(\|.*\n)*")


def shown() -> dict[str, list[str]]:
    """The columns of the table in the page."""
    found = _TABLE.search(PAGE.read_text())
    assert found is not None
    head, _, *rows = [line.strip("| ").split(" | ") for line in found[0].splitlines()]
    assert [row[0] for row in rows] == [f"`{law.__name__}`" for law in OPTIMIZER_LAWS]
    return {name: [row[i] for row in rows] for i, name in enumerate(head) if i}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_page_shows_which_laws_hold(name):
    assert shown()[name] == column(name)


def test_the_page_is_written_by_this_file():
    columns = shown()
    assert list(columns) == list(OPTIMIZERS)
    assert table(columns) == _TABLE.search(PAGE.read_text())[0]


def test_our_optimizers_keep_every_law():
    ours = {name: cells for name, cells in shown().items() if name.startswith("`lars_tree")}
    assert len(ours) == 3
    assert all(set(cells) == {"yes"} for cells in ours.values())


if __name__ == "__main__":
    text = table({name: column(name) for name in OPTIMIZERS})
    PAGE.write_text(_TABLE.sub(lambda _: text, PAGE.read_text()))
