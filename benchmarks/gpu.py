"""LARS on a GPU next to other optimizers: `python -m benchmarks.gpu` or `python benchmarks/gpu.py`.

It needs torch, numpy and this checkout; nothing has to be installed or compiled before. It runs the
tests of the GPU engine and then measures the models (`gpu_steps.py`). Each model has a process of
its own, because after an invalid memory access CUDA is unusable for the rest of a process.
`--dry` tries out, on the CPU and with tiny models, everything that needs no GPU.
`tests/test_benchmarks_gpu.py` checks that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python benchmarks/gpu.py`, and before an installed lars_tree

import torch  # noqa: E402

import lars_tree  # noqa: E402
from benchmarks.device import Cpu, Cuda  # noqa: E402
from benchmarks.gpu_steps import BASE, COPY, OURS, left_out, measure_model  # noqa: E402
from benchmarks.report import markdown  # noqa: E402
from benchmarks.targets import MIB  # noqa: E402
from benchmarks.trees import TITLES, TREES, Shapes  # noqa: E402

LEAST = 7  # bytes moved per byte of parameters: read w, g for the norms; w, g, v; write w, v
TEST_SHARE = 0.3  # of all seconds
CUDA_TESTS = [  # in files that otherwise test the CPU
    "tests/test_torch.py::test_cuda_agrees_with_the_cpu_and_never_waits",
    "tests/test_torch_optimizer_state.py::test_cuda_agrees_with_the_cpu_and_never_waits",
    "tests/test_torch_optimizer_state.py::test_a_cuda_graph_replays_steps",
    "tests/test_torch_optimizer_state.py::test_compiled_cuda_steps_agree",
]
GRACE = 20.0  # seconds, to start and to end a process
HEADING = ["", "engine", "ms", "ratio", "of a copy", "CPU, ms", "syncs", "peak, MiB", "held, MiB"]
LEGEND = f"""\
Each row is one step on float32 parameters with momentum 0.9.

* ms: the lower quartile of the time of steps in a row. ratio: relative to {BASE}.
* of a copy: the bandwidth relative to a copy, if a step moves {LEAST} bytes per byte of parameters.
* CPU, ms: until a step returns. syncs: how often a step waits for the GPU.
* peak: the memory that a step allocates and frees; in brackets, relative to the parameters.
* held: the memory that is kept beyond parameters, gradients and state.
* The memory of a CUDA graph is not measured."""

Json = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Run the command line; return 1 if a test or a contestant of ours failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=450, help="the time for everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--dry", action="store_true", help="try it out on the CPU")
    parser.add_argument("--model", choices=TREES, help=argparse.SUPPRESS)  # see in_own_process
    options = parser.parse_args(arguments)
    if not (options.dry or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --dry tries it out on the CPU")
    device = Cpu() if options.dry else Cuda()
    save = partial(_write, options.json)
    if options.model is None:
        return everything(device, options.seconds, save)
    if options.dry:
        torch.set_num_threads(1)  # faster for tiny tensors
    shapes = _tiny(TREES[options.model]()) if options.dry else TREES[options.model]()
    measure_model(shapes, device, options.seconds, save)
    return 0


def _tiny(shapes: Shapes) -> Shapes:
    return {x: tuple(min(n, 8) for n in shapes[x]) for x in islice(shapes, 4)}


def _write(file: Path | None, result: Json) -> None:
    if file is not None:  # replaced as a whole, because this process may be killed
        temporary = file.with_name(file.name + ".new")
        temporary.write_text(json.dumps(result, indent=1))
        os.replace(temporary, file)


def everything(device: Cpu, seconds: float, save: Any) -> int:
    """Test, measure, and print each part when it is known."""
    deadline = monotonic() + seconds
    result: Json = {"machine": machine(device), "left out": left_out(device), "models": {}}
    _say(f"Measured on {result['machine']}.")
    for name, why in result["left out"].items():
        _say(f"* Left out: {name} ({why}).")
    if not device.is_gpu:
        _say("* Left out without a GPU: host syncs, device memory.")
    passed, result["tests"] = accelerator_tests(TEST_SHARE * seconds, device)
    _say(f"\nTests of the GPU engine: {result['tests']}")
    save(result)
    _say("\n" + LEGEND)
    for done, model in enumerate(TREES):
        share = (deadline - monotonic()) / (len(TREES) - done)
        result["models"][model] = in_own_process(model, max(share, 2 * GRACE), device)
        save(result)
        _say("\n" + page(model, result["models"][model]))
    rows = [row for x in result["models"].values() for row in x["rows"] if OURS in row["name"]]
    complete = not any(x["ending"] for x in result["models"].values())
    return 0 if passed and complete and not any(row["error"] for row in rows) else 1


def in_own_process(model: str, seconds: float, device: Cpu) -> Json:
    """Measure a model in a new process; if that ends early, keep what was measured until then."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        options = ["--json", str(file), "--seconds", str(seconds - GRACE)]
        options += ["--dry"] if not device.is_gpu else []
        command = [sys.executable, __file__, "--model", model, *options]
        ending = _finish(command, seconds, stdout=sys.stderr)
        found = json.loads(file.read_text()) if file.exists() else {"rows": []}
    return {**found, "ending": ending}


def accelerator_tests(seconds: float, device: Cpu) -> tuple[bool, str]:
    """Whether the tests of the GPU engine passed, and the end of pytest's output.

    On the CPU they are only collected: CI runs them among all tests.
    """
    files = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/test_fused*.py"))
    missing = [name for name in ("pytest", "hypothesis", "mpmath") if not find_spec(name)]
    missing += [] if files else ["tests/test_fused.py"]
    if missing:
        return True, f"left out, because there is no {', no '.join(missing)}"
    # The repository's options need pytest-xdist, and make errors of warnings by other versions.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-oaddopts=", "-ofilterwarnings="]
    if not device.is_gpu:
        options.append("--collect-only")
    elif find_spec("xdist"):
        options.append("--numprocesses=4")
    others = [test for test in CUDA_TESTS if (ROOT / test.partition("::")[0]).exists()]
    command = [sys.executable, "-m", "pytest", *options, *files, *others]
    with TemporaryFile("w+") as log:
        ending = _finish(command, seconds, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        log.seek(0)
        lines = log.read().strip().splitlines()
    return not ending, "\n".join([*lines[-40:], f"pytest: {ending}"] if ending else lines[-1:])


def _finish(command: list[str], seconds: float, **options: Any) -> str:
    """Run a command for at most so many seconds; how it ended, or "" if it succeeded."""
    with subprocess.Popen(command, **options) as process:  # noqa: S603
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports the failures until now
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            return f"stopped after {seconds:.0f} s"
    return f"exit status {code}" if code else ""


def machine(device: Cpu) -> str:
    """The GPU, its driver, and the versions."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    versions = {"torch": torch.__version__, "triton": triton, "lars_tree": lars_tree.__version__}
    parts = ["the CPU, to try out the script"]
    if device.is_gpu:
        parts = [torch.cuda.get_device_name(), f"driver {_driver()}"]
        versions |= {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return ", ".join(parts + [f"{name} {version}" for name, version in versions.items() if version])


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.split("\n")[0].strip() or "unknown"


def page(model: str, result: Json) -> str:
    """A section of docs/performance.md: the figures of one model, and the errors."""
    lines = [f"## {TITLES[model]}", ""]
    rows = {row["name"]: row for row in result["rows"]}
    if rows.get(COPY, {}).get("seconds"):
        size, bandwidth = result["bytes"], result["copied"] / rows[COPY]["seconds"]
        limit = LEAST * size / bandwidth
        lines.append(
            f"{result['tensors']} tensors, {size / MIB:.3g} MiB of parameters. A copy reads and "
            f"writes {bandwidth / 1e9:.0f} GB/s: {limit * 1e3:.3g} ms for {LEAST} bytes per byte."
        )
        base = rows.get(BASE, {}).get("seconds")
        table = [_cells(row, base, limit, size) for name, row in rows.items() if name != COPY]
        lines += ["", markdown([HEADING, *table]), ""]
    lines += [f"* {name} failed: {row['error']}" for name, row in rows.items() if row["error"]]
    lines += [f"* The process did not end well: {result['ending']}"] if result["ending"] else []
    return "\n".join(lines)


def _cells(row: Json, base: float | None, limit: float, size: int) -> list[str]:
    seconds, peak = row["seconds"], row["peak"]
    numbers = [
        seconds and 1e3 * seconds,
        seconds and base and seconds / base,
        seconds and limit / seconds,
        row["cpu_seconds"] and 1e3 * row["cpu_seconds"],
        row["syncs"],
    ]
    cells = ["" if x is None else f"{x:.3g}" for x in numbers]
    cells.append("" if peak is None else f"{peak / MIB:.3g} ({peak / size:.2f})")
    cells.append("" if row["held"] is None else f"{row['held'] / MIB:.3g}")
    return [row["name"], row["engine"], *cells]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
