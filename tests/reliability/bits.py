"""Bits: how, where and with what else a step is computed does not change its bits.

An attempt takes a step in two ways and compares all weights, velocities and counters byte by byte.
The layers have random shapes, with sizes around those of vectors, blocks and chunks; all formats,
also mixed, and complex and long double; elements of all exponents, zeros, infinity and NaN; and all
options, some far outside of the range that anyone uses. The ways that are compared are in the
middle column.

What does not survive, and why:

* `jax.jit`, autograd and Dask compute with whole arrays, and add in another order, which the
  compiler may choose. The last bit may differ; the section on exponents has the errors.
* The order of the axes in memory is the order in which squares are added, so it may change the last
  bit. Gaps, the sign of strides, alignment and byte order change nothing.
* A NaN stays NaN, but its sign and payload differ between the kernel and its twin. Within each of
  them they do not depend on threads, the library or the tree.
* Instruction sets that the processor does not have cannot be tried: the row says which were.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice, pairwise, product
from typing import Any
from unittest.mock import patch

import numpy as np
import random_steps
from conftest import need
from float_modes import MODES, mode
from random_steps import Case, cases, difference, drawn, native, prepared, read, stepped
from strided import strided

from lars_tree import Container, _native, schedules, set_num_threads
from lars_tree._backends.cpu import twin
from lars_tree._core import writes
from tests.reliability.attack import Attempts, attack
from tests.reliability.shared import cycled

NATIVE_NAMES = (*random_steps.NAMES, "complex64", "complex128")
OUTS = ("new", "w", "g", "other")
FORMS = (random_steps.as_numpy, random_steps.as_torch, random_steps.as_parameter)
FORMS += (random_steps.as_jax,)


def _refused(*_: Any) -> None:
    raise AssertionError("the kernel did not update this layer")


@attack(
    "The kernel, its twin in numpy, and all instruction sets give the same bits",
    f"steps with the instruction sets 0 to {_native.instruction_set} of baseline, AVX2, AVX-512",
    count=8000,
    short=200,
    needs=("torch", "ml_dtypes"),
)
def kernel(rng: np.random.Generator) -> Attempts:
    for case in cases(rng, names=NATIVE_NAMES):
        with native(kernel=None):
            expected = stepped(case)
        out = drawn(rng, OUTS)
        for instruction_set in range(_native.instruction_set + 1):
            with (
                native(instruction_set=instruction_set),
                patch.multiple(twin, _update_layer=_refused, _measure_layer=_refused),
            ):
                actual = stepped(case, out=out)
            yield difference(case, f"instruction set {instruction_set}, {out}", actual, expected)


@attack(
    "Results do not depend on the number of threads, nor on whose threads they are",
    "steps of up to 3 million elements, on 1 to 8 threads of our own or of torch",
    count=800,
    short=32,
    needs=("torch", "ml_dtypes"),
)
def threads(rng: np.random.Generator) -> Attempts:
    torch = need("torch")
    ways = cycled(rng, list(product(range(1, 9), (False, True))))
    for case in cases(rng, large=3_000_000, names=NATIVE_NAMES):
        set_num_threads(1)
        expected = stepped(case)
        for number, is_team in islice(ways, 2):  # of the 16, so that there are many cases
            # The kernel uses the team of OpenMP if it has as many threads as may be used.
            torch.set_num_threads(number if is_team else number % 8 + 1)
            set_num_threads(number)
            out = drawn(rng, OUTS)
            way = f"{number} threads{' of torch' if is_team else ''}, {out}"
            yield difference(case, way, stepped(case, out=out), expected, signs=True)


@attack(
    "Results are the same in numpy, torch and JAX, and in trees that mix them",
    "steps",
    count=3000,
    short=60,
    needs=("torch", "jax", "ml_dtypes"),
)
def libraries(rng: np.random.Generator) -> Attempts:
    for case in cases(rng, names=NATIVE_NAMES, kinds=("update", "update", "Lars")):
        expected = stepped(case)
        out = drawn(rng, OUTS)
        for form in FORMS[1:]:
            where = "new" if form is random_steps.as_jax else out
            way = f"{form.__name__}, {where}"
            yield difference(case, way, stepped(case, form, out=where), expected, signs=True)
        if case.kind == "update":
            kinds = [drawn(rng, FORMS) for _ in case.w]
            turns = {id(x): f for xs in (case.w, case.g) for x, f in zip(xs, kinds, strict=True)}
            mixed = stepped(case, lambda x, turns=turns: turns.get(id(x), FORMS[0])(x))
            yield difference(case, "mixed", mixed, expected, signs=True)


@attack(
    "Gaps, negative strides, alignment, byte order and memory maps change no bit",
    "steps of arrays with up to four axes in any order",
    count=3000,
    short=160,
    plain=True,
    needs=("torch", "ml_dtypes"),
)
def memory(rng: np.random.Generator) -> Attempts:
    for plain in cases(rng, most=3000, kinds=("update", "Lars")):
        case = plain._replace(options=plain.options | _by_layer(rng, plain))
        orders = [rng.permutation(x.ndim).tolist() for x in case.w]
        every = zip(stepped(case), cycle(orders), strict=False)
        expected = [x.transpose(p) if x.ndim else x for x, p in every]
        turned = _turned(case, orders)
        for name, form in (
            ("strided", partial(strided, rng)),
            ("swapped bytes", partial(strided, rng, swapped=True)),
            ("mapped", partial(strided, rng, mapped=True)),
            ("read-only", partial(_read_only, rng)),
            ("tensors", partial(_strided_tensor, rng)),
        ):
            has_long = any(x.dtype == np.longdouble for x in (*case.w, *case.g))
            if name == "tensors" and (isinstance(case.options["lr"], list) or has_long):
                continue  # torch has no long double, and updates with rates as whole arrays
            has_halves = any(x.dtype.itemsize == 2 for x in case.w)
            if name == "swapped bytes" and case.kind == "Lars" and has_halves:
                continue  # their velocities are not swapped
            out = "new" if name == "read-only" else drawn(rng, ("new", "w", "other"))
            g_form = lambda x, form=form: form(_in_another_order(rng, x))  # noqa: E731
            actual = stepped(turned, form, g_form=g_form, out=out)
            yield difference(case, f"{name}, axes {orders}, {out}", actual, expected)


def _by_layer(rng: np.random.Generator, case: Case) -> dict[str, list[Any]]:
    """Options with a value for each layer: `layer_axis`, and perhaps rates for each element."""
    few = [[axis for axis, length in enumerate(x.shape) if length < 20] for x in case.w]
    axes = [drawn(rng, [None, *choices]) for choices in few]
    rates = [10 ** rng.uniform(-3, 1, x.shape) for x in case.w]
    return {"layer_axis": axes} | ({"lr": rates} if rng.random() < 0.3 else {})


def _turned(case: Case, orders: list[list[int]]) -> Case:
    """The case with the axes of each layer in another order, and the same order in memory."""
    arrays = ([x.transpose(p) for x, p in zip(xs, orders, strict=True)] for xs in case[2:5])
    axes = zip(case.options["layer_axis"], orders, strict=True)
    options = {"layer_axis": [None if axis is None else p.index(axis) for axis, p in axes]}
    if isinstance(case.options["lr"], list):
        rates = zip(case.options["lr"], orders, strict=True)
        options["lr"] = [x.transpose(p) for x, p in rates]
    return Case(case.number, case.kind, *arrays, case.options | options)


def _in_another_order(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """The same elements with another order of the axes in memory."""
    order = rng.permutation(x.ndim)
    return x.transpose(order).copy().transpose(np.argsort(order))


def _read_only(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    x = strided(rng, x)
    x.flags.writeable = False
    return x


def _strided_tensor(rng: np.random.Generator, x: np.ndarray) -> Any:
    return random_steps.tensor_of(strided(rng, x, simple=True))


@attack(
    "Neither the rounding mode nor flush-to-zero changes a bit, and both stay as they were set",
    f"steps in {len(MODES)} modes: 4 of rounding, each with results or operands flushed or not",
    count=4000,
    short=64,
    plain=True,
    needs=("torch", "jax", "ml_dtypes"),
)
def modes(rng: np.random.Generator) -> Attempts:
    if not MODES:
        yield None  # this system is not known
        return
    set_num_threads(3)
    for case in cases(rng, most=2000):
        if case.number % 50 == 49:  # threads inherit the mode
            case = next(cases(rng, large=600_000))
        if case.kind == "Lars" and rng.random() < 0.5:
            case.options["lr"] = schedules.Polynomial(0.1, total_steps=7, warmup_steps=3)
        expected = stepped(case)
        has_long = any(x.dtype == np.longdouble for x in (*case.w, *case.g))
        for name in MODES:
            form = drawn(rng, (random_steps.as_numpy, partial(strided, rng), *FORMS[1:]))
            if form in FORMS[1:] and (has_long or case.kind == "ratios"):
                form = random_steps.as_numpy  # JAX reports ratios in float32
            out = "new" if form is random_steps.as_jax else drawn(rng, OUTS)
            held = drawn(rng, (0, writes.MAX_HELD))  # with 0, strided arrays change in a thread
            with patch.object(writes, "MAX_HELD", held), np.errstate(all="ignore"):
                step = prepared(case, form, out=out)
                with mode(name):
                    results = step()
            way = f"{name}, {getattr(form, '__name__', 'strided')}, {out}, {held} held"
            yield difference(case, way, list(map(read, results)), expected)


LEAVES = 1000


@attack(
    "A leaf gets the same bits alone, and anywhere in a tree of 1,000 leaves",
    "trees of random nesting",
    count=300,
    short=3,
    seconds=60,
    plain=True,
    needs=("torch", "ml_dtypes"),
)
def trees(rng: np.random.Generator) -> Attempts:
    for case in cases(rng, most=1000, layers=12):
        others = next(cases(rng, most=30, layers=30, kinds=(case.kind,)))
        arrays = (a + b for a, b in zip(case[2:5], others[2:5], strict=True))
        pool = Case(*case[:2], *arrays, case.options)
        alone = [stepped(_with_layers(pool, [i])) for i in range(len(pool.w))]
        for _ in range(3):
            indices = rng.integers(0, len(pool.w), LEAVES).tolist()
            nest = partial(_nested, int(rng.integers(1e9)))
            results = stepped(_with_layers(pool, indices), nest=nest)
            end = LEAVES * (len(results) // LEAVES)  # after it are the counters
            faults = (
                difference(
                    case,
                    f"layer {i} as leaf {k}",
                    [*results[k:end:LEAVES], *results[end:]],
                    alone[i],
                    signs=True,
                )
                for k, i in enumerate(indices)
            )
            yield next(filter(None, faults), None)


def _with_layers(case: Case, indices: list[int]) -> Case:
    return Case(*case[:2], *([xs[i] for i in indices] for xs in case[2:5]), case.options)


def _nested(seed: int, xs: list[Any]) -> Any:
    """A tree with these leaves, which is the same for the same seed and number of leaves."""
    rng = np.random.default_rng(seed)

    def build(xs: list[Any]) -> Any:
        if len(xs) == 1 and rng.random() < 0.7:
            return xs[0]
        ends = [0, *np.sort(rng.integers(0, len(xs), rng.integers(0, 9))).tolist(), len(xs)]
        children = [build(xs[a:b]) for a, b in pairwise(ends) if a < b]
        kind = drawn(rng, (list, tuple, dict, Container))
        return (
            kind(children)
            if kind in (list, tuple)
            else kind(zip("abcdefghi", children, strict=False))
        )

    return build(xs)
