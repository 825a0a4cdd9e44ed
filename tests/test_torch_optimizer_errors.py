"""What lars_tree.torch.Lars refuses; and a step is whole or not taken, whatever comes between."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
from conftest import interrupted_at, need

from lars_tree import LarsTreeError

torch = need("torch")

from test_torch_optimizer import FOREACH, W, model, parameter, same, train  # noqa: E402

import lars_tree.torch  # noqa: E402
from lars_tree.torch import Lars, param_groups  # noqa: E402


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -0.1}, "Invalid learning rate: -0.1"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"weight_decay": -1}, "Invalid weight_decay: -1"),
        ({"trust_coefficient": -1}, "Invalid trust_coefficient: -1"),
        ({"eps": float("inf")}, "Invalid eps: inf"),
        ({"dampening": 2}, "Invalid dampening: 2"),
        ({"nesterov": True, "momentum": 0}, "Nesterov momentum requires a momentum"),
        ({"nesterov": True, "dampening": 0.1}, "zero dampening"),
        ({"lr": True}, "Invalid lr: expected a finite number >= 0, got True"),
        ({"adapt": 1}, "Invalid adapt: expected True, False or 'decayed', got 1"),
        ({"layer_axis": 0.5}, "Invalid layer_axis: expected an axis or None, got 0.5"),
    ],
    ids=str,
)
def test_values_that_make_no_optimizer_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Lars([parameter()], **options)
    with pytest.raises(ValueError, match=says):
        Lars([{"params": [parameter()], **options}])
    opt = Lars([parameter()])
    with pytest.raises(ValueError, match=says):
        opt.add_param_group({"params": [parameter()], **options})
    assert len(opt.param_groups) == 1


def test_parameters_that_torch_would_refuse_are_refused():
    p = parameter()
    with pytest.raises(ValueError, match="empty parameter list"):
        Lars([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Lars([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        Lars([np.ones(3)])
    with pytest.raises(ValueError, match="non-leaf"):
        Lars([p * 2])


@FOREACH
def test_sparse_gradients_are_refused(foreach):
    p, q = parameter(), parameter()
    q.grad = q.grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        Lars([p, q], foreach=foreach).step()
    assert p.tolist() == W


@FOREACH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_rate_that_a_scheduler_broke_is_refused(foreach, momentum):
    p = parameter()
    opt = Lars([p], momentum=momentum, foreach=foreach)
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        opt.step()
    assert p.tolist() == W


def lose_shape(opt, p):
    opt.state[p]["momentum_buffer"] = torch.zeros(3)


def lose_dtype(opt, p):
    opt.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float16)


def lose_tensor(opt, p):
    opt.state[p]["momentum_buffer"] = np.zeros(4)


def lose_axis(opt, p):
    opt.param_groups[-1]["layer_axis"] = 2


def lose_gradient(opt, p):
    """torch looks at its shape when it is set alone."""
    p.data = torch.ones(7)


@FOREACH
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lose_shape, "expected a velocity"),
        (lose_dtype, "expected a velocity"),
        (lose_tensor, "expected a torch array"),
        (lose_axis, "layer_axis is no axis"),
        (lose_gradient, "dcdw does not broadcast"),
    ],
)
def test_an_error_names_the_parameters_and_nothing_is_written(spoil, says, foreach):
    """Whatever group they are in."""
    net = model()
    first, second = param_groups(net)
    opt = Lars([{**first, "momentum": 0.0}, second], 0.5, foreach=foreach)
    train(net, opt, 1)
    spoil(opt, net[1].weight)
    before = copy.deepcopy((list(net.parameters()), opt.state_dict()["state"]))
    with pytest.raises(LarsTreeError, match=says) as caught:
        opt.step()
    (note,) = caught.value.__notes__
    assert note.startswith("parameters: ")
    assert "1.weight" in note
    assert same(net.parameters(), before[0])
    for each, old in zip(opt.state_dict()["state"].values(), before[1].values(), strict=True):
        assert np.array_equal(each["momentum_buffer"], old["momentum_buffer"])


@FOREACH
@pytest.mark.parametrize("momenta", [(0.9, 0.9), (0.9, 0.0), (0.0, 0.0)])
def test_parameters_that_share_memory_are_refused(momenta, foreach):
    """Each is another Parameter, so torch does not see that they are tied."""
    x = torch.ones(4)
    params = [torch.nn.Parameter(y) for y in (x, x[1:3])]
    groups = [{"params": [p], "momentum": m} for p, m in zip(params, momenta, strict=True)]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(LarsTreeError, match="share memory") as caught:
        Lars(groups, foreach=foreach).step()
    assert caught.value.__notes__ == ["parameters: param_groups[1]['params'][0]"]
    assert x.tolist() == [1, 1, 1, 1]


@FOREACH
def test_steps_of_many_threads_are_all_taken(foreach):
    """The first ones too: all of them move one buffer."""
    p = torch.nn.Parameter(torch.zeros(20_000))
    p.grad = -torch.ones_like(p)
    opt = Lars([p], 1.0, momentum=1.0, adapt=False, foreach=foreach)
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(40):
            opt.step()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert opt.state[p]["momentum_buffer"].unique().tolist() == [-160]
    assert p.unique().tolist() == [160 * 161 / 2]


@pytest.mark.parametrize("foreach", [None, True])
def test_ctrl_c_comes_before_a_first_step_or_after_it(foreach):
    def stepped(line=None):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3, generator=generator)) for _ in range(3)]
        groups = [{"params": params[:2]}, {"params": params[2:], "momentum": 0.0}]
        opt = Lars(groups, 0.1, dampening=0.5, trust_coefficient=0.1, foreach=foreach)
        for p in params:
            p.grad = torch.ones(3)
        reached = line is None or interrupted_at(line, lars_tree.__path__[0], opt.step)
        buffers = [opt.state[p].get("momentum_buffer") for p in params]
        return params, opt, buffers, reached

    (*before, _), line, seen = stepped(), 0, set()
    done, opt, *_ = stepped()
    opt.step()
    while True:
        params, opt, buffers, reached = stepped(line)
        if not reached:
            break
        whole = same(params, done)
        assert whole or same(params, before[0]), line
        assert [x is not None for x in buffers] == [whole, whole, False], line
        seen.add(whole)
        line += 1
    assert seen == {False, True}
