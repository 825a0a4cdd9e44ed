"""check_optimizer_laws with optimizers of torch and optax, through `for_torch` and `for_optax`."""

from __future__ import annotations

import pytest
from conftest import need
from test_testing_runs import FEW, QUICK

from lars_tree import Lars
from lars_tree.testing import (
    STATE_LAWS,
    TREE_LAWS,
    LawError,
    check_optimizer_laws,
    check_update_laws,
    for_optax,
    for_torch,
    laws,
)


def test_any_optimizer_of_torch():
    """Laws about trees and the state hold for each optimizer, with or without a momentum."""
    torch = need("torch")
    common = {"dtypes": ["float32"], "settings": FEW}
    check_optimizer_laws(for_torch(torch.optim.SGD), laws=TREE_LAWS, **common)
    check_optimizer_laws(for_torch(torch.optim.AdamW), laws=STATE_LAWS, momentum=None, **common)

    class Modifying(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(2)
            super().step()

    with pytest.raises(LawError, match=r"dcdw was modified") as caught:
        check_optimizer_laws(for_torch(Modifying), laws=STATE_LAWS[:2], **common)
    assert list(caught.value.laws) == ["leaves_its_inputs_alone_in_a_run"]
    assert str(caught.value).startswith("test_any_optimizer_of_torch.<locals>.Modifying breaks")


def test_a_state_that_is_not_saved_completely():
    torch = need("torch")

    class Forgetful(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "state": {}}

    common = {"laws": STATE_LAWS, "dtypes": ["float32"], "settings": FEW}
    with pytest.raises(LawError) as caught:
        check_optimizer_laws(for_torch(Forgetful), **common)
    assert list(caught.value.laws) == ["resumes_from_a_saved_state"]


def test_for_torch_passes_options_and_rates():
    torch = need("torch")
    w, g = {"a": torch.tensor([3.0])}, {"a": torch.tensor([1.0])}
    make = for_torch(torch.optim.SGD, dampening=0.5, momentum=0.25)
    half, one = make(0.5), make(1.0)
    first, state = half.update(w, g, half.init(w))
    assert (w["a"].item(), first["a"].item(), g["a"].item()) == (3, 2.5, 1)
    second, state = one.update(first, g, state)  # buffer: 0.25 * 1 + 0.5 * 1
    assert second["a"].item() == 2.5 - 0.75
    third, _ = one.update({"a": torch.tensor([9.0])}, {"a": None}, state)
    assert third["a"].item() == 9
    again = one.load(second, one.save(state))
    assert one.update(second, g, again)[0]["a"].item() == 1.75 - (0.25 * 0.75 + 0.5)


def test_for_optax_passes_options_and_rates():
    optax, jnp = need("optax"), need("jax.numpy")
    w, g = {"b": jnp.array([3.0]), "a": jnp.ones(1)}, {"a": jnp.ones(1), "b": jnp.ones(1)}
    make = for_optax(optax.sgd, momentum=0.5)
    assert make.__name__ == "sgd"
    half, one = make(0.5), make(1.0)
    first, state = half.update(w, g, half.init(w))
    assert first["b"].tolist() == [2.5]
    second, _ = one.update(first, g, state)
    assert second["b"].tolist() == [2.5 - 1.5]


def test_adapters_take_classes_and_functions():
    torch, optax = need("torch"), need("optax")
    with pytest.raises(ValueError, match=r"cls: expected a class such as .*, got a SGD") as caught:
        for_torch(torch.optim.SGD([torch.zeros(1)]))
    assert caught.value.argument == "cls"
    with pytest.raises(ValueError, match="transform: expected a function of the rate") as caught:
        for_optax(optax.lars(0.1))
    assert caught.value.argument == "transform"


def test_an_update_function_is_not_an_optimizer():
    torch = need("torch")
    with pytest.raises(ValueError, match=r"update: .*: use check_optimizer_laws"):
        check_update_laws(for_torch(torch.optim.SGD))


def test_the_memory_of_a_gradient_may_be_used_again():
    """As in torch with zero_grad(set_to_none=False)."""
    torch = need("torch")

    class Kept(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.sub_(p.grad + self.state[p].setdefault("first", p.grad))

    with pytest.raises(LawError) as caught:
        check_optimizer_laws(for_torch(Kept), laws=STATE_LAWS[:3], settings=QUICK)
    assert list(caught.value.laws) == ["keeps_no_inputs"]


def test_an_optimizer_gets_only_parameters_of_the_shapes():
    """Muon takes only matrices: not even an empty tree makes another parameter."""
    torch = need("torch")
    common = {"dtypes": ["float32"], "shapes": [(2, 3)], "settings": FEW}
    check_optimizer_laws(for_torch(torch.optim.Muon), laws=TREE_LAWS + STATE_LAWS, **common)


def test_groups_may_have_the_parameters_in_another_order():
    torch = need("torch")

    def in_groups(parameters, lr, momentum=0.0, weight_decay=0.0):
        groups = [{"params": [p for p in parameters if p.ndim == n]} for n in (2, 1)]
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)

    common = {"dtypes": ["float32"], "shapes": [(2,), (2, 2)], "settings": FEW}
    check_optimizer_laws(for_torch(in_groups), laws=TREE_LAWS + STATE_LAWS, **common)


def test_a_leaf_that_XLA_rounds_otherwise_beside_other_leaves_breaks_no_law():
    """Adam of optax corrects the bias of all leaves in one compiled function."""
    optax = need("optax")
    law = laws.takes_each_layer_on_its_own_in_a_run
    common = {"dtypes": ["float64"], "shapes": [(2,)], "key_order": False, "settings": QUICK}
    check_optimizer_laws(for_optax(optax.adam), laws=[law], momentum=None, **common)

    def whole(lr):
        """The steps have the direction of the gradient of all leaves."""
        scale = optax.normalize_by_update_norm()
        return optax.chain(scale, optax.sgd(lr))

    with pytest.raises(LawError):
        check_optimizer_laws(for_optax(whole), laws=[law], momentum=None, **common)


def test_an_optimizer_without_momentum_gets_a_hint():
    torch = need("torch")
    hint = (
        "\n\nEvery law is broken, because the optimizer has no argument 'momentum': check it with"
    )
    few = STATE_LAWS[:2]
    with pytest.raises(LawError) as caught:
        check_optimizer_laws(for_torch(torch.optim.Adam), laws=few, settings=QUICK)
    assert hint in str(caught.value)
    assert "nested=False" not in str(caught.value)
    check_optimizer_laws(for_torch(torch.optim.Adam), laws=few, momentum=None, settings=QUICK)


def test_a_misspelt_argument_gets_a_hint():
    says = r"check_optimizer_laws\(\) got .*'dtype' \(did you mean 'dtypes'"
    with pytest.raises(TypeError, match=says):
        check_optimizer_laws(Lars, dtype=["float32"])
