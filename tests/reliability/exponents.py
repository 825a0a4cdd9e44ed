"""Exponents: each step is within 1 ulp of the exact one, and within 4 ulp in float64.

The exact step is that of `tests/reference.py`: the formula of the rule in mpmath, with 400 bits.
Errors are in ulp of the largest of |w|, |u|, |v| and the change of w at each element, where u is
the step and v the velocity. The page shows the largest error of all attempts, which is that of
float64. In float16, bfloat16 and float32 every error is at most 1 ulp, and at most half an ulp of
the result where the result is the largest of these, because everything before the last rounding is
computed in double. A pair is an exponent of the weights and one of the gradients, from a grid of
3,025 pairs over the whole range of each format: from the smallest subnormal number to the largest
number, and with arrays of zeros. The corners of the grid come first. In every second pair with
`joint_norm` and decay, g is about -decay * w.

What does not survive, and why:

* Under `jax.jit`, XLA flushes subnormal numbers to zero, and numbers near the ends of the range of
  float64 may leave it: the row has a grid of the other numbers.
* XLA and torch round double to float16 and bfloat16 through float32. Under `jax.jit` and with
  autograd, a result that is almost halfway between two adjacent numbers may be rounded to the
  wrong one.
* `lars_tree.torch.Lars` rounds the velocity before it multiplies it by the learning rate, and a
  learning rate above 1 makes that error larger. If the float64 weights and steps are subnormal, the
  error is at most 4 ulp times the learning rate.
* Operations on whole arrays, as in autograd, overflow where float64 weights or gradients exceed
  8e307; pairs with such numbers are left out of the row.
* With `joint_norm`, elements of a float64 layer that are more than 10^440 times smaller than its
  largest element may be lost in steps that are longer than the weights.
* A result that is out of the range of float64 may be NaN instead of infinite.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import reference
from conftest import need, unit_lars
from random_steps import as_jax, as_parameter, as_torch, drawn, read, velocity_name
from test_numbers import BOUNDS, exponents, random_array

from lars_tree import lars_update
from tests.reliability.attack import Attempts, attack

DECAYS = [0.0, 0.0, 0.0, 1e-4, 0.1, 3.0]
RATES = [1e-3, 0.1, 1.0, 3.0]
SPREAD = reference.mpf(10) ** 440  # of elements in a joint gradient
ONE_ROUNDING = 0.5 + 1e-6  # in ulp of the result, after a computation in double
TWO_ROUNDINGS = 0.5 + 2.0**-11  # of double to float32 to 16 bits, as by torch and XLA
SMALLEST_NORMAL = 2.0**-1022
GRID = 55  # levels of each array: 3,025 pairs for each format
SIZE = 3  # of the arrays
NEEDS = ("mpmath", "ml_dtypes")
PAIRS: dict[str, Any] = {"count": 4 * GRID**2, "short": 200, "seconds": 120, "needs": NEEDS}

Pair = tuple[str, np.ndarray, np.ndarray]
Generator = np.random.Generator


def elements(rng: Generator, name: str, exponent: int | None) -> np.ndarray:
    """Random elements with about this exponent; zeros if it is None."""
    x = random_array(rng, name, exponent or 0, SIZE)
    return x if exponent is not None else 0 * x


def grid(rng: Generator, normal: bool = False) -> Iterator[Pair]:
    """Weights and gradients for each pair of exponents of each format.

    With `normal`, the exponents are those of normal numbers. The order is random, but the corners
    of the grid come first: weights and gradients that are zero, smallest, largest or any other.
    """
    pairs: list[tuple[str, Any, Any]] = []
    ends: dict[str, set[int | None]] = {}
    corners: dict[Any, int] = {}
    for name in BOUNDS:
        levels = [None, *exponents(name, GRID - 1)]
        if normal:
            bits, smallest, largest = reference.FORMATS[name]
            levels = np.linspace(smallest + bits + 3, largest - 4, GRID).astype(int).tolist()
        pairs += itertools.product([name], levels, levels)
        ends[name] = {None, *levels[:2], levels[-1]}
    order = rng.permutation(len(pairs)).tolist()
    for k in order:
        name, *both = pairs[k]
        corners.setdefault((name, *(x if x in ends[name] else "other" for x in both)), k)
    for k in dict.fromkeys([*corners.values(), *order]):
        name, *both = pairs[k]
        yield name, *(elements(rng, name, exponent) for exponent in both)


def flat(x: Any) -> list[float]:
    return read(x).astype(np.float64).tolist()


def judged(
    text: str, name: str, new: Any, old: Any, step: reference.Step, rounding: float = ONE_ROUNDING
) -> float | str:
    """The error if it is within the bounds, otherwise what happened."""
    error = reference.worst_error(new, old, step, name)
    if not error <= BOUNDS[name]:
        return f"{text}: off by {error} ulp"
    sizes = [max(abs(u), abs(x)) for u, x in zip(step.u, step.w_new, strict=True)]
    of_result = reference.worst_error(new, old, step._replace(u=sizes), name)
    if name != "float64" and not of_result <= rounding:
        return f"{text}: off by {of_result} ulp of the result, so it was rounded more than once"
    return error


def step_error(
    name: str,
    w: Any,
    g: Any,
    new: Any,
    lr: float,
    rounding: float = ONE_ROUNDING,
    **options: Any,
) -> float | str:
    """The error of a step without momentum."""
    w, g, new = map(flat, (w, g, new))
    step = reference.lars(w, g, lr, **options)
    # A result out of range need not have a sign.
    limit = reference.mpf(2) ** (reference.FORMATS[name][2] + 1)
    given = [x if x == x or abs(y) < limit else y for x, y in zip(new, step.w_new, strict=True)]
    text = f"{name} w={w} g={g} lr={lr} {options} gives {new}"
    return judged(text, name, given, w, step, rounding)


@attack("An update is rounded once", "pairs, with and without decay", **PAIRS)
def updates(rng: Generator) -> Attempts:
    for name, w, g in grid(rng):
        lr, options = drawn(rng, RATES), {"decay_lambda": drawn(rng, DECAYS)}
        yield step_error(name, w, g, lars_update(w, g, lr, **options), lr, **options)


OPTIONS = {
    "decay_lambda": [0.0, 1e-4, 0.1, 3.0, 1e-200, 1e200],
    "trust_coefficient": [1.0, 1e-3, 10.0],
    "eps": [0.0, 0.0, 1e-8, 1e-300],
    "adapt": [True, True, True, False],
    "trust_clip": [False, True],
    "joint_norm": [False, True],
    "grad_scale": [1.0, 65536.0, 1e-3],
}


@attack("The same holds for all options", "pairs with random options", **PAIRS)
def options(rng: Generator) -> Attempts:
    for name, w, g in grid(rng):
        lr = drawn(rng, RATES)
        given = {option: drawn(rng, values) for option, values in OPTIONS.items()}
        yield step_error(name, w, g, lars_update(w, g, lr, **given), lr, **given)


@attack(
    "The joint norm loses nothing where the gradient and the decay cancel",
    "pairs with decay",
    **PAIRS,
)
def joint_norm(rng: Generator) -> Attempts:
    for name, w, g in grid(rng):
        lr, options = (
            drawn(rng, RATES),
            {"decay_lambda": drawn(rng, DECAYS[3:]), "joint_norm": True},
        )
        g = opposed(rng, w, g, options)
        yield step_error(name, w, g, lars_update(w, g, lr, **options), lr, **options)


def opposed(rng: Generator, w: Any, g: Any, options: dict[str, Any]) -> Any:
    """In every second case of a joint norm, about -decay * w where that is finite; else g."""
    if not (options["joint_norm"] and options["decay_lambda"]) or rng.random() < 0.5:
        return g
    nearly = 1 - 10 ** rng.uniform(-12, -1) * rng.uniform(0.5, 1.5, SIZE)
    with np.errstate(over="ignore"):
        x = (w.astype(np.float64) * -options["decay_lambda"] * nearly).astype(w.dtype)
    return np.where(np.isfinite(x), x, g)


@attack(
    "With momentum, weights and velocity are each rounded once",
    "pairs with a velocity of any exponent, half with nesterov",
    **PAIRS,
)
def momentum(rng: Generator) -> Attempts:
    for name, w, g in grid(rng):
        lr, nesterov, given = drawn(rng, RATES), bool(rng.integers(2)), _with_decay(rng)
        g, v = opposed(rng, w, g, given), _velocity(rng, velocity_name(name), w)
        optimizer = unit_lars(lr, 0.9, nesterov, **given)
        state = optimizer.init(w)
        state["velocity"] = v
        new, after = optimizer.update(w, g, state)
        step = reference.lars(flat(w), flat(g), lr, **given)
        text = f"{name} w={w} g={g} v={v} lr={lr} nesterov={nesterov} {given}"
        yield moved_error(text, name, (w, v), (new, after["velocity"]), step.u, nesterov, 1.0)


@attack(
    "The same holds for the optimizer of torch",
    "pairs with a buffer of any exponent, half with nesterov",
    **PAIRS | {"needs": (*NEEDS, "torch")},
)
def torch_optimizer(rng: Generator) -> Attempts:
    optimizer_class = need("lars_tree.torch").Lars
    for name, w, g in grid(rng):
        lr, nesterov, given = drawn(rng, RATES), bool(rng.integers(2)), _with_decay(rng)
        g, v = opposed(rng, w, g, given), _velocity(rng, velocity_name(name), w)
        p = as_parameter(w)
        p.grad = as_torch(g)
        options = {"weight_decay": given["decay_lambda"], "joint_norm": given["joint_norm"]}
        options |= {"nesterov": nesterov, "trust_coefficient": 1.0, "eps": 0.0}
        optimizer = optimizer_class([p], lr, 0.9, **options)
        optimizer.state[p]["momentum_buffer"] = as_torch(v)
        optimizer.step()
        step = reference.lars(flat(w), flat(g), 1.0, **given)
        new = p, optimizer.state[p]["momentum_buffer"]
        text = f"{name} w={w} g={g} v={v} lr={lr} {options}"
        yield moved_error(text, name, (w, v), new, step.u, nesterov, lr)


def _with_decay(rng: Generator) -> dict[str, Any]:
    return {"decay_lambda": drawn(rng, DECAYS), "joint_norm": bool(rng.integers(2))}


def _velocity(rng: Generator, name: str, w: Any) -> np.ndarray:
    """Of any exponent, or in every second case of about that of the weights."""
    if rng.random() < 0.5:
        return (w.astype(np.float64) * rng.uniform(-1, 1, SIZE)).astype(name)
    return elements(rng, name, drawn(rng, [None, *exponents(name, GRID - 1)]))


def moved_error(
    text: str,
    name: str,
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    u: list[Any],
    nesterov: bool,
    rate: float,
) -> float | str:
    """The larger error of the weights and the velocity."""
    (w, v), (new_w, new_v) = ([flat(x) for x in xs] for xs in (before, after))
    step = reference.Step(u, [], reference.mpf(1))
    exact = reference.move(w, v, step, 0.9, nesterov, rate)
    sizes = [max(map(abs, row)) for row in zip(u, v, exact.v_new, strict=True)]
    # The rate multiplies what was rounded; subnormal numbers are rounded like the smallest normal.
    smallest = SMALLEST_NORMAL if name == "float64" else 0.0
    rows = zip(sizes, exact.change, strict=True)
    moves = [max(rate * max(x, smallest), abs(y)) for x, y in rows]
    of_w = reference.Step(moves, exact.w_new, step.ratio)
    of_v = reference.Step(sizes, exact.v_new, step.ratio)
    kept = velocity_name(name)
    found = [
        judged(f"{text} gives {new_w}", name, new_w, w, of_w),
        judged(f"{text} gives v={new_v}", kept, new_v, w, of_v),
    ]
    failed = [x for x in found if isinstance(x, str)]
    return failed[0] if failed else max(found)


@cache
def compiled(**options: Any) -> Callable[..., Any]:
    return need("jax").jit(lambda w, g, lr, numbers: lars_update(w, g, lr, **numbers, **options))


@attack(
    "The same holds under `jax.jit`, for normal numbers",
    "pairs of normal numbers, with and without decay and joint norm",
    **PAIRS | {"needs": (*NEEDS, "jax"), "short": 120},
)
def jit(rng: Generator) -> Attempts:
    with need("jax").enable_x64(True):
        for name, w, g in grid(rng, normal=True):
            lr, given = drawn(rng, RATES), _with_decay(rng)
            other = opposed(rng, w, g, given)
            sizes = np.abs(other.astype(np.float64))
            if not np.any((sizes > 0) & (sizes < _flushed_below(name))):
                g = other
            # Steps of short arrays with numbers of 32 bits take a way of their own.
            dtype = drawn(rng, [np.float32, np.float64]) if name != "float64" else np.float64
            lr, decay = dtype(lr), dtype(given["decay_lambda"])
            numbers = {"decay_lambda": decay} if decay else {}  # few programs to compile
            joint = given["joint_norm"] and bool(decay)
            new = compiled(joint_norm=joint)(as_jax(w), as_jax(g), lr, numbers)
            options = {"decay_lambda": float(decay), "joint_norm": joint}
            yield step_error(name, w, g, new, float(lr), whole_array_rounding(name), **options)


def _flushed_below(name: str) -> float:
    """XLA replaces smaller numbers by 0 on CPUs."""
    return float(np.finfo(np.float64 if name == "float64" else np.float32).smallest_normal)


@attack(
    "The same holds for whole-array operations, as in autograd of torch",
    "pairs, with and without decay and joint norm",
    **PAIRS | {"needs": (*NEEDS, "torch")},
)
def autograd(rng: Generator) -> Attempts:
    for name, w, g in grid(rng):
        if max(map(abs, flat(w) + flat(g))) > 8e307:
            continue
        lr, given = drawn(rng, RATES), _with_decay(rng)
        g = opposed(rng, w, g, given)
        tensors = as_torch(w).requires_grad_(), as_torch(g)
        new = lars_update(*tensors, lr, stop_gradients=False, **given)
        yield step_error(name, w, g, new, lr, whole_array_rounding(name), **given)


def whole_array_rounding(name: str) -> float:
    return TWO_ROUNDINGS if name in ("float16", "bfloat16") else ONE_ROUNDING


@attack(
    "Elements of all sizes in one array do not harm one another",
    "layers with mixed exponents: all, one huge among tiny ones, or subnormal and largest ones",
    **PAIRS,
)
def mixed(rng: Generator) -> Attempts:
    while True:
        name = drawn(rng, list(BOUNDS))
        w, g = (mixture(rng, name) for _ in "wg")
        given = {option: drawn(rng, values) for option, values in OPTIONS.items()}
        given["decay_lambda"] = min(3.0, given["decay_lambda"])
        if largest_quotient(w, g) > SPREAD:
            given["joint_norm"] = False
        lr = drawn(rng, [*RATES, 1e-290])
        yield step_error(name, w, g, lars_update(w, g, lr, **given), lr, **given)


def largest_quotient(*arrays: np.ndarray) -> reference.mpf:
    """The largest element divided by the smallest one that is not 0."""
    sizes = [abs(reference.mpf(x)) for array in arrays for x in flat(array) if x]
    return max(sizes) / min(sizes)


def mixture(rng: Generator, name: str) -> np.ndarray:
    """Elements with different exponents."""
    lowest, *_, highest = every = exponents(name, 12)
    size = 5
    chosen = {
        "all": rng.choice(every, size),
        "one huge": [highest, *rng.choice(every[:6], size - 1)],
        "ends": rng.choice([lowest, lowest + 3, highest], size),
    }[drawn(rng, ["all", "one huge", "ends"])]
    parts = [random_array(rng, name, int(e), 1) for e in rng.permutation(chosen)]
    return np.concatenate([*parts, parts[0] * 0])


@attack(
    "The norms of long arrays are exact",
    "layers of up to a million elements; some norms are halfway between two float64 numbers",
    count=500,
    short=20,
    seconds=40,
    needs=NEEDS,
)
def long_sums(rng: Generator) -> Attempts:
    while True:
        name, size = drawn(rng, list(BOUNDS)), int(10 ** rng.uniform(0.5, 6))
        lr, decay = drawn(rng, RATES), drawn(rng, DECAYS)
        (w, w_norm), (g, g_norm) = (long_array(rng, name, size) for _ in "wg")
        new = lars_update(w, g, lr, decay_lambda=decay)
        some = rng.integers(0, size, 8)
        w, g, new = (flat(x[some]) for x in (w, g, new))
        rate = lr * w_norm / (g_norm + decay * w_norm) if w_norm and g_norm else lr
        u = [rate * (b + decay * reference.mpf(a)) for a, b in zip(w, g, strict=True)]
        step = reference.Step(u, [a - x for a, x in zip(w, u, strict=True)], rate)
        text = f"{name}, {size} elements, norms {w_norm} and {g_norm}, lr={lr} decay={decay}"
        yield judged(f"{text}: w={w} g={g} gives {new}", name, new, w, step)


def long_array(rng: Generator, name: str, size: int) -> tuple[np.ndarray, reference.mpf]:
    """An array with at most 16 different elements in random order, and its norm."""
    values = random_array(rng, name, drawn(rng, exponents(name, 12)), drawn(rng, [1, 2, 16]))
    counts = rng.multinomial(size, np.full(len(values), 1 / len(values)))
    if name == "float64" and size > 2 and rng.random() < 0.5:
        # (a^2 - b^2, 2 a b) has the norm a^2 + b^2. This odd number has 54 bits.
        a, b = (2 * int(x) + i for i, x in enumerate(rng.integers(2**25, 47_000_000, 2)))
        legs, exponent = (a * a - b * b, 2 * a * b), int(rng.integers(-900, 900))
        values = np.array([*(np.ldexp(float(x), exponent) for x in legs), 0.0])
        counts = np.array([1, 1, size - 2])
    squares = (int(n) * reference.mpf(x) ** 2 for n, x in zip(counts, flat(values), strict=True))
    norm = reference.mp.sqrt(reference.mp.fsum(squares))
    return rng.permutation(np.repeat(values, counts)), norm
