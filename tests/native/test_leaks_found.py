"""The leak checks find leaks, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from leaks import SANITIZED, allocated, check

if SANITIZED:
    pytest.skip("the sanitizer allocates in place of Python and malloc", allow_module_level=True)


@pytest.mark.parametrize(
    ("leak", "expected"),
    [
        (lambda given, number: bytes(100), r"20\d\d blocks of Python"),
        (lambda given, number: np.empty(1_000), r"16\d{6} bytes"),
        (lambda given, number: number, "2000 references to 1.5"),
        (lambda given, number: given, r"\[\d+\], \[\d+\]"),
    ],
)
def test_leaks_are_found(leak, expected):
    if "bytes" in expected and not allocated():
        pytest.skip("the C library does not tell how much is allocated")
    given, number, kept = object(), float("1.5"), []
    with pytest.raises((pytest.fail.Exception, AssertionError), match=expected):
        check(lambda: kept.append(leak(given, number)), [given, number], 20)


def test_what_is_allocated_once_is_no_leak():
    kept = []

    def fill():
        if len(kept) < 1_000:
            kept.append(bytes(100))

    check(fill, [], 200)
    assert len(kept) == 1_000
