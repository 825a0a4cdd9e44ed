"""The short form of every attack of `tests/reliability`, each in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import need_installed

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.reliability.attack import PARTS, attacks, run

ATTACKS = [attack for part in PARTS for attack in attacks(part)]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.key)
def test_every_attempt_is_survived(attack):
    need_installed(*attack.needs)
    result = run(attack, attack.short, attack.seconds)
    assert result.ok, "\n".join(result.failures)
