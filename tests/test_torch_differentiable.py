"""Differentiable steps of CPU tensors that are shorter than double: values, derivatives, memory.

Derivatives are compared with those of the same step in double, which autograd computes from the
operations of `formula.step`.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import lars_update

torch = need("torch")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.complex64]
OPTIONS = {
    "plain": {},
    "decay": {"decay_lambda": 0.1},
    "eps": {"decay_lambda": 0.1, "eps": 0.5, "grad_scale": 4.0, "trust_coefficient": 0.5},
    "clipped": {"trust_clip": True, "decay_lambda": 0.1},
    "unclipped": {"trust_clip": True, "trust_coefficient": 1e-3},
    "fixed": {"adapt": False, "decay_lambda": 0.1, "grad_scale": 2.0},
}


def tensors(dtype, shape=(3, 4), seed=0):
    """w, dcdw, and a direction for the derivatives of the result."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return [torch.randn(shape, dtype=wide, generator=generator).to(dtype) for _ in range(3)]


def inputs(w, g, options, names):
    """Copies of w and g, and the named options as tensors, that all require gradients."""
    numbers = {name: torch.tensor(float({"lr": 0.3, **options}[name])) for name in names}
    return [x.detach().clone().requires_grad_() for x in (w, g, *numbers.values())]


def step(given, options, names):
    w, g, *numbers = given
    options = {"lr": 0.3, **options, **dict(zip(names, numbers, strict=True))}
    return lars_update(w, g, options.pop("lr"), stop_gradients=False, **options)


def doubled(x):
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def close(actual, expected, atol=0):
    """Equal but for rounding to the dtype of `actual`."""
    eps = torch.finfo(actual.dtype).eps
    size = float(expected.abs().max())
    torch.testing.assert_close(
        doubled(actual), doubled(expected), rtol=0, atol=2 * eps * size + atol
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_derivatives_are_those_of_the_step_in_double(dtype, options):
    w, g, direction = tensors(dtype)
    names = ["lr", *(name for name in options if name not in ("adapt", "trust_clip"))]
    ours = inputs(w, g, options, names)
    new = step(ours, options, names)
    assert "LarsStep" in new.grad_fn.name()
    theirs = inputs(doubled(w), doubled(g), options, names)
    expected = torch.autograd.grad(step(theirs, options, names), theirs, doubled(direction))
    for x, y in zip(torch.autograd.grad(new, ours, direction), expected, strict=True):
        close(x, y, atol=1e-15)


@given(
    exponents=st.tuples(*[st.integers(-120, 120)] * 3),
    zero=st.sampled_from(["none", "w", "g"]),
    options=st.sampled_from(list(OPTIONS.values())),
)
def test_derivatives_are_right_over_the_whole_range(exponents, zero, options):
    """Also at zero weights, where they are finite."""
    given = [x * 2.0**e for x, e in zip(tensors(torch.float32), exponents, strict=True)]
    given[0] *= zero != "w"
    given[1] *= zero != "g"
    w, g, direction = given
    ours, theirs = inputs(w, g, options, []), inputs(doubled(w), doubled(g), options, [])
    actual = torch.autograd.grad(step(ours, options, []), ours, direction)
    new = step(theirs, options, [])
    for x, y in zip(actual, torch.autograd.grad(new, theirs, doubled(direction)), strict=True):
        if y.abs().max() < torch.finfo(torch.float32).max:
            close(x, y, atol=2.0**-149)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_do_not_matter(layout, dtype):
    w, g, direction = tensors(dtype)
    change = {
        "transposed": lambda x: x.t().contiguous().t(),
        "strided": lambda x: torch.stack([x, x], 1)[:, 0],
        "expanded": lambda x: x,
    }[layout]
    direction = direction[:1, :1].expand(3, 4) if layout == "expanded" else direction
    results = []
    for of_w, of_g in ((w, g), (change(w), g), (w, change(g))):
        given = [of_w.detach().requires_grad_(), of_g.detach().requires_grad_()]
        new = lars_update(*given, 0.1, decay_lambda=0.1, stop_gradients=False)
        assert "LarsStep" in new.grad_fn.name()
        results.append([new, *torch.autograd.grad(new, given, direction)])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_derivatives_can_be_differentiated():
    """Here the gradient depends on the weights, as in meta-learning."""
    w, g, _ = tensors(torch.float32)

    def curvature(w, lr):
        dcdw = (w * w).sum() * g.to(w.dtype) + w
        new = lars_update(w, dcdw, lr, decay_lambda=0.1, stop_gradients=False)
        first = torch.autograd.grad((new**3).sum(), (w, lr), create_graph=True)
        return torch.autograd.grad(sum((x * x).sum() for x in first), (w, lr), create_graph=True)

    ours = inputs(w, g, {}, ["lr"])
    theirs = inputs(doubled(w), doubled(g), {}, ["lr"])
    actual = curvature(ours[0], ours[2])
    for x, y in zip(actual, curvature(theirs[0], theirs[2]), strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-4)
    assert all(x.requires_grad for x in actual)


def test_jacobians_are_vectorised():
    w, g, _ = tensors(torch.float32, (5,))

    def function(w, g):
        return lars_update(w, g, 0.1, decay_lambda=0.1, stop_gradients=False)

    rows, columns = (
        torch.autograd.functional.jacobian(function, (w, g), vectorize=vectorize)
        for vectorize in (False, True)
    )
    of_func = torch.func.jacfwd(function, (0, 1))(w, g)
    for x, y, z in zip(rows, columns, of_func, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-6)
    loss = lambda w: function(w, g).pow(3).sum()  # noqa: E731
    hessians = [
        torch.autograd.functional.hessian(loss, w, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*hessians, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_weights_have_the_bits_of_a_step_without_gradients(options):
    w, g, _ = tensors(torch.float32, (200, 100))
    new = lars_update(w.clone().requires_grad_(), g, 0.1, stop_gradients=False, **options)
    assert torch.equal(new.detach(), lars_update(w, g, 0.1, **options))


def test_autograd_saves_only_the_arguments():
    w, g, _ = tensors(torch.float32)
    w.requires_grad_()
    lr, saved = torch.tensor(0.1, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        lars_update(w, g, lr, decay_lambda=0.1, stop_gradients=False)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (w, g, lr)}


def test_weights_that_changed_since_the_step_are_refused():
    w, g, _ = tensors(torch.float32)
    new = lars_update(w.requires_grad_(), g, 0.1, stop_gradients=False)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        new.sum().backward()


def test_each_leaf_has_its_own_graph():
    trees = [{key: tensors(torch.float32, seed=key)[i] for key in (1, 2)} for i in (0, 1)]
    for x in trees[0].values():
        x.requires_grad_()
    new = lars_update(*trees, 0.1, stop_gradients=False)
    new[1].sum().backward()
    assert trees[0][2].grad is None
    new[2].sum().backward()
    assert all(np.isfinite(x.grad.numpy()).all() for x in trees[0].values())
