"""Errors of `torch.Lars` in the terms of its users: p.grad, momentum_buffer, names of parameters.

The checks speak of w, dcdw and state, as the calls over a nest do. Nothing is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lars_tree import errors
from lars_tree.errors import LarsTreeError, Path


class Rows(Protocol):
    """Parameters of one group that are stepped alike: a `Batch`."""

    name: str
    number: int
    group: dict[str, Any]
    rows: list[tuple[int, Any, Any, Any]]


# What the checks say, and what torch calls it.
_TERMS = {
    "dcdw": "p.grad",
    "w": "p",
    "out": "p",
    "leaves of p": "parameters",
    "state": "momentum_buffer",
    "velocity": "momentum_buffer",
    "weights": "parameters",
    "decay_lambda": "weight_decay",
}
_CONVERTS = (
    "p was changed after the optimizer had stepped it, as by model.double() or model.to():"
    "\n  opt.load_state_dict(opt.state_dict()) converts the buffers, opt.state.clear() drops them"
)

TORCH_WORDS = errors.Words(
    w="p",
    dcdw="p.grad",
    out="p",
    state="momentum_buffer",
    weights="parameters",
    outs="parameters",
    velocity="momentum_buffer",
    options={"decay_lambda": "weight_decay"},
    path=lambda path: "/".join(map(str, path)),
    hint=_CONVERTS,
)


def name_of(group: dict[str, Any], number: int, place: int) -> str:
    """What the optimizer's user calls a parameter of a group."""
    known = group.get("param_names", ())
    return known[place] if place < len(known) else f"param_groups[{number}]['params'][{place}]"


@contextmanager
def in_terms_of_torch(batches: list[Any]) -> Iterator[None]:
    """Translate errors of the package."""
    try:
        yield
    except LarsTreeError as error:
        raise _translated(error, batches) from None


def _translated(error: LarsTreeError, batches: list[Rows]) -> LarsTreeError:
    """The same error, about the parameters of these batches."""
    names: dict[Path, str] = {}
    for batch in batches:
        # Options have the path of a batch alone.
        names[(batch.name,)] = f"param_groups[{batch.number}]"
        for i, (place, *_) in enumerate(batch.rows):
            names[batch.name, i] = name_of(batch.group, batch.number, place)
    by_path = {errors.path_string(path): name for path, name in names.items()}
    # Longer paths first: that of a batch is the beginning of those of its parameters.
    known = sorted(map(re.escape, by_path), key=len, reverse=True)
    paths = re.compile("|".join(rf"(?<!\S){path}(?![\w/])" for path in known))
    words = str(error)
    for word, term in _TERMS.items():
        words = re.sub(rf"(?<![\w'./]){word}(?![\w'./=])", term, words)
    words = paths.sub(lambda found: by_path[found[0]], words)
    if error.argument == "state" and isinstance(error, (errors.StateError, errors.BackendError)):
        words += f"\n  {_CONVERTS}"
    translated = type(error)(words)
    translated.argument = _TERMS.get(error.argument, error.argument)
    translated.paths = tuple((names[path],) if path in names else path for path in error.paths)
    return translated
