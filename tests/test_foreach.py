"""The foreach engine against `reference.py`, for all options, dtypes and memory layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
from conftest import need
from test_numbers import DECAYS, exponents, random_array

torch = need("torch")

from foreach_steps import layer, normal, step, velocity_like  # noqa: E402

from lars_tree._backends.torch import foreach, tensors  # noqa: E402
from lars_tree._backends.torch.tensors import TorchOps  # noqa: E402
from lars_tree._numerics import formula  # noqa: E402
from lars_tree._numerics.formula import Rule  # noqa: E402

# Where float64 is missing, norms and coefficients are float32. The measured errors are 1.00, 1.00,
# 1.88 (3.53 without float64) and 2.73.
BOUNDS = {"float16": 1 + 1e-6, "bfloat16": 1 + 1e-6, "float32": 2, "float64": 4}
BOUNDS_WITHOUT_FLOAT64 = {**BOUNDS, "float32": 4}


@pytest.fixture(params=[True, False], ids=["float64", "no float64"])
def bounds(request, monkeypatch):
    """The bounds on errors, for a device with float64 and for one without."""
    monkeypatch.setattr(tensors, "has_float64", lambda device: request.param)
    return BOUNDS if request.param else BOUNDS_WITHOUT_FLOAT64


def to_torch(x, name):
    return torch.tensor(x.astype(np.float64)).to(getattr(torch, name))


def flat(x):
    return x.double().flatten().tolist()


def errors(pairs, name, lr=0.1, **options):
    """The errors of one step of many layers, given pairs of numpy arrays."""
    given = [[to_torch(x, name) for x in pair] for pair in pairs]
    old = [(flat(w), flat(g)) for w, g in given]
    step([layer(w, g, lr_before_momentum=lr, **options) for w, g in given])
    for (w, _), (old_w, old_g) in zip(given, old, strict=True):
        exact = reference.lars(old_w, old_g, lr, **options)
        yield reference.worst_error(flat(w), old_w, exact, name)


def skip_missing(name, bounds):
    if name == "float64" and bounds is BOUNDS_WITHOUT_FLOAT64:
        pytest.skip("a device without float64 has no such tensors")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_error_is_bounded_over_the_whole_range_of_exponents(name, decay, bounds):
    skip_missing(name, bounds)
    rng = np.random.default_rng(1)
    grid = list(itertools.product(exponents(name, 10), repeat=2))
    pairs = [[random_array(rng, name, exponent, 5) for exponent in at] for at in grid]
    for lr in (1e-3, 0.1):
        found = dict(zip(grid, errors(pairs, name, lr, decay_lambda=decay), strict=True))
        assert {at: e for at, e in found.items() if e > bounds[name]} == {}


@pytest.mark.parametrize("name", reference.FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {"trust_coefficient": 1e-3},
        {"eps": 1e-8},
        {"eps": 1e-300, "decay_lambda": 1e-200},
        {"adapt": False},
        {"adapt": False, "decay_lambda": 0.01, "grad_scale": 4.0, "maximize": True},
        {"trust_clip": True},
        {"decay_lambda": 0.1, "maximize": True},
        {"grad_scale": 65536.0, "decay_lambda": 1e-4, "eps": 1e-6},
        {"trust_clip": True, "grad_scale": 1e-3, "trust_coefficient": 10.0},
        {"joint_norm": True},
        {"joint_norm": True, "decay_lambda": 1e-4, "trust_clip": True, "eps": 1e-8},
        {"joint_norm": True, "decay_lambda": 3.0, "grad_scale": 0.1},
        {"joint_norm": True, "decay_lambda": 0.1, "maximize": True},
        {"joint_norm": True, "decay_lambda": 1e-200},
    ],
    ids=str,
)
def test_the_error_is_bounded_for_every_option(name, options, bounds):
    skip_missing(name, bounds)
    rng = np.random.default_rng(2)
    grid = list(itertools.product(exponents(name, 7), repeat=2))
    pairs = [[random_array(rng, name, exponent, 5) for exponent in at] for at in grid]
    found = dict(zip(grid, errors(pairs, name, **options), strict=True))
    assert {at: e for at, e in found.items() if e > bounds[name]} == {}


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_elements_of_all_sizes_in_one_layer(name):
    rng = np.random.default_rng(3)
    every = exponents(name, 9)[:-1]
    pairs = [
        [
            np.concatenate([random_array(rng, name, e, 1) for e in rng.permutation(every)])
            for _ in "wg"
        ]
        for _ in range(40)
    ]
    for decay in (0.0, 0.01):
        assert max(errors(pairs, name, decay_lambda=decay)) <= BOUNDS[name]


@pytest.mark.parametrize("decay", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_joint_norm_is_exact_where_the_sum_cancels(name, decay, bounds):
    """To all digits if the norms are wider than the arrays, otherwise by half of the digits."""
    skip_missing(name, bounds)
    rng = np.random.default_rng(9)
    pairs = []
    parts = {"float64": [1e-6, 1e-2], "float32": [1e-3, 1e-2]}.get(name, [0, 1e-12, 1e-6, 1e-2])
    if name == "float32" and bounds is BOUNDS:
        parts = [0, 1e-12, 1e-6, 1e-2]
    if bounds is BOUNDS_WITHOUT_FLOAT64:
        decay = float(np.float32(decay))  # it is rounded
    levels = exponents(name, 7)[1:-1] + [-1030] * (name == "float64")  # subnormal
    for exponent, part in itertools.product(levels, parts):
        w = random_array(rng, name, exponent, 5)
        g = (-decay * w.astype(float) * (1 + part * rng.normal(size=5))).astype(w.dtype)
        if np.isfinite(g.astype(float)).all():
            pairs.append((w, g))
    assert max(errors(pairs, name, joint_norm=True, decay_lambda=decay)) <= bounds[name]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_two_steps_with_momentum(name, nesterov, joint, bounds):
    """With torch's convention, where a second rate scales the velocity, and dampening."""
    skip_missing(name, bounds)
    rng = np.random.default_rng(3)
    options = {"decay_lambda": 0.01, "trust_coefficient": 0.02, "eps": 1e-6, "joint_norm": joint}
    momentum = {"momentum": 0.75, "nesterov": nesterov, "lr_after_momentum": 0.375}
    w = to_torch(random_array(rng, name, 0, 6), name)
    velocity = velocity_like(w)
    for _ in range(2):
        g = to_torch(random_array(rng, name, 3, 6), name)
        old = [flat(x) for x in (w, g, velocity)]
        rates = {"lr_before_momentum": 1.0, "dampening": 0.5}
        step([layer(w, g, velocity, **options, **momentum, **rates)])
        exact = reference.move(
            old[0], old[2], reference.lars(*old[:2], 0.5, **options), 0.75, nesterov, 0.375
        )
        moved = reference.Step(exact.change, exact.w_new, None)
        assert reference.worst_error(flat(w), old[0], moved, name) <= bounds[name]
        precise = 1e-15 if name == "float64" else 1e-6
        expected = np.array([float(x) for x in exact.v_new])
        assert np.abs(flat(velocity) - expected).max() <= precise * np.abs(expected).max()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("decay", "joint"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize(
    ("name", "grid", "tolerance"),
    [("float64", [-960, 0, 1000], 2e-15), ("float32", [-90, 0, 120], 1e-6)],
)
def test_a_velocity_has_its_digits_where_the_weights_hide_them(
    name, grid, tolerance, decay, joint, clip, bounds
):
    skip_missing(name, bounds)
    rng = np.random.default_rng(7)
    options = {"trust_coefficient": 0.1, "decay_lambda": decay, "trust_clip": clip}
    options["joint_norm"] = joint
    for w_exponent, g_exponent in itertools.product([None, *grid], grid):
        w, g = np.abs([random_array(rng, name, e or 0, 5) for e in (w_exponent, g_exponent)])
        w, g = (to_torch(x, name) for x in (w * (w_exponent is not None), g))
        velocity = velocity_like(w)
        exact = reference.lars(flat(w), flat(g), 1.0, **options)
        step([layer(w, g, velocity, lr_before_momentum=1.0, **options)])
        expected = [float(x) for x in exact.u]
        np.testing.assert_allclose(flat(velocity), expected, rtol=tolerance, atol=1e-37)


@pytest.mark.parametrize("options", [{}, {"joint_norm": True}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("name", reference.FORMATS)
def test_layers_with_different_numbers_are_updated_as_if_alone(name, options):
    """The numbers may be floats or 0-d tensors."""
    some = torch.tensor(0.25, dtype=torch.float64)
    numbers = [
        {"momentum": 0.5, "decay_lambda": 0.1, "lr_after_momentum": 0.1},
        {"momentum": 0.25, "decay_lambda": 0.5, "lr_after_momentum": 1.0, "eps": 1e-3},
        {"momentum": some, "decay_lambda": some, "lr_before_momentum": some, "grad_scale": some},
        {"momentum": 0.5, "decay_lambda": 0.0, "adapt": False},
        {"momentum": 0.5, "decay_lambda": 0.5, "adapt": False, "lr_before_momentum": some},
        {"momentum": some, "decay_lambda": some, "trust_clip": True, "dampening": 0.5},
    ]

    def fresh():
        for i, each in enumerate(numbers):
            w, g, v = (normal(3, 4, dtype=getattr(torch, name), seed=3 * i + k) for k in range(3))
            yield layer(w, g, v.to(velocity_like(w).dtype), **options, **each)

    together, alone = list(fresh()), list(fresh())
    step(together)
    for each in alone:
        step([each])
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        torch.testing.assert_close(a.w, b.w, rtol=0, atol=0, msg=str(i))
        torch.testing.assert_close(a.velocity, b.velocity, rtol=0, atol=0)


def test_a_decay_of_zero_leaves_infinite_weights_alone():
    w, velocity = torch.tensor([torch.inf, 1.0]), torch.zeros(2)
    for options in ({"adapt": False}, {"adapt": False, "nesterov": True}):
        step([layer(w, torch.ones(2), velocity, **options)])
        assert w[0] == torch.inf


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"decay_lambda": 0.1}, {"adapt": False}, {"joint_norm": True, "decay_lambda": 0.1}],
    ids=str,
)
def test_nonfinite_numbers_propagate_as_in_the_formula(name, options):
    dtype = getattr(torch, name)
    for bad, at in itertools.product([torch.inf, -torch.inf, torch.nan], ["w", "dcdw", "both"]):
        w, g = normal(4, dtype=dtype), normal(4, dtype=dtype, seed=1)
        if at != "dcdw":
            w[1] = bad
        if at != "w":
            g[2] = bad
        rule = Rule(0.1, **options)
        expected, _ = formula.step(TorchOps(torch), w.double(), g.double(), rule, None, False)
        step([layer(w, g, **options)])
        for same in (torch.isnan, torch.isposinf, torch.isneginf):
            assert same(w).tolist() == same(expected).tolist(), (bad, at)


def is_power_of_two(x):
    return (torch.frexp(x).mantissa == 0.5).all()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_norms_are_scaled(name, joint, bounds):
    skip_missing(name, bounds)
    grid = list(itertools.product(exponents(name, 7), repeat=2))
    rng = np.random.default_rng(4)
    pairs = [[to_torch(random_array(rng, name, e, 5), name) for e in at] for at in grid]
    pairs += [[torch.zeros(3, dtype=pairs[0][0].dtype)] * 2]
    options = {"joint_norm": joint, "decay_lambda": 0.5}
    table = foreach.Foreach([layer(w, g, **options) for w, g in pairs]).norms()
    assert table.dtype == (torch.float64 if bounds is BOUNDS else torch.float32)
    assert table[-1].tolist() == [[0, 1], [0, 1]]
    scaled, scale = table.unbind(-1)
    assert is_power_of_two(scale)
    assert scale.isfinite().all()
    assert (scaled[:-1] > 1e-18).all()
    assert (scaled < 1e10).all()
    for given, row in zip(pairs, table.tolist(), strict=True):
        w, g = ([reference.mpf(x) for x in flat(each)] for each in given)
        if joint:
            g = [a + b / 2 for a, b in zip(g, w, strict=True)]
        for (number, its_scale), x in zip(row, (w, g), strict=True):
            exact = reference.norm(x)
            assert abs(reference.mpf(number) * its_scale - exact) <= 2e-7 * exact


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_the_scale_is_finite_if_the_norm_is_not(name, number, bounds):
    skip_missing(name, bounds)
    x = torch.tensor([1.0, number], dtype=getattr(torch, name))
    for options in ({}, {"joint_norm": True, "decay_lambda": 0.5}):
        ((scaled, scale), _) = foreach.Foreach([layer(x, x, **options)]).norms()[0]
        assert not scaled.isfinite()
        assert scale.isfinite()


def test_the_scale_of_a_sum_that_cancels_is_1(bounds):
    w = torch.full((3,), 8.0)
    engine = foreach.Foreach([layer(w, -4 * torch.ones(3), joint_norm=True, decay_lambda=0.5)])
    assert engine.norms()[0, 1].tolist() == [0, 1]


LAYOUTS = {
    "0-d": lambda x: x.flatten()[5],
    "empty": lambda x: x[:0],
    "transposed": lambda x: x.permute(2, 0, 1),
    "strided": lambda x: x[::2, :, 1::2],
    "row": lambda x: x[1, 2],
}


@pytest.mark.parametrize("limit", [2**25, 256])
@pytest.mark.parametrize("options", [{}, {"joint_norm": True}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("keep", [None, 0.0])
def test_any_layout_and_any_mix_of_dtypes(options, limit, keep, monkeypatch):
    """Strided tensors get the values of contiguous copies, and nothing else is written."""
    monkeypatch.setattr(foreach, "LIMIT", limit)
    views, copies, bases = [], [], []
    dtypes = [(w, g) for w in reference.FORMATS for g in (w, "float32", "float64")]
    for (w_name, g_name), view in itertools.product(dtypes, LAYOUTS.values()):
        w_dtype, g_dtype = getattr(torch, w_name), getattr(torch, g_name)
        base = [normal(4, 4, 6, seed=k) for k in range(3)]
        base[0], base[1] = base[0].to(w_dtype), base[1].to(g_dtype)
        base[2] = base[2].to(velocity_like(base[0]).dtype)
        rule = {"decay_lambda": 0.1, "momentum": 0.5, **options}
        bases.append((base, view, [x.clone() for x in base]))
        views.append(layer(*map(view, base), **rule))
        copies.append(layer(*(view(x).clone().contiguous() for x in base), **rule))
    step(views, None if keep is None else torch.tensor(keep))
    step(copies)
    # Parts of other shapes give norms with other rounding errors.
    tolerance = {"rtol": 0, "atol": 0} if limit == 2**25 else {}
    for one, other in zip(views, copies, strict=True):
        torch.testing.assert_close(one.w, other.w, **tolerance)
        torch.testing.assert_close(one.velocity, other.velocity, **tolerance)
    for base, view, old in bases:
        changed = torch.zeros(base[0].shape, dtype=torch.bool)
        view(changed).fill_(True)
        for x, y, may_change in zip(base, old, (changed, False & changed, changed), strict=True):
            assert torch.equal(x[~may_change], y[~may_change])
            assert not may_change.any() or not torch.equal(x[may_change], y[may_change])


@pytest.mark.parametrize("options", [{}, {"joint_norm": True}], ids=str)
@pytest.mark.parametrize("name", reference.FORMATS)
def test_a_layer_in_many_parts(name, options, monkeypatch, bounds):
    """Elements of all sizes are in different parts, whose norms are out of range of each other."""
    skip_missing(name, bounds)
    monkeypatch.setattr(foreach, "LIMIT", 512)
    rng = np.random.default_rng(6)
    for order in ([0, 1, 2], [2, 1, 0]):
        every = exponents(name, 9)[3:-3]
        pair = [
            np.concatenate([random_array(rng, name, every[k], 40) for k in order]) for _ in "wg"
        ]
        pair[0][:40] = 0
        low = random_array(rng, name, exponents(name, 9)[1], 40)  # next to parts that are 0
        pairs = [pair, [np.concatenate([low * (k == 0) for k in order]) for _ in "wg"]]
        assert max(errors(pairs, name, decay_lambda=0.1, **options)) <= bounds[name]


@pytest.mark.parametrize("joint", [False, True])
def test_the_norms_of_whole_layers_update_their_shards(joint):
    """Each shard is updated as if it were in one process with the others."""
    options = {"joint_norm": joint, "decay_lambda": 0.1, "momentum": 0.5, "lr_after_momentum": 0.1}

    def fresh():
        g = normal(6, 4, seed=1)
        g[:3] *= 1e-30
        return [normal(6, 4), g, normal(6, 4, seed=2)]

    whole, sharded = fresh(), fresh()
    engine = foreach.Foreach([layer(*whole, **options)])
    norms = engine.norms()
    engine.write(norms, None)
    shards = foreach.Foreach([layer(*(x[k : k + 3] for x in sharded), **options) for k in (0, 3)])
    parts = shards.norms()
    together = torch.linalg.vector_norm(parts[..., 0] * parts[..., 1], dim=0)
    torch.testing.assert_close(together, norms[0, :, 0] * norms[0, :, 1])
    shards.write(norms.expand(2, 2, 2), None)
    for x, y in zip(whole, sharded, strict=True):
        torch.testing.assert_close(x, y, rtol=0 if not joint else 1e-6, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"decay_lambda": 0.1, "nesterov": True}, {"joint_norm": True, "decay_lambda": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize("name", reference.FORMATS)
def test_a_step_that_is_skipped_changes_no_bit(name, has_velocity, options):
    w = normal(8, dtype=getattr(torch, name))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize]
    w[0], w[1], w[2] = torch.inf, torch.nan, -0.0
    w.view(integer)[3] = -7  # a NaN with a payload
    velocity = None
    if has_velocity:
        velocity = w.to(velocity_like(w).dtype)
        velocity.view(torch.int64 if name == "float64" else torch.int32)[3] = -7
    for number in (torch.nan, torch.inf, 1.0):
        old = [x.clone() for x in (w, velocity) if x is not None]
        g = normal(8, dtype=w.dtype, seed=1)
        g[4] = number
        for flag in (torch.tensor(1.0), torch.tensor(True)):
            out = torch.zeros_like(w)
            step([layer(w, g, velocity, momentum=0.5, **options)], flag)
            step([layer(w, g, velocity, momentum=0.5, out=out, **options)], flag)
            new = [x for x in (w, velocity) if x is not None]
            for x, y in [*zip(old, new, strict=True), (old[0], out)]:
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
