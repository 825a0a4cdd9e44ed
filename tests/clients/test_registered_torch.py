"""Weights in the classes of TensorDict, and in parameter dicts and lists of torch."""

from __future__ import annotations

import copy

import pytest
from conftest import need, unit_lars

from lars_tree import Container, Lars, StructureError, lars_update
from lars_tree.testing import assert_identical


def step(w, g):
    """The step of one leaf."""
    return lars_update(w, g, 0.1, decay_lambda=0.01)


@pytest.fixture(scope="module")
def torch():
    return need("torch")


def test_a_tensordict(torch):
    tensordict, pytree = need("tensordict"), need("torch.utils._pytree")
    w = tensordict.TensorDict(
        {"a": torch.tensor([3.0, 4.0]), "b": {"c": torch.ones(2, 3)}}, batch_size=[2]
    )
    g = w.apply(lambda x: x + torch.arange(2.0).reshape(2, *[1] * (x.ndim - 1)))
    expected = pytree.tree_map(step, w, g)
    for gradient in (g, g.to_dict(), Container(g.to_dict())):
        new = lars_update(w, gradient, 0.1, decay_lambda=0.01)
        assert (type(new), new.batch_size, new["b"].batch_size) == (type(w), (2,), (2,))
        assert (new == expected).all()
    assert (w["a"] == torch.tensor([3.0, 4.0])).all()
    opt = Lars(0.1)
    new, state = opt.update(w, g, opt.init(w))
    assert (type(new), new.batch_size) == (type(w), (2,))
    assert state.velocity["b"]["c"].shape == (2, 3)
    kept = w["b", "c"]
    assert lars_update(w, g, 0.1, decay_lambda=0.01, out=w) is w
    assert w["b", "c"] is kept
    assert (w == expected).all()


def test_other_classes_of_tensordict(torch):
    tensordict, pytree = need("tensordict"), need("torch.utils._pytree")
    rows = [tensordict.TensorDict(a=torch.full((i,), float(i))) for i in (1, 2)]
    w = tensordict.lazy_stack(rows)

    @tensordict.tensorclass
    class Layer:
        w: object
        name: str

    for tree in (w, [Layer(w=torch.ones(3), name="x", batch_size=[3])]):
        new = lars_update(tree, 1.0, 0.1, decay_lambda=0.01)
        expected = pytree.tree_map(lambda x: step(x, torch.ones_like(x)), tree)
        assert pytree.tree_structure(new) == pytree.tree_structure(tree)
        for x, y in zip(pytree.tree_leaves(new), pytree.tree_leaves(expected), strict=True):
            assert torch.equal(x, y)
    assert new[0].name == "x"


def test_an_optimizer_of_a_stack_of_tensordicts(torch):
    """The items of a stack are stacked tensors, but its children are the tensordicts."""
    tensordict = need("tensordict")
    rows = [tensordict.TensorDict(a=torch.full((2,), float(i))) for i in (1, 2)]
    w, opt = tensordict.lazy_stack([x.clone() for x in rows]), unit_lars(0.1, momentum=0.5)
    state, expected_state = opt.init(w), opt.init(rows)
    for _ in range(2):
        expected, expected_state = opt.update(rows, rows, expected_state, out=rows)
        w, state = opt.update(w, w, state)
    assert type(w) is type(tensordict.lazy_stack(rows))
    assert (w == tensordict.lazy_stack(expected)).all()


@pytest.mark.parametrize("is_dict", [True, False], ids=["ParameterDict", "ParameterList"])
def test_dicts_and_lists_of_parameters(torch, is_dict):
    keys = ["a", "b"] if is_dict else [0, 1]
    values = [torch.nn.Parameter(torch.tensor([3.0, 4.0])), torch.nn.Parameter(torch.ones(1))]
    values[1].requires_grad = False
    w = torch.nn.ParameterDict(zip(keys, values, strict=True)) if is_dict else None
    w = w or torch.nn.ParameterList(values)
    w.eval()
    g = {keys[0]: torch.tensor([0.0, 10.0]), keys[1]: None}
    new = lars_update(w, g, 0.1)
    assert type(new) is type(w)
    assert not new.training
    assert [x.requires_grad for x in new.parameters()] == [True, False]
    assert [x.tolist() for x in new.parameters()] == [[3, 3.5], [1]]
    assert [x.tolist() for x in w.parameters()] == [[3, 4], [1]]
    opt = unit_lars(0.1, momentum=0.5)
    moved, state = opt.update({"x": w}, {"x": g}, opt.init({"x": w}))
    assert [x.tolist() for x in moved["x"].parameters()] == [[3, 3.5], [1]]
    velocity = state.velocity.x[keys[0]]
    assert (type(velocity), velocity.tolist()) == (torch.Tensor, [0, 0.5])
    assert lars_update(w, g, 0.1, out=w) is w
    assert w[keys[0]] is values[0]
    assert values[0].tolist() == [3, 3.5]
    with pytest.raises(StructureError, match="missing"):
        lars_update(w, {keys[0]: values[0]}, 0.1)


@pytest.mark.parametrize("kind", ["ParameterDict", "ParameterList"])
def test_other_attributes_of_parameter_dicts_and_lists_are_kept(torch, kind):
    class Params(getattr(torch.nn, kind)):
        def __init__(self, values, scale):
            super().__init__(values)
            self.scale = scale
            self.register_buffer("mean", torch.ones(1))

    values = [torch.tensor([3.0, 4.0]), torch.nn.ParameterDict({"a": torch.ones(2)}), 5.0]
    w = Params(dict(zip("xyz", values, strict=True)) if kind == "ParameterDict" else values, 7)
    keys = list(w.keys()) if kind == "ParameterDict" else range(3)
    g = {keys[0]: torch.tensor([0.0, 10.0]), keys[1]: torch.ones(2), keys[2]: None}
    before = copy.deepcopy(w.state_dict())
    new = lars_update(w, g, 0.1)
    assert (type(new), new.scale, new[keys[2]]) == (Params, 7, 5.0)
    assert list(new.state_dict()) == list(before)
    assert new.mean is w.mean
    assert new[keys[0]].tolist() == [3, 3.5]
    new.extra = torch.nn.Parameter(torch.ones(1))
    new.register_buffer("other", None, persistent=False)
    assert_identical(dict(w.state_dict()), dict(before))
    assert not w._non_persistent_buffers_set
    w[keys[2]] = torch.ones(1)
    opt = Lars(0.1)
    state = opt.init(w)
    assert list(state.velocity.state_dict()) == ["mean"]  # velocities are no parameters
    assert opt.update(w, g, state, out=w)[0] is w
    assert state.velocity[keys[0]][1] > 0
    assert w[keys[0]][1] < 4
