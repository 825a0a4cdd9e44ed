"""Overlaps: arrays that share memory are refused, or updated as if they did not.

Weights, gradients, results and velocities are random views of one buffer: shifted, strided,
reversed, transposed, broadcast, and of several dtypes. The addresses of all bytes are listed. A
call must be refused, without a write, if a byte would be written twice, and only then. Any other
call must give the results of the same call on copies, and write nothing else.
"""

from __future__ import annotations

import itertools
import traceback
from typing import Any

import numpy as np
from conftest import need
from native_steps import options_of
from numpy.lib.stride_tricks import as_strided

from lars_tree import OutError
from lars_tree._core.advance import advance
from tests.reliability.attack import Attempts, attack

ROOM = 640  # numbers of 4 bytes in the buffer


class View:
    """The layout of a view: dtype, shape, strides (in items) and start (in bytes)."""

    def __init__(self, random, shape, dtype, *, least_stride, written):
        self.dtype, self.shape = np.dtype(dtype), shape
        if random.random() < 0.5:  # without gaps, as most arrays are
            order = random.permutation(len(shape)) if random.random() < 0.3 else range(len(shape))
            strides, extent = [0] * len(shape), 1
            for axis in reversed(order):
                strides[axis] = extent
                extent *= shape[axis]
        else:
            strides = [int(s) for s in random.integers(-3, 9, len(shape))]
            if random.random() < 0.7:  # makes self-overlaps less frequent
                strides = [s if s or not written else 1 for s in strides]
        self.strides = [max(s, least_stride) for s in strides]
        steps = [(n - 1) * s for n, s in zip(shape, self.strides, strict=True)]
        below, above = (sum(x for x in steps if x * sign > 0) for sign in (-1, 1))
        size = self.dtype.itemsize
        # The views are near each other, and in one of four cases at the same address.
        most = ROOM * 4 // size - above + below - 1
        start = min(most, int(random.choice([0, 0, *random.integers(0, 12, 4), most])))
        self.start = (start - below) * size
        items = [
            self.start + size * sum(i * s for i, s in zip(index, self.strides, strict=True))
            for index in np.ndindex(*shape)
        ]
        self.overlaps_itself = len(set(items)) < len(items)
        self.bytes = {item + i for item in items for i in range(size)}

    def of(self, buffer):
        strides = [s * self.dtype.itemsize for s in self.strides]
        return as_strided(buffer[self.start // 4 :].view(self.dtype), self.shape, strides)

    def of_torch(self, buffer):
        torch = need("torch")
        start = self.start // self.dtype.itemsize
        whole = buffer.view(getattr(torch, self.dtype.name))
        return whole.as_strided(self.shape, self.strides, start)

    @property
    def has_plain_order(self):
        """Whether a copy has its items in the same memory order."""
        return (
            self.strides == sorted(self.strides, reverse=True) and min(self.strides, default=1) > 0
        )


class Case:
    """A call on views of one buffer: trees of one or two leaves, sometimes with out=w."""

    def __init__(self, seed, least_stride=-3):
        self.seed, self.least_stride = seed, least_stride
        random = np.random.default_rng(seed)
        self.buffer = random.normal(size=ROOM).astype(np.float32)  # finite if viewed as float64 too
        self.w, self.dcdw, self.out = {}, {}, {}
        for key in ["a", "b"][: random.integers(1, 3)]:
            shape = [(4,), (16,), (33,), (2, 3), (3, 4), (5, 1), (2, 2, 3), ()][random.integers(8)]
            w_dtype, dcdw_dtype = random.choice(["f4", "f4", "f8"], 2)

            def view(shape, dtype, written=False):
                return View(random, shape, dtype, least_stride=least_stride, written=written)

            self.w[key] = view(shape, w_dtype)
            broadcast = shape[1:] if shape and random.random() < 0.1 else shape
            self.dcdw[key] = view(broadcast, dcdw_dtype) if random.random() < 0.95 else None
            self.out[key] = view(shape, w_dtype, written=True)
            if random.random() < 0.2:
                self.out[key] = self.w[key]
            elif random.random() < 0.1 and broadcast == shape and w_dtype == dcdw_dtype:
                self.out[key] = self.dcdw[key] or self.out[key]
        if random.random() < 0.2:
            self.out = self.w
        self.options = {"decay_lambda": random.choice([0.0, 0.1]), "adapt": random.random() < 0.9}
        self.velocity = {}
        if random.random() < 0.3:
            self.options["nesterov"] = random.random() < 0.5
            for key, x in self.w.items():
                self.velocity[key] = view(x.shape, x.dtype, written=True)
                if self.dcdw[key] and self.dcdw[key].shape != x.shape:  # optimizers refuse this
                    self.dcdw[key] = view(x.shape, self.dcdw[key].dtype)

    def must_be_refused(self):
        stepped = [key for key in self.w if not (self.out is self.w and not self.dcdw[key])]
        trees = [tree for tree in (self.out, self.velocity) if tree]
        results = [tree[key].bytes for tree in trees for key in self.w]
        shared = sum(map(len, results)) > len(set().union(*results))
        return shared or any(tree[key].overlaps_itself for tree in trees for key in stepped)

    def tolerance(self, key, given):
        """The allowed error: None (the same bits) if the memory order of the copies is the same."""
        views = [x for x in (self.w[key], self.dcdw[key]) if x]
        if all(x.has_plain_order for x in views) and len({x.shape for x in views}) == 1:
            return None
        return np.finfo(self.w[key].dtype).eps * max(np.abs(x).max(initial=0) for x in given)


def run(case, buffer, view, copy, to_numpy):
    """Take the step of a case and check its results."""
    before = to_numpy(buffer).copy()

    def tree(views):
        return {key: x and view(x, buffer) for key, x in views.items()}

    def step(w, dcdw, velocity, out=None):
        options = options_of(momentum=0.9, **case.options)
        new, state = advance(w, dcdw, out, options, {"velocity": velocity} if velocity else None)
        return {"out": new, "velocity": state.get("velocity", {})}

    given = tree(case.w), tree(case.dcdw), tree(case.velocity)
    w, _, velocity = given
    out = w if case.out is case.w else tree(case.out)
    copies = [{k: None if x is None else copy(x) for k, x in t.items()} for t in given]
    expected = step(*copies)
    try:
        returned = step(*given, out)
    except OutError:
        assert np.array_equal(to_numpy(buffer), before), "it was refused, and yet written"
        assert case.must_be_refused(), "it was refused without a reason"
        return
    assert not case.must_be_refused(), "two results were written to one place"
    assert returned["out"] is out
    assert all(x is velocity[key] for key, x in returned["velocity"].items())
    after = to_numpy(buffer).view(np.uint8)
    results = (*case.out.values(), *case.velocity.values())
    written = sorted(set().union(*(x.bytes for x in results)))
    others = np.delete(np.arange(after.size), written)
    assert np.array_equal(after[others], before.view(np.uint8)[others]), "written beyond out"
    for name, key in itertools.product(expected, case.w):
        if key not in expected[name]:
            continue
        actual, right = to_numpy(returned[name][key]), to_numpy(expected[name][key])
        most = case.tolerance(key, [to_numpy(t[key]) for t in copies if t.get(key) is not None])
        if most is None:
            assert actual.tobytes() == right.tobytes(), (name, key)
        else:
            np.testing.assert_allclose(actual, right, rtol=0, atol=most)


def failure(case: Case, *how: Any) -> str | None:
    try:
        run(case, *how)
    except Exception:
        return f"Case({case.seed}, {case.least_stride}): {traceback.format_exc(limit=-2)}"
    return None


CLAIM = "Overlapping arrays are refused if a result would be lost, and otherwise computed right"


@attack(CLAIM, "random overlaps, numpy", count=10_000, short=1_000, seconds=60, plain=True)
def of_numpy(rng: np.random.Generator) -> Attempts:
    while True:
        case = Case(int(rng.integers(2**32)))
        yield failure(case, case.buffer, View.of, np.copy, np.asarray)


@attack(CLAIM, "random overlaps, torch", count=2_000, short=200, seconds=60, needs=("torch",))
def of_torch(rng: np.random.Generator) -> Attempts:
    torch = need("torch")
    while True:
        case = Case(int(rng.integers(2**32)), least_stride=0)
        ours = torch.from_numpy(case.buffer)
        buffer = ours if rng.random() < 0.5 else ours.clone()  # numpy's memory, or torch's
        yield failure(case, buffer, View.of_torch, lambda x: x.clone().contiguous(), np.asarray)
