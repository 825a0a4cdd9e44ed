"""Attacks on the claims of the README: `python -m tests.reliability` runs them.

A module here is a part: a section of docs/reliability.md. `attack.py` says what an attack is.
`tests/test_reliability.py` runs the short form of every attack.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Parts use the helpers of the tests, such as `reference`, which pytest imports by these names.
sys.path.insert(0, str(Path(__file__).parent.parent))
