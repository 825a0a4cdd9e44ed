"""Groups of steps: each step is compared with the base of its group.

The steps of a group alternate in one process, so these ratios depend much less on the machine than
the times do.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import measure

Step = Callable[[], Any]
Steps = dict[str, Step]


@dataclass(frozen=True)
class Group:
    """Steps, one of which is the base, and bounds for the ratios of other steps to the base.

    Attributes:
        build: Returns the steps, by name.
        work: Returns for each step the work that is done before each call, and not timed. None
            repeats the steps without other work.
        module: A library that all steps need.
        variables: Environment variables; with them, the group is measured in a fresh process.
        arguments: The command line of another program for Python, without the number of rounds,
            which is appended. It prints the seconds of each step as JSON.
    """

    title: str
    build: Callable[[], Steps] | None
    base: str
    bounds: dict[str, float]
    module: str = "numpy"
    work: Callable[[], Steps] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    def measured(self, rounds: int) -> dict[str, float]:
        """The median seconds of each step; empty if the library is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return {}
        if self.arguments:
            return json.loads(measure.child(*self.arguments, str(rounds)))
        if self.variables:
            run = ("-m", __spec__.name, self.title, str(rounds))
            return json.loads(measure.child(*run, variables=self.variables).splitlines()[-1])
        return self.measured_here(rounds)

    def measured_here(self, rounds: int) -> dict[str, float]:
        """Like `measured`, but always in this process."""
        assert self.build is not None
        steps = self.build()
        if self.work is None:
            return measure.medians(steps, rounds)
        return measure.medians_after(self.work(), steps, rounds)


def main(title: str, rounds: str) -> None:
    """Print the median seconds of each step of one group as JSON."""
    from benchmarks.sections import GROUPS

    (group,) = (x for groups in GROUPS.values() for x in groups if x.title == title)
    sys.stdout.write(json.dumps(group.measured_here(int(rounds))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
