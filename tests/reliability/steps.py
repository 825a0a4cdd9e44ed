"""Steps to be attacked, each with everything that it may change."""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import c_char
from pathlib import Path
from typing import Any

import numpy as np
from conftest import need, to_library, to_numpy

import lars_tree as lt

CASES: dict[str, Callable[[], Case]] = {}


class Case:
    """A call that can be repeated, the trees that it changes, and those that it must not change."""

    def __init__(self, call: Callable[[], Any], changed: Any, kept: Any = ()) -> None:
        self.call, self._changed, self._kept = call, changed, kept

    def contents(self) -> list[list[bytes]]:
        """What the trees contain."""
        return [contents(self._changed), contents(self._kept)]

    def addresses(self) -> list[int]:
        """Of the memory that is changed."""
        return [memory(x).ctypes.data for x in lt.Container({"": self._changed}).leaves()]


def contents(tree: Any) -> list[bytes]:
    """The memory of all arrays of a tree."""
    return [memory(x).tobytes() for x in lt.Container({"": tree}).leaves()]


def memory(x: Any) -> np.ndarray:
    """All bytes of the memory of an array, with those between the elements of a view."""
    if hasattr(x, "untyped_storage"):
        storage = x.detach().untyped_storage()
        return np.frombuffer((c_char * storage.nbytes()).from_address(storage.data_ptr()), "u1")
    x = to_numpy(x)
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x.ravel(order="K").view("u1")


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        CASES[name] = make
        return make

    return register


def strided(start: float) -> Any:
    return np.stack([np.arange(start, start + 4.0), np.zeros(4)], 1)[:, 0]


def weights() -> Any:
    return lt.Container(a=np.arange(1.0, 4.0), b={"c": np.ones(5, np.float32), "d": [np.ones(())]})


def gradients() -> Any:
    return lt.Container(a=np.full(3, 0.5), b={"c": np.full(5, 0.25), "d": [np.full((), 0.125)]})


def mixed_weights() -> Any:
    return {"strided": strided(1), "dense": np.arange(3.0, 6), "other": [strided(7)]}


def mixed_gradients() -> Any:
    return {"strided": np.full(4, 0.5), "dense": np.full(3, 0.25), "other": [np.full(4, 0.125)]}


def in_place(w: Any, g: Any, *args: Any, **options: Any) -> Case:
    args = args or (0.1,)
    return Case(lambda: lt.lars_update(w, g, *args, out=w, **options), w, g)


def into_new(w: Any, g: Any) -> Case:
    box = {"w": w}

    def call() -> None:
        box["w"] = lt.lars_update(box["w"], g, 0.1, decay_lambda=0.1)

    return Case(call, box, [w, g])


def moving(w: Any, g: Any, opt: lt.Lars | None = None) -> Case:
    opt = opt or lt.Lars(0.1)
    state = opt.init(w)
    return Case(lambda: opt.update(w, g, state, out=w), [w, state], g)


def moving_into_new(w: Any, g: Any, opt: lt.Lars | None = None) -> Case:
    opt = opt or lt.Lars(0.1)
    box = {"w": w, "state": opt.init(w)}

    def call() -> None:
        box["w"], box["state"] = opt.update(box["w"], g, box["state"])

    return Case(call, box, [w, g, dict(box["state"])])


case("numpy, in place")(lambda: in_place(weights(), gradients(), decay_lambda=0.1))
case("numpy, new arrays")(lambda: into_new(weights(), gradients()))
case("numpy, momentum in place")(lambda: moving(weights(), gradients()))
case("numpy, momentum into new arrays")(lambda: moving_into_new(weights(), gradients()))
case("numpy, strided")(lambda: moving(mixed_weights(), mixed_gradients()))
case("numpy, strided into new arrays")(lambda: moving_into_new(mixed_weights(), mixed_gradients()))


def not_finite(g: Any) -> Any:
    g["strided"][1] = np.nan
    return g


case("numpy, skip")(
    lambda: moving(mixed_weights(), mixed_gradients(), lt.Lars(0.1, nonfinite="skip"))
)
case("numpy, skipped")(
    lambda: moving(mixed_weights(), not_finite(mixed_gradients()), lt.Lars(0.1, nonfinite="skip"))
)
case("numpy, raise, joint norm")(
    lambda: moving(weights(), gradients(), lt.Lars(0.1, nonfinite="raise", joint_norm=True))
)


@case("numpy, patterns and schedules")
def of_functions() -> Case:
    rates = {"a": lambda step: 0.5 / (step + 1), "b": 0.1}
    opt = lt.Lars(rates, adapt={"*/d/*": False, "*": True}, weight_decay=lambda path, x: 0.1)
    return moving(weights(), gradients(), opt)


@case("numpy, a rate per element")
def of_rates() -> Case:
    rates = {"strided": 0.1, "dense": np.array([0.1, 0.2, 0.3]), "other": 0.1}
    return in_place(mixed_weights(), mixed_gradients(), rates)


@case("numpy, overlaps")
def of_overlaps() -> Case:
    """The weights of each leaf are written over the gradients of another one."""
    memory = np.arange(1.0, 33.0)
    w = [memory[:8], memory[8:16]]
    g = [memory[12:20], memory[4:12]]
    return Case(lambda: lt.lars_update(w, g, 0.1, out=w), memory)


LARGE = 140_000  # elements: for several threads


def large() -> Any:
    return [
        np.full(LARGE, 0.5, np.float32),
        np.ones(3, np.float32),
        np.ones((2, LARGE), np.float32)[1],
    ]


@case("numpy, four threads")
def of_threads() -> Case:
    lt.set_num_threads(4)
    w = large()
    return in_place(w, [np.full(x.shape, 0.25) for x in w], joint_norm=True, decay_lambda=0.1)


# ---- torch


def tensors() -> tuple[Any, Any]:
    torch = need("torch")
    w = {"a": torch.ones(3), "b": [torch.ones(4, dtype=torch.bfloat16), torch.ones(4, 2)[:, 0]]}
    return w, {"a": torch.ones(3), "b": [torch.ones(4, dtype=torch.bfloat16), torch.ones(4)]}


case("torch, in place")(lambda: in_place(*tensors()))
case("torch, new tensors")(lambda: into_new(*tensors()))
case("torch, momentum in place")(lambda: moving(*tensors()))
case("torch, momentum into new tensors")(lambda: moving_into_new(*tensors()))
case("torch and numpy, momentum in place")(
    lambda: moving([mixed_weights(), tensors()[0]], [mixed_gradients(), tensors()[1]])
)


def optimizer(steps: int, **options: Any) -> Case:
    torch = need("torch")
    from lars_tree.torch import Lars

    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 4, 2)]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    opt = Lars([{"params": params[:2]}, {"params": params[2:], "adapt": False}], 0.1, **options)
    for _ in range(steps):
        opt.step()

    class Stepping(Case):
        def contents(self) -> list[list[bytes]]:
            """Also of the velocities: one of zeros is as good as none."""
            states = [(p, opt.state.get(p, {})) for p in params]
            moved = [state.get("momentum_buffer", torch.zeros_like(p)) for p, state in states]
            return [contents([*params, *moved]), contents([p.grad for p in params])]

    return Stepping(opt.step, params)


case("torch.Lars, first step")(lambda: optimizer(0))
case("torch.Lars")(lambda: optimizer(1))
case("torch.Lars, skip")(lambda: optimizer(0, nonfinite="skip"))
case("torch.Lars, nesterov")(lambda: optimizer(1, nesterov=True))


# ---- JAX


def jax_arrays() -> tuple[Any, Any]:
    w, g = weights().to_dict(), gradients().to_dict()
    return tuple(lt.Container(x).map(lambda x: to_library("jax", x)) for x in (w, g))


case("jax, new arrays")(lambda: into_new(*jax_arrays()))
case("jax, momentum into new arrays")(lambda: moving_into_new(*jax_arrays()))


# ---- Files


class File(Case):
    """A call that replaces a file."""

    def __init__(self, call: Callable[[], Any], path: Path) -> None:
        super().__init__(call, {})
        self._path = path

    def contents(self) -> list[list[bytes]]:
        """Of the arrays in the file, and the number of files that are open."""
        opened = len(os.listdir("/proc/self/fd"))
        return [contents(lt.io.load(self._path)), [str(opened).encode()]]

    def addresses(self) -> list[int]:
        return []


def saving(name: str) -> File:
    """Loads a file and saves other weights there; the process is in a folder of its own."""
    path = Path(name)
    lt.io.save(weights(), path)
    return File(lambda: lt.io.save(lt.io.load(path).map(lambda x: x + 1), path), path)


case("save, npz")(lambda: saving("w.npz"))
case("save, safetensors")(lambda: saving("w.safetensors"))
