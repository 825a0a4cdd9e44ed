"""The words of `torch.Lars` for errors: p.grad, momentum_buffer, names of parameters."""

from __future__ import annotations

from typing import Any

from lars_tree import errors

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
