"""Updates inside jax.shard_map: norms over the mesh axes in `axis_name`, and refused arguments."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars

from lars_tree import BackendError, Container, LeafError, OptionError, lars_update
from lars_tree._core.options import DEFAULTS, resolve
from lars_tree._numerics.formula import mesh_axes
from lars_tree._tree.structure import leaves
from lars_tree.report import trust_ratios

jax = need("jax")
jnp = jax.numpy

from jax.sharding import AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

# For each leaf: its shape, its sharding over a mesh of two by two, axis_name and layer_axis.
LEAVES = {
    "rows": ((8, 3), P("x"), "x", None),
    "both": ((4, 6), P("x", "y"), ("x", "y"), None),
    "rows_over_all": ((8, 3), P(("x", "y")), ("y", "x"), None),
    "replicated": ((5,), P(), None, None),
    "layers": ((8, 3), P("x"), (), 0),
    "across": ((8, 6), P("x", "y"), ("x", "y"), 1),
    "plain": ((8,), P("y"), None, None),
}
SPECS = {name: spec for name, (_, spec, *_) in LEAVES.items()}
AXES = {name: axes for name, (*_, axes, _) in LEAVES.items()}
# Each layer of this leaf is sharded over x, but not over y.
AXES["across"] = ("x", ())
OPTIONS = {  # for sharded weights and for whole weights
    "decay_lambda": 0.01,
    "trust_clip": {name: name == "both" for name in LEAVES},
    "joint_norm": {name: name in ("both", "rows") for name in LEAVES},
    "adapt": {name: name != "plain" for name in LEAVES},
    "layer_axis": {name: axis for name, (*_, axis) in LEAVES.items()},
}
ROWS = P("x")
CHECKED = pytest.mark.parametrize("checked", [True, False])


def tree(seed, names=LEAVES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=LEAVES[name][0]).astype(dtype) for name in names}


def cut(names, options):
    """The options or specs of the named leaves only."""
    some = lambda x: {name: x[name] for name in names}  # noqa: E731
    if options is SPECS:
        return some(SPECS)
    return {key: some(x) if isinstance(x, dict) else x for key, x in options.items()}


def mesh(*shape):
    names = ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def on_mesh(fn, in_specs, out_specs, shape=(2, 2), checked=True):
    """Compile fn to run on the shards of its arguments."""
    sharded = jax.shard_map(
        fn, mesh=mesh(*shape), in_specs=in_specs, out_specs=out_specs, check_vma=checked
    )
    return compiled(sharded)


def compiled(fn):
    """Compile fn quickly, with few optimizations."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def on_line(fn, *args, checked=True, eager=False, specs=ROWS, out=ROWS):
    """Run fn on shards of its arguments (by default of their rows), on four devices."""
    made = jax.shard_map(fn, mesh=mesh(4), in_specs=specs, out_specs=out, check_vma=checked)
    return (made if eager else compiled(made))(*args)


def close(actual, expected, rtol=1e-6):
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype
        np.testing.assert_allclose(actual[name], x, rtol, 1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("checked", "names"), [(True, list(LEAVES)), (False, ["both", "replicated", "across"])]
)
def test_an_optimizer_on_shards_moves_as_on_whole_weights(checked, names):
    make = {"momentum": 0.5, "nesterov": True, **OPTIONS}
    whole = Lars(0.1, **cut(names, make))
    sharded = Lars(0.1, **cut(names, {"axis_name": AXES, **make}))
    w, g, weights = tree(0, names), tree(1, names), cut(names, SPECS)
    step = jax.jit(sharded.update)  # tests a jitted step inside shard_map

    def run(w, g):
        once = lambda x, _: (step(x[0], g, x[1]), None)  # noqa: E731
        return jax.lax.scan(once, (w, sharded.init(w)), None, length=3)[0]

    states = Container(step=P(), skipped=P(), velocity=weights)
    new, state = on_mesh(run, (weights, weights), (weights, states), checked=checked)(w, g)
    expected = whole.init(w)
    for _ in range(3):
        w, expected = whole.update(w, g, expected)
    close(new, w, 3e-6)
    close(state.velocity, expected.velocity, 3e-6)
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("checked", np.float32),
        ("checked", np.complex64),
        ("checked", np.float16),
        ("unchecked", np.float32),
        ("vmap", np.float32),
        ("pmap", np.float32),
    ],
)
def test_every_way_to_map_over_a_named_axis(way, dtype):
    w, g = (tree(seed)["rows"].astype(dtype) for seed in (0, 1))
    if dtype == np.complex64:
        w, g = w + 1j * g, g - 2j * w
    step = lambda w, g: lars_update({"a": w}, {"a": g}, 0.1, axis_name="x")["a"]  # noqa: E731
    if way in ("vmap", "pmap"):
        parts = [x.reshape(4, 2, 3) for x in (w, g)]
        mapped = jax.pmap(step, axis_name="x")
        if way == "vmap":
            mapped = compiled(jax.vmap(step, axis_name="x"))
        new = mapped(*parts).reshape(8, 3)
    else:
        new = on_line(step, w, g, checked=way != "unchecked")
    expected = lars_update(w, g, 0.1)
    assert new.dtype == expected.dtype
    np.testing.assert_allclose(new, expected, 1e-3 if dtype == np.float16 else 1e-6)


def test_an_axis_of_the_mesh_may_be_left_to_the_compiler():
    w, g = tree(0)["both"], tree(1)["both"]
    step = jax.shard_map(
        lambda w, g: lars_update(w, g, 0.1, axis_name="x"),
        mesh=mesh(2, 2), in_specs=P("x"), out_specs=P("x"), axis_names={"x"},
    )  # fmt: skip
    grid = jax.NamedSharding(mesh(2, 2), P("x", "y"))
    new = jax.jit(step)(*(jax.device_put(x, grid) for x in (w, g)))
    np.testing.assert_allclose(new, lars_update(w, g, 0.1), 1e-6)


def test_shards_of_all_sizes_are_scaled_together():
    """Squares must neither overflow in one shard nor underflow in another."""
    w = np.array([3e30, 4e30, 1e-30, 0], np.float32)
    g = np.array([0, 1e-38, 4e-30, 3e-30], np.float32)
    new = on_line(lambda w, g: lars_update(w, g, 0.1, axis_name="x"), w, g)
    np.testing.assert_allclose(new, lars_update(w, g, 0.1), 1e-6)


@pytest.mark.parametrize("rest", [1.0, [1.0, 2.0, 3.0]])
def test_gradients_that_broadcast_count_on_each_device(rest):
    w = tree(0)["both"][:, :3]
    number = rest if rest == 1 else jnp.asarray(rest)
    new = on_line(lambda w: lars_update(w, number, 0.1, axis_name="x"), w)
    np.testing.assert_allclose(new, lars_update(w, np.asarray(rest), 0.1), 1e-6)


def test_gradients_may_be_sharded_over_fewer_axes_than_weights():
    w, g = tree(0)["both"][:, :3], tree(1)["both"][:2, :3]
    step = lambda w, g: lars_update(w, g, 0.1, axis_name=("x", "y"))  # noqa: E731
    new = on_mesh(step, (P(("y", "x")), P("x")), P(("y", "x")))(w, g)
    np.testing.assert_allclose(new, lars_update(w, np.tile(g, (2, 1)), 0.1), 1e-6)


def test_the_step_on_shards_is_differentiable():
    with jax.enable_x64(True):
        args = [*(jnp.asarray(tree(seed, ["rows"], float)["rows"]) for seed in (0, 1)), 0.1]

        def step(w, g, lr, axes=None):
            return lars_update(w, g, lr, decay_lambda=0.1, stop_gradients=False, axis_name=axes)

        def slopes(step):
            return compiled(jax.grad(lambda *args: (step(*args) ** 3).sum(), (0, 1, 2)))(*args)

        expected = slopes(step)
        for checked in (True, False):
            sharded = jax.shard_map(
                lambda *args: step(*args, axes="x"),
                mesh=mesh(4), in_specs=(P("x"), P("x"), P()), out_specs=P("x"), check_vma=checked,
            )  # fmt: skip
            for x, y in zip(slopes(sharded), expected, strict=True):
                np.testing.assert_allclose(x, y, 1e-10)


def test_gradients_are_finite_where_shards_are_zero():
    w = np.float32([0, 0, 0, 5])

    step = jax.shard_map(
        lambda w, g: lars_update(w, g, 0.1, stop_gradients=False, axis_name="x"),
        mesh=mesh(4), in_specs=P("x"), out_specs=P("x"),
    )  # fmt: skip
    slopes = compiled(jax.grad(lambda w, g: step(w, g).sum(), (0, 1)))
    for args in ((w, w), (w, 0 * w), (0 * w, w)):
        assert all(np.isfinite(x).all() for x in slopes(*args))


@CHECKED
def test_all_devices_skip_together(checked):
    names = ("rows", "replicated", "layers")
    axes, specs = cut(names, {"axis_name": AXES})["axis_name"], cut(names, SPECS)
    optimizer = Lars(0.1, nonfinite="skip", axis_name=axes)
    step = lambda w, g: optimizer.update(w, g, optimizer.init(w))  # noqa: E731
    states = Container(step=P(), skipped=P(), velocity=specs)
    step = on_mesh(step, (specs, specs), (specs, states), checked=checked)
    for bad in (*names, None):
        w, g = tree(0, names), tree(1, names)
        expected = lars_update(w, g, 0.1) if bad is None else w
        if bad is not None:
            g[bad].flat[-1] = np.nan  # on one device only, if the leaf is sharded
        new, state = step(w, g)
        assert (int(state.step), int(state.skipped)) == ((0, 1) if bad else (1, 0))
        for name in ("rows", "replicated"):
            np.testing.assert_allclose(new[name], expected[name], 1e-6)
        assert np.array_equal(new["layers"], w["layers"]) == (bad is not None)
        # All replicas are identical.
        for x in (new["replicated"], state.step):
            assert len({np.asarray(shard.data).tobytes() for shard in x.addressable_shards}) == 1


def test_trust_ratios_on_shards():
    out = {"both": P(), "layers": P("x"), "across": P("y")}
    specs, options = cut(out, SPECS), cut(out, {"axis_name": AXES, **OPTIONS})
    w, g = tree(0, out), tree(1, out)
    ratios = lambda w, g: trust_ratios(w, g, 0.1, **options)  # noqa: E731
    found = on_mesh(ratios, (specs, specs), out)(w, g)
    for name, x in trust_ratios(w, g, 0.1, **cut(out, OPTIONS)).items():
        np.testing.assert_allclose(found[name], x, 1e-6, err_msg=name)


def test_layers_of_their_own_on_each_device():
    """For example, each device may train its own network of a population."""
    w, g = tree(0)["rows"], tree(1)["rows"]
    new = on_line(lambda w, g: lars_update(w, g, 0.1, axis_name=()), w, g)
    parts = zip(np.split(w, 4), np.split(g, 4), strict=True)
    expected = np.concatenate([lars_update(*pair, 0.1) for pair in parts])
    np.testing.assert_allclose(new, expected, 1e-6)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("make", "axes"),
    [
        (lambda a, b: {"a": a, "b": b}, {"a": "x", "b": None}),
        (lambda a, b: [a, b], ["x", None]),
        (lambda a, b: (a, b), ["x", None]),
        (lambda a, b: (a, b), [("x",), ()]),
        (lambda a, b: {"n": {"a": a}, "b": [b]}, {"n": "x", "b": None}),
        (lambda a, b: {"n": (a, a), "b": [b]}, Container(n=("x",), b=[None])),
        (Pair, Pair("x", None)),
        (lambda a, b: [Pair(a, a), b], [Pair("x", ("x",)), None]),
    ],
)
def test_a_tuple_is_a_value_and_other_nodes_are_a_prefix(make, axes):
    w = make(np.ones(1), np.ones(2))
    rules = resolve(w, {**DEFAULTS, "lr": 0.1, "axis_name": axes}, len(leaves(w)))
    for x, rule in zip(leaves(w), rules, strict=True):
        assert mesh_axes(rule) == ({"x"} if x.size == 1 else set())


W, G = {"a": {"b": np.ones((4, 2), np.float32)}}, {"a": {"b": np.ones((4, 2), np.float32)}}


def refused(step, kind, says, *args, specs=ROWS, **how):
    """Assert that a step on shards fails, with the path and the texts `says` in the message."""
    with pytest.raises(kind) as caught:
        on_line(step, *(args or (W, G)), specs=specs, **how)
    assert caught.value.paths == (("a", "b"),), caught.value
    for text in says:
        assert text in str(caught.value)


@pytest.mark.parametrize("eager", [True, False])
def test_sharded_weights_without_the_option_are_refused(eager):
    says = ["'x'", "a/b", "axis_name", "()"]
    update = lambda w, g: lars_update(w, g, 0.1)  # noqa: E731
    refused(update, OptionError, says, eager=eager)
    optimizer = Lars(0.1)
    move = lambda w, g: optimizer.update(w, g, optimizer.init(w))[0]  # noqa: E731
    refused(move, OptionError, says, eager=eager)
    refused(lambda w, g: trust_ratios(w, g, 0.1), OptionError, says, eager=eager)
    # The option names one axis, but the weights also vary over another axis.
    both = lambda w, g: lars_update(w, g, 0.1, axis_name="x")  # noqa: E731
    with pytest.raises(OptionError, match="got 'x', and weights that vary over 'x' and 'y'"):
        on_mesh(both, P(("x", "y")), P(("x", "y")))(W, G)


def test_steps_without_norms_need_no_option():
    new = on_line(lambda w, g: lars_update(w, g, 0.1, adapt=False), W, G)
    np.testing.assert_allclose(new["a"]["b"], 0.9, 1e-6)


def test_gradients_that_are_not_averaged_are_refused():
    says = ["dcdw", "'x'", "a/b", "pmean"]
    update = lambda w, g: lars_update(w, g, 0.1)  # noqa: E731
    how = {"specs": (P(), P("x")), "out": P()}
    whole = {"a": {"b": np.ones((1, 2), np.float32)}}
    refused(update, BackendError, says, whole, G, **how)
    mean = lambda w, g: update(w, jax.lax.pmean(g, "x"))  # noqa: E731
    on_line(mean, whole, G, **how)


@pytest.mark.parametrize("name", ["lr", "decay_lambda", "eps", "momentum"])
def test_options_that_differ_between_devices_are_refused(name):
    def step(w, rate):
        options = {"lr": 0.1, name: rate[0]}
        optimizer = Lars(options.pop("lr"), **options)
        return optimizer.update(w, w, optimizer.init(w))[0]

    rates = np.float32([0.1, 0.2, 0.3, 0.4])
    refused(step, BackendError, [name, "'x'"], W, rates, specs=(P(), P("x")), out=P())


def test_a_velocity_that_differs_between_devices_is_refused():
    optimizer = Lars(0.1)

    def step(w, velocity):
        state = optimizer.init(w)
        return optimizer.update(w, w, state | {"velocity": velocity})[0]

    whole = {"a": {"b": np.ones((1, 2), np.float32)}}
    refused(step, BackendError, ["state", "'x'"], whole, G, specs=(P(), P("x")), out=P())


def test_sums_over_an_axis_with_the_same_weights_on_all_devices_are_refused():
    update = lambda w, g: lars_update(w, g, 0.1, axis_name="x")  # noqa: E731
    says = ["'x'", "are replicated: leave it out"]
    refused(update, OptionError, says, specs=P(), out=P())


@pytest.mark.parametrize("checked", [True, False])
def test_unknown_axes_are_refused(checked):
    update = lambda w, g: lars_update(w, g, 0.1, axis_name=("x", "nope"))  # noqa: E731
    refused(update, OptionError, ["'nope'", "shard_map"], checked=checked)
    with pytest.raises(OptionError, match=r"a/b: expected an axis .*shard_map, got 'nope'"):
        jax.jit(lambda w, g: lars_update(w, g, 0.1, axis_name="nope"))(W, G)


def test_partial_sums_are_refused():
    if not hasattr(jax.typeof(jnp.ones(1)), "manual_axis_type"):
        pytest.skip("JAX before 0.10 does not tell partial sums from others")

    def step(w, g):
        g = jax.tree.map(lambda x: jax.lax.pcast(x, "x", to="unreduced"), g)
        return lars_update(w, g, 0.1)

    whole = {"a": {"b": np.ones((1, 2), np.float32)}}
    says = ["'x'", "dcdw", "partial sums"]
    refused(step, LeafError, says, whole, G, specs=(P(), P("x")), out=P())


@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
def test_arrays_outside_of_shard_map_have_no_axes(library):
    module = need("jax.numpy" if library == "jax" else library)
    make = getattr(module, "asarray", None) or module.array
    w = {"a": {"b": make(np.ones(3))}, "c": make(np.ones(3))}
    for axes in ("x", ("x", "y"), {"a": "x", "c": None}):
        for step in (
            lambda: lars_update(w, w, 0.1, axis_name=axes),  # noqa: B023
            lambda: Lars(0.1, axis_name=axes).update(w, w, Lars(0.1).init(w)),  # noqa: B023
            lambda: trust_ratios(w, w, 0.1, axis_name=axes),  # noqa: B023
        ):
            with pytest.raises(OptionError, match=r"axis_name does not fit.*\n +a/b: .*'x'") as e:
                step()
            assert e.value.argument == "axis_name"
    expected = lars_update(w, w, 0.1)
    for axes in (None, (), {"a": None, "c": ()}):
        new = lars_update(w, w, 0.1, axis_name=axes)
        assert np.asarray(new["c"]).tobytes() == np.asarray(expected["c"]).tobytes()


@pytest.mark.parametrize(
    "axes", [0, True, bytearray(b"x"), ("x", None), (("x",),), ("x", []), np.int32(1), {"x"}]
)
def test_invalid_axis_names_are_refused(axes):
    w = {"a": {"b": np.ones(3)}}
    for value, path in ((axes, ""), ({"a": {"b": axes}}, "a/b")):
        says = "axis_name has an invalid value"
        with pytest.raises(OptionError, match=says) as caught:
            lars_update(w, w, 0.1, axis_name=value)
        assert "the name of a mesh axis, a tuple of names, or None" in str(caught.value)
        assert path in str(caught.value)
        with pytest.raises(OptionError, match=says):
            Lars(0.1, axis_name=value)
