"""The number of threads of the kernel: from the user, the environment, torch, or the cores."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lars_tree import errors

_VARIABLE = "LARS_TREE_NUM_THREADS"
_chosen: int | None = None


def set_num_threads(n: int | None) -> None:
    """Set the number of threads that one update may use; None restores the default.

    The default is the first of these that is given: the environment variable LARS_TREE_NUM_THREADS;
    where torch is imported, `torch.get_num_threads()`; the environment variable OMP_NUM_THREADS
    (torchrun sets it to 1); the number of cores that the process may use. A CPU quota of its
    control group limits all but the first. Results do not depend on the number of threads. Small
    trees use one thread.

    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(None)

    Raises:
        OptionError: n is not a whole number >= 1.
    """
    global _chosen
    _chosen = None if n is None else errors.whole_number("n", n, least=1)


def get_num_threads() -> int:
    """The number of threads that one update may use; `set_num_threads` has the default.

    >>> set_num_threads(2)
    >>> get_num_threads()
    2
    >>> set_num_threads(None)

    Raises:
        OptionError: LARS_TREE_NUM_THREADS is not a whole number >= 1.
    """
    chosen = _chosen or _own_variable()
    if chosen is not None:
        return chosen
    torch = sys.modules.get("torch")
    of_torch = getattr(torch, "get_num_threads", None)  # missing while torch is being imported
    return default() if of_torch is None else min(of_torch(), quota_limit())


@cache
def _own_variable() -> int | None:
    text = os.environ.get(_VARIABLE)
    if text is not None and (not text.isdecimal() or int(text) < 1):
        headline = f"{_VARIABLE}: expected a whole number >= 1, got {text!r}"
        raise errors.error(errors.OptionError, _VARIABLE, headline)
    return int(text) if text is not None else None


@cache
def default() -> int:
    """The number without any setting of ours or of torch."""
    # The further numbers of a list are for nested regions. OpenMP ignores invalid values too.
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first) >= 1:
        return min(int(first), quota_limit())
    return cores()


def cores(root: Path = Path("/")) -> int:
    """The number of cores that this process may use: CPU affinity, limited by cgroup quotas."""
    affinity = getattr(os, "sched_getaffinity", None)
    available = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(available, quota_limit(root))


@cache
def quota_limit(root: Path = Path("/")) -> int:
    """The number of cores that cgroup quotas allow; sys.maxsize without any."""
    return max(1, min(map(math.ceil, _quotas(root)), default=sys.maxsize))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of the control groups of this process and of their parents (Linux)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / name.lstrip("/")
        # In a container, the group is often mounted as the root.
        for directory in [group, *group.parents]:
            if directory.is_relative_to(mount):
                yield from _quota(directory)


def _quota(directory: Path) -> Iterator[float]:
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return
    if quota.isdecimal() and period.isdecimal():  # neither "max" nor -1
        yield int(quota) / int(period)
