"""The native kernel on torch tensors with momentum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import need
from native_steps import options_of
from test_native import SETS, patched, run, watched
from test_native_torch import DTYPES, cut, equal, pytestmark, random  # noqa: F401

from lars_tree import LarsTreeError, _native
from lars_tree._backends.base import Columns
from lars_tree._core.advance import advance
from lars_tree._numerics.formula import Rule
from lars_tree._tree import structure

torch = need("torch")

OPTIONS = {"decay_lambda": 0.1, "momentum": 0.9, "lr_after_momentum": 0.7}


def step(w, g, out, velocity, count=None, **options):
    """The new weights, velocity and number of steps."""
    state = {"velocity": velocity, "step": torch.tensor(0) if count is None else count}
    new, state = advance(w, g, out, options_of(**OPTIONS | options), state)
    return new, state["velocity"], state["step"]


def by_twin(*args, **options):
    with patched(kernel=None):
        return step(*args, **options)


def by_kernel(*args, instruction_set=SETS[-1], **options):
    with watched(instruction_set=instruction_set) as took:
        new = step(*args, **options)
    assert took == [True]
    return new


def velocity_for(w):
    v = 1 - 2 * random(*w.shape, dtype=torch.float64)
    return v if w.dtype == torch.float64 else v.float()


def assert_same_step(actual, expected):
    assert all(map(equal, actual, expected))
    assert actual[2] == 1


@pytest.mark.parametrize(("w_dtype", "g_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (300, 3), (4, 3, 2)])
def test_tensors_get_the_same_bits_as_from_the_twin(shape, w_dtype, g_dtype):
    w, g = random(*shape, dtype=w_dtype), (1 + random(*shape) / 3).to(g_dtype)
    v = velocity_for(w)
    expected = by_twin(w, g, None, v)
    old = v.clone()
    assert_same_step(by_kernel(w, g, None, v), expected)
    turned = [x.permute(tuple(range(x.ndim))[::-1]) for x in (w, g, v)]
    new = by_kernel(*turned[:2], None, turned[2])
    assert [x.stride() for x in new[:2]] == [turned[0].stride()] * 2
    back = [x.permute(tuple(range(w.ndim))[::-1]) for x in new[:2]]
    assert_same_step([*back, new[2]], expected)
    assert equal(v, old)
    out = torch.empty_like(w)
    actual = by_kernel(w, g, out, v)
    assert (actual[0] is out, actual[1] is v) == (True, True)
    assert_same_step(actual, expected)
    v = old.clone()
    assert_same_step(by_kernel(w, g, w, v, instruction_set=0), expected)
    assert equal(w, expected[0])
    assert equal(v, expected[1])


@pytest.mark.parametrize("out", ["new", "w"])
def test_weights_may_be_parameters_and_the_velocity_is_a_tensor(out):
    w, g = torch.nn.Parameter(random(5)), random(5)
    for v in (random(5), torch.nn.Parameter(random(5)), random(5).requires_grad_()):
        expected = by_twin(w, g, None, v)
        actual = by_kernel(w, g, w if out == "w" else None, v)
        assert type(actual[0]) is type(expected[0]) is torch.nn.Parameter
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        if out == "new":
            assert equal(actual[1], expected[1])
            assert not actual[1].requires_grad
        assert actual[0].is_leaf
        assert actual[1].is_leaf


def test_versions_count_the_writes():
    w = {"a": random(5), "b": random(4), "unchanged": random(3)}
    g = {"a": random(5), "b": random(4), "unchanged": None}
    v = {key: torch.zeros_like(x) for key, x in w.items()}
    count = torch.tensor(0)

    def versions():
        return [x._version for x in (*w.values(), *v.values(), g["a"], count)]

    before = versions()
    by_kernel({"a": w["a"]}, {"a": g["a"]}, None, {"a": v["a"]}, count)
    assert versions() == before
    for i in range(1, 4):
        by_kernel(w, g, w, v, count)
        after = [b - a for a, b in zip(before, versions(), strict=True)]
        assert after == [i, i, 0, i, i, 0, 0, i]
        assert count == i
    with pytest.raises(LarsTreeError):
        step(w, g, w, v | {"b": torch.zeros(7)}, count)
    assert [b - a for a, b in zip(before, versions(), strict=True)] == after
    v = {key: x.requires_grad_() for key, x in v.items()}
    loss = (v["a"] * v["a"]).sum()
    by_kernel(w, g, w, v, count)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors():
    w, g, v = random(5), random(5), random(5)
    expected = by_twin(w, g, None, v)
    with torch.inference_mode():
        inside = [x.clone() for x in (w, g, v)]
        new = by_kernel(*inside[:2], None, inside[2])
    assert new[1].is_inference()
    assert all(map(torch.equal, new, expected))
    for out in (None, inside[0]):
        actual = by_kernel(*inside[:2], out, inside[2])
        assert all(map(torch.equal, actual, expected))


# ---- Pairs of w and a velocity that the kernel does not support

OTHERS = {
    "strided": lambda: (random(3), random(6)[::2]),
    "another order": lambda: (random(3, 2), random(2, 3).T),
    "misaligned": lambda: (
        random(3),
        torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1),
    ),
    "complex": lambda: (random(3) * (1 + 2j), random(3) * 1j),
    "negative view": lambda: (random(3), torch._neg_view(random(3))),
    "one gradient is missing": lambda: ([random(3), random(3)], [random(3), random(3)]),
}


def gradient(w):
    return [random(3), None] if isinstance(w, list) else torch.ones_like(w)


@pytest.mark.parametrize("case", OTHERS)
def test_unsupported_leaves_get_the_same_bits(case):
    w, v = OTHERS[case]()
    with watched() as took:
        actual = step(w, gradient(w), None, v)
    assert took[-1] is False  # the last plan that steps was offered all leaves
    expected = by_twin(w, gradient(w), None, v)
    for x, y in zip(actual, expected, strict=True):
        assert all(map(equal, structure.leaves(x), structure.leaves(y)))


def half(x):
    return x.to(torch.float16)


REFUSED = {
    "freed": lambda: (random(3), cut(random(3), 0)),
    "freed and large": lambda: (random(3_000_000), cut(random(3_000_000), 0)),
    "cut short": lambda: (random(3), cut(random(3), 8)),
    "cut short to its length": lambda: (random(2), cut(random(3)[1:], 8)),
    "cut short and transposed": lambda: (random(2, 2), cut(random(2, 3)[:, 1:].T, 16)),
    "meta": lambda: (random(3), torch.empty(3, device="meta")),
    "sparse": lambda: (random(3), random(3).to_sparse()),
    "another dtype": lambda: (random(3), random(3).double()),
    "too short": lambda: (half(random(3)), half(random(3))),
    "integers": lambda: (random(3), torch.ones(3, dtype=torch.int32)),
    "another shape": lambda: (random(3), random(4)),
    "a numpy array": lambda: (random(3), np.zeros(3, np.float32)),
    "a number": lambda: (torch.tensor(1.0), 0.0),
}
IN_PLACE = {
    "negative view": lambda: (random(3), torch._neg_view(random(3))),
    "expanded": lambda: (random(3), torch.zeros(1).expand(3)),
    "the weights": lambda: ((x := random(3)), x),
    "a part of the weights": lambda: ((x := random(6))[:4], x[2:]),
    "of two": lambda: ([random(3), random(3)], [(x := random(3)), x]),
    "of weights without a gradient": lambda: (
        [random(3), random(3)],
        [random(3), cut(random(3), 0)],
    ),
    "of weights without a gradient, another shape": lambda: (
        [random(3), random(3)],
        [random(3), random(4)],
    ),
}


@pytest.mark.parametrize(
    ("case", "out"),
    [*itertools.product(REFUSED, ["new", "w"]), *((case, "w") for case in IN_PLACE)],
)
def test_the_kernel_does_not_update_leaves_that_are_refused(case, out):
    messages = []
    for call in (step, by_twin):
        w, v = (REFUSED | IN_PLACE)[case]()
        before = [x.clone() for x in structure.leaves(w)]
        with pytest.raises(LarsTreeError) as caught:
            call(w, gradient(w), w if out == "w" else None, v)
        messages.append(str(caught.value))
        assert all(map(torch.equal, structure.leaves(w), before))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_as_counters(dtype):
    w, g, v = random(3), random(3), random(3)
    count = torch.tensor(5, dtype=dtype)
    columns = Columns([w], [g], [w], [Rule(0.1)], [v])
    backend, plan = need("lars_tree._backends.torch.backend").BACKEND, _native.plan()
    taken = backend.count(plan, count)
    assert taken is (dtype == torch.int64)
    assert backend.prepare(plan, columns, None, None) == []
    plan.step()
    assert count == 5 + taken
    for i in range(3):
        assert count == 5 + taken + i
        step(w, g, w, v, count)


def test_read_only_memory_is_refused(tmp_path):
    file = tmp_path / "state"
    np.ones(3000, np.float32).tofile(file)
    np.ones(1, np.int64).tofile(tmp_path / "step")
    code = f"""if 1:
        import numpy as np, torch, lars_tree
        from lars_tree._core.advance import advance
        options = {{"lr": 0.5, "momentum": 0.5, "stop_gradients": True}}
        mapped = np.memmap({str(file)!r}, np.float32, mode="r")
        step = np.memmap({str(tmp_path / "step")!r}, np.int64, mode="r")
        for offset in (0, 1, 1500):
            v = torch.from_numpy(mapped)[offset:]
            w, g = torch.ones_like(v), torch.zeros_like(v)
            new, state = advance(w, g, None, options, {{"velocity": v}})
            print((state["velocity"] == 0.5).all().item(), (new == 0.5).all().item())
            try:
                advance(w, g, w, options, {{"velocity": v}})
            except lars_tree.OutError:
                print("refused", (w == 1).all().item())
        state = {{"velocity": torch.ones_like(v), "step": torch.from_numpy(step)[0]}}
        state["skipped"] = torch.tensor(0)
        try:
            lars_tree.Lars(0.5, 0.5).update(w, g, state, out=w)
        except lars_tree.OutError:
            print("refused", (w == 1).all().item(), (state["velocity"] == 1).all().item())"""
    assert run(code) == [*["True", "True", "refused", "True"] * 3, "refused", "True", "True"]
