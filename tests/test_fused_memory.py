"""The fused engine writes the elements of its tensors and nothing else, in any memory layout."""

from __future__ import annotations

import pytest
from conftest import need, need_triton

import lars_tree

torch = need("torch")
need_triton()

from test_fused import DEVICE, engine_of, write  # noqa: E402
from test_torch_optimizer import same  # noqa: E402

from lars_tree._backends.torch import kernels  # noqa: E402
from lars_tree._backends.torch.fused import row_of  # noqa: E402
from lars_tree._backends.torch.layers import Layer  # noqa: E402
from lars_tree._numerics.formula import Rule  # noqa: E402
from lars_tree.torch import Lars  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreter")

GUARD = 12  # elements before and after each tensor


def random(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def guarded(generator, shape, view, dtype=torch.float32, offset=0):
    """A view of random numbers in a larger tensor: that tensor, a mask of the others, the view.

    `offset` is counted in elements.
    """
    size = torch.Size(shape).numel()
    whole = random(generator, size + 2 * GUARD, dtype=dtype)
    others = torch.ones_like(whole, dtype=torch.bool)
    start = GUARD + offset
    views = [view(x[start : start + size].view(shape)) for x in (whole, others)]
    views[1].fill_(False)
    return whole, others, views[0]


def expected(w, dcdw, rule, velocity):
    """The results of the native engine, from contiguous copies in CPU memory."""
    w, dcdw = (x.detach().cpu().contiguous() for x in (w, dcdw))
    opt = lars_tree.Lars(
        rule.lr_before_momentum,
        rule.momentum,
        weight_decay=rule.decay_lambda,
        trust_coefficient=1.0,
        eps=0.0,
    )
    state = opt.init(w)
    state.velocity.copy_(velocity.cpu())
    w, state = opt.update(w, dcdw, state)
    return w, state.velocity


def check(shape, view=lambda x: x, dtype=torch.float32, offset=0):
    generator = torch.Generator().manual_seed(0)
    kept = torch.float32 if dtype.itemsize == 2 else dtype
    dtypes = (dtype, dtype, dtype, kept)
    tensors = [guarded(generator, shape, view, each, offset) for each in dtypes]
    w, dcdw, out, velocity = (x for *_, x in tensors)
    before = [whole.clone() for whole, *_ in tensors]
    rule = Rule(0.1, decay_lambda=0.01, momentum=0.9)
    new_w, new_velocity = expected(w, dcdw, rule, velocity)
    write([Layer(w, dcdw, out, velocity, rule)])
    assert torch.equal(out.cpu(), new_w)
    assert torch.equal(velocity.cpu(), new_velocity)
    for i, (whole, others, _) in enumerate(tensors):
        untouched = torch.ones_like(others) if i < 2 else others
        assert torch.equal(whole[untouched], before[i][untouched])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 40])
def test_sizes_near_the_ends_of_blocks_and_chunks(size, dtype):
    check((size,), dtype=getattr(torch, dtype))


@pytest.mark.parametrize("extra", [-1, 0, 3])
def test_a_size_near_the_end_of_a_real_chunk(extra):
    assert int(kernels.CHUNK) == 8192
    check((int(kernels.CHUNK) + extra,))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_addresses_of_any_alignment(offset, dtype):
    dtype = getattr(torch, dtype)
    check((37,), dtype=dtype, offset=offset)
    x = torch.ones(64, dtype=dtype, device=DEVICE)
    y = x[offset : offset + 37]
    for layer in (Layer(y, x[:37], x[:37], None, Rule(1.0)), Layer(x[:37], y, y, y, Rule(1.0))):
        assert row_of(layer).layout.is_aligned is (offset * dtype.itemsize % 16 == 0)


VIEWS = {
    "a number": ((), lambda x: x),
    "empty": ((0, 3), lambda x: x),
    "transposed": ((5, 7), lambda x: x.t()),
    "channels last": ((2, 4, 5, 3), lambda x: x.permute(0, 3, 1, 2)),
    "every second row": ((6, 7), lambda x: x[::2]),
    "every second column": ((5, 8), lambda x: x[:, ::2]),
    "every second number": ((31,), lambda x: x[::2]),
    "some columns": ((5, 9), lambda x: x[:, 2:7]),
    "some columns, transposed": ((5, 9), lambda x: x[:, 2:7].t()),
    "one column": ((9, 5), lambda x: x[:, 3]),
    "a part of a middle axis": ((3, 7, 4), lambda x: x[:, 1:6]),
    "one index of the last axis": ((3, 7, 4), lambda x: x[:, :, 1]),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", VIEWS)
def test_strided_tensors(name):
    check(*VIEWS[name])


@pytest.mark.parametrize(
    ("view", "is_supported"),
    [
        (lambda x: x[:, 1:3, 1:3], False),
        (lambda x: x[::2, ::2], False),
        (lambda x: x[:1].expand(4, 5, 6), False),
        (lambda x: x[1], True),
    ],
)
def test_other_strides_are_left_to_another_engine(view, is_supported):
    x = view(torch.ones(4, 5, 6, device=DEVICE))
    assert (row_of(Layer(x, x, x, None, Rule(1.0))) is not None) is is_supported


def test_tensors_of_one_layer_must_have_the_same_strides():
    x = torch.ones(4, 6, device=DEVICE)
    other = torch.ones(6, 4, device=DEVICE).t()
    assert row_of(Layer(x, other, x, None, Rule(1.0))) is None
    assert row_of(Layer(x, x, x, other, Rule(1.0))) is None
    assert row_of(Layer(x, x, other, None, Rule(1.0))) is None
    assert row_of(Layer(x.int(), x, x, None, Rule(1.0))) is None
    assert row_of(Layer(other, other, other, other, Rule(1.0))) is not None


def compare(params, grads, steps=2, **options):
    """Compare the fused and the native engine after some steps, to the last bit."""
    results = []
    for fused in (True, None):
        device = DEVICE if fused else torch.device("cpu")
        ours = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]
        for p, g in zip(ours, grads, strict=True):
            p.grad = g.to(device)
        opt = Lars(ours, 0.5, weight_decay=0.01, trust_coefficient=0.1, fused=fused, **options)
        assert opt.engine == ("fused" if fused else "native")
        for _ in range(steps):
            opt.step()
        buffers = [opt.state[p]["momentum_buffer"].cpu() for p in ours]
        results.append([*(p.detach().cpu() for p in ours), *buffers])
    assert same(*results)
    return results[0]


@pytest.mark.usefixtures("small_chunks")
def test_many_small_tensors_of_all_formats():
    generator = torch.Generator().manual_seed(0)
    dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float32
    params, grads = (
        [random(generator, 1 + i % 5, dtype=dtypes[i // 3 % 4]) for i in range(200)]
        for _ in range(2)
    )
    params[7].zero_()
    compare(params, grads, steps=1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_a_layer_axis(axis, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = 3, 4, 5
    w, g = (random(generator, *shape, 2) for _ in range(2))
    w, g = (torch.view_as_complex(x) if dtype == "complex64" else x[..., 0] for x in (w, g))
    w, g = w.contiguous(), g.contiguous()
    new, _ = compare([w], [g], layer_axis=axis)
    whole, _ = compare([w], [g])
    assert not torch.allclose(new, whole, rtol=1e-3)


@pytest.mark.usefixtures("small_chunks")
def test_complex_tensors():
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.view_as_complex(random(generator, 3, 7, 2)) for _ in range(2))
    compare([w, w.t()], [g, g.t()])


@pytest.mark.usefixtures("small_chunks")
def test_the_old_values_are_kept_if_the_device_says_so():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        w, g, out = (random(generator, 21, dtype=dtype) for _ in range(3))
        kept = torch.float32 if dtype.itemsize == 2 else dtype
        velocity = random(generator, 21, dtype=kept)
        g[3] = torch.nan
        before = velocity.clone()
        layer = Layer(w, g, out, velocity, Rule(0.1, momentum=0.9))
        for flag in (1.0, torch.nan, torch.inf):
            out.fill_(7)
            write([layer], torch.tensor(flag, device=DEVICE))
            assert torch.equal(out, w)
            assert torch.equal(velocity, before)
        write([layer], torch.tensor(0.0, device=DEVICE))
        assert out.isnan().all()


@pytest.mark.usefixtures("small_chunks")
def test_only_guarded_layers_that_are_not_finite_are_found():
    """A large velocity makes weights of half precision overflow; nothing is written."""
    x = torch.ones(40, dtype=torch.float16, device=DEVICE)
    spoiled, large = x.clone(), torch.full_like(x, 30_000, dtype=torch.float32)
    spoiled[-1] = torch.inf
    skip = Rule(1.0, nonfinite="skip", momentum=1.0)
    layers = [
        Layer(x, x, x, x.float(), skip),
        Layer(x, spoiled, x, x.float(), skip),
        Layer(x, spoiled, x, x.float(), skip._replace(nonfinite="propagate")),
        Layer(x, x, x, 3 * large, skip._replace(nonfinite="raise")),
        Layer(x.float(), x, x.float(), 3 * large, skip),
        Layer(x.bfloat16(), spoiled, x.bfloat16(), None, skip),
    ]
    engine = engine_of(layers)
    found = engine.nonfinite(engine.norms())
    assert found.tolist() == [False, True, False, True, False, True]
    assert all((layer.out == 1).all() for layer in layers)
