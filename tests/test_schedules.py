"""Schedules: values, laws, and agreement of the libraries."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
from conftest import need
from conftest import unit_lars as Lars
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import OptionError
from lars_tree.schedules import Constant, Cosine, Polynomial

EACH = [
    Constant(0.3),
    Constant(0.3, warmup_steps=7),
    Polynomial(10.0, 100),
    Polynomial(10.0, 100, 20, power=1, end=0.5),
    Polynomial(1.0, 5, 5),
    Cosine(2.0, 100, 20, end=0.1),
    Cosine(2.0, 1),
]

rates = st.floats(0, 1e3)
schedules = st.one_of(
    st.builds(Constant, rates, st.integers(0, 50)),
    st.tuples(rates, rates, st.integers(0, 50), st.integers(1, 50), st.floats(0.5, 4)).map(
        lambda x: Polynomial(max(x[:2]), x[2] + x[3], x[2], x[4], min(x[:2]))
    ),
    st.tuples(rates, rates, st.integers(0, 50), st.integers(1, 50)).map(
        lambda x: Cosine(max(x[:2]), x[2] + x[3], x[2], min(x[:2]))
    ),
)


def test_the_schedule_of_the_paper():
    """The rate rises linearly from 0 during the warm-up, and then is peak * (1 - t)**2."""
    schedule = Polynomial(8.0, total_steps=50, warmup_steps=10)
    expected = [8 * s / 10 if s <= 10 else 8 * (1 - (s - 10) / 40) ** 2 for s in range(51)]
    assert [schedule(s) for s in range(51)] == pytest.approx(expected, rel=1e-14)


def test_half_a_cosine_wave():
    schedule = Cosine(1.0, total_steps=8, end=0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(9)]
    assert [schedule(s) for s in range(9)] == pytest.approx(expected, rel=1e-14)


@given(schedules, st.integers(0, 200))
def test_rates_rise_to_the_peak_then_fall_to_the_end(schedule, step):
    peak = getattr(schedule, "peak", getattr(schedule, "rate", None))
    end = getattr(schedule, "end", peak)
    warmup = schedule.warmup_steps
    before, here = schedule(step), schedule(step + 1)
    slack = 1e-12 * peak
    if step < warmup:
        assert before <= here + slack
        assert before == pytest.approx(peak * step / warmup, rel=1e-12)
    else:
        assert here <= before + slack
    assert schedule(warmup) == peak
    assert schedule(max(warmup, getattr(schedule, "total_steps", 0))) == pytest.approx(end)
    assert 0 <= here <= peak * (1 + 1e-12)
    assert isinstance(here, float)


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_steps_of_every_kind_give_the_same_rate(schedule):
    for step in (0, 3, 20, 61, 1000):
        expected = schedule(step)
        assert schedule(np.array(step)) == expected
        assert schedule(np.int32(step)) == expected


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_a_traced_step_gives_a_traced_rate(schedule):
    jax = need("jax")
    traced = jax.jit(schedule)
    for step in (0, 3, 20, 61, 1000):
        assert float(traced(step)) == pytest.approx(schedule(step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_a_mapped_step_of_torch_gives_a_mapped_rate(schedule):
    torch = need("torch")
    steps = torch.tensor([0, 3, 20, 61, 1000])
    mapped = torch.func.vmap(lambda step: torch.as_tensor(schedule(step)))(steps)
    expected = [schedule(int(step)) for step in steps]
    assert mapped.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert schedule(torch.tensor(3)) == schedule(3)


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_schedules_compare_hash_and_pickle_by_value(schedule):
    again = eval(repr(schedule), {cls.__name__: cls for cls in (Constant, Cosine, Polynomial)})
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.warmup_steps = 3


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.array], ids=lambda x: x.__name__)
def test_numpy_numbers_become_python_numbers(number):
    """Under jit, a numpy number would change the dtype of the rate."""
    rate = np.float32(0.5)
    for plain, other in [
        (Constant(0.5, 7), Constant(rate, number(7))),
        (
            Polynomial(0.5, 100, 20, 2.0, 0.5),
            Polynomial(rate, number(100), number(20), rate * 4, rate),
        ),
        (Cosine(0.5, 100, 20, 0.5), Cosine(rate, number(100), number(20), rate)),
    ]:
        assert repr(other) == repr(plain)
        assert other == plain
        assert type(other(3)) is float
        jax = need("jax")
        with jax.enable_x64(True):
            step = jax.numpy.int32(3)
            assert jax.jit(other)(step).dtype == jax.jit(plain)(step).dtype


def test_a_warm_up_starts_at_0_and_can_be_shifted():
    schedule = Polynomial(1.0, 100, warmup_steps=4)
    assert schedule(0) == 0
    x = np.ones(1)
    for lr, expected in ((schedule, 1.0), (lambda step: schedule(step + 1), 0.75)):
        opt = Lars(lr)
        assert opt.update(x, x, opt.init(x))[0] == expected


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Constant(-1.0), "rate: expected a finite number >= 0, got -1.0"),
        (lambda: Constant(math.nan), "rate: expected a finite number >= 0, got nan"),
        (lambda: Constant(0.1, 1.5), "warmup_steps: expected a whole number >= 0, got 1.5"),
        (lambda: Polynomial(1.0, 10, -1), "warmup_steps: expected a whole number >= 0, got -1"),
        (lambda: Polynomial(1.0, 10, 11), r"total_steps: expected at least 1 and warmup_steps"),
        (lambda: Polynomial(1.0, 0), r"total_steps: expected at least 1 and warmup_steps \(0\)"),
        (lambda: Polynomial("1", 10), "peak: expected a finite number >= 0, got '1'"),
        (lambda: Polynomial(1.0, 10, power=math.inf), "power: expected a finite number"),
        (lambda: Cosine(1.0, True), "total_steps: expected a whole number >= 0, got True"),
        (lambda: Cosine(1.0, np.True_), "total_steps: expected a whole number >= 0, got np.True_"),
        (
            lambda: Cosine(1.0, np.int64(-3)),
            r"total_steps: expected a whole number >= 0, got np.int64",
        ),
        (
            lambda: Constant(np.float32("nan")),
            r"rate: expected a finite number >= 0, got np.float32",
        ),
        (lambda: Constant(np.True_), "rate: expected a finite number >= 0, got np.True_"),
        (lambda: Constant(1j), "rate: expected a finite number >= 0, got 1j"),
        (lambda: Cosine(True, 10), "peak: expected a finite number >= 0, got True"),
    ],
)
def test_invalid_values_are_refused(make, says):
    with pytest.raises(OptionError, match=says):
        make()


STEPS = (-1.5, 0.5, 3.0, 6.75, 7.0, 20.5, 60.25, 99.5, 1000.0, math.inf)


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_a_fractional_step_has_one_rate_in_every_library(schedule):
    """The step may be concrete or traced."""
    jax, torch = need("jax"), need("torch")
    expected = [schedule(step) for step in STEPS]
    assert all(isinstance(rate, float) for rate in expected)
    for make in (np.float64, np.float32, np.float16, np.array, torch.tensor, jax.numpy.asarray):
        assert [schedule(make(step)) for step in STEPS] == pytest.approx(expected, rel=1e-3)
    near = pytest.approx(expected, rel=1e-5, abs=1e-6)
    for dtype in ("float32", "float16"):
        steps = np.array(STEPS, dtype)  # each step is exact in both dtypes
        assert jax.jit(jax.vmap(schedule))(steps).tolist() == near
        rates = lambda step: torch.as_tensor(schedule(step), dtype=torch.float32)  # noqa: E731
        assert torch.func.vmap(rates)(torch.from_numpy(steps)).tolist() == near


def test_rates_between_two_steps_lie_on_the_curve():
    assert Polynomial(1.0, total_steps=10)(0.5) == 0.95**2
    assert Constant(1.0, warmup_steps=10)(0.5) == 0.05
    assert Cosine(1.0, total_steps=10)(2.5) == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("schedule", EACH, ids=repr)
@given(step=st.integers(-10, 2**60))
def test_whole_numbers_keep_their_bits_as_floats(schedule, step):
    if int(float(step)) == step:
        assert schedule(float(step)) == schedule(step)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "float16", "bfloat16"])
def test_small_step_dtypes_do_not_overflow(dtype):
    """In the step's dtype, 3 - 20 (unsigned), 200 (int8) and 70,000 (float16) would overflow."""
    jax = need("jax")
    for schedule in (Polynomial(10.0, 100, 20, end=1.0), Cosine(2.0, 70_000, 200)):
        step = jax.numpy.asarray(3, dtype)
        assert float(jax.jit(schedule)(step)) == pytest.approx(schedule(3), rel=1e-6)
        assert schedule(step) == schedule(3)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_arrays_of_steps_give_arrays_of_rates(library):
    xp, schedule = need(library), Polynomial(10.0, 100, 20, end=1.0)
    for shape in ((3,), (1,)):
        rates = schedule(xp.full(shape, 60))
        assert rates.shape == shape
        assert rates.tolist() == pytest.approx([schedule(60)] * shape[0])
