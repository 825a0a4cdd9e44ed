"""The foreach engine: bytes read and written, temporaries, host syncs, and what is written."""

from __future__ import annotations

import itertools
import weakref

import pytest
from conftest import need

torch = need("torch")

from foreach_steps import layer, normal, step, velocity_like  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from lars_tree._backends.torch import foreach  # noqa: E402
from lars_tree.torch import Lars  # noqa: E402

MIB = 2**20

# Operations that only describe memory, or only reserve it
FREE = ("view", "expand", "detach", "slice", "select", "as_strided", "split", "unbind", "empty")
FREE += ("alias", "unsqueeze", "permute", "is_non_overlapping", "prim")


class Recorder(TorchDispatchMode):
    """Count the bytes that operations read and write, and the bytes of temporaries alive.

    Small tensors are not counted. `known` are tensors that are no temporaries.
    """

    def __init__(self, known=()):
        super().__init__()
        self.bytes, self.alive, self.peak, self.names = 0, 0, 0, set()
        self.storages = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = str(function).removeprefix("aten.")
        self.names.add(name)
        if not name.startswith(FREE):
            in_place = name.split(".")[0].endswith("_")
            written = args[0] if in_place else result
            read = args[1:] if name.startswith(("copy_", "_foreach_copy_")) else args
            self.bytes += size_of(written) + size_of(read)
        for x in tree_leaves(result):
            self.hold(x)
        return result

    def hold(self, x):
        if not isinstance(x, torch.Tensor) or size_of(x) == 0:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.release, key)

    def release(self, key):
        self.alive -= self.storages.pop(key)


def size_of(xs):
    tensors = (x for x in tree_leaves(xs) if isinstance(x, torch.Tensor))
    return sum(x.nbytes for x in tensors if x.numel() > 100)


def recorded(
    shapes, dtype=torch.float32, has_velocity=True, unless=False, numbers=float, **options
):
    """A step on fake CUDA tensors, where reading a number raises an error."""
    with FakeTensorMode():
        empty = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        layers = []
        for w in empty:
            some = {name: numbers(x) for name, x in options.items() if type(x) is float}
            velocity = velocity_like(w) if has_velocity else None
            layers.append(layer(w, torch.empty_like(w), velocity, **(options | some)))
        known = [x for each in layers for x in each if isinstance(x, torch.Tensor)]
        flag = torch.zeros((), device="cuda") if unless else None
        with Recorder(known) as recorder:
            step(layers, flag)
        return recorder, sum(w.nbytes for w in empty)


USUAL = {"momentum": 0.9, "decay_lambda": 1e-4, "lr_after_momentum": 0.1, "eps": 1e-8}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 15),
        ({"trust_clip": True, "dampening": 0.5}, 15),
        ({"decay_lambda": 0.0}, 12),
        ({"adapt": False}, 13),
        ({"nesterov": True}, 20),
        ({"has_velocity": False}, 12),
        ({"unless": True}, 25),
        ({"dtype": torch.bfloat16}, 37),
        ({"dtype": torch.float64}, 23),
        ({"joint_norm": True}, 39),
    ],
    ids=str,
)
def test_bytes_per_byte_of_parameters(options, expected):
    recorder, parameters = recorded([(200, 200)] * 20, **(USUAL | options))
    assert recorder.bytes / parameters == pytest.approx(expected, abs=0.1)


OPTIONS = [
    {},
    {"nesterov": True, "unless": True},
    {"joint_norm": True, "unless": True},
    {"dtype": torch.bfloat16, "unless": True},
    {"dtype": torch.float64},
    {"dtype": torch.float64, "joint_norm": True, "unless": True},
]


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_temporaries_of_one_large_tensor(options):
    recorder, parameters = recorded([(75_000, 1000)], **(USUAL | options))
    assert parameters == 300e6
    assert recorder.peak <= 33 * MIB  # `_foreach_norm` may need as much again


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shapes", [[(60, 60)] * 100, [(1000, 400)], [400_000]], ids=["small", "large", "row"]
)
def test_temporaries_are_bounded(shapes, options, monkeypatch):
    monkeypatch.setattr(foreach, "LIMIT", MIB // 2)
    recorder, parameters = recorded(shapes, **(USUAL | options))
    assert recorder.peak <= 0.55 * MIB < parameters


def test_a_model_needs_temporaries_of_its_size_at_most():
    recorder, parameters = recorded([(200, 200)] * 20, **USUAL)
    assert recorder.peak <= 1.01 * parameters


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_host_does_not_wait_for_the_device(options):
    """Fake tensors have no numbers to wait for."""

    def on_device(number):
        return torch.full((), number, dtype=torch.float32, device="cuda")

    for numbers in (float, on_device):
        recorder, _ = recorded([(20, 20), (30,), ()], numbers=numbers, **(USUAL | options))
        assert not any("local_scalar" in name for name in recorder.names)
    with FakeTensorMode(), pytest.raises(RuntimeError):
        on_device(1.0).item()


class OutOfMemoryError(Exception):
    pass


class Failing(TorchDispatchMode):
    """Raise an error at an allocation, after some others.

    Quotients find the memory of earlier quotients, which were larger and are no longer alive.
    """

    def __init__(self, before):
        super().__init__()
        self.before = before
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        returns = function._schema.returns
        allocates = returns and all(each.alias_info is None for each in returns)
        if name.startswith("_foreach_div."):
            size = sum(x.nbytes for x in args[0])
            allocates = size > self.largest
            self.largest = max(size, self.largest)
        if allocates and not name.startswith("is_non_overlapping"):
            if not self.before:
                raise OutOfMemoryError(name)
            self.before -= 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_written_if_memory_runs_out(options, monkeypatch):
    monkeypatch.setattr(foreach, "LIMIT", 16384)
    options = USUAL | options
    dtype, unless = options.pop("dtype", torch.float32), options.pop("unless", False)
    given = [[normal(n, 30, dtype=dtype, seed=k) for k in range(2)] for n in (1, 7, 20)]
    layers = [layer(*xs, velocity_like(xs[0]), **options) for xs in given]
    layers += [layer(*(x.double() for x in given[0]), velocity_like(given[0][0].double()))]
    old = [x.clone() for each in layers for x in (each.w, each.velocity)]
    flag = torch.tensor(0.0) if unless else None
    for before in itertools.count(step=3):
        try:
            with Failing(before):
                step(layers, flag)
            break
        except OutOfMemoryError:
            new = [x for each in layers for x in (each.w, each.velocity)]
            assert all(map(torch.equal, old, new))
    assert before > 20
    new = [x for each in layers for x in (each.w, each.velocity)]
    assert not any(map(torch.equal, old, new))


def test_layers_that_do_not_adapt_are_not_read_for_norms():
    read = Recorder()
    given = [layer(normal(200), normal(200, seed=1), adapt=False), layer(normal(0), normal(0))]
    with read:
        norms = foreach.Foreach(given).norms()
    assert norms[1].tolist() == [[0, 1], [0, 1]]
    assert read.bytes == 0
    assert foreach.Foreach([]).norms().shape == (0, 2, 2)
    foreach.Foreach([]).write(torch.zeros(0, 2, 2), None)


def test_parameters_and_inference_tensors():
    expected = normal(5)
    step([layer(expected, normal(5, seed=1))])
    parameter = torch.nn.Parameter(normal(5))
    version = parameter._version
    step([layer(parameter, normal(5, seed=1))])
    assert torch.equal(parameter, expected)
    assert parameter._version > version
    with torch.inference_mode():
        w = normal(5)
    step([layer(w, normal(5, seed=1))])
    assert torch.equal(w, expected)


@pytest.mark.parametrize("has_velocity", [False, True])
def test_the_result_may_be_another_tensor(has_velocity):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        w, g, out = (normal(5, dtype=dtype, seed=k) for k in range(3))
        velocities = [velocity_like(w) if has_velocity else None for _ in range(2)]
        old = w.clone()
        step([layer(w, g, velocities[0], out=out, decay_lambda=0.1)])
        assert torch.equal(w, old)
        step([layer(w, g, velocities[1], decay_lambda=0.1)])
        assert torch.equal(w, out)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"nonfinite": "skip"}])
def test_a_step_keeps_no_tensors_alive(options):
    p = torch.nn.Parameter(normal(4, 3))
    opt = Lars([p], lr=0.1, foreach=True, **options)
    for seed in range(3):
        p.grad = normal(4, 3, seed=seed)
        gradient = weakref.ref(p.grad)
        opt.step()
        opt.zero_grad()
        assert gradient() is None
    buffer = weakref.ref(opt.state[p].get("momentum_buffer", p.detach()))
    opt.state.clear()
    assert buffer() is None


def test_large_numbers_are_finite_although_their_sum_is_not():
    w, velocity = torch.tensor([1.2e308], dtype=torch.float64).expand(2, 1).clone()
    options = {"momentum": 1.0, "lr_after_momentum": 0.1, "nonfinite": "skip"}
    engine = foreach.Foreach([layer(w, torch.zeros_like(w), velocity, **options)])
    assert engine.nonfinite(engine.norms()).tolist() == [False]
    velocity.fill_(torch.nan)
    assert engine.nonfinite(engine.norms()).tolist() == [True]
