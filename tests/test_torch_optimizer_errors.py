"""Invalid options, parameters and buffers of lars_tree.torch.Lars; steps of many threads."""

from __future__ import annotations

import copy
import re
import threading
from decimal import Decimal

import numpy as np
import pytest
from conftest import need

from lars_tree import LarsTreeError

torch = need("torch")

from test_torch_optimizer import W, model, parameter, same, train  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -0.1}, "Invalid lr: expected a finite number >= 0, got -0.1"),
        ({"lr": float("nan")}, "Invalid lr: expected a finite number >= 0, got nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"momentum": -0.1}, "Invalid momentum: expected a finite number >= 0, got -0.1"),
        ({"weight_decay": -1}, "Invalid weight_decay: expected a finite number >= 0, got -1"),
        ({"trust_coefficient": -1}, "Invalid trust_coefficient: expected .*, got -1"),
        ({"eps": float("inf")}, "Invalid eps: expected a finite number >= 0, got inf"),
        ({"dampening": 2}, "Invalid dampening: expected a number from 0 to 1, got 2"),
        ({"nesterov": True, "momentum": 0}, "Nesterov momentum requires a momentum"),
        ({"nesterov": True, "dampening": 0.1}, "zero dampening"),
        ({"lr": True}, "Invalid lr: expected a finite number >= 0, got True"),
        ({"adapt": 1}, "Invalid adapt: expected True, False or 'decayed', got 1"),
        ({"layer_axis": 0.5}, "Invalid layer_axis: expected an axis or None, got 0.5"),
        ({"layer_axis": np.True_}, "Invalid layer_axis: expected an axis or None, got np.True_"),
        ({"lr": "0.1"}, "Invalid lr: expected a finite number >= 0, got '0.1'"),
        ({"lr": 1j}, "Invalid lr: expected a finite number >= 0, got 1j"),
        ({"lr": np.bool_(True)}, "Invalid lr: expected a finite number >= 0, got np.True_"),
        ({"lr": torch.tensor(True)}, r"Invalid lr: expected .*, got tensor\(True\)"),
        ({"lr": torch.tensor(1j)}, r"Invalid lr: expected .*, got tensor\(0.\+1.j\)"),
        ({"lr": np.array([0.1])}, r"Invalid lr: expected .*, got array\(\[0.1\]\)"),
        ({"lr": np.datetime64(1, "s")}, "Invalid lr: expected a finite number >= 0"),
        pytest.param({"lr": 10**400}, "Invalid lr: expected .*, got 1000", id="beyond the floats"),
        ({"lr": Decimal("sNaN")}, r"Invalid lr: expected .*, got Decimal\('sNaN'\)"),
        ({"eps": None}, "Invalid eps: expected a finite number >= 0, got None"),
        ({"momentum": [0.9]}, r"Invalid momentum: expected a finite number >= 0, got \[0.9\]"),
        ({"dampening": "0"}, "Invalid dampening: expected a finite number >= 0, got '0'"),
        ({"weight_decay": torch.tensor([1.0, 2.0])}, "Tensor weight_decay must be 1-element"),
        ({"trust_coefficient": {}}, "Invalid trust_coefficient: expected a finite number >= 0"),
        ({"nesterov": 1}, "Invalid nesterov: expected True or False, got 1"),
        ({"maximize": None}, "Invalid maximize: expected True or False, got None"),
        ({"foreach": "yes"}, "Invalid foreach: expected True, False or None, got 'yes'"),
        ({"fused": 1}, "Invalid fused: expected True, False or None, got 1"),
        ({"adapt": "decay"}, r"Invalid adapt: .*'decayed', got 'decay' \(did you mean 'decayed'"),
        ({"nonfinite": "skipp"}, r"Invalid nonfinite: .*got 'skipp' \(did you mean 'skip'\?\)"),
        ({"nonfinite": None}, "Invalid nonfinite: expected 'propagate', 'skip' or 'raise'"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Lars([parameter()], **options)
    with pytest.raises(ValueError, match=rf"^param_groups\[0\]: .*{says}"):
        Lars([{"params": [parameter()], **options}])
    opt = Lars([parameter()])
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: .*{says}"):
        opt.add_param_group({"params": [parameter()], **options})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [parameter()]})
    opt.param_groups[1].update(options)
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: .*{says}") as error:
        opt.step()
    assert isinstance(error.value, LarsTreeError)
    assert error.value.argument in options
    assert error.value.paths == (("param_groups[1]",),)
    assert [p.tolist() for group in opt.param_groups for p in group["params"]] == [W, W]
    assert not opt.state


def test_parameters_that_torch_refuses_are_refused():
    p = parameter()
    with pytest.raises(ValueError, match="empty parameter list"):
        Lars([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Lars([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        Lars([np.ones(3)])
    with pytest.raises(ValueError, match="non-leaf"):
        Lars([p * 2])


def test_sparse_gradients_are_refused(engine):
    p, q = parameter(), parameter()
    q.grad = q.grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as error:
        Lars([("p", p), ("q", q)], **engine).step()
    assert isinstance(error.value, LarsTreeError)
    assert (error.value.argument, error.value.paths) == ("p.grad", (("q",),))
    assert p.tolist() == W


def wrong_shape(opt, p):
    opt.state[p]["momentum_buffer"] = torch.zeros(3)


def wrong_dtype(opt, p):
    opt.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float16)


def numpy_buffer(opt, p):
    opt.state[p]["momentum_buffer"] = np.zeros(4)


def meta_buffer(opt, p):
    opt.state[p]["momentum_buffer"] = torch.zeros_like(p, device="meta")


def invalid_axis(opt, p):
    opt.param_groups[-1]["layer_axis"] = 2


def reshaped_parameter(opt, p):
    """torch checks the shape of a gradient only when the gradient is assigned."""
    p.data = torch.ones(7)


def freed_gradient(opt, p):
    p.grad.untyped_storage().resize_(0)


def shared_memory(opt, p):
    p.data = opt.param_groups[0]["params"][0].data[0, :4]


# Error messages must not contain these terms of `lars_update`.
OTHER_TERMS = re.compile(r"\b(dcdw|w|out|state|velocity|weights|leaf|leaves)\b(?!_)")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (wrong_shape, r"momentum_buffer .* p\n  1.weight: expected .* \(4,\) .*, got .* \(3,\)"),
        (
            wrong_dtype,
            r"momentum_buffer .* p\n  1.weight: expected .* torch.float32 .* torch.float16",
        ),
        (numpy_buffer, r"momentum_buffer and p .*\n  1.weight: expected a torch array as in p"),
        (meta_buffer, r"momentum_buffer .*\n  1.weight: expected dense data, got .* meta device"),
        (invalid_axis, r"layer_axis is no axis of the parameters\n  0.bias: expected an axis"),
        (reshaped_parameter, r"p.grad .* p\n  1.weight: expected .*\(7,\), got \(4,\)"),
        (freed_gradient, r"p.grad .*\n  1.weight: expected dense data, got .* freed"),
        (shared_memory, r"two parameters share memory .*\n  1.weight: shares memory with 0.weight"),
    ],
)
def test_an_error_names_the_parameters_and_nothing_is_written(spoil, says, engine):
    """The error uses the terms of torch, whichever group the parameter is in."""
    net = model()
    first, second = param_groups(net, named=True)
    opt = Lars([{**first, "momentum": 0.0}, second], 0.5, **engine)
    train(net, opt, 1)
    spoil(opt, net[1].weight)
    before = copy.deepcopy((list(net.parameters()), opt.state_dict()["state"]))
    with pytest.raises(LarsTreeError, match=says) as caught:
        opt.step()
    message = str(caught.value).replace("opt.state", "").replace("state_dict", "")
    assert not OTHER_TERMS.search(message), message
    assert ("1.weight",) in caught.value.paths
    assert not OTHER_TERMS.search(caught.value.argument)
    assert same(net.parameters(), before[0])
    for each, old in zip(opt.state_dict()["state"].values(), before[1].values(), strict=True):
        buffers = [x["momentum_buffer"] for x in (each, old)]
        assert spoil is meta_buffer or np.array_equal(*buffers)


@pytest.mark.parametrize("momenta", [(0.9, 0.9), (0.9, 0.0), (0.0, 0.0)])
def test_parameters_that_share_memory_are_refused(momenta, engine):
    """The parameters are different objects, so torch does not detect the shared memory."""
    x = torch.ones(4)
    params = [torch.nn.Parameter(y) for y in (x, x[1:3])]
    groups = [{"params": [p], "momentum": m} for p, m in zip(params, momenta, strict=True)]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(LarsTreeError, match="share memory") as caught:
        Lars(groups, **engine).step()
    first, second = (f"param_groups[{i}]['params'][0]" for i in (0, 1))
    assert str(caught.value).splitlines()[1:] == [f"  {second}: shares memory with {first}"]
    assert x.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("foreach", [None, True])  # the interpreter is slow
def test_steps_of_many_threads_are_all_taken(foreach):
    """In the first step, all threads use the same new buffer."""
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


def test_after_the_dtype_of_a_model_has_changed_the_error_says_what_to_do():
    net = model()
    opt = Lars(net.named_parameters(), 0.5)
    train(net, opt, 1)
    buffers = [opt.state[p]["momentum_buffer"] for p in net.parameters()]
    net.double()
    with pytest.raises(
        LarsTreeError, match=r"as by model.double.*\n  opt.load_state_dict"
    ) as caught:
        train(net, opt, 1)
    assert [path for (path,) in caught.value.paths] == [name for name, _ in net.named_parameters()]
    opt.load_state_dict(opt.state_dict())
    loaded = [opt.state[p]["momentum_buffer"] for p in net.parameters()]
    assert same(loaded, [x.double() for x in buffers])
    train(net, opt, 1)
    opt.state.clear()
    train(net.float(), opt, 1)


def _set_axis(opt, p):
    opt.param_groups[0]["layer_axis"] = p.ndim


def _set_buffer(make):
    return lambda opt, p: opt.state[p].update(momentum_buffer=make(opt.state[p]["momentum_buffer"]))


def _to_double(opt, p):
    p.grad, p.data = None, p.data.double()
    p.grad = torch.ones_like(p)


@pytest.mark.parametrize(
    "change",
    [
        _set_axis,
        _to_double,
        _set_buffer(torch.Tensor.double),
        _set_buffer(lambda x: x[:1]),
        _set_buffer(torch.Tensor.tolist),
    ],
)
def test_a_compiled_step_reports_what_does_not_fit(change):
    messages = []
    for compiled in (False, True):
        torch._dynamo.reset()
        p = parameter([3.0, 4.0], [1.0, 1.0], torch.float32)
        opt = Lars([p], lr=0.1)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        step()
        change(opt, p)
        before = p.detach().clone()
        with pytest.raises(LarsTreeError) as caught:
            step()
        assert torch.equal(p, before)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_key_that_is_no_option_warns():
    p, q = parameter(), parameter()
    with pytest.warns(UserWarning, match=r"param_groups\[1\]: 'decay' is no option of Lars"):
        opt = Lars([{"params": [p]}, {"params": [q], "decay": 0.1}], 0.1)
    with pytest.warns(
        UserWarning, match=r"param_groups\[2\]: 'momentun' .*did you mean 'momentum'"
    ):
        opt.add_param_group({"params": [parameter()], "momentun": 0.5})


def test_groups_of_other_optimizers_and_schedulers_do_not_warn():
    sgd = torch.optim.SGD([parameter()], 0.1)
    torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=9)
    adam = torch.optim.AdamW([("w", parameter())], 0.1)
    for other in (sgd, adam):
        kept = "params", "param_names", "differentiable", "capturable", "initial_lr", "max_lr"
        Lars([{key: group[key] for key in kept if key in group} for group in other.param_groups], 1)
