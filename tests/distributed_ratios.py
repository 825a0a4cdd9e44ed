"""Trust ratios of DTensor, compared with those of dense tensors. See test_distributed."""

from __future__ import annotations

import torch
from distributed_tensors import MIXED, cases, trees
from distributed_worker import error, gathered
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lars_tree.report import layer_table, trust_ratios
from lars_tree.torch import Lars


def options(leaves):
    return {
        "decay_lambda": 0.01,
        "adapt": {name: leaf.adapt for name, leaf in leaves.items()},
        "layer_axis": {name: leaf.layer_axis for name, leaf in leaves.items()},
    }


def optimizer(w, dcdw, leaves):
    """An optimizer of these leaves with the same options, for the same gradients."""
    groups = []
    for name, leaf in leaves.items():
        p = torch.nn.Parameter(w[name])
        grad = dcdw[name]
        p.grad = torch.full_like(p, grad) if isinstance(grad, float) else grad
        groups.append({"params": [(name, p)], "adapt": leaf.adapt, "layer_axis": leaf.layer_axis})
    return Lars(groups, weight_decay=0.01, trust_coefficient=1.0, eps=0.0)


def measure(world):
    for tree, leaves, mesh, *_ in cases(world):
        for kind in ("float32", "complex128", "large by small"):
            w, dcdw, *plain = trees(leaves, kind, mesh)
            found, expected = (trust_ratios(*x, 0.1, **options(leaves)) for x in ((w, dcdw), plain))
            known = {name: x for name, x in expected.items() if x is not None}
            assert {name for name, x in found.items() if x is None} == expected.keys() - known
            assert not any(isinstance(x, DTensor) for x in found.values())
            numbers = {name: found[name].double() for name in known}
            errors = [error(numbers[name], x) for name, x in known.items()]
            tables = [layer_table(*x, 0.1, **options(leaves)) for x in ((w, dcdw), plain)]
            steps = [
                [x["relative_step"] or 0 for x in sorted(table, key=lambda x: x["path"])]
                for table in tables
            ]
            off = max(abs(a - b) / (b or 1) for a, b in zip(*steps, strict=True) if b < 1e300)
            bits = [x.tolist() for x in numbers.values()]
            by_name = optimizer(w, dcdw, leaves).trust_ratios()
            assert known.keys() == {name for name, x in by_name.items() if x is not None}
            assert all(torch.equal(by_name[name], found[name]) for name in known)
            yield f"{tree}, {kind}", {"error": max(errors), "off": off, "bits": gathered(bits)}
    mesh = DeviceMesh("cpu", list(range(world // 2)))
    leaves = {name: MIXED[name] for name in ("rows", "layers_across")}
    w, dcdw, *_ = trees(leaves, "float64", mesh)
    found = trust_ratios(w, dcdw, 0.1, **options(leaves))
    known = [bool(torch.isfinite(x).all()) for x in found.values()]
    yield "some processes", {"known": gathered(known)}
