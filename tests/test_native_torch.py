"""Which torch tensors the native kernel supports, and the properties of the results."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import need
from test_native import by_kernel, run, watched, without_kernel

from lars_tree import LarsTreeError, lars_update

torch = need("torch")
exchange = need("lars_tree._backends.torch.reader")._EXCHANGE
pytestmark = pytest.mark.skipif(exchange is None, reason="torch has no C functions for DLPack")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.manual_seed(sum(shape))).to(dtype)


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a, b) and type(a) is type(b)


@pytest.mark.parametrize(("w_dtype", "g_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (300, 3), (4, 3, 2)])
def test_tensors_get_the_same_bits_as_from_the_twin(shape, w_dtype, g_dtype):
    w, g = random(*shape, dtype=w_dtype), random(*shape, dtype=g_dtype)
    expected = without_kernel(w, g, 0.1, decay_lambda=0.1)
    assert equal(by_kernel(w, g, 0.1, decay_lambda=0.1), expected)
    turned = [x.permute(tuple(range(x.ndim))[::-1]) for x in (w, g)]
    new = by_kernel(*turned, 0.1, decay_lambda=0.1)
    assert new.stride() == turned[0].stride()
    assert equal(new.permute(tuple(range(w.ndim))[::-1]), expected)
    out = torch.empty_like(w)
    assert by_kernel(w, g, 0.1, decay_lambda=0.1, out=out) is out
    assert equal(out, expected)
    assert by_kernel(w, g, 0.1, decay_lambda=0.1, out=w) is w
    assert equal(w, expected)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("make", [torch.Tensor.requires_grad_, torch.nn.Parameter])
def test_a_result_requires_a_gradient_where_the_weights_do(make, requires_grad):
    w, g = make(random(5), requires_grad), random(5)
    new = by_kernel(w, g, 0.1)
    assert equal(new, without_kernel(w, g, 0.1))
    assert (new.requires_grad, new.is_leaf, new.grad_fn) == (requires_grad, True, None)
    assert by_kernel(w, g, 0.1, out=w) is w
    assert w.requires_grad is requires_grad
    assert w.is_leaf
    assert equal(w, new)


def test_the_result_for_a_non_leaf_is_a_leaf():
    w = random(5).requires_grad_() * 2
    new = by_kernel(w, random(5), 0.1)
    assert new.is_leaf
    assert new.requires_grad


def test_versions_count_the_writes():
    w = {"a": random(5), "b": random(4), "none": random(3)}
    g = {"a": random(5), "b": random(4), "none": None}

    def versions():
        return [x._version for x in (*w.values(), g["a"], g["b"])]

    with watched() as took:
        lars_update(w, g, 0.1, out=w)
    assert took == [True]
    assert versions() == [1, 1, 0, 0, 0]
    out = {"a": g["a"], "b": torch.empty(4), "none": w["none"]}
    by_kernel(w, g, 0.1, out=out)
    assert versions() == [1, 1, 0, 1, 0]
    assert out["b"]._version == 1
    with pytest.raises(LarsTreeError):
        lars_update(w, g | {"b": torch.ones(7)}, 0.1, out=w)
    assert versions() == [1, 1, 0, 1, 0]
    x = random(5).requires_grad_()
    loss = (x * x).sum()
    by_kernel(x, random(5), 0.1, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_versions_also_count_the_writes_to_unsupported_tensors():
    x = random(6)
    w, g = [random(5), x[::2], random(4) * 1j], [random(5), random(3), random(4) + 1j]
    expected = without_kernel([y.clone() for y in w], g, 0.1)
    lars_update(w, g, 0.1, out=w)
    assert [y._version for y in (w[0], x, w[2])] == [1, 1, 1]
    assert all(map(equal, w, expected))


def test_inference_tensors():
    with torch.inference_mode():
        w = random(5)
        inside = by_kernel(w, random(5), 0.1)
    assert inside.is_inference()
    expected = without_kernel(w, random(5), 0.1)
    assert torch.equal(inside, expected)
    assert torch.equal(by_kernel(w, random(5), 0.1), expected)
    assert torch.equal(by_kernel(w, random(5), 0.1, out=w), expected)


def cut(x, size):
    x.untyped_storage().resize_(size)
    return x


# (w, dcdw, out) that the general path refuses
REFUSED = {
    "freed w": lambda: (cut(random(3), 0), random(3), None),
    "freed dcdw": lambda: (random(3), cut(random(3), 0), None),
    "freed out": lambda: (random(3), random(3), cut(random(3), 0)),
    "freed in place": lambda: ((x := cut(random(3), 0)), random(3), x),
    "cut short": lambda: (random(3), cut(random(3), 8), None),
    "cut short to its length": lambda: (random(2), cut(random(3)[1:], 8), None),
    "cut short and transposed": lambda: (random(2, 2), cut(random(2, 3)[:, 1:].T, 16), None),
    "negative view as out": lambda: (random(3), random(3), torch._neg_view(random(3))),
    "conjugate's part as out": lambda: (
        random(3),
        random(3),
        torch.randn(3, dtype=torch.complex64).conj().imag,
    ),
    "meta": lambda: (random(3), torch.empty(3, device="meta"), None),
    "meta w": lambda: (torch.empty(3, device="meta"), random(3), None),
    "sparse": lambda: (random(3), random(3).to_sparse(), None),
    "sparse w": lambda: (random(3).to_sparse(), random(3), None),
    "sparse out": lambda: (random(3), random(3), random(3).to_sparse()),
    "integers": lambda: (random(3), torch.ones(3, dtype=torch.int32), None),
    "float8": lambda: (random(3), random(3).to(torch.float8_e4m3fn), None),
    "expanded out": lambda: (random(3), random(3), torch.zeros(1).expand(3)),
    "tied weights": lambda: ([(x := random(3)), x], [random(3), random(3)], [x, x]),
    "freed, no gradient": lambda: (
        (w := [random(3), cut(random(3), 0)]),
        [random(3), None],
        w,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_kernel_does_not_update_leaves_that_are_refused(case):
    messages = []
    for update in (lars_update, without_kernel):
        w, g, out = REFUSED[case]()
        with pytest.raises(LarsTreeError) as caught:
            update(w, g, 0.1, out=out)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# (w, dcdw) that only the general path supports
OTHERS = {
    "negative view": lambda: (torch._neg_view(random(3)), random(3)),
    "negative gradient": lambda: (random(3), torch._neg_view(random(3))),
    "conjugate's part": lambda: (random(3), (random(3) * (1 + 2j)).conj().imag),
    "complex": lambda: (random(3) * (1 + 2j), random(3) * 1j),
    "strided": lambda: (random(6)[::2], random(3)),
    "other order": lambda: (random(3, 2), random(2, 3).T),
    "expanded": lambda: (random(3), torch.ones(1).expand(3)),
    "broadcast": lambda: (random(2, 3), random(3)),
    "misaligned": lambda: (
        random(3),
        torch.frombuffer(bytearray(range(13)), dtype=torch.float32, offset=1),
    ),
    "a number": lambda: (random(3), 2.0),
}


@pytest.mark.parametrize("case", OTHERS)
def test_unsupported_leaves_get_the_same_bits(case):
    w, g = OTHERS[case]()
    with watched() as took:
        new = lars_update(w, g, 0.1)
    assert took[-1] is False  # the last plan that steps was offered all leaves
    assert equal(new, without_kernel(w, g, 0.1))


@pytest.mark.parametrize(
    "tensor", ["torch._efficientzerotensor(3)", "torch._to_functional_tensor(torch.ones(3))"]
)
def test_tensors_without_memory_do_not_end_the_process(tensor):
    code = f"""if 1:
        import torch, lars_tree
        x, one = {tensor}, torch.ones(3)
        for w, dcdw, out in [(x, one, None), (one, x, None), (one, one, x), (x, one, x)]:
            try:
                lars_tree.lars_update(w, dcdw, 0.1, out=out)
            except Exception:
                pass
            print("alive")"""
    assert run(code) == ["alive"] * 4


def test_read_only_memory_is_refused_as_out(tmp_path):
    file = tmp_path / "weights"
    np.ones(3000, np.float32).tofile(file)
    code = f"""if 1:
        import numpy as np, torch, lars_tree
        mapped = np.memmap({str(file)!r}, np.float32, mode="r")
        for offset in (0, 1, 1500):
            w = torch.from_numpy(mapped)[offset:]
            print((lars_tree.lars_update(w, w, 0.5) == 0.5).all().item())
            for from_ in (w, torch.ones_like(w)):
                try:
                    lars_tree.lars_update(from_, w, 0.5, out=w)
                except lars_tree.OutError:
                    print("refused")
        private = torch.from_numpy(np.memmap({str(file)!r}, np.float32, mode="c"))
        lars_tree.lars_update(private, private, 0.5, out=private)
        print((private == 0.5).all().item())"""
    assert run(code) == [*["True", "refused", "refused"] * 3, "True"]
    assert (np.fromfile(file, np.float32) == 1).all()


def test_torch_func_and_tracing_get_the_operations():
    def step(w, g):
        return lars_update({"a": w}, {"a": g}, 0.1)["a"]

    w, g = random(2, 3), random(2, 3) + 1
    expected = torch.stack([step(x, y) for x, y in zip(w, g, strict=True)])
    assert torch.allclose(torch.func.vmap(step)(w, g), expected)
    slopes = torch.func.grad(lambda w: lars_update(w, g, 0.1, stop_gradients=False).square().sum())(
        w
    )
    assert slopes.abs().sum() > 0
    zero = torch.func.grad(lambda w: step(w, g).sum())(w)
    assert torch.equal(zero, torch.zeros_like(w))
    traced = need("torch.fx.experimental.proxy_tensor").make_fx(step)(w, g)
    assert torch.allclose(traced(2 * w, g + 1), step(2 * w, g + 1))


@pytest.mark.filterwarnings("ignore:.*TorchScript:DeprecationWarning")
def test_a_compiled_step_is_the_step():
    def step(w, g):
        return lars_update({"a": 2 * w}, {"a": g + 1}, 0.1)["a"]

    w, g = random(2, 3), random(2, 3)
    assert torch.allclose(torch.compile(step, backend="eager")(w, g), step(w, g))
