"""The result of a subcommand: text for people, or one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Output(NamedTuple):
    """The text or the record to print, and the exit status."""

    text: str
    record: dict[str, Any]
    status: int = 0

    def as_json(self) -> str:
        """The record in one line. NaN and infinities become strings: JSON does not have them."""
        return json.dumps(_plain(self.record), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def columns(lines: list[tuple[str, str]]) -> list[str]:
    """Names and texts in two aligned columns."""
    width = max((len(name) for name, _ in lines), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in lines]
