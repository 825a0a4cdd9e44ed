"""Weights in the classes of Equinox, Flax and Haiku."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import need, unit_lars

from lars_tree import Container, Lars, LeafError, OptionError, _native, lars_update, report
from lars_tree._tree import structure


def step(w, g):
    """The step of one leaf."""
    return w if g is None else lars_update(w, g, 0.1, decay_lambda=0.01)


def close(actual, expected):
    """Whether two JAX trees have the same structure, and arrays that differ by rounding only."""
    jax = need("jax")
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
        elif hasattr(x, "dtype"):
            assert (x == y).all()
        else:
            assert x is y
    return True


@pytest.fixture(scope="module")
def jax():
    return need("jax")


@pytest.fixture(scope="module")
def data(jax):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (8, 3)), jax.random.normal(keys[1], (8, 2))


# Equinox


@pytest.fixture(scope="module")
def eqx():
    return need("equinox")


@pytest.fixture(scope="module")
def mlp(jax, eqx):
    """A model whose leaves are arrays, functions, a number and a bool."""
    mlp = eqx.nn.MLP(3, 2, 4, 2, activation=jax.nn.relu, key=jax.random.key(1))
    return eqx.nn.Sequential([mlp, eqx.nn.Dropout(0.5, inference=True)])


@pytest.fixture(scope="module")
def eqx_gradient(jax, eqx, mlp, data):
    x, y = data
    return eqx.filter_grad(lambda m: ((jax.vmap(m)(x) - y) ** 2).mean())(mlp)


def eqx_expected(jax, eqx, model, gradient):
    """The step of each array; Equinox puts the other leaves back."""
    arrays, others = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(step, arrays, gradient), others)


def test_a_module_of_equinox_with_functions_as_leaves(jax, eqx, mlp, eqx_gradient):
    new = lars_update(mlp, eqx_gradient, 0.1, decay_lambda=0.01)
    expected = eqx_expected(jax, eqx, mlp, eqx_gradient)
    assert eqx.tree_equal(new, expected)
    assert not eqx.tree_equal(new, mlp)
    assert new.layers[0].activation is mlp.layers[0].activation
    jitted = eqx.filter_jit(lambda m, g: lars_update(m, g, 0.1, decay_lambda=0.01))
    assert close(jitted(mlp, eqx_gradient), expected)


def test_an_optimizer_of_a_module_of_equinox(jax, eqx, mlp, eqx_gradient):
    opt = unit_lars(0.1, momentum=0.5, decay_lambda=0.01)
    arrays = eqx.filter(mlp, eqx.is_inexact_array)
    expected, list_state = jax.tree.leaves(arrays), opt.init(jax.tree.leaves(arrays))
    gradients = jax.tree.leaves(eqx_gradient)
    update = eqx.filter_jit(opt.update)
    runs = [(mlp, opt.init(arrays)), (arrays, opt.init(arrays))]
    for _ in range(2):
        expected, list_state = opt.update(expected, gradients, list_state)
        runs = [update(model, eqx_gradient, state) for model, state in runs]
    for model, state in runs:
        assert close(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)), expected)
        moved = [x for x in structure.leaves(state.velocity) if x is not None]
        assert close(moved, list_state.velocity if list_state else None)
    assert type(runs[0][0]) is type(mlp)


def test_reports_of_a_module_of_equinox(jax, eqx, mlp, eqx_gradient):
    arrays = eqx.filter(mlp, eqx.is_inexact_array)
    ratios = report.trust_ratios(arrays, eqx_gradient, 0.1)
    expected = report.trust_ratios(jax.tree.leaves(arrays), jax.tree.leaves(eqx_gradient), 0.1)
    assert type(ratios) is type(mlp)
    assert jax.tree.leaves(ratios) == expected
    text = str(report.layer_table(arrays, eqx_gradient, 0.1))
    assert "layers/0/layers/1/weight" in text
    shown = repr(Container(model=mlp))
    assert "model/layers/0/layers/0/bias     float32 (4,)" in shown


def test_a_gradient_for_a_function_is_refused(mlp):
    with pytest.raises(LeafError, match="expected an array, got") as caught:
        lars_update(mlp, 1.0, 0.1)
    assert ("layers", 0, "activation") in caught.value.paths
    assert caught.value.argument == "w"


def test_a_module_with_numpy_arrays_is_updated_in_place(jax, eqx, mlp, eqx_gradient):
    w, g = (
        jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, tree)
        for tree in (mlp, eqx_gradient)
    )
    expected = lars_update(w, g, 0.1)
    weight = w.layers[0].layers[0].weight
    assert lars_update(w, g, 0.1, out=w) is w
    assert w.layers[0].layers[0].weight is weight
    assert eqx.tree_equal(w, expected)
    with pytest.raises(Exception, match="out cannot be written to"):
        lars_update(mlp, eqx_gradient, 0.1, out=mlp)


def test_options_by_prefix_for_a_module(jax, eqx, mlp, eqx_gradient):
    arrays = eqx.filter(mlp, eqx.is_inexact_array)
    is_weight = jax.tree.map(lambda x: x.ndim > 1, arrays)
    new = lars_update(arrays, eqx_gradient, 0.1, adapt=is_weight)
    expected = jax.tree.map(
        lambda w, g, adapt: lars_update(w, g, 0.1, adapt=adapt), arrays, eqx_gradient, is_weight
    )
    assert eqx.tree_equal(new, expected)


@pytest.mark.parametrize("native", [True, False])
def test_options_are_for_the_arrays_of_a_module(jax, eqx, mlp, eqx_gradient, native, monkeypatch):
    """Leaves that are not arrays need no value: no pattern must match, no function is called."""
    if not native:
        monkeypatch.setattr(_native, "kernel", None)
    arrays = eqx.filter(mlp, eqx.is_inexact_array)
    is_weight = jax.tree.map(lambda x: x.ndim > 1, arrays)
    expected = lars_update(mlp, eqx_gradient, 0.1, adapt=is_weight)
    assert not eqx.tree_equal(expected, lars_update(mlp, eqx_gradient, 0.1))
    changed = eqx.filter(expected, eqx.is_inexact_array)
    assert eqx.tree_equal(changed, lars_update(arrays, eqx_gradient, 0.1, adapt=is_weight))
    for adapt in (lambda path, x: x.ndim > 1, {"*/weight": True, "*/bias": False}):
        new = lars_update(mlp, eqx_gradient, 0.1, adapt=adapt)
        assert eqx.tree_equal(new, expected)
        opt = unit_lars(0.1, momentum=0, adapt=adapt)
        assert eqx.tree_equal(opt.update(mlp, eqx_gradient, opt.init(arrays))[0], expected)
    with pytest.raises(OptionError, match="expected a value, got None") as caught:
        lars_update(
            mlp,
            eqx_gradient,
            0.1,
            adapt=eqx.tree_at(lambda m: m.layers[0].layers[0].bias, is_weight, None),
        )
    assert caught.value.paths == (("layers", 0, "layers", 0, "bias"),)


@pytest.fixture(scope="module")
def schedule(eqx):
    class Schedule(eqx.Module):
        rate: object
        every: int = eqx.field(static=True)

        def __call__(self, step):
            return self.rate * (step % self.every == 0)

    return Schedule


def test_a_module_that_is_a_schedule(jax, schedule):
    """A schedule is a node with static data here; optimizers with other schedules differ."""
    traces = []

    def step(opt, w):
        traces.append(opt)
        state = opt.init(w)
        for _ in range(2):
            w, state = opt.update(w, {"a": jax.numpy.array([0.0, 10.0])}, state)
        return w["a"]

    jitted, w = jax.jit(step, static_argnums=0), {"a": jax.numpy.array([3.0, 4.0])}
    for lr in (
        lambda every: schedule(0.1, every),
        lambda every: schedule(jax.numpy.array(0.1), every),
        lambda every: {"a": schedule(0.1, every)},
    ):
        first, second = (unit_lars(lr(every), momentum=0) for every in (1, 2))
        assert first != second
        assert jitted(first, w).tolist() == pytest.approx(step(first, w).tolist())
        assert jitted(second, w).tolist() == pytest.approx([3, 3.5])
    again = [unit_lars(schedule(0.1, 1), momentum=0) for _ in range(2)]
    assert again[0] == again[1]
    count = len(traces)
    for opt in again:
        jitted(opt, w)
    assert len(traces) == count


def test_a_callable_module_of_rates(jax, eqx, mlp, eqx_gradient, schedule):
    """A callable node is a tree of rates where it is a prefix of w, and a schedule otherwise."""
    arrays = eqx.filter(mlp, eqx.is_inexact_array)
    rates = jax.tree.map(lambda x: 0.1 if x.ndim > 1 else 0.2, arrays)
    expected = lars_update(arrays, eqx_gradient, rates)
    for w, g, lr in [
        (arrays, eqx_gradient, rates),
        ({"m": arrays, "n": None}, {"m": eqx_gradient, "n": None}, {"m": rates, "n": 1.0}),
    ]:
        opt = unit_lars(lr, momentum=0)
        new, _ = opt.update(w, g, opt.init(w))
        assert eqx.tree_equal(new["m"] if isinstance(new, dict) else new, expected)
    opt = unit_lars({"m": schedule(0.1, 1)}, momentum=0)
    new, _ = opt.update({"m": arrays}, {"m": eqx_gradient}, opt.init({"m": arrays}))
    assert eqx.tree_equal(new["m"], lars_update(arrays, eqx_gradient, 0.1))
    with pytest.raises(OptionError, match=r"expected a finite number >= 0, got -0\.1") as caught:
        unit_lars(jax.tree.map(lambda x: -x, rates)).update(
            arrays, eqx_gradient, Lars(1).init(arrays)
        )
    assert ("layers", 0, "layers", 0, "weight") in caught.value.paths


def test_a_callable_module_that_fails_as_a_schedule(mlp):
    w = {"a": np.ones(2)}
    opt = Lars(mlp.layers[0].layers[0])
    with pytest.raises(ValueError, match="at least 1") as caught:  # the module's own error
        opt.update(w, w, opt.init(w))
    note = "lr was called as a schedule, a function of the step, because it is not a prefix of w"
    assert note in caught.value.__notes__


# Flax


@pytest.fixture(scope="module")
def nnx():
    return need("flax.nnx")


@pytest.fixture(scope="module")
def nnx_model(nnx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            for block in self.blocks:
                x = nnx.relu(block(x))
            return self.head(self.norm(x))

    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def nnx_gradient(nnx, nnx_model, data):
    x, y = data
    return nnx.grad(lambda m: ((m(x) - y) ** 2).mean())(nnx_model)


def test_a_state_of_nnx(jax, nnx, nnx_model, nnx_gradient):
    params = nnx.state(nnx_model, nnx.Param)
    expected = jax.tree.map(step, params, nnx_gradient)
    new = lars_update(params, nnx_gradient, 0.1, decay_lambda=0.01)
    assert type(new) is type(params)
    assert close(new, expected)
    assert ("blocks", 0, "kernel", "value") in [path for path, _ in structure.walk(params)]
    update = jax.jit(lambda w, g: lars_update(w, g, 0.1, decay_lambda=0.01))
    assert close(update(params, nnx_gradient), expected)
    changed = nnx.clone(nnx_model)
    nnx.update(changed, new)
    assert close(nnx.state(changed, nnx.Param), expected)


def test_an_optimizer_of_a_state_of_nnx(jax, nnx, nnx_model, nnx_gradient):
    params = nnx.state(nnx_model, nnx.Param)
    opt = unit_lars(0.1, momentum=0.5)
    expected, list_state = jax.tree.leaves(params), opt.init(jax.tree.leaves(params))
    update, state = jax.jit(opt.update), opt.init(params)
    for _ in range(2):
        params, state = update(params, nnx_gradient, state)
        expected, list_state = opt.update(expected, jax.tree.leaves(nnx_gradient), list_state)
    assert close(jax.tree.leaves(params), expected)


def test_a_module_of_nnx_with_random_state(jax, nnx_model):
    """A module is a tree too; random state and counts have no gradient."""
    g = jax.tree.map(
        lambda x: x + 1 if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else None, nnx_model
    )
    new = lars_update(nnx_model, g, 0.1)
    assert type(new) is type(nnx_model)
    expected = step(nnx_model.head.kernel[...], nnx_model.head.kernel[...] + 1)
    assert new.head.kernel.shape == expected.shape
    assert new.dropout.rngs.count[...] == nnx_model.dropout.rngs.count[...]
    assert not np.array_equal(new.head.kernel[...], nnx_model.head.kernel[...])


def test_struct_dataclasses_and_frozen_dicts_of_flax(jax):
    struct, core = need("flax.struct"), need("flax.core")

    @struct.dataclass
    class Layer:
        w: object
        name: str = struct.field(pytree_node=False, default="layer")

    w = {"x": Layer(np.array([3.0, 4.0]), "first"), "y": core.FrozenDict(a={"b": np.ones(2)})}
    g = {"x": Layer(np.array([0.0, 10.0])), "y": {"a": {"b": np.zeros(2)}}}
    new = lars_update(w, g, 0.1)
    assert (type(new["x"]), new["x"].name, new["x"].w.tolist()) == (Layer, "first", [3, 3.5])
    assert (type(new["y"]), new["y"]["a"]["b"].tolist()) == (core.FrozenDict, [1, 1])
    opt = Lars(0.1)
    moved, _ = opt.update(w, g, opt.init(w))
    assert jax.tree.structure(moved) == jax.tree.structure(w)


# Haiku


def test_params_of_haiku(jax, data):
    hk = need("haiku")
    x, y = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
        params = model.init(jax.random.key(0), x)
    g = jax.grad(lambda w: ((model.apply(w, x) - y) ** 2).mean())(params)
    expected = jax.tree.map(step, params, g)
    assert close(lars_update(params, g, 0.1, decay_lambda=0.01), expected)
    # Haiku's immutable mapping gives JAX the leaves of all levels as children.
    frozen = hk.data_structures.to_immutable_dict(params)
    new = lars_update(frozen, g, 0.1, decay_lambda=0.01)
    assert type(new) is type(frozen)
    assert close(hk.data_structures.to_mutable_dict(new), expected)
