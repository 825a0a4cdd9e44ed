"""JAX arrays sharded over four devices have the results of one device, and keep their shardings."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars

from lars_tree import lars_update

jax = need("jax")
jnp = jax.numpy

from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

# For each leaf: its shape, its partition over a mesh of two by two, and its layer axis.
LEAVES = {
    "rows": ((8, 3), ("x",), None),
    "columns": ((3, 6), (None, "y"), None),
    "both": ((4, 6), ("x", "y"), None),
    "rows_over_all": ((8, 3), (("x", "y"),), None),
    "replicated": ((5,), (), None),
    "number": ((), (), None),
    "layers": ((8, 3), ("x",), 0),
    "across": ((8, 3), ("x",), 1),
}
OPTIONS = {
    "decay_lambda": 0.01,
    "trust_clip": {name: name in ("both", "layers") for name in LEAVES},
    "adapt": {name: name != "replicated" for name in LEAVES},
    "layer_axis": {name: axis for name, (*_, axis) in LEAVES.items()},
}
STEPS = 2


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def mesh(request):
    assert len(jax.devices()) == 4
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(request.param,) * 2)


def tree(seed, leaves=LEAVES):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=leaves[name][0]).astype(np.float32) for name in leaves}


def layouts(mesh):
    return {name: NamedSharding(mesh, PartitionSpec(*cut)) for name, (_, cut, _) in LEAVES.items()}


def check(new, expected, shardings):
    assert new.keys() == expected.keys()
    for name, x in new.items():
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, expected[name], rtol=1e-6, err_msg=name)
        kept = x.sharding.is_equivalent_to(shardings[name], x.ndim)
        assert kept, f"{name}: {x.sharding} instead of {shardings[name]}"


def update(w, g):
    return lars_update(w, g, 0.1, **OPTIONS)


def donated(w, g):
    new = jax.jit(update, donate_argnums=0)(w, g)
    assert all(x.is_deleted() for x in w.values())
    return new


@pytest.mark.parametrize("way", [update, jax.jit(update), donated], ids=["plain", "jit", "donated"])
def test_weights(mesh, way):
    shardings = layouts(mesh)
    w, g = (jax.device_put(tree(seed), shardings) for seed in range(2))
    check(way(w, g), update(tree(0), tree(1)), shardings)


OPTIMIZER = Lars(0.1, momentum=0.5, nesterov=True, **OPTIONS)
SIMPLE = Lars(0.1, momentum=0.5, decay_lambda=0.01)


def one_by_one(w, g, state, step=OPTIMIZER.update):
    for _ in range(STEPS):
        w, state = step(w, g, state)
    return w, state


def jitted(w, g, state):
    return one_by_one(w, g, state, jax.jit(OPTIMIZER.update))


def donating(w, g, state):
    new = one_by_one(w, g, state, jax.jit(OPTIMIZER.update, donate_argnums=(0, 2)))
    assert all(x.is_deleted() for tree in (w, state.velocity) for x in tree.values())
    return new


def scanned(w, g, state):
    body = lambda carry, _: (OPTIMIZER.update(carry[0], g, carry[1]), None)  # noqa: E731
    return jax.lax.scan(body, (w, state), None, length=STEPS)[0]


@pytest.mark.parametrize("way", [one_by_one, jitted, donating, scanned, jax.jit(scanned)])
def test_weights_and_velocities(mesh, way):
    shardings = layouts(mesh)
    w, g = (jax.device_put(tree(seed), shardings) for seed in range(2))
    state = OPTIMIZER.init(w)
    check(state.velocity, {name: np.zeros(x.shape) for name, x in w.items()}, shardings)
    new, state = way(w, g, state)
    expected, moving = one_by_one(tree(0), tree(1), OPTIMIZER.init(tree(0)))
    check(new, expected, shardings)
    check(state.velocity, moving.velocity, shardings)
    assert (int(state.step), int(state.skipped)) == (STEPS, 0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("cut", [(), ("y",)])
def test_gradients_with_another_sharding(mesh, jit, cut):
    shardings = layouts(mesh)
    cut_otherwise = NamedSharding(mesh, PartitionSpec(*cut))
    even = ("rows", "both", "rows_over_all", "layers", "across")
    w = jax.device_put(tree(0), shardings)
    g = jax.device_put(tree(1), shardings | dict.fromkeys(even, cut_otherwise))
    # The compiler chooses the shardings of results, unless the mesh axes are Explicit or
    # out_shardings are given.
    told = jit and AxisType.Auto in mesh.axis_types
    step = jax.jit(update, out_shardings=shardings if told else None) if jit else update
    check(step(w, g), update(tree(0), tree(1)), shardings)
    if not jit:
        new, state = one_by_one(w, g, OPTIMIZER.init(w))
        expected, moving = one_by_one(tree(0), tree(1), OPTIMIZER.init(tree(0)))
        check(new, expected, shardings)
        check(state.velocity, moving.velocity, shardings)


def test_gradients_that_broadcast(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    w = jax.device_put(tree(0)["rows"], sharding)
    g = jax.device_put(tree(1)["rows"][0], NamedSharding(mesh, PartitionSpec()))
    for way in (lars_update, jax.jit(lars_update)):
        new = way({"w": w}, {"w": g}, 0.1)
        expected = lars_update(tree(0)["rows"], tree(1)["rows"][0], 0.1)
        check(new, {"w": expected}, {"w": sharding})


def test_some_leaves_on_one_device(mesh):
    device = jax.devices()[2]
    shardings = layouts(mesh) | {"both": SingleDeviceSharding(device)}
    w, g = (jax.device_put(tree(seed), shardings) for seed in range(2))
    w["number"], g["number"] = (jnp.asarray(tree(seed)["number"]) for seed in range(2))
    shardings["number"] = w["number"].sharding  # also on one device, but not committed to it
    new, state = one_by_one(w, g, OPTIMIZER.init(w))
    expected, moving = one_by_one(tree(0), tree(1), OPTIMIZER.init(tree(0)))
    check(new, expected, shardings)
    check(state.velocity, moving.velocity, shardings)
    assert [new[name].committed for name in ("both", "number")] == [True, False]


def test_a_skipped_step_keeps_the_shardings(mesh):
    shardings = layouts(mesh)
    w, g = (jax.device_put(tree(seed), shardings) for seed in range(2))
    bad = tree(1)["rows"]
    bad[-1, -1] = np.nan  # in the shard of one device
    g["rows"] = jax.device_put(bad, shardings["rows"])
    optimizer = Lars(0.1, nonfinite="skip", **OPTIONS)
    for step in (optimizer.update, jax.jit(optimizer.update)):
        new, state = step(w, g, optimizer.init(w))
        check(new, tree(0), shardings)
        check(state.velocity, {name: np.zeros(x.shape) for name, x in w.items()}, shardings)
        assert (int(state.step), int(state.skipped)) == (0, 1)


@pytest.mark.parametrize("count", [3, 12])
def test_all_layers_share_their_all_reduces(mesh, count):
    """Weights that are sharded along their first axis need no other communication."""
    rows = NamedSharding(mesh, PartitionSpec(("x", "y")))
    w = {i: jax.device_put(jnp.ones((8, 3 + i % 2)), rows) for i in range(count)}
    step = jax.jit(SIMPLE.update)
    program = step.lower(w, w, SIMPLE.init(w)).compile().as_text()
    found = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program)
    assert set(found) == {"all-reduce"}
    assert len(found) <= 2
