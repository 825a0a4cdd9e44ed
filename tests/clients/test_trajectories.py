"""The published recipes take the same steps as other implementations of them, over many steps.

The gradients depend on the weights, so a difference in one step changes all later steps.
"""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need, need_installed
from peers import ivy_with_numpy

import lars_tree as lt
from lars_tree import schedules

STEPS = 60
SHAPES = {"conv": (4, 3, 3, 3), "dense": (6, 5), "bias": (6,), "scale": (4,)}
KERNELS = {name: len(shape) > 1 for name, shape in SHAPES.items()}
RNG = np.random.default_rng(0)
START = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
TARGET = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
NOISE = {name: RNG.normal(size=(STEPS, *shape)) for name, shape in SHAPES.items()}


def gradient(name, w, step):
    """That of a loss that is not quadratic, with noise."""
    return np.tanh(w - TARGET[name]) + 0.1 * NOISE[name][step]


def close(actual, expected):
    """Equal up to rounding errors; the steps themselves are more than a million times larger."""
    for name, w in actual.items():
        np.testing.assert_allclose(w, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert np.abs(w - START[name]).max() > 1e-3


def differ(actual, expected):
    """A recipe with one setting changed is told apart."""
    with pytest.raises(AssertionError):
        close(actual, expected)


def timm_lars():
    need_installed("timm")
    from benchmarks.contestants import timm_lars

    return timm_lars()


def by_torch(optimizer, groups, factor=None, then=None, **options):
    """The weights after all steps.

    Args:
        groups: The options of the group of the kernels (True), and of all others (False).
        factor: The rate by step, as a factor of lr.
        then: An optimizer of another package, which loads the state for the second half.
    """
    torch = need("torch")
    weights = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in START.items()}

    def parameter_groups():
        for kernels, group in groups.items():
            yield {
                "params": [weights[name] for name in SHAPES if KERNELS[name] is kernels],
                **group,
            }

    opt = optimizer(parameter_groups(), **options)
    factor = factor or (lambda step: 1.0)
    for step in range(STEPS):
        if then and step == STEPS // 2:
            state, opt = opt.state_dict(), then(parameter_groups())
            opt.load_state_dict(state)
        for name, p in weights.items():
            p.grad = torch.tensor(gradient(name, p.detach().numpy(), step))
        for group in opt.param_groups:
            group["lr"] = options["lr"] * factor(step)
        opt.step()
    return {name: p.detach().numpy() for name, p in weights.items()}


def gradients(w, step):
    return {name: gradient(name, np.asarray(x), step) for name, x in w.items()}


def by_trees(opt, w=START, state=None, steps=range(STEPS)):
    w = lt.Container(w).map(np.copy)
    state = state or opt.init(w)
    for step in steps:
        w, state = opt.update(w, gradients(w, step), state)
    return w


def by_optax(transform, steps=range(STEPS)):
    """The weights and the state after these steps."""
    jax, optax = need("jax"), need("optax")
    with jax.enable_x64(True):
        w = jax.tree.map(jax.numpy.asarray, START)
        state = transform.init(w)
        for step in steps:
            g = jax.tree.map(jax.numpy.asarray, gradients(w, step))
            updates, state = transform.update(g, state, w)
            w = optax.apply_updates(w, updates)
        return jax.tree.map(np.asarray, w), state


def ours(groups, factor=None, **options):
    need("torch")
    from lars_tree.torch import Lars

    return by_torch(Lars, groups, factor, eps=0.0, **options)


def excluded(decay):
    """The groups that `param_groups` makes for these weights."""
    return {True: {"weight_decay": decay}, False: {"weight_decay": 0.0, "adapt": False}}


def test_the_recipe_of_the_paper_is_that_of_pytorch_optimizer():
    """Polynomial decay of power 2 after a linear warm-up. Its LARS adapts kernels only."""
    peer = need("pytorch_optimizer").LARS
    factor = schedules.Polynomial(1.0, total_steps=STEPS, warmup_steps=6)
    theirs = {True: {"weight_decay": 5e-4}, False: {"weight_decay": 0.0}}
    options = {"lr": 2.0, "momentum": 0.9, "trust_coefficient": 0.01}
    expected = by_torch(peer, theirs, factor, **options)
    close(ours(excluded(5e-4), factor, **options), expected)
    differ(ours(excluded(5e-4), factor, **options | {"trust_coefficient": 0.011}), expected)
    differ(ours({True: {"weight_decay": 5e-4}, False: {}}, factor, **options), expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_recipe_of_simclr_is_that_of_optax(nesterov):
    """Cosine decay; the velocity contains the rate, and the norm is that of g + decay * w."""
    optax = need("optax")
    schedule = schedules.Cosine(0.3 * 4096 / 256, total_steps=STEPS, warmup_steps=6)
    peer = optax.lars(
        lambda count: schedule(count),
        1e-2,
        weight_decay_mask=KERNELS,
        trust_ratio_mask=KERNELS,
        momentum=0.9,
        nesterov=nesterov,
    )
    options = {
        "momentum": 0.9,
        "nesterov": nesterov,
        "weight_decay": {name: 1e-2 * kernel for name, kernel in KERNELS.items()},
        "adapt": KERNELS,
        "eps": 0.0,
    }
    expected, _ = by_optax(peer)
    close(by_trees(lt.Lars(schedule, joint_norm=True, **options)), expected)
    differ(by_trees(lt.Lars(schedule, **options)), expected)


def test_the_recipe_of_byol_is_that_of_the_parts_of_optax():
    """Like SimCLR, but the rate multiplies the whole buffer."""
    optax = need("optax")
    factor = schedules.Cosine(1.0, total_steps=STEPS, warmup_steps=6)
    peer = optax.chain(
        optax.add_decayed_weights(1e-2, KERNELS),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.01), KERNELS),
        optax.trace(0.9),
        optax.scale_by_schedule(lambda count: -3.2 * factor(count)),
    )
    options = {"lr": 3.2, "momentum": 0.9, "trust_coefficient": 0.01}
    expected, _ = by_optax(peer)
    close(ours(excluded(1e-2), factor, joint_norm=True, **options), expected)
    differ(ours(excluded(1e-2), factor, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False},
        {"nesterov": True},
        {"dampening": 0.1},
        {"trust_clip": True},
    ],
    ids=str,
)
def test_the_recipe_of_timm(options):
    """timm adapts the group with decay only, which adapt="decayed" does too."""
    groups = {True: {"weight_decay": 1e-2}, False: {"weight_decay": 0.0}}
    factor = schedules.Cosine(1.0, total_steps=STEPS, warmup_steps=6)
    options = {"lr": 0.05 if "trust_clip" in options else 2.0, "momentum": 0.9, **options}
    expected = by_torch(timm_lars(), groups, factor, trust_coeff=0.02, eps=0, **options)
    given = {"trust_coefficient": 0.02, **options}
    close(ours(groups, factor, adapt="decayed", **given), expected)
    differ(ours(groups, factor, **given), expected)


def test_the_recipe_of_ivy():
    """Without decay, whose rule differs. ivy does not move zero weights; here, there are none."""
    need_installed("ivy")
    ivy = ivy_with_numpy()
    w, expected = dict(START), {name: ivy.array(x) for name, x in START.items()}
    for step in range(STEPS):
        g = {name: gradient(name, np.array(x), step) for name, x in expected.items()}
        expected = {
            name: ivy.lars_update(x, ivy.array(g[name]), 0.05) for name, x in expected.items()
        }
        w = lt.lars_update(w, {name: gradient(name, x, step) for name, x in w.items()}, 0.05)
    close(w, {name: np.array(x) for name, x in expected.items()})
    differ(w, {name: np.array(x) * (1 + 1e-8) for name, x in expected.items()})


@pytest.mark.parametrize("peer", ["SGD", "timm", "pytorch_optimizer"])
def test_a_run_of_another_optimizer_is_continued_from_its_state(peer):
    """The groups have what the state does not contain."""
    torch = need("torch")
    from lars_tree.torch import Lars

    need_installed("timm", "pytorch_optimizer")
    decays = {True: {"weight_decay": 1e-2}, False: {"weight_decay": 0.0}}
    options = {"lr": 0.5, "momentum": 0.9}
    optimizer, given = {
        "SGD": (torch.optim.SGD, {}),
        "timm": (timm_lars(), {"trust_coeff": 0.02, "eps": 1e-8}),
        "pytorch_optimizer": (need("pytorch_optimizer").LARS, {"trust_coefficient": 0.02}),
    }[peer]
    adapt = {"SGD": False, "timm": "decayed", "pytorch_optimizer": "decayed"}[peer]
    eps = 1e-8 if peer == "timm" else 0.0

    def then(groups):
        return Lars(groups, adapt=adapt, trust_coefficient=0.02, eps=eps)

    expected = by_torch(optimizer, decays, **options, **given)
    close(by_torch(optimizer, decays, then=then, **options, **given), expected)

    def then_without_state(groups):
        opt = then(groups)
        opt.load_state_dict = lambda state: opt.param_groups[0].update(weight_decay=1e-2)
        return opt

    differ(by_torch(optimizer, decays, then=then_without_state, **options, **given), expected)


def test_a_run_of_optax_is_continued_from_its_trace():
    """docs/coming-from.md: its trace is the negative velocity."""
    optax = need("optax")
    half = range(STEPS // 2), range(STEPS // 2, STEPS)
    expected, _ = by_optax(optax.lars(0.5, 1e-2, trust_coefficient=0.02))
    w, trained = by_optax(optax.lars(0.5, 1e-2, trust_coefficient=0.02), half[0])
    opt = lt.Lars(0.5, weight_decay=1e-2, trust_coefficient=0.02, eps=0.0, joint_norm=True)
    state = opt.init(w)
    differ(by_trees(opt, w, state, half[1]), expected)
    state["velocity"] = {
        name: -np.asarray(x) for name, x in optax.tree.get(trained, "trace").items()
    }
    close(by_trees(opt, w, state, half[1]), expected)
