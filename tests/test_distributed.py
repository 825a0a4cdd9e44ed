"""With torch DTensor and FSDP2, several processes compute the result of one process.

The processes communicate by gloo over the loopback interface only, and find each other by a file.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import need

from lars_tree import native_available

need("torch")
need("torch.distributed.tensor")
need("torch.distributed.fsdp")

WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT = 600  # seconds; a suite that takes longer is assumed to hang


def measured(suite, world, folder):
    """Run a suite in `world` processes and return its measurements; if one fails, show its errors.

    As soon as a process has failed, all are killed, because the others would wait for it.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    outputs = [folder / f"{suite}{rank}" for rank in range(world)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            command = [sys.executable, WORKER, suite, str(rank), str(world), folder / "store"]
            with (
                output.with_suffix(".out").open("w") as out,
                output.with_suffix(".err").open("w") as err,
            ):
                processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=env))
        deadline = time.monotonic() + LIMIT
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0] * world:
        rank = next((i for i, code in enumerate(codes) if code), 0)
        said = outputs[rank].with_suffix(".err").read_text()[-4000:]
        pytest.fail(f"exit codes {codes}, of rank {rank}:\n{said}", pytrace=False)
    return dict(map(json.loads, outputs[0].with_suffix(".out").read_text().splitlines()))


# Relative tolerances; for bfloat16, in units in the last place. Other kinds are computed in double
# precision, with a tolerance of 1e-12. Without the native engine, shards are updated in float32, so
# that elements that nearly cancel have larger relative errors.
TOLERANCES = {"float32": 1.3e-6 if native_available() else 2e-4, "bfloat16": 1.0}


def wrong(found):
    """The cases whose results differ from those of one process."""
    return {
        name: case
        for name, case in found.items()
        if not case["error"] <= TOLERANCES.get(case["kind"], 1e-12)
        or not case["kept"]
        or not case["replicas agree"]
    }


def check_faults(found, world):
    """Assert that all processes refused the invalid arguments, and that nothing was written."""
    for argument in ("w", "dcdw", "state"):
        headline = f"{argument} holds an array that cannot be computed with"
        expected = ["LeafError", ["a/rows"], headline]
        assert found[f"partial {argument}"]["raised"] == [expected] * world
    expected = ["OutError", ["a/rows"], "out cannot be written to"]
    assert found["partial out"]["raised"] == [expected] * world
    elsewhere = ("plain dcdw", "turned state", "plain out", "turned out", "replicated out")
    for name in (*elsewhere, "dcdw for plain w", "out for plain w"):
        kinds = [[kind, paths] for kind, paths, _ in found[name]["raised"]]
        assert kinds == [["BackendError", ["a/plain" if "plain w" in name else "a/rows"]]] * world
    refused = ["ShapeError", ["a/rows"], "lr does not broadcast to w"]
    assert found["lr for each row"]["raised"] == [refused] * world
    for name in ("of no axes", "of one axis", "in each process", "for plain w"):
        assert found[f"lr {name}"]["same"] == [True] * world, name
    for name in (
        "w after faults",
        "out for plain w",
        "partial out",
        "plain out",
        "turned out",
        "replicated out",
    ):
        assert found[name]["same"] == [True] * world, name


def test_tensors(tmp_path):
    world = 4
    found = measured("distributed_tensors", world, tmp_path)
    compared = {name: case for name, case in found.items() if "kind" in case}
    assert len(compared) == 90
    assert wrong(compared) == {}

    # Each step has one all-reduce per mesh dimension, and sends nothing else unless gradients are
    # redistributed.
    for name, case in compared.items():
        sent, count = case["sent"], case["all_reduces"]
        assert sent.pop("all_reduce", 0) == count, name
        if case["kind"] == "float64":
            assert sent.pop("gloo:all_reduce", 0) == count, name
            assert (sent != {}) == case["redistributes"], name

    for leaf in ("rows", "columns", "sgd"):
        assert found[f"skip, {leaf}"] == {"same": [[True] * 2] * world, "counts": [[0, 1]] * world}
        headline = "dcdw would make weights that are not finite"
        refused = [["NonFiniteError", [leaf], headline]] * world
        assert found[f"raise, {leaf}"] == {"same": [True] * world, "raised": refused}

    check_faults(found, world)
    some = found["some processes"]
    assert max(map(max, some["errors"])) <= 1e-12
    assert [any(sizes) for sizes in some["sizes"]] == [i < world // 2 for i in range(world)]


@pytest.mark.skipif(not native_available(), reason="the kernel was not built")
def test_shards(tmp_path):
    """Shards whose norms are exact are updated to the same bits as in one process."""
    world = 2
    found = measured("distributed_shards", world, tmp_path)
    compared = {name: case for name, case in found.items() if "error" in case}
    assert len(compared) == 45
    for name, case in compared.items():
        exact = {"error": 0, "kept": True, "replicas agree": True}
        sent = 2 if name.endswith("other") else 1  # `nonfinite` needs a second all-reduce
        assert case == {**exact, "sent": sent}, name
    assert found["versions"] == [True] * world
    for name in ("uneven", "across", "odd"):
        all_kept = {"same": [True] * world, "kept": [True] * world, "skipped": [1] * world}
        assert found[f"skipped, {name}"] == all_kept
    assert found["amp"] == [True] + [False] * (world - 1)
    tied = ["OutError", ["tied"], "two leaves of out share memory (tied weights)"]
    freed = ["LeafError", ["freed"], "w holds an array that cannot be computed with"]
    for name, refused in {"tied": tied, "freed": freed}.items():
        assert found[name] == {"raised": [refused] * world, "same": [True] * world, "sent": 0}


def test_ratios(tmp_path):
    """All processes get the ratios of whole parameters and of all layers, with the same bits."""
    world = 4
    found = measured("distributed_ratios", world, tmp_path)
    some = found.pop("some processes")["known"]
    assert some == [[i < world // 2] * 2 for i in range(world)]
    assert len(found) == 3 * 6
    for name, case in found.items():
        assert case["error"] <= 1e-12, name
        assert case["off"] <= (1e-6 if "float" in name else 1e-5), name
        assert case["bits"] == case["bits"][:1] * world, name


def test_models(tmp_path):
    world = 4
    found = measured("distributed_models", world, tmp_path)
    same, counts = zip(*found.pop("zero redundancy"), strict=True)
    assert (all(same), sum(counts), min(counts) > 0) == (True, 8, True)
    refused = [found.pop(name) for name in list(found) if name.startswith("refused")]
    assert len(refused) == 12
    for case in refused:
        kinds = [
            [kind in ("BackendError", "LeafError"), len(paths)] for kind, paths, _ in case["raised"]
        ]
        assert kinds == [[True, 1]] * world
        assert case["same"] == [[True, True]] * world
    assert len(found) == 22
    assert wrong(found) == {}
    for name, case in found.items():
        if name.startswith("resumed"):
            assert case["buffers"] == ["float64" if case["kind"] == "float64" else "float32"], name
            names = [f"{i}.{x}" for i in range(4) for x in ("bias", "weight")]
            assert case["names"] == ([] if "torch.optim" in name else names), name
            continue
        # Tensor parallelism adds a mesh dimension. Sharding along layer_axis splits no layer.
        count = 2 if "parallel" in name else 0 if "layers" in name else 1
        assert (case["all_reduces"], case["collectives"]) == (count, count), name


@pytest.mark.skipif(not native_available(), reason="the kernel was not built")
@pytest.mark.parametrize("world", [3, 4])
def test_compiled(tmp_path, world):
    """Compiled steps are whole graphs: one for the first step, one for all later steps."""
    found = measured("distributed_compiled", world, tmp_path)
    refused = {name: found.pop(name) for name in list(found) if name.startswith("refused")}
    for name, case in refused.items():
        kind = "LeafError" if "partial" in name else "BackendError"
        argument = "p.grad" if "gradient" in name else "momentum_buffer"
        expected = [kind, ["param_groups[0]['params'][2]"], argument]
        raised = [[*fault[:2], fault[2].split()[0]] for fault in case.pop("raised")]
        assert raised == [expected] * world, name
        assert case == {"same": [True] * world, "sent": 0}, name
    if world == 3:  # the last process is not in the mesh
        kept, close, graphs = zip(*found.pop("some processes"), strict=True)
        assert (kept, close, graphs[:2]) == ((True, False, True), (False, True, True), (2, 2))
    assert (len(refused), len(found)) == ((5, 2) if world == 3 else (0, 7))
    assert wrong(found) == {}
    for name, case in found.items():
        graphs = [None, 2, 2] if case["kind"] == "bfloat16" else [2] * world
        assert case["graphs"] == graphs, name
        if "meshes" in name:
            count = 2 if "joint" in name else 1
            assert (case["all_reduces"], case["collectives"]) == (count, count), name
