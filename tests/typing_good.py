"""A user's script that mypy and pyright accept; the asserted types are those of the values."""

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray

import lars_tree as lt
from lars_tree import io, report
from lars_tree.torch import Lars, param_groups

Weights = dict[str, NDArray[np.float64]]


def is_matrix(path: tuple[str, ...], leaf: NDArray[np.float64]) -> bool:
    return leaf.ndim == 2 and path[-1] != "embedding"


def gradients(w: Weights) -> Weights:
    return {name: 2 * x for name, x in w.items()}


def dict_of_arrays() -> None:
    w: Weights = {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}
    g = gradients(w)
    assert_type(lt.lars_update(w, g, 0.1), Weights)
    assert_type(lt.lars_update(w, g, 0.1, out=w), Weights)
    assert_type(lt.lars_update(w["kernel"], 1.0, np.float32(0.1)), NDArray[np.float64])
    rates = {"kernel": 0.1, "bias": np.full(2, 0.1)}
    lt.lars_update(w, g, rates, decay_lambda={"kernel": 1e-4, "bias": 0}, nonfinite="skip")
    lt.lars_update(
        w, g, 0.1, adapt={"kernel": True, "bias": False}, layer_axis={"kernel": 0, "bias": None}
    )
    lt.lars_update(w, g, torch.tensor(0.1), nonfinite={"kernel": "raise", "bias": "propagate"})
    lt.lars_update(w, g, {"*bias": 1, "*": 0.1}, adapt={"*bias": False, "*": True})
    lt.lars_update(w, g, lambda path, x: 0.1 if path[-1] == "bias" else 1, adapt=is_matrix)


def other_trees() -> None:
    w = {"encoder": {"kernel": np.ones(3), "bias": np.ones(2)}, "head": [np.ones(2), np.ones(1)]}
    decay = {"encoder": {"kernel": 1e-4, "bias": 0}, "head": 0.1}
    new = lt.lars_update(w, w, 0.1, decay_lambda=decay, stop_gradients=False, axis_name=None)
    assert new.keys() == w.keys()
    pair = ({"kernel": np.ones(3)}, lt.Array(np.ones(2)))
    new_kernel, new_array = lt.lars_update(pair, pair, (0.1, 0.2))
    assert_type(new_array, lt.Array)
    new_kernel["kernel"].sum()


def container() -> None:
    w = lt.Container(encoder={"kernel": np.ones((3, 2)), "bias": np.zeros(2)}, head=np.ones(3))
    kernel: NDArray[np.float64] = w.encoder.kernel
    g = w.map(lambda x: 2 * x)
    assert_type(g, lt.Container)
    assert_type(w - 0.1 * g, lt.Container)
    assert_type(-w / kernel.size + {"encoder": 1, "head": 2}, lt.Container)
    assert_type(w | {"step": np.zeros(1)}, lt.Container)
    assert_type(w == g, bool)
    is_kernel = w.map(lambda path, x: path[-1] == "kernel", with_path=True)
    assert_type(w.lars_update(g, 0.1, adapt=is_kernel, nonfinite="raise"), lt.Container)
    assert_type(w.lars_update(g, lt.Container(encoder=0.1, head=0.2), out=w), lt.Container)
    w.lars_update(g, 0.1, out=w.to_dict())
    assert_type(w.filter(lambda path, x: path[-1] == "bias"), lt.Container)
    assert_type(w.unflatten(w.leaves()), lt.Container)


def array() -> None:
    w = lt.Array(np.ones(3))
    assert_type(w.lars_update(np.ones(3), 0.1), lt.Array)
    assert_type(2 * w + w * np.ones(3) - w / 2, lt.Array)
    assert_type(w > 0, lt.Array)
    assert_type(w + lt.Container(a=np.ones(3)), lt.Container)
    assert_type(lt.Container(a=np.ones(3)) + w, lt.Container)


def optimizer() -> None:
    w: Weights = {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}
    schedule = lt.schedules.Polynomial(0.1, total_steps=100, warmup_steps=10)
    opt = lt.Lars(schedule, momentum=0.9, nesterov=True, weight_decay=1e-4, nonfinite="skip")
    state = opt.init(w)
    assert_type(state, lt.Container)
    for _ in range(3):
        w, state = opt.update(w, gradients(w), state)
    assert_type(opt.update(w, gradients(w), state), tuple[Weights, lt.Container])
    assert_type(opt.update(w, gradients(w), state, out=w), tuple[Weights, lt.Container])
    new, state = opt.update(w, gradients(w), state, grad_scale=1024.0, lr=schedule, adapt=is_matrix)
    assert_type(opt == lt.Lars(0.1), bool)
    assert_type({opt: new}[opt], Weights)
    lt.Lars({"kernel": schedule, "bias": lambda step: 0.1 / (step + 1)}, {"kernel": 0.9, "bias": 0})
    assert_type(schedule(3), float)
    assert_type(schedule(np.int64(3)), float)
    assert_type(schedule(torch.arange(2)), torch.Tensor)
    rates: NDArray[np.float64] = lt.schedules.Cosine(1.0, 10)(np.arange(10))
    assert rates[0] == lt.schedules.Constant(1.0)(0)


def torch_loop() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    groups = param_groups(model, weight_decay=1e-4, nonfinite="skip", excluded_lr=0.1)
    groups = param_groups(
        model,
        lr={"0": 0.5, "2.weight": 1.0, "*": torch.tensor(2.0)},
        weight_decay=lambda name, p: 1e-4 if name.startswith("2.") else 0.0,
        excluded_lr={"0": 0.05, "*": 0.1},
    )
    opt = Lars(groups, lr=0.1, momentum=0.9, adapt="decayed")
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=2)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss: torch.Tensor = model(torch.ones(4, 3)).square().mean()
        torch.autograd.backward(loss)
        return loss

    for _ in range(3):
        assert_type(opt.step(closure), torch.Tensor)
        opt.step()
        scheduler.step()
    Lars(model.parameters(), lr=torch.tensor(0.1), layer_axis=None, fused=True)
    Lars(model.named_parameters(), nonfinite="propagate", adapt=False)
    w = dict(model.named_parameters())
    assert_type(lt.lars_update(w, w, 0.1, out=w), dict[str, torch.nn.Parameter])
    assert_type(io.from_state_dict(model.state_dict()), lt.Container)


class Writer:
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        print(f"{tag} {value:.3f} {step}")


def reports_and_files() -> None:
    w = lt.Container(kernel=np.ones((3, 2)), bias=np.ones(2))
    ratios = report.trust_ratios(w, w, 0.1, decay_lambda=1e-4, trust_clip=True)
    assert_type(ratios, lt.Container)
    report.ScalarCallback(Writer(), every=1)(ratios, 0)
    history = report.TrustHistory()
    history.record(ratios)
    assert_type(history.ratios["kernel"], np.ndarray[Any, Any])
    assert_type(report.layer_table(w, w, 0.1), report.LayerTable)
    io.save(w, "weights.safetensors", metadata={"step": "1"})
    io.save(w, "model.safetensors.index.json", max_shard_size="5GB")
    io.load("model.safetensors.index.json", flat=True)
    assert_type(io.load("weights.safetensors", library="torch"), lt.Container)
    assert_type(io.open("weights.safetensors", "r+"), lt.Container)
    assert_type(io.to_state_dict(w), dict[str, Any])


dict_of_arrays()
other_trees()
container()
array()
optimizer()
torch_loop()
reports_and_files()
