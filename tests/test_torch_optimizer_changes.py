"""What may happen to parameters, gradients and buffers of lars_tree.torch.Lars between two steps.

Nothing that a step found may be taken for granted in the next one. So after each change, a step
must give what a new optimizer gives for copies of the same values, or raise and write nothing.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
from conftest import need

from lars_tree import LarsTreeError

torch = need("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lars_tree.torch import Lars  # noqa: E402

OPTIONS = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.1}


def made(steps=2, **options):
    """Parameters of several shapes, and their optimizer after some steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (3, 4), ()]
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    opt = Lars(params, **OPTIONS, **options)
    for _ in range(steps):
        opt.step()
    return params, opt


def values(x):
    return None if x is None else x.detach().resolve_neg().clone()


def by_new_optimizer(params, opt):
    """The parameters after a step of a new optimizer on copies."""
    copies = [torch.nn.Parameter(values(p)) for p in params]
    new = Lars(copies, **OPTIONS)
    for p, copied in zip(params, copies, strict=True):
        copied.grad = None if p.grad is None else values(p.grad.as_subclass(torch.Tensor))
        buffer = opt.state[p].get("momentum_buffer")
        if buffer is not None:
            new.state[copied]["momentum_buffer"] = values(buffer)
    new.step()
    buffers = [new.state[p].get("momentum_buffer") for p in copies]
    return [values(p) for p in copies], [values(x) for x in buffers]


def now(params, opt):
    buffers = [opt.state[p].get("momentum_buffer") for p in params]
    return [values(p) for p in params], [values(x) for x in buffers]


def equal(a, b):
    pairs = [(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


class Subclass(torch.Tensor):
    pass


def turned(x):
    """The same values in another order of the axes in memory."""
    return x.t().contiguous().t()


def in_the_middle(x):
    """The same values in a view that does not start at the beginning of its storage."""
    long = torch.zeros(x.numel() + 7, dtype=x.dtype)
    long[3 : 3 + x.numel()] = x.flatten()
    return long[3 : 3 + x.numel()].view(x.shape)


def replace_data(convert):
    def change(p, opt):
        p.data = convert(p.data)

    return change


def replace_grad(convert):
    def change(p, opt):
        p.grad = convert(p.grad)

    return change


def replace_buffer(convert):
    def change(p, opt):
        opt.state[p]["momentum_buffer"] = convert(opt.state[p]["momentum_buffer"])

    return change


def widen_all(p, opt):
    gradient = p.grad.double()
    p.grad = None
    p.data = p.data.double()
    p.grad = gradient
    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].double()


def shorten_all(p, opt):
    gradient = p.grad[:2].clone()
    p.grad = None
    p.data = p.data[:2].clone()
    p.grad = gradient
    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"][:2].clone()


def set_storage(p, opt):
    x = p.data.clone()
    with torch.no_grad():
        p.set_(x.untyped_storage(), 0, x.shape, x.stride())


def swap_memory(p, opt):
    """The parameter and its gradient exchange their memory."""
    p.data, p.grad.data = p.grad.data, p.data


def overlap_gradient(p, opt):
    x = torch.arange(15.0)
    p.data, p.grad.data = x[:12].view(3, 4), x[3:].view(3, 4)


def resize_twice(p, opt):
    """A freed storage is allocated again, perhaps at the same address."""
    x = p.grad.clone()
    p.grad.untyped_storage().resize_(0)
    p.grad.untyped_storage().resize_(x.nbytes)
    p.grad.copy_(x)


def become_non_leaf(p, opt):
    p.requires_grad_(False)
    p.add_(torch.ones((), requires_grad=True))


STEPS = {
    "nothing": lambda p, opt: None,
    "the gradient has other memory": replace_grad(torch.clone),
    "the gradient is in the middle of a storage": replace_grad(in_the_middle),
    "the gradient has another order of axes": replace_grad(turned),
    "the gradient is expanded": replace_grad(lambda x: x[:1].expand(3, 4)),
    "the gradient is strided": replace_grad(lambda x: torch.stack([x, x], -1)[..., 0]),
    "the gradient is negated lazily": replace_grad(torch._neg_view),
    "the gradient is of a subclass": replace_grad(lambda x: x.as_subclass(Subclass)),
    "the gradient is a parameter": replace_grad(torch.nn.Parameter),
    "the gradient is None": replace_grad(lambda x: None),
    "the gradient is the parameter": replace_grad(lambda x: x.zero_()),
    "the storage of the gradient was resized twice": resize_twice,
    "the data have other memory": replace_data(torch.clone),
    "the data are in the middle of a storage": replace_data(in_the_middle),
    "the data have another order of axes": replace_data(turned),
    "the data and the gradient have exchanged their memory": swap_memory,
    "the data and the gradient overlap": overlap_gradient,
    "set_": set_storage,
    "the data are of numpy": replace_data(lambda x: torch.from_numpy(x.numpy().copy())),
    "all are float64": widen_all,
    "all are shorter": shorten_all,
    "the buffer has other memory": replace_buffer(torch.clone),
    "the buffer is None": replace_buffer(lambda x: None),
    "requires_grad is off": lambda p, opt: p.requires_grad_(False),
    "the parameter is no leaf": become_non_leaf,
}


@pytest.mark.parametrize("name", STEPS)
def test_after_a_change_a_step_is_that_of_a_new_optimizer(name):
    params, opt = made()
    STEPS[name](params[0], opt)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        for _ in range(2):
            expected = by_new_optimizer(params, opt)
            opt.step()
            assert equal(now(params, opt), expected)


def tie(p, opt):
    p.data = opt.param_groups[0]["params"][2].data


def tie_partly(p, opt):
    p.data = opt.param_groups[0]["params"][2].data.view(-1)[:12].view(3, 4)


def buffer_in_a_parameter(p, opt):
    opt.state[p]["momentum_buffer"] = opt.param_groups[0]["params"][2].data


def free(x):
    x.untyped_storage().resize_(0)


def shrink(x):
    x.untyped_storage().resize_(x.nbytes - 4)


ERRORS = {
    "two parameters are tied": (tie, "share memory"),
    "two parameters overlap": (tie_partly, "share memory"),
    "a buffer is another parameter": (buffer_in_a_parameter, "shares memory"),
    "the parameter was freed": (lambda p, _: free(p.data), "freed"),
    "the gradient was freed": (lambda p, _: free(p.grad), "freed"),
    "the buffer was freed": (lambda p, opt: free(opt.state[p]["momentum_buffer"]), "freed"),
    "the parameter was shrunk": (lambda p, _: shrink(p.data), "freed"),
    "the gradient was shrunk": (lambda p, _: shrink(p.grad), "freed"),
    "the buffer was shrunk": (lambda p, opt: shrink(opt.state[p]["momentum_buffer"]), "freed"),
    "the data are float64": (replace_data(torch.Tensor.double), "momentum_buffer"),
    "the data have another shape": (replace_data(lambda x: x[:2].clone()), "shape"),
    "the data are negated lazily": (replace_data(torch._neg_view), "negated"),
    "the buffer has another shape": (replace_buffer(torch.flatten), "does not fit p"),
    "the buffer is sparse": (replace_buffer(torch.Tensor.to_sparse), "sparse"),
    "the gradient is sparse": (replace_grad(torch.Tensor.to_sparse), "sparse"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_after_a_change_a_step_raises_and_writes_nothing(name):
    change, says = ERRORS[name]
    params, opt = made()
    change(params[0], opt)
    others = params[1:]
    before = now(others, opt)
    for _ in range(2):
        with pytest.raises((LarsTreeError, RuntimeError), match=says):
            opt.step()
        assert equal(now(others, opt), before)


def test_data_become_read_only(tmp_path):
    """A write to a page that is mapped read-only would end the process."""
    params, opt = made()
    path = tmp_path / "w"
    path.write_bytes(params[0].detach().numpy().tobytes())
    mapped = np.memmap(path, np.float32, "r", shape=(3, 4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        params[0].data = torch.from_numpy(mapped)
    with pytest.raises(LarsTreeError, match="read-only"):
        opt.step()


def test_a_step_inside_of_a_dispatch_mode():
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    params, opt = made()
    expected = by_new_optimizer(params, opt)
    with Counting():
        opt.step()
    assert equal(now(params, opt), expected)


def test_a_step_inside_of_a_transform():
    params, opt = made()
    expected = by_new_optimizer(params, opt)

    def inside(x):
        opt.step()
        return x

    torch.func.vmap(inside)(torch.ones(2))
    assert equal(now(params, opt), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # from JAX, if already imported
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_takes_the_same_step():
    params, opt = made()
    expected = by_new_optimizer(params, opt)
    child = os.fork()
    if child == 0:
        opt.step()
        os._exit(0 if equal(now(params, opt), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    opt.step()
    assert equal(now(params, opt), expected)
