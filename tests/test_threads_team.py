"""Native calls on the OpenMP team of torch, or on threads of their own: the same bits on both."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import CI, need
from native_steps import NO_MORE_THREADS

from lars_tree import _native

if _native.kernel is None and (not CI or os.environ.get("LARS_TREE_NATIVE") == "0"):
    pytest.skip("the native kernel was not built, or is turned off", allow_module_level=True)

fork_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/task here")


STEP = """
import os, sys, threading, time, zlib
import numpy as np, lars_tree
rng = np.random.default_rng(0)
w = [rng.normal(size=n).astype(np.float32) for n in (1_000_000, 3, 700)]
g = [x[::-1].copy() for x in w]
def step():
    new = lars_tree.lars_update(w, g, 0.1, decay_lambda=0.01, joint_norm=True)
    return zlib.crc32(b"".join(x.tobytes() for x in new))
def tasks():
    return len(os.listdir("/proc/self/task"))
"""
TORCH = "import torch\n"


def run(code, **variables):
    """The words that the code prints, after three threads of OpenMP were allowed."""
    names = ("LARS_TREE_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP + code],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "3"} | variables,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


# Runs `step` in each thread of a parallel region; one thread after the other holds the GIL.
NESTED = f"""{TORCH}
import ctypes
numbers = []
region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: numbers.append(step()))
step()
ctypes.CDLL(None).GOMP_parallel(region, None, 3, 0)
assert len(numbers) == 3 and len(set(numbers)) == 1
print(numbers[0])"""

TWICE = "step(); print(step())"  # the first step starts threads of its own
CASES = {
    "no OpenMP": (TWICE, {}),
    "a team": (TORCH + TWICE, {}),
    "torch is imported later": (f"step(); {TORCH}{TWICE}", {}),
    "a team larger than the work": (TORCH + TWICE, {"OMP_NUM_THREADS": "7"}),
    "fewer threads than the team": (f"{TORCH}lars_tree.set_num_threads(2); {TWICE}", {}),
    "more threads than the team": (f"{TORCH}lars_tree.set_num_threads(8); {TWICE}", {}),
    "the runtime gives one thread": (TORCH + TWICE, {"OMP_THREAD_LIMIT": "1"}),
    "the runtime may give fewer threads": (TORCH + TWICE, {"OMP_DYNAMIC": "true"}),
    "bound threads": (TORCH + TWICE, {"OMP_PROC_BIND": "true"}),
    "inside a parallel region": (NESTED, {}),
}


@pytest.fixture(scope="module")
def expected():
    """The result of one thread."""
    return run("print(step())", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_the_same_on_any_threads(expected, case):
    code, variables = CASES[case]
    if TORCH in code:
        need("torch")
    if NESTED in code and sys.platform != "linux":
        pytest.skip("the name of the runtime is not known")
    assert run(code, **variables) == expected


@linux_only
@pytest.mark.parametrize(
    ("size", "number", "expected"), [(3, 3, "0 2 2 2"), (6, 6, "0 5 5 5"), (3, 2, "0 0 2 2")]
)
def test_updates_use_the_threads_of_torch_if_the_numbers_agree(size, number, expected):
    """The first step starts and ends its own threads. The tree is too small for six threads."""
    need("torch")
    code = f"""{TORCH}
torch.set_num_threads({size})
lars_tree.set_num_threads({number})
numbers = [tasks()]
for use in (step, step, lambda: torch.ones(1_000_000), step):
    use()
    numbers.append(tasks() - numbers[0])
print(*numbers[1:])"""
    assert run(code) == expected.split()


@linux_only
def test_many_python_threads_leave_no_threads_behind(expected):
    need("torch")
    code = f"""{TORCH}
results = []
def work():
    start.wait()
    results.extend(step() for _ in range(5))
step(), step()
before, start = tasks(), threading.Barrier(6)
workers = [threading.Thread(target=work) for _ in range(6)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
until = time.monotonic() + 60
while tasks() > before and time.monotonic() < until:
    time.sleep(0.001)
assert len(results) == 30
print(*set(results), tasks() - before)"""
    assert run(code) == [*expected, "0"]


@fork_only
@pytest.mark.parametrize("library", ["", TORCH])
def test_a_hundred_forks_work_after_use(expected, library):
    """A team does not exist in a forked child, which would wait for it forever."""
    if library:
        need("torch")
    code = f"""{library}
expected = step()
for _ in range(100):
    assert step() == expected
    child = os.fork()
    if not child:
        os._exit(step() != expected or step() != expected)
    assert os.waitpid(child, 0)[1] == 0
print(expected)"""
    assert run(code) == expected


@linux_only
def test_the_work_is_done_if_no_thread_of_the_team_can_start():
    """libgomp would end the process."""
    need("torch")
    code = f"""{TORCH}
lars_tree.set_num_threads(1)  # the system keeps the stacks of ended threads
torch.set_num_threads(8)
expected = step()
lars_tree.set_num_threads(8)
{NO_MORE_THREADS}
for _ in range(3):
    lars_tree.lars_update(w, g, 0.0, out=w)
lars_tree.lars_update(w, g, 0.1, decay_lambda=0.01, joint_norm=True, out=w)
print(checksum(w) == expected)"""
    assert run(code) == ["True"]
