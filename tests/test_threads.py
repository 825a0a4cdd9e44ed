"""The number of threads; native calls beside other threads, forks and floating-point modes."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CI, need
from native_steps import NO_MORE_THREADS

import lars_tree
from lars_tree import OptionError, _native, get_num_threads, lars_update, set_num_threads
from lars_tree._native import threads

OFF = os.environ.get("LARS_TREE_NATIVE") == "0"
with_kernel = pytest.mark.skipif(
    _native.kernel is None and (not CI or OFF), reason="the native kernel was not built, or is off"
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    set_num_threads(None)


def run(code, **variables):
    names = ("LARS_TREE_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment | variables,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---- The number of threads


def test_the_number_is_the_one_set_or_the_default():
    default = get_num_threads()
    set_num_threads(3)
    assert get_num_threads() == 3
    set_num_threads(None)
    assert get_num_threads() == default >= 1


@pytest.mark.parametrize("n", [0, -1, 1.0, True, "2", np.float64(2), np.True_, [1]])
def test_invalid_numbers_of_threads_are_refused(n):
    set_num_threads(2)
    with pytest.raises(OptionError, match="n: expected a whole number >= 1, got") as caught:
        set_num_threads(n)
    assert caught.value.argument == "n"
    assert get_num_threads() == 2


def test_an_integer_of_numpy_is_a_number_of_threads():
    set_num_threads(np.int64(2))
    assert get_num_threads() == 2
    assert type(get_num_threads()) is int


@pytest.mark.parametrize("n", [10**9, 2**63, 10**30])
def test_more_threads_than_there_could_be(n):
    set_num_threads(n)
    assert get_num_threads() == n
    assert lars_update(np.ones(3), np.ones(3), 0.5).tolist() == [0.5] * 3


PRINT = """if 1:
    import lars_tree
    try:
        print(lars_tree.get_num_threads())
    except lars_tree.OptionError as error:
        print(error)"""


def test_the_environment_gives_the_default():
    assert run(PRINT, LARS_TREE_NUM_THREADS="7") == "7"
    assert run(PRINT) == str(threads.cores())
    for text in ("0", "-1", "two", "", "1.5"):
        expected = f"LARS_TREE_NUM_THREADS: expected a whole number >= 1, got {text!r}"
        assert run(PRINT, LARS_TREE_NUM_THREADS=text) == expected


TORCH = "import torch; torch.set_num_threads(2); "


# A statement, variables of the environment, and the number of threads unless a quota limits it
SETTINGS = {
    "OpenMP": ("", {"OMP_NUM_THREADS": "3"}, 3),
    "OpenMP, nested": ("", {"OMP_NUM_THREADS": " 3 ,1"}, 3),
    "OpenMP, as torch reads it": ("import torch", {"OMP_NUM_THREADS": "1"}, 1),
    "torch": (TORCH, {"OMP_NUM_THREADS": "3"}, 2),
    "torch, changed later": (f"{TORCH} N(); torch.set_num_threads(3)", {}, 3),
    "torch is being imported": ("sys.modules['torch'] = sys", {"OMP_NUM_THREADS": "3"}, 3),
    "our variable": (TORCH, {"OMP_NUM_THREADS": "3", "LARS_TREE_NUM_THREADS": "4"}, 4),
    "set": (f"{TORCH} lars_tree.set_num_threads(5)", {"LARS_TREE_NUM_THREADS": "4"}, 5),
    "set to the default": (f"{TORCH} lars_tree.set_num_threads(None)", {}, 2),
} | {f"OpenMP, {text!r}": ("", {"OMP_NUM_THREADS": text}, None) for text in ("", "0", "-1", "x")}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_number_is_that_of_the_first_setting(case):
    code, variables, expected = SETTINGS[case]
    if "import torch" in code:
        need("torch")
    if "LARS_TREE_NUM_THREADS" not in variables:
        expected = min(expected or threads.cores(), threads.quota_limit())
    code = f"import sys, lars_tree; N = lars_tree.get_num_threads; {code}\nprint(N())"
    assert run(code, **variables) == str(expected)


def test_a_quota_limits_the_numbers_of_others(monkeypatch):
    monkeypatch.setattr(threads, "quota_limit", lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 5))
    assert get_num_threads() == 2
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.default.__wrapped__() == 2


# Lines of /proc/self/cgroup, files below /sys/fs/cgroup, and the number of cores that they allow
GROUPS = {
    "none": ("", {}, 16),
    "v2": ("0::/app", {"app/cpu.max": "300000 100000\n"}, 3),
    "v2, a part of a core": ("0::/app", {"app/cpu.max": "250000 100000\n"}, 3),
    "v2, less than a core": ("0::/app", {"app/cpu.max": "20000 100000\n"}, 1),
    "v2, no limit": ("0::/app", {"app/cpu.max": "max 100000\n"}, 16),
    "v2, more than there are": ("0::/app", {"app/cpu.max": "9900000 100000\n"}, 16),
    "v2, above": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
    "v2, the root": ("0::/a/b", {"cpu.max": "400000 100000"}, 4),
    "v2, not cpu.max": ("0::/a", {"a/cpu.max": "what"}, 16),
    "v1": (
        "5:cpu,cpuacct:/app\n3:memory:/app",
        {
            "cpu,cpuacct/app/cpu.cfs_quota_us": "500000\n",
            "cpu,cpuacct/app/cpu.cfs_period_us": "100000\n",
        },
        5,
    ),
    "v1, no limit": (
        "5:cpu:/app",
        {"cpu/app/cpu.cfs_quota_us": "-1\n", "cpu/app/cpu.cfs_period_us": "100000\n"},
        16,
    ),
    "v1, another controller": (
        "5:cpuset:/app",
        {"cpuset/app/cpu.cfs_quota_us": "1\n", "cpuset/app/cpu.cfs_period_us": "1\n"},
        16,
    ),
    "both": (
        "1:name=systemd:/app\n2:cpu:/app\n0::/app",
        {
            "cpu/cpu.cfs_quota_us": "600000",
            "cpu/cpu.cfs_period_us": "100000",
            "app/cpu.max": "max 100000",
        },
        6,
    ),
    "a colon in the name": ("0::/a:b", {"a:b/cpu.max": "300000 100000\n"}, 3),
}


@pytest.mark.parametrize("case", GROUPS)
def test_control_groups_limit_the_cores(tmp_path, monkeypatch, case):
    lines, files, expected = GROUPS[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    contents = {"proc/self/cgroup": lines} | {f"sys/fs/cgroup/{k}": v for k, v in files.items()}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cores(tmp_path) == expected


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert threads.cores(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.cores(tmp_path) == os.cpu_count()


# ---- During a call


@with_kernel
def test_other_threads_run_during_a_call(monkeypatch):
    """The switch interval is so long that another thread runs only if the call releases the GIL."""
    count, stop, seen = 0, threading.Event(), []

    def beside():
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(1e-4)

    class Watched:
        def __init__(self, *args):
            self.plan = kernel.Plan(*args)

        def __getattr__(self, name):
            return getattr(self.plan, name)

        def step(self):
            before = count
            self.plan.step()
            seen.append((before, count, len(self.plan.indices) == len(w)))

    kernel = _native.kernel
    walks = {name: getattr(kernel, name) for name in ("collect", "match", "rebuild")}
    monkeypatch.setattr(_native, "kernel", SimpleNamespace(Plan=Watched, **walks))
    w = [np.ones(1_000_000, np.float32)] * 4
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=beside)
    thread.start()
    try:
        sys.setswitchinterval(100)
        while len(seen) < 100 and not (seen and seen[-1][1] > seen[-1][0]):
            lars_update(w, w, 0.1)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert seen[-1][1] > seen[-1][0]
    assert seen[-1][2]


@with_kernel
@pytest.mark.parametrize("number", [1, 3])
def test_updates_in_place_by_many_threads_are_all_counted(number):
    set_num_threads(number)
    w = [np.zeros(600_000, np.float32), np.zeros(10)]
    g = [-np.ones_like(x) for x in w]
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(40):
            lars_update(w, g, 1.0, adapt=False, out=w)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [np.unique(x).tolist() for x in w] == [[160.0], [160.0]]


STEP = """
import os, sys, threading
import numpy as np, lars_tree
rng = np.random.default_rng(0)
w = [rng.normal(size=n).astype(np.float32) for n in (900_000, 3, 700)]
g = [x[::-1].copy() for x in w]
def step():
    import zlib
    new = lars_tree.lars_update(w, g, 0.1, decay_lambda=0.01)
    return zlib.crc32(b"".join(x.tobytes() for x in new))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_update():
    """During the fork, another thread may hold the lock for updates in place."""
    code = f"""{STEP}
lars_tree.set_num_threads(4)
busy, stop = threading.Event(), threading.Event()
def work():
    while not stop.is_set():
        lars_tree.lars_update(out, g, 0.0, out=out)
        busy.set()
out = [x.copy() for x in w]
thread = threading.Thread(target=work)
thread.start()
busy.wait()
expected = step()
for _ in range(5):
    child = os.fork()
    if not child:
        lars_tree.lars_update(out, g, 0.0, out=out)
        os._exit(step() != expected)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
print(step() == expected)"""
    assert run(code) == "True"


@with_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the limit exists on Linux only")
def test_one_thread_does_the_work_if_no_other_can_start():
    code = f"""{STEP}
lars_tree.set_num_threads(1)  # the system keeps the stacks of ended threads
expected = step()
lars_tree.set_num_threads(8)
{NO_MORE_THREADS}
import zlib
lars_tree.lars_update(w, g, 0.1, decay_lambda=0.01, out=w)
print(checksum(w) == expected)"""
    assert run(code) == "True"


def test_without_the_kernel_the_bits_are_the_same():
    code = f"{STEP}\nprint(lars_tree.native_available(), step())"
    on, off = run(code, LARS_TREE_NATIVE="1").split(), run(code, LARS_TREE_NATIVE="0").split()
    assert off == ["False", on[1]]
    assert on[0] == str(_native.kernel is not None or OFF)
    assert run(f"{STEP}\nlars_tree.set_num_threads(3)\nprint(step())") == on[1]


# ---- The floating-point environment

SMALL = np.random.default_rng(0).integers(1, 2**23, 600_000, np.uint32).view(np.float32)


def stepped():
    return [lars_update(w, w[::-1].copy(), 0.1, trust_coefficient=0.5) for w in (SMALL, SMALL[:99])]


@with_kernel
def test_flushing_subnormal_numbers_does_not_matter():
    torch = need("torch")
    set_num_threads(3)
    expected = stepped()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    try:
        actual = stepped()
        flushed = [np.float32(x) * np.float32(1) for x in SMALL[:3]]
    finally:
        torch.set_flush_denormal(False)
    assert flushed == [0, 0, 0]  # the mode of the caller is restored
    assert [x.tobytes() for x in actual] == [x.tobytes() for x in expected]
    assert all(x.any() for x in actual)


@with_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="the number of FE_UPWARD is that of Linux")
def test_the_rounding_mode_does_not_matter():
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    upward = 0x800 if os.uname().machine == "x86_64" else 0x400000
    set_num_threads(3)
    expected = stepped()
    assert libm.fesetround(upward) == 0
    try:
        actual = stepped()
        mode = libm.fegetround()
    finally:
        libm.fesetround(0)
    assert mode == upward
    assert [x.tobytes() for x in actual] == [x.tobytes() for x in expected]
    assert lars_tree.native_available()
