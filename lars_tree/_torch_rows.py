"""What one step of a torch optimizer is about: its parameters side by side, and their rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lars_tree._backends.base import Columns, Leaf
from lars_tree._backends.foreach import Foreach
from lars_tree._backends.torch import BACKEND
from lars_tree._core.execute import Caller
from lars_tree._rule import Rule
from lars_tree._torch_messages import TORCH_WORDS, name_of
from lars_tree._torch_options import rule
from lars_tree.errors import Path

# One parameter, its gradient, buffer and rule, the number of its group, and its place there. There
# is one for each parameter, and a tuple with names takes three times as long to make.
ParameterRow = tuple[Tensor, Tensor, Tensor | None, Rule, int, int]


class Rows:
    """All parameters that have a gradient.

    Attributes:
        far: The places of those that the foreach engine takes.
        first: The places of those whose buffers are new.
        can_wait: Whether a device may find out by itself that the step is not to be taken.
    """

    def __init__(self, groups: list[dict[str, Any]], grad_scale: Any) -> None:
        self.groups = groups
        self.grad_scale = grad_scale
        self.all: list[ParameterRow] = []
        self.far: set[int] = set()
        self.first: list[int] = []
        self.can_wait = True

    def rule(self, number: int, is_far: bool, is_first: bool) -> Rule:
        """The rule of parameters of a group that are stepped alike."""
        group, scale = self.groups[number], self.grad_scale
        # CPU memory cannot wait, and only a step that is taken is the first one.
        is_undamped = is_first and group["dampening"] != 0
        self.can_wait &= is_far and not is_undamped
        return rule(group, scale if is_far or scale is None else float(scale), is_first)

    def columns(self, counters: Mapping[str, Any] | None = None) -> Columns:
        """What `execute` steps in place."""
        params, grads, buffers, rules = (list(xs) for xs in list(zip(*self.all, strict=True))[:4])
        return Columns(params, grads, params, rules, buffers, counters or {})

    def new_buffers(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The parameters whose buffers are new, with these."""
        return ((self.all[i][0], self.all[i][2]) for i in self.first)

    def leaves(self) -> list[Leaf]:
        """The same, each by itself."""
        return [
            Leaf(i, param, grad, param, rule, BACKEND, buffer)
            for i, (param, grad, buffer, rule, *_) in enumerate(self.all)
        ]

    def caller(
        self, found_inf: Tensor | None = None, last: tuple[Callable[[], Any], ...] = ()
    ) -> Caller:
        """What `execute` is to know besides; the foreach engine does not look at the values."""
        engine = None
        if self.far and all(group["nonfinite"] == "propagate" for group in self.groups):
            groups = {self.all[i][4] for i in self.far}
            one_by_one = all(self.groups[number]["foreach"] is False for number in groups)
            engine = Foreach(self.far, one_by_one, found_inf)
        return Caller(self._paths, same_shapes=True, last=last, words=TORCH_WORDS, engine=engine)

    def _paths(self) -> list[Path]:
        places = (row[4:] for row in self.all)
        return [(name_of(self.groups[number], number, place),) for number, place in places]
