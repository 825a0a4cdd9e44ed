"""What an attack is, and how one is run: in a process of its own, and with a time limit."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from time import monotonic

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = (  # the modules with attacks, in the order of the page
    "faults",
    "options",
    "structure",
    "signals",
    "allocations",
    "overlaps",
    "bounds",
    "leaks",
    "threads",
    "processes",
    "bits",
    "exponents",
    "files",
    "writers",
    "races",
)
GRACE = 60.0  # seconds: to start, to finish the attempt at hand, to end
SHOWN = 5  # of the failures

# Of each attempt: None, or an error in ulp that is within its bound, if the claim held; otherwise a
# text that says what happened.
Attempts = Iterator[float | str | None]


@dataclass(frozen=True)
class Attack:
    """Attempts to break one claim."""

    part: str
    name: str
    claim: str
    tried: str  # what an attempt is, in the plural
    attempts: Callable[[np.random.Generator], Attempts]  # may be endless
    count: int
    short: int  # the count of the short form
    seconds: float
    kernel: bool  # False: without the native kernel
    needs: tuple[str, ...]  # libraries besides numpy

    @property
    def command(self) -> str:
        """The command that repeats it."""
        prefix = "" if self.kernel else "LARS_TREE_NATIVE=0 "
        return f"{prefix}python -m tests.reliability {self.part}.{self.name}"

    @property
    def key(self) -> str:
        """Its name in files of results and in tests."""
        return f"{self.part}.{self.name}" + ("" if self.kernel else ", without the kernel")


@dataclass
class Result:
    """How the attempts of an attack ended."""

    tried: int = 0
    survived: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # the first ones
    worst: float | None = None  # the largest error in ulp of an attempt that held

    @property
    def ok(self) -> bool:
        """Whether the claim held each time."""
        return 0 < self.tried == self.survived


_FOUND: dict[str, list[Attack]] = {}


def attack(
    claim: str,
    tried: str,
    *,
    count: int,
    short: int,
    seconds: float = 40.0,
    plain: bool = False,
    needs: tuple[str, ...] = (),
) -> Callable[[Callable[[np.random.Generator], Attempts]], Callable[..., Attempts]]:
    """Make an attack of a generator of attempts; with `plain`, another one without the kernel.

    The generator yields, for each attempt, None or an error in ulp if the claim held, and otherwise
    what happened; the page shows the largest error. It gets a random generator, which is the same
    each time. A generator of all cases of a kind shuffles them with it, so that the short form
    tries a sample of them. The attack ends after `count` attempts, at the end of the generator, or
    after `seconds`.
    """

    def register(attempts: Callable[[np.random.Generator], Attempts]) -> Callable[..., Attempts]:
        part = attempts.__module__.rpartition(".")[2]
        for kernel in (True, False) if plain else (True,):
            _FOUND.setdefault(part, []).append(
                Attack(
                    *(part, attempts.__name__, claim, tried, attempts),
                    *(count, short, seconds, kernel, needs),
                )
            )
        return attempts

    return register


def attacks(part: str) -> list[Attack]:
    """The attacks of a part, in the order of their definitions."""
    importlib.import_module(f"tests.reliability.{part}")
    return _FOUND.get(part, [])


def run_here(attack: Attack, count: int, seconds: float) -> Result:
    """Run attempts in this process."""
    start = monotonic()
    result = Result()
    for outcome in islice(attack.attempts(np.random.default_rng(0)), count):
        result.tried += 1
        result.survived += not isinstance(outcome, str)
        if isinstance(outcome, float):
            result.worst = max(outcome, result.worst or 0.0)
        elif outcome is not None and len(result.failures) < SHOWN:
            result.failures.append(outcome)
        if monotonic() - start > seconds:
            break
    result.seconds = monotonic() - start
    return result


def run(attack: Attack, count: int, seconds: float) -> Result:
    """Run attempts in a new process. If it crashes or hangs, that is a failure."""
    command = [sys.executable, "-m", "tests.reliability", f"{attack.part}.{attack.name}", "--json"]
    command += ["--count", str(count), "--seconds", str(seconds)]
    environment = {**os.environ, "LARS_TREE_NATIVE": "1" if attack.kernel else "0"}
    start = monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds + GRACE,
            check=False,
        )
        return Result(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        failure = f"did not end within {seconds + GRACE:.0f} s"
    except (ValueError, IndexError):  # no result
        failure = f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    return Result(1, 0, monotonic() - start, [failure])


def as_json(result: Result) -> str:
    """One line; see `run`."""
    return json.dumps(asdict(result))
