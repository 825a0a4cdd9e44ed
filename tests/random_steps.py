"""Random steps of random trees, and the bits of their results.

A `Case` is what a step is given. `prepared` makes the arrays of a library from a case, in any form
of memory, and returns a function that takes the step. `difference` compares results.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from conftest import need, unit_lars
from random_arrays import dtype_of, random_array

from lars_tree import _native, lars_update, report
from lars_tree._numerics.formula import is_zero
from lars_tree._tree.structure import leaves

Arrays = list[np.ndarray]
Form = Callable[[np.ndarray], Any]  # makes another array with the same elements

NAMES = ("float16", "bfloat16", "float32", "float64")
ALL_NAMES = (*NAMES, "complex64", "complex128", "longdouble")

# Around vectors, rows, groups, blocks, chunks, and layers that several threads update.
SIZES = [0, 1, *(n + d for n in (8, 16, 64, 128, 1024, 16_384, 131_072) for d in (-1, 0, 1))]

OPTIONS = {
    "lr": [0.1, 0.1, 1.0, 3.0, 1e-3, 0.0, 1e-290, 1e290],
    "decay_lambda": [0.0, 0.0, 1e-4, 0.1, 3.0, 1e-200, 1e200],
    "trust_coefficient": [1.0, 1.0, 1e-3, 1e-150, 1e150],
    "eps": [0.0, 0.0, 1e-8, 1e-300],
    "grad_scale": [1.0, 1.0, 0.1, 65536.0, 1e-200],
    "adapt": [True, True, True, False],
    "trust_clip": [False, False, True],
    "joint_norm": [False, True],
}
MOMENTUM = {"momentum": [0.9, 0.9, 0.5, 1.0, 0.0, 1e-300, 1e300], "nesterov": [False, True]}
TORCH = {"dampening": [0.0, 0.5], "maximize": [False, True]}
SPECIAL = [*[()] * 9, (0.0, -0.0), (np.inf,), (np.nan, -np.inf)]  # few: NaN hides all else


class Case(NamedTuple):
    """A step of a list of layers.

    Attributes:
        number: Its number, from 0, in a sequence of cases.
        kind: What takes the step: "update", "Lars" or "torch.Lars"; or "ratios", a report.
        w, g, v: The weights, gradients and velocities, as dense numpy arrays in C order.
        options: The options of `lars_update`, and of the optimizers.
    """

    number: int
    kind: str
    w: Arrays
    g: Arrays
    v: Arrays
    options: dict[str, Any]

    def __str__(self) -> str:
        layers = [
            f"{w.dtype}/{g.dtype}{list(w.shape)}" for w, g in zip(self.w, self.g, strict=True)
        ]
        if len(layers) > 6:
            layers[6:] = [f"{len(layers) - 6} more"]
        options = {name: x for name, x in self.options.items() if not isinstance(x, list)}
        return f"case {self.number}: {self.kind} of {', '.join(layers)}, {options}"


def drawn(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """One of the choices, as it is: numpy's `choice` would convert it."""
    return choices[rng.integers(len(choices))]


def random_shape(rng: np.random.Generator, most: int) -> tuple[int, ...]:
    """A shape with at most about this number of elements."""
    size = drawn(rng, [n for n in SIZES if n <= most])
    if rng.random() < 0.3:
        size = int(most ** rng.random())
    if rng.random() < 0.5:
        return (size,)
    axes = rng.integers(0, 5)
    return tuple(
        int(n) for n in rng.integers(1, 2 + int(min(size, 5000) ** (1 / max(1, axes))), axes)
    )


def array_of(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, ...],
    level: float,
    spread: int,
    special: Any,
) -> np.ndarray:
    """Like `random_array`, also for long double and arrays without axes."""
    is_long = name == "longdouble"
    name, size = "float64" if is_long else name, math.prod(shape)
    few = min(size, 100_003)  # large arrays repeat their elements
    x = random_array(rng, name, (few,), level, spread, special)
    x = np.resize(x, shape) if size else x.reshape(shape)
    if is_long:  # with digits below those of double
        x = x * (1 + rng.integers(0, 2**11, shape) * np.longdouble(2) ** -63)
    return np.asarray(x)


def velocity_name(name: str) -> str:
    """The format of the velocity of weights of this format."""
    return "float32" if name in ("float16", "bfloat16") else name


def cases(
    rng: np.random.Generator,
    *,
    most: int = 20_000,
    layers: int = 4,
    large: int = 0,
    names: Sequence[str] = ALL_NAMES,
    kinds: Sequence[str] = ("update", "Lars", "torch.Lars", "ratios"),
) -> Iterator[Case]:
    """Endless random cases with at most `most` elements in each of at most so many layers.

    With `large`, the first layer has more elements, up to that number.
    """
    number = 0
    while True:
        kind = drawn(rng, kinds)
        options = {name: drawn(rng, values) for name, values in OPTIONS.items()}
        if rng.random() < 0.5:  # not only extremes
            options |= {"lr": 0.1, "trust_coefficient": 1.0, "grad_scale": 1.0}
            options["decay_lambda"] = drawn(rng, [0.0, 1e-4, 0.1])
        if "Lars" in kind:
            options |= {name: drawn(rng, values) for name, values in MOMENTUM.items()}
        if kind == "torch.Lars":
            options |= {name: drawn(rng, values) for name, values in TORCH.items()}
            options["grad_scale"] = 1.0
            if options["nesterov"]:
                options |= {"dampening": 0.0, "momentum": options["momentum"] or 0.9}
        w, g, v = [], [], []
        for i in range(rng.integers(1, layers + 1)):
            name = drawn(rng, [x for x in names if kind != "torch.Lars" or x != "longdouble"])
            shape = random_shape(rng, most)
            if large and i == 0:
                shape = (int(large * rng.uniform(0.5, 1)),)
            peers = [x for x in names if x.startswith("complex") == name.startswith("complex")]
            g_name = name if kind == "torch.Lars" else drawn(rng, [name, drawn(rng, peers)])
            for arrays, x in ((w, name), (g, g_name), (v, velocity_name(name))):
                level, spread = drawn(rng, [0.5, 0.5, rng.random()]), drawn(rng, [0, 2, 3000])
                arrays.append(array_of(rng, x, shape, level, spread, drawn(rng, SPECIAL)))
            if options["joint_norm"] and rng.random() < 0.3:  # g and the decay nearly cancel
                with np.errstate(all="ignore"):
                    opposed = w[-1] * -options["decay_lambda"]
                    g[-1] = np.asarray(opposed, g[-1].dtype)
        yield Case(number, kind, w, g, v, options)
        number += 1


# ---- Arrays of other libraries


def as_numpy(x: np.ndarray) -> np.ndarray:
    return x.copy()


def as_torch(x: np.ndarray) -> Any:
    return tensor_of(x.copy())


def tensor_of(x: np.ndarray) -> Any:
    """A tensor in the memory of x."""
    torch = need("torch")
    if x.dtype == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def as_parameter(x: np.ndarray) -> Any:
    return need("torch").nn.Parameter(as_torch(x))


def as_jax(x: np.ndarray) -> Any:
    with need("jax").enable_x64(True):
        return need("jax.numpy").array(x)


def read(x: Any) -> np.ndarray:
    """An array of any library as a numpy array in C order."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach()
        if x.dtype == torch.bfloat16:
            return x.contiguous().view(torch.int16).numpy().view(dtype_of("bfloat16"))
        x = x.numpy()
    x = np.asarray(x)
    return x.astype(x.dtype.newbyteorder("="), order="C")


# ---- Steps


def prepared(
    case: Case,
    form: Form = as_numpy,
    *,
    g_form: Form | None = None,
    out: str = "new",
    nest: Callable[[list[Any]], Any] = list,
) -> Callable[[], list[Any]]:
    """A function that takes the step of a case, and returns what it computed as a list of arrays.

    Args:
        form: Makes the arrays; `g_form` those of the gradients.
        out: Where the new weights are written to: "new" arrays, "w" (in place), "g" (if possible),
            or "other" arrays. The optimizer of torch always works in place.
        nest: Makes a tree of a list.
    """
    options = dict(case.options)
    lr = options.pop("lr")
    if case.kind == "torch.Lars":
        return _prepared_torch(case, g_form or as_torch, lr, options)
    w, v = (nest([form(x) for x in xs]) for xs in (case.w, case.v))
    g = nest([(g_form or form)(x) for x in case.g])
    can_reuse = all(a.dtype == b.dtype for a, b in zip(case.w, case.g, strict=True))
    target = {"new": None, "w": w, "g": g if can_reuse else None}.get(out)
    if out == "other":
        target = nest([form(x) for x in case.w])
    if case.kind == "ratios":
        return lambda: leaves(report.trust_ratios(w, g, lr, **options))
    if case.kind == "update":
        return lambda: leaves(lars_update(w, g, lr, out=target, **options))
    optimizer = unit_lars(lr, **options)
    state = optimizer.init(form(np.zeros(1)))  # JAX would compile zeros of each shape
    if "velocity" in state:
        state["velocity"] = v

    def step() -> list[Any]:
        new, after = optimizer.update(w, g, state, out=target)
        counters = [np.int64(after.pop(name)) for name in ("step", "skipped")]
        return [*leaves(new), *leaves(dict(after)), *counters]

    return step


def _prepared_torch(
    case: Case, g_form: Form, lr: float, options: dict[str, Any]
) -> Callable[[], list[Any]]:
    parameters = [as_parameter(x) for x in case.w]
    del options["grad_scale"]
    options["weight_decay"] = options.pop("decay_lambda")
    optimizer = need("lars_tree.torch").Lars(parameters, lr, **options)
    for p, g, v in zip(parameters, case.g, case.v, strict=True):
        p.grad = g_form(g)
        if not is_zero(options["momentum"]):
            optimizer.state[p]["momentum_buffer"] = as_torch(v)

    def step() -> list[Any]:
        optimizer.step()
        buffers = [optimizer.state[p].get("momentum_buffer") for p in parameters]
        return [*parameters, *(x for x in buffers if x is not None)]

    return step


def stepped(case: Case, *args: Any, **options: Any) -> Arrays:
    """The arrays that `prepared` computes, as numpy arrays."""
    with np.errstate(all="ignore"):
        return [read(x) for x in prepared(case, *args, **options)()]


def difference(
    case: Case, way: str, actual: Arrays, expected: Arrays, *, signs: bool = False
) -> str | None:
    """Where the bits differ; None if they are equal.

    All NaN are equal; with `signs`, only those with the same bits.
    """
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{case}, {way}: array {i} is {a.dtype} {a.shape}, expected {b.dtype} {b.shape}"
        if a.tobytes() == b.tobytes():
            continue
        if a.dtype.kind == "c":
            a, b = (x.reshape(-1).view(f"f{x.itemsize // 2}") for x in (a, b))
        a, b = a.reshape(-1), b.reshape(-1)
        differs = (_bytes_of(a) != _bytes_of(b)).any(axis=1)
        if not signs:
            differs &= ~(np.isnan(a) & np.isnan(b))
        if differs.any():
            k = int(np.flatnonzero(differs)[0])
            return f"{case}, {way}: array {i}, element {k} is {a[k]!r}, expected {b[k]!r}"
    return None


def _bytes_of(flat: np.ndarray) -> np.ndarray:
    """The bytes of each element; of a long double without the padding."""
    rows = flat.reshape(-1, 1).view(np.uint8)
    return rows[:, :10] if flat.dtype == np.longdouble and flat.itemsize == 16 else rows


@contextmanager
def native(**values: Any) -> Iterator[None]:
    """Run the block with other attributes of `_native`: `kernel=None`, or an `instruction_set`."""
    with patch.multiple(_native, **values):
        yield
