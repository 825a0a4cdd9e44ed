"""`benchmarks.gpu`: on the CPU with `--dry`, and with a simulated GPU.

The simulated functions of `torch.cuda` have the signatures of the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from unittest.mock import create_autospec

import pytest
from conftest import need

torch = need("torch")

from benchmarks import gpu, gpu_steps  # noqa: E402
from benchmarks.device import Cpu, Cuda, captured  # noqa: E402

SHAPES = {"kernel": (16, 16), "bias": (16,)}
PLANTED = "planted: no such kernel"


def plant(folder, monkeypatch, code):
    """Put a package in the place of bitsandbytes, also for other processes."""
    package = folder / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "optim.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))


def test_a_dry_run_reports_all_contestants_and_those_that_fail(tmp_path, monkeypatch):
    plant(tmp_path, monkeypatch, f"def LARS(*_, **options): raise RuntimeError({PLANTED!r})")
    file = tmp_path / "figures.json"
    command = [sys.executable, gpu.__file__, "--dry", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["models"].keys() == {"resnet", "gpt2", "small"}
    for model, found in result["models"].items():
        rows = {row["name"]: row for row in found["rows"]}
        expected = gpu_steps.CONTESTANTS.keys() - result["left out"].keys()
        assert rows.keys() == {gpu_steps.COPY, "bitsandbytes"} | expected
        assert rows.pop("bitsandbytes")["error"] == f"RuntimeError: {PLANTED}"
        for name, row in rows.items():
            assert (row["error"], row["seconds"] > 0, row["cpu_seconds"] > 0) == ("", True, True)
            assert bool(row["engine"]) == name.startswith("lars_tree")
        section = done.stdout.split(f"## {gpu.TITLES[model]}\n")[1].split("##")[0]
        assert f"* bitsandbytes failed: RuntimeError: {PLANTED}" in section
        cells = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
        assert [x[0] for x in cells[2:]] == [f"| {x}" for x in [*rows, "bitsandbytes"][1:]]
        assert float(cells[2][3]) == 1  # the ratio of the base to itself
    for name in result["left out"]:
        assert f"* Left out: {name} (" in done.stdout


def test_a_crash_keeps_what_was_measured_before(tmp_path, monkeypatch):
    plant(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    found = gpu.in_own_process("small", 100, Cpu())
    assert found["ending"] == "exit status -9"
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["lars_tree"]["ready"] > 0
    assert "* The process did not end well: exit status -9" in gpu.page("small", found)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"name": "lars_tree, foreach", "error": ""}, 0),
        ({"name": "timm", "error": "ValueError"}, 0),
        ({"name": "lars_tree, foreach", "error": "ValueError"}, 1),
    ],
)
def test_the_status_tells_whether_a_contestant_of_ours_failed(row, status, monkeypatch):
    monkeypatch.setattr(gpu, "in_own_process", lambda *_: {"rows": [row], "ending": ""})
    monkeypatch.setattr(gpu, "accelerator_tests", lambda *_: (True, ""))
    assert gpu.everything(Cpu(), 1, lambda result: None) == status


def test_the_figures_of_a_page():
    def row(name, ms, **more):
        figures = gpu_steps.Figures(name, seconds=ms / 1e3, cpu_seconds=5e-5, **more)
        return gpu_steps.asdict(figures)

    rows = [
        row(gpu_steps.COPY, 0.5),  # 1.5 GB in 0.5 ms: 3 TB/s
        row(gpu_steps.BASE, 0.25, syncs=0, peak=0, held=0),
        row("lars_tree", 0.5, engine="fused", syncs=2, peak=gpu.MIB // 2, held=2**18),
    ]
    found = {"rows": rows, "tensors": 7, "bytes": 100 * gpu.MIB, "copied": 1.5e9, "ending": ""}
    lines = gpu.page("resnet", found).splitlines()
    # 7 * 100 MiB at 3 TB/s take 0.245 ms.
    assert "7 tensors, 100 MiB" in lines[2]
    assert "3000 GB/s: 0.245 ms" in lines[2]
    assert lines[6] == "| torch SGD, fused |  | 0.25 | 1 | 0.979 | 0.05 | 0 | 0 (0.00) | 0 |"
    assert lines[7] == "| lars_tree | fused | 0.5 | 2 | 0.489 | 0.05 | 2 | 0.5 (0.01) | 0.25 |"


def test_a_contestant_that_takes_too_long_is_stopped():
    figures = gpu_steps.Figures("slow")
    with gpu_steps.recorded(figures, 0.05):
        while True:
            pass
    assert figures.error == "TimeoutError: not ready after 0 s"


def test_an_error_is_recorded_with_its_cause():
    figures = gpu_steps.Figures("graph")
    with gpu_steps.recorded(figures):
        try:
            raise ValueError("a sync\n during capture")
        finally:
            raise RuntimeError("capture failed")
    assert figures.error == (
        "RuntimeError: capture failed; first: ValueError: a sync during capture"
    )


@pytest.fixture
def planted_tests(tmp_path, monkeypatch):
    """Replaces the tests of the GPU engine."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "find_spec", lambda name: name != "xdist" and find_spec(name))
    # The options of the repository need plugins, and make warnings of other versions errors.
    options = (
        '[tool.pytest.ini_options]\naddopts = ["--no-such-option"]\nfilterwarnings = ["error"]'
    )
    (tmp_path / "pyproject.toml").write_text(options)
    (tmp_path / "tests").mkdir()
    return tmp_path / "tests" / "test_fused.py"


PASSING = "import warnings\ndef test_a(): warnings.warn('of another version')\n"
FAILING = "def test_b(): assert 1 == 2\n"


def test_the_accelerator_tests_are_counted(planted_tests):
    planted_tests.write_text(PASSING)
    passed, text = gpu.accelerator_tests(60, Cuda())
    assert passed
    assert text.startswith("1 passed, 1 warning in ")
    passed, text = gpu.accelerator_tests(60, Cpu())
    assert passed
    assert text.startswith("1 test collected in ")


def test_failures_of_the_accelerator_tests_are_shown(planted_tests):
    planted_tests.write_text(PASSING + FAILING)
    passed, text = gpu.accelerator_tests(60, Cuda())
    assert not passed
    assert "assert 1 == 2" in text
    assert "1 failed, 1 passed, 1 warning" in text
    assert text.endswith("pytest: exit status 1")


def test_accelerator_tests_that_take_too_long_are_stopped(planted_tests):
    planted_tests.write_text(FAILING + "def test_c():\n    while True: pass\n")
    passed, text = gpu.accelerator_tests(10, Cuda())
    assert not passed
    assert "assert 1 == 2" in text
    assert text.endswith("pytest: stopped after 10 s")


def test_without_pytest_the_tests_are_left_out(planted_tests, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    missing = "no pytest, no hypothesis, no mpmath, no tests/test_fused.py"
    assert gpu.accelerator_tests(60, Cuda()) == (True, f"left out, because there is {missing}")


class SimulatedGpu:
    """What `torch.cuda` does, with memory and time that are only counted."""

    def __init__(self):
        self.used = self.top = 0
        self.seconds = 0.0
        self.mode, self.log = "default", []
        self.fails = False

    def allocate(self, size):
        self.used += size
        self.top = max(self.top, self.used)

    def reset(self, device=None):
        self.top = self.used

    def set_mode(self, debug_mode):
        self.mode = debug_mode

    def wait(self):
        """An operation such as `item`."""
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    @contextmanager
    def stream(self, stream):
        self.log.append("side stream")
        try:
            yield
        finally:
            self.log.append("main stream")

    @contextmanager
    def graph(self, cuda_graph, pool=None, stream=None, **options):
        assert stream is not None
        self.log.append("capture")
        yield
        if self.fails:
            raise RuntimeError("capture failed")
        self.log.append("captured")
        cuda_graph.replay.side_effect = lambda: self.log.append("replay")


@pytest.fixture
def simulated(monkeypatch):
    """Replaces what the benchmark uses of `torch.cuda`."""
    cuda, device = torch.cuda, SimulatedGpu()

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self, stream=None):
            self.at = device.seconds

        def elapsed_time(self, end_event):
            return 1e3 * (end_event.at - self.at)

        def synchronize(self):
            device.log.append("event")

    replaced = {
        "synchronize": lambda device=None: None,
        "set_sync_debug_mode": device.set_mode,
        "reset_peak_memory_stats": device.reset,
        "memory_allocated": lambda _=None: device.used,
        "max_memory_allocated": lambda _=None: device.top,
        "memory_stats": lambda _=None: {"requested_bytes.all.current": device.used},
        "stream": device.stream,
    }
    for name, function in replaced.items():
        simulation = create_autospec(getattr(cuda, name), side_effect=function)
        monkeypatch.setattr(cuda, name, simulation)
    monkeypatch.setattr(cuda, "current_stream", create_autospec(cuda.current_stream))
    monkeypatch.setattr(cuda, "Stream", create_autospec(cuda.Stream))
    monkeypatch.setattr(cuda, "CUDAGraph", create_autospec(cuda.CUDAGraph))
    monkeypatch.setattr(cuda, "graph", device.graph)
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(Cuda, "backend", "eager")
    monkeypatch.setattr(Cuda, "name", "cpu")  # where the tensors are
    monkeypatch.setattr(Cuda, "copied", 4096)
    monkeypatch.setattr(Cuda, "rounds", 1)
    monkeypatch.setattr(gpu_steps, "TURN", 1e-6)  # the time is simulated
    return device


def test_time_on_a_gpu_is_that_of_one_call(simulated):
    def step():
        simulated.seconds += 0.002

    assert Cuda().per_call(step, 5) == pytest.approx(0.002, rel=1e-12)


def test_all_waiting_is_counted(simulated):
    event = torch.cuda.Event(enable_timing=True)

    def step():
        simulated.wait()
        simulated.wait()
        torch.cuda.synchronize()
        event.synchronize()
        warnings.warn("something else", stacklevel=1)

    assert Cuda().syncs(step) == 4
    assert Cuda().syncs(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        Cuda().syncs(lambda: 1 / 0)
    assert simulated.mode == "default"


def test_the_peak_counts_what_a_step_frees_again(simulated):
    simulated.allocate(1000)
    simulated.allocate(-400)

    def step():
        simulated.allocate(100)
        simulated.allocate(50)
        simulated.allocate(-150)

    assert Cuda().peak(step) == 150
    assert Cuda().held() == 600


def test_a_graph_is_captured_on_a_side_stream_after_the_first_steps(simulated):
    replay = captured(lambda: simulated.log.append("step"))
    steps = ["step", "step", "step"]
    captures = ["side stream", *steps, "capture", "step", "captured", "main stream"]
    assert simulated.log == captures
    replay()
    assert simulated.log == [*captures, "replay"]


def test_a_failed_capture_restores_the_stream(simulated):
    simulated.fails = True
    with pytest.raises(RuntimeError, match="capture failed"):
        captured(lambda: None)
    assert simulated.log[-1] == "main stream"


def test_a_model_is_measured_on_a_gpu(simulated, monkeypatch):
    """The simulated graph replays nothing, so that the check of its step must report it."""
    saved = []
    gpu_steps.measure_model(SHAPES, Cuda(), 100, saved.append)
    rows = {row["name"]: row for row in saved[-1]["rows"]}
    assert "does not change the weights" in rows.pop(gpu_steps.GRAPH)["error"]
    assert {"lars_tree", "lars_tree, compiled", gpu_steps.BASE} < rows.keys()
    for row in rows.values():
        assert (row["error"], row["syncs"], row["peak"]) == ("", 0, 0)
        assert (row["held"] is None) == (row["name"] == gpu_steps.COPY)


def test_the_memory_of_a_graph_is_not_measured(simulated, monkeypatch):
    monkeypatch.setattr(gpu_steps, "captured", lambda step: step)
    monkeypatch.setattr(gpu_steps, "CONTESTANTS", {gpu_steps.GRAPH: gpu_steps.lars("graph")})
    saved = []
    gpu_steps.measure_model(SHAPES, Cuda(), 100, saved.append)
    copy, graph = saved[-1]["rows"]
    assert (copy["name"], copy["peak"], copy["held"]) == (gpu_steps.COPY, 0, None)
    assert (graph["error"], graph["syncs"]) == ("", 0)
    assert (graph["peak"], graph["held"]) == (None, None)
