"""Updates of torch tensors: parameters, autograd, torch.func, multi-tensor operations, versions."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import reference
from conftest import need, to_numpy

from lars_tree import Container, Lars, OutError, lars_update

torch = need("torch")

from lars_tree._backends.base import Leaf, StepResult  # noqa: E402
from lars_tree._backends.torch import multi_tensor, tensors  # noqa: E402
from lars_tree._numerics.formula import Rule  # noqa: E402

DOUBLE = {"dtype": torch.float64}


def doubles(*values, grad=True):
    return [torch.tensor(value, requires_grad=grad, **DOUBLE) for value in values]


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "parameter", "result"])
def test_the_result_is_a_leaf_and_requires_grad_like_w(kind, requires_grad):
    w = torch.ones(3, requires_grad=requires_grad)
    if kind == "parameter":
        w = torch.nn.Parameter(w.detach(), requires_grad=requires_grad)
    elif kind == "result":
        w = w * 1
    new = lars_update(w, torch.ones(3), 0.1)
    assert new.is_leaf
    assert new.grad_fn is None
    assert new.requires_grad == w.requires_grad
    assert isinstance(new, torch.nn.Parameter) == (kind == "parameter")
    kept = lars_update(w, None, 0.1)
    assert (kept.is_leaf, kept.requires_grad) == (True, w.requires_grad)
    assert kept.data_ptr() != w.data_ptr()


@pytest.mark.parametrize("options", [{}, {"trust_clip": True}, {"adapt": False}, {"eps": 0.1}])
def test_the_step_is_differentiable(options):
    w, g, lr, decay = doubles([[3.0, 4.0], [-1.0, 2.0]], [[0.4, 0.3], [0.5, -2.0]], 0.1, 0.2)

    def step(w, g, lr, decay):
        return lars_update(w, g, lr, decay_lambda=decay, stop_gradients=False, **options)

    assert torch.autograd.gradcheck(step, (w, g, lr, decay))
    if not options:
        assert torch.autograd.gradgradcheck(step, (w, g, lr, decay))


def test_the_step_of_stacked_layers_is_differentiable():
    w, g, lr = doubles([[3.0, 4.0], [-1.0, 2.0]], [[0.4, 0.3], [0.5, -2.0]], [0.1, 0.2])
    step = lambda w, g, lr: lars_update(w, g, lr, stop_gradients=False, layer_axis=1)  # noqa: E731
    assert torch.autograd.gradcheck(step, (w, g, lr))


def test_complex_steps_are_differentiable():
    w, g = (torch.tensor(x, dtype=torch.complex128, requires_grad=True) for x in ([1 + 2j], [2j]))
    assert torch.autograd.gradcheck(
        lambda w, g: lars_update(w, g, 0.1, decay_lambda=0.1, stop_gradients=False), (w, g)
    )


@pytest.mark.parametrize("zero", ["w", "g", "both"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_gradients_are_finite_at_zero(zero, decay):
    w, g, lr, beta = doubles([0.0, 0.0], [0.3, 0.4], 0.1, decay)
    if zero == "g":
        w, g = doubles([0.3, 0.4], [0.0, 0.0])
    elif zero == "both":
        w, g = doubles([0.0, 0.0], [0.0, 0.0])
    lars_update(w, g, lr, decay_lambda=beta, stop_gradients=False).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (w, g, lr, beta))
    if zero == "w":
        assert g.grad.tolist() == [-0.1, -0.1]  # the ratio is 1, as in SGD
        assert w.grad.tolist() == pytest.approx([1 - 0.1 * decay] * 2)


def test_stop_gradients_gives_no_graph_even_for_a_tracked_rate():
    w, g, lr = doubles([3.0, 4.0], [0.4, 0.3], 0.1)
    new = lars_update(w, g, lr)
    assert new.grad_fn is None
    both = lars_update({"a": w, "b": w}, g, lr, stop_gradients={"a": True, "b": False})
    assert both["a"].grad_fn is None
    assert both["b"].grad_fn is not None
    assert both["a"].tolist() == both["b"].tolist() == pytest.approx([2.6, 3.7])


def test_forward_mode_and_torch_func():
    w, g = doubles([3.0, 4.0], [0.4, 0.3], grad=False)
    step = lambda w, g: lars_update(w, g, 0.1, stop_gradients=False)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(lambda w: step(w, g), w)
    assert torch.allclose(torch.func.jacrev(step)(w, g), jacobian)
    assert torch.allclose(torch.func.jacfwd(step)(w, g), jacobian)
    batched = torch.func.vmap(step)(torch.stack([w, 2 * w]), torch.stack([g, g]))
    assert torch.allclose(batched, torch.stack([step(w, g), step(2 * w, g)]))
    stopped = torch.func.grad(lambda w: (w * lars_update(w, g, 0.1)).sum())(w)
    assert torch.allclose(stopped, lars_update(w, g, 0.1))


def test_in_place_is_seen_by_autograd():
    w = torch.ones(3, requires_grad=True)
    loss = (w**2).sum()  # autograd saves w
    version = w._version
    assert lars_update(w, torch.ones(3), 0.1, out=w) is w
    assert w._version > version
    assert w.is_leaf
    assert w.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("guard", ["propagate", "skip", "raise"])
def test_every_way_to_write_bumps_the_version(guard):
    w, version = torch.ones(3), torch.ones(3)._version
    lars_update({"w": w}, {"w": torch.ones(3)}, 0.1, out={"w": w}, nonfinite=guard)
    assert w._version > version
    assert w.tolist() == pytest.approx([0.9] * 3)


def test_a_step_that_is_refused_bumps_no_version():
    w = torch.ones(4)
    opt = Lars(0.1)
    state = opt.init([w, w])
    written = [w, state["step"], state["skipped"], *state["velocity"]]
    versions = [x._version for x in written]
    with pytest.raises(OutError, match="share memory"):
        opt.update([w, w], [w, w], state, out=[w, w])
    assert [x._version for x in written] == versions


def test_nonfinite_may_be_a_numpy_string():
    w = torch.ones(2, 3).t()  # not supported by the native engine with this gradient
    new = lars_update(w, torch.full((3, 2), torch.inf), 0.1, nonfinite=np.str_("skip"))
    assert torch.equal(new, w)


def test_inference_tensors_are_updated():
    with torch.inference_mode():
        w = torch.ones(3)
        lars_update(w, torch.ones(3), 0.1, out=w)
    assert lars_update(w, torch.ones(3), 0.0).tolist() == w.tolist() == pytest.approx([0.9] * 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_gives_the_bits_of_numpy(dtype):
    name = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=(50, 40)).astype(name) for _ in range(2))
    ours = [torch.tensor(x.astype(np.float64)).to(getattr(torch, dtype)) for x in (w, g)]
    expected = lars_update(w, g, 0.1, decay_lambda=1e-3)
    new = lars_update(*ours, 0.1, decay_lambda=1e-3)
    assert new.dtype == getattr(torch, dtype)
    assert np.array_equal(new.double().numpy(), expected.astype(np.float64))


def test_views_of_all_kinds():
    base = torch.arange(24.0).reshape(4, 6)
    for view in (base.t(), base[::2, 1::2], base[1], base[2, 3], base[:0], base.expand(2, 4, 6)):
        new = lars_update(view, torch.ones_like(view), 0.1)
        expected = lars_update(view.clone().numpy(), np.ones(view.shape, np.float32), 0.1)
        np.testing.assert_allclose(new.numpy(), expected, rtol=1e-6)
    z = torch.tensor([1 + 2j, 3 - 1j])
    new = lars_update(z.conj(), torch.ones(2, dtype=z.dtype), 0.1)
    assert torch.allclose(new, lars_update(z.conj().resolve_conj(), torch.ones_like(z), 0.1))


def test_a_state_dict_is_updated_in_place():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model(torch.ones(5, 3)).square().sum().backward()
    w = dict(model.named_parameters())
    before = {key: x.detach().clone() for key, x in w.items()}
    grads = {key: x.grad.clone() for key, x in w.items()}
    lars_update(w, {key: x.grad for key, x in w.items()}, 0.1, out=w)
    for key, x in model.named_parameters():
        assert torch.equal(x.grad, grads[key])
        assert torch.equal(x.detach(), lars_update(before[key], grads[key], 0.1))


def many(leaves, rules, velocities=None, has_float64=False):
    """The new weights, by the multi-tensor operations for an accelerator without float64."""
    velocities = velocities or [None] * len(leaves)
    news = [
        StepResult(torch.empty_like(w), v) for (w, _), v in zip(leaves, velocities, strict=True)
    ]
    rows = zip(leaves, news, rules, velocities, strict=True)
    pairs = [
        (Leaf(i, w, g, w, rule, None, v), new) for i, ((w, g), new, rule, v) in enumerate(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "has_float64", lambda device: has_float64)
        multi_tensor.prepare(pairs).write()
    return [new.w for new in news]


@pytest.mark.parametrize("options", [{}, {"decay_lambda": 0.1}, {"eps": 1e-3}, {"grad_scale": 8.0}])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_multi_tensor_steps_agree_with_separate_steps(options, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (5,), (0, 2), (2, 3, 2)]
    leaves = [
        tuple(
            torch.randn(shape, generator=generator, dtype=torch.complex64).to(getattr(torch, dtype))
            if dtype == "complex64"
            else torch.randn(shape, generator=generator).to(getattr(torch, dtype))
            for _ in range(2)
        )
        for shape in shapes
    ]
    leaves.append((torch.zeros_like(leaves[0][0]), leaves[0][1]))
    rules = [Rule(0.1 * (i + 1), **options) for i in range(len(leaves))]
    rules[4] = rules[4]._replace(layer_axis=1)
    news = many(leaves, rules)
    for new, (w, g), rule in zip(news, leaves, rules, strict=True):
        expected = lars_update(w, g, rule.lr_before_momentum, layer_axis=rule.layer_axis, **options)
        assert new.dtype == expected.dtype
        tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 3e-7)
        assert torch.allclose(new, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_multi_tensor_momentum_agrees_with_double_precision(dtype, nesterov):
    """The reference values are from the same operations in double precision."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    shapes = [(3, 4), (), (5,), (0, 2), (2, 3, 2)]
    leaves = [
        tuple(torch.randn(s, generator=generator, dtype=dtype) for _ in range(2)) for s in shapes
    ]
    wide = {torch.complex64: torch.complex64}.get(dtype, torch.float32)
    velocities = [torch.randn(s, generator=generator, dtype=wide) for s in shapes]
    rule = Rule(
        1.0, decay_lambda=0.1, momentum=0.9, lr_after_momentum=0.1, nesterov=nesterov, maximize=True
    )
    rules = [rule, rule, rule._replace(momentum=0.5), rule, rule._replace(layer_axis=1)]
    double = [
        (*(x.to(torch.promote_types(x.dtype, torch.float64)) for x in (*leaf, v)), each)
        for leaf, v, each in zip(leaves, velocities, rules, strict=True)
    ]
    news = many(leaves, rules, velocities)
    precise = [v for *_, v, _ in double]
    expected = many([leaf[:2] for leaf in double], rules, precise, has_float64=True)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-6)
    for new, other, v, other_v in zip(news, expected, velocities, precise, strict=True):
        assert torch.allclose(new, other.to(dtype), rtol=tolerance, atol=tolerance)
        assert torch.allclose(v, other_v.to(v.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("w_exponent", [-140, -60, 0, 60, 125])
@pytest.mark.parametrize("g_exponent", [-140, -60, 0, 60, 125])
def test_multi_tensor_steps_cover_the_range_of_float32(w_exponent, g_exponent):
    """In float32, squares of numbers above 2**64 overflow, and below 2**-75 underflow to 0."""
    w = torch.tensor(np.ldexp([3.0, 4.0], w_exponent), dtype=torch.float32)
    g = torch.tensor(np.ldexp([4.0, 3.0], g_exponent), dtype=torch.float32)
    (new,) = many([(w, g)], [Rule(0.1)])
    step = reference.lars(w.tolist(), g.tolist(), 0.1)
    assert reference.worst_error(new.tolist(), w.tolist(), step, "float32") <= 4


def test_multi_tensor_options_may_be_tensors_and_differ_by_leaf():
    leaves = [(torch.tensor([3.0, 4.0]), torch.tensor([0.4, 0.3]))] * 2
    rules = [Rule(torch.tensor(0.1)), Rule(0.2, decay_lambda=0.1)]
    first, second = many(leaves, rules)
    assert first.tolist() == pytest.approx([2.6, 3.7])
    assert second.tolist() == pytest.approx([2.3, 3.3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_cuda_agrees_with_the_cpu_and_never_waits(dtype):
    rng = np.random.default_rng(0)
    trees = [
        Container({f"l{i}": torch.tensor(rng.normal(size=(30, i + 1))) for i in range(9)}).map(
            lambda x: x.to(getattr(torch, dtype))
        )
        for _ in range(2)
    ]
    expected = lars_update(*trees, 0.1, decay_lambda=0.01)
    w, g = (tree.map(lambda x: x.cuda()) for tree in trees)
    torch.cuda.set_sync_debug_mode("error")
    try:
        new = lars_update(w, g, 0.1, decay_lambda=0.01, nonfinite="skip")
        lars_update(w, g, 0.1, decay_lambda=0.01, out=w)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}.get(dtype, 1e-14)
    for result in (new, w):
        for x, y in zip(result.leaves(), expected.leaves(), strict=True):
            assert torch.allclose(x.cpu(), y, rtol=tolerance, atol=tolerance)


def test_leaves_may_be_of_different_libraries():
    jnp, da = need("jax.numpy"), need("dask.array")
    makers = [np.asarray, torch.tensor, jnp.asarray, da.from_array]
    w = Container({f"l{i}": make(np.array([3.0, 4.0])) for i, make in enumerate(makers)})
    g = Container({f"l{i}": make(np.array([0.4, 0.3])) for i, make in enumerate(makers)})
    new = w.lars_update(g, 0.1)
    assert [type(x) for x in new.leaves()] == [type(x) for x in w.leaves()]
    for x in new.leaves():
        assert to_numpy(x).tolist() == pytest.approx([2.6, 3.7])


def test_another_thread_may_be_importing_dtensor(monkeypatch):
    """torch imports it when it first needs it; the module is then in sys.modules, but empty."""
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", ModuleType("partial"))
    w = torch.ones(3, 2)[:, 0]
    lars_update(w, torch.ones(3), 0.5, adapt=False, out=w)
    assert w.tolist() == [0.5] * 3


def test_the_view_of_an_empty_tensor_has_an_address():
    """Numpy before 2.4 takes no array at address 0."""
    from lars_tree._backends.torch.addresses import Address

    assert Address(torch.empty(0, 3)).__array_interface__["data"][0] != 0
