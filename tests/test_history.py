"""TrustHistory and ScalarCallback: recording, waiting for devices, plots."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import need, to_library
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Container, LeafError, OptionError, StructureError, _backends
from lars_tree.report import ScalarCallback, TrustHistory, TrustRatioWarning, trust_ratios


def ratios(step, count=2):
    return Container(
        layer={f"k{i}": np.float64(10.0 ** (i % 7 - 1) * (step + 1)) for i in range(count)}
    )


def recorded(steps=5, count=2, **options):
    history = TrustHistory(**options)
    for step in range(steps):
        history.record(ratios(step, count))
    return history


# Recording


def test_a_history_has_the_ratios_of_each_layer_by_step(library):
    history = TrustHistory()
    w = to_library(library.name, np.array([3.0, 4.0]))
    for i in (1, 2, 4):
        g = to_library(library.name, np.array([0.0, float(i)]))
        history.record(trust_ratios({"a": [w], "b": w}, {"a": [g], "b": None}, 0.1), step=10 * i)
    assert history.steps.tolist() == [10, 20, 40]
    assert list(history.ratios) == ["a/0"]
    np.testing.assert_allclose(history.ratios["a/0"], [5, 2.5, 1.25], rtol=1e-6)
    assert repr(history) == "TrustHistory: 1 layer, 3 steps from 10 to 40"
    assert len(history) == 3


def test_steps_count_on_where_they_are_left_out():
    history = recorded(2)
    history.record(ratios(0), step=7)
    history.record(ratios(0))
    assert history.steps.tolist() == [0, 1, 7, 8]
    assert repr(TrustHistory()) == "TrustHistory: nothing recorded"
    assert TrustHistory().ratios == {}


def test_a_layer_without_a_ratio_has_a_gap():
    history = TrustHistory()
    for a, b in ((None, [1.0, 2.0]), (3.0, None), (4.0, [5.0, np.nan])):
        history.record({"a": a, "b": None if b is None else np.array(b)})
    expected = {"a": [np.nan, 3, 4], "b[0]": [1, np.nan, 5], "b[1]": [2, np.nan, np.nan]}
    assert list(history.ratios) == list(expected)
    for name, column in history.ratios.items():
        np.testing.assert_array_equal(column, expected[name])


def test_keys_match_by_name_and_another_tree_is_refused():
    history = TrustHistory()
    history.record({"b": 1.0, "a": 2.0})
    history.record({"a": 4.0, "b": 3.0})
    with pytest.raises(StructureError, match="unexpected 'c'") as caught:
        history.record({"a": 1.0, "b": 1.0, "c": 1.0})
    assert caught.value.argument == "ratios"
    assert {k: x.tolist() for k, x in history.ratios.items()} == {"b": [1, 3], "a": [2, 4]}


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ({"a": {"b": "0.5"}, "c": 1.0}, "a/b: expected a number or an array, got a str"),
        ({"a": {"b": np.ones(2)}, "c": 1.0}, r"a/b: expected ratios of shape \(\) as before"),
        ({"a": {"b": 1.0}, "c": np.ones(3)}, r"c: expected ratios of shape \(2,\) as before"),
    ],
)
def test_ratios_that_do_not_match_are_refused_and_not_recorded(odd, text):
    history = TrustHistory()
    history.record({"a": {"b": 1.0}, "c": None})
    history.record({"a": {"b": None}, "c": np.array([2.0, 3.0])})
    with pytest.raises(LeafError, match=text) as caught:
        history.record(odd)
    assert caught.value.argument == "ratios"
    history.record({"a": {"b": 4}, "c": None})
    assert history.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(history.ratios["a/b"], [1, np.nan, 4])


@given(st.integers(2, 9), st.integers(0, 200))
def test_memory_is_bounded_and_kept_steps_span_the_run_evenly(capacity, count):
    history = recorded(count, capacity=capacity)
    assert len(history) <= capacity
    assert len(history) >= min(count, capacity // 2)
    stride = {int(x) for x in np.diff(history.steps)}
    assert len(stride) <= 1
    if count:
        assert history.steps[0] == 0
        assert count - history.steps[-1] <= max(stride, default=1)
    for name in history.ratios:
        scale = 0.1 if name == "layer/k0" else 1.0
        assert history.ratios[name] == pytest.approx(scale * (history.steps + 1))


@pytest.mark.parametrize("read_at", [set(), {0, 3, 4, 7, 30}, set(range(50))])
def test_reading_in_between_changes_nothing(read_at):
    history = TrustHistory(capacity=7)
    for step in range(50):
        history.record(ratios(step))
        if step in read_at:
            assert history.ratios["layer/k1"][-1] == history.steps[-1] + 1
            kinds = {type(x) for row in history._rows for x in row}
            assert kinds == {np.ndarray}  # nothing left to fetch
    assert history.ratios["layer/k1"].tolist() == (history.steps + 1).tolist()


@pytest.mark.parametrize("capacity", [0, 1, -3, 2.5, "9", True])
def test_an_invalid_capacity_is_refused(capacity):
    with pytest.raises(OptionError, match="capacity: expected a whole number >= 2, got"):
        TrustHistory(capacity=capacity)


# Waiting


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_recording_does_not_wait_and_reading_fetches_once(name, monkeypatch):
    x = to_library(name, np.array([3.0, 4.0]))
    backend = _backends.find(x)
    fetched = []
    fetch = type(backend).fetch

    def counting(self, xs):
        fetched.append(len(xs))
        return fetch(self, xs)

    monkeypatch.setattr(type(backend), "fetch", counting)
    monkeypatch.setattr(type(backend), "to_numpy", lambda self, x: pytest.fail("looked at"))
    found = trust_ratios([x, x], [1.0, 2.0], 0.1)
    history = TrustHistory()
    for _ in range(10):
        history.record(found)
    assert fetched == []
    assert [len(column) for column in history.ratios.values()] == [10, 10]
    assert fetched == [20]
    history.record(found)
    assert history.ratios["0"][-1] == pytest.approx(5 / 2**0.5)
    assert fetched == [20, 2]


def test_ratios_are_recorded_outside_of_jit_only():
    jax = need("jax")
    history = TrustHistory()
    w = Container(b=jax.numpy.array([3.0, 4.0]), a=jax.numpy.ones(1))

    @jax.jit
    def step(w):
        return trust_ratios(w, 1.0, 0.1)

    history.record(step(w))
    assert history.ratios["b"] == pytest.approx([5 / 2**0.5])
    with pytest.raises(LeafError, match="values of ratios are not known yet"):
        jax.jit(lambda w: history.record(trust_ratios(w, 1.0, 0.1)))(w)
    assert len(history) == 1


def test_lazy_ratios_are_computed_when_recorded():
    history = TrustHistory()
    history.record(trust_ratios(to_library("dask", np.array([3.0, 4.0])), 1.0, 0.1))
    assert type(history._rows[0][0]) is np.ndarray


# Plots


def axes_of(history, *arguments):
    need("matplotlib")
    return history.plot(*arguments)


def test_few_layers_are_lines_over_a_logarithmic_axis():
    history = recorded(5, count=3)
    ax = axes_of(history)
    assert ax.get_yscale() == "log"
    assert [line.get_label() for line in ax.get_lines()] == list(history.ratios)
    for line, column in zip(ax.get_lines(), history.ratios.values(), strict=True):
        assert line.get_xdata().tolist() == [0, 1, 2, 3, 4]
        assert line.get_ydata().tolist() == column.tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(history.ratios)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "ratio")


@pytest.mark.parametrize("count", [2, 13])
def test_ticks_are_whole_steps(count):
    ticks = axes_of(recorded(1, count)).get_xticks()
    assert [x for x in ticks if x != int(x)] == []


def test_lines_can_be_told_apart():
    lines = axes_of(recorded(3, count=12)).get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_many_layers_are_a_heat_map():
    history = recorded(5, count=13)
    ax = axes_of(history)
    (mesh,) = ax.collections
    table = np.array(list(history.ratios.values()))
    assert mesh.get_array().reshape(table.shape).tolist() == table.tolist()
    assert type(mesh.norm).__name__ == "LogNorm"
    assert mesh.get_coordinates()[0, :, 0].tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(history.ratios)
    low, high = ax.get_ylim()
    assert low > high  # the first layer is at the top
    assert len(axes_of(recorded(2, count=1000)).get_yticklabels()) <= 40


@pytest.mark.parametrize("count", [2, 13])
def test_ratios_that_cannot_be_drawn_are_named_in_a_warning(count):
    history = recorded(4, count=count)
    odd = ratios(4, count)
    odd.layer.k0, odd.layer.k1 = np.float64(0), np.float64(np.inf)
    history.record(odd)
    with pytest.warns(TrustRatioWarning) as caught:
        ax = axes_of(history)
    (warning,) = caught
    assert str(warning.message).splitlines()[1:] == [
        "  layer/k0: ratio is 0 at 1 of 5 steps",
        "  layer/k1: ratio is inf at 1 of 5 steps",
    ]
    if count == 2:
        assert np.isnan([line.get_ydata()[-1] for line in ax.get_lines()]).all()
    else:
        (mesh,) = ax.collections
        assert mesh.get_array().mask.reshape(13, 5).sum() == 2
    ax.figure.canvas.draw()


@pytest.mark.parametrize("count", [0, 2, 13])
@pytest.mark.parametrize("value", [np.nan, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_anything_can_be_drawn(count, value, steps):
    history = TrustHistory()
    for _ in range(steps):
        history.record({f"k{i}$_{{x": np.float64(value) for i in range(count)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrustRatioWarning)
        axes_of(history).figure.canvas.draw()


def test_plot_draws_on_the_given_axes():
    figure = need("matplotlib.figure").Figure()
    ax = figure.subplots()
    assert axes_of(recorded(), ax) is ax
    assert axes_of(recorded()).figure is not figure


def test_a_notebook_shows_the_figure_of_new_axes():
    picture = axes_of(recorded())._repr_png_()
    image = need("matplotlib.image").imread(io.BytesIO(picture))
    assert image.shape[0] > 300
    assert image.std() > 0.05  # something is drawn
    assert not hasattr(
        axes_of(recorded(), need("matplotlib.figure").Figure().subplots()), "_repr_png_"
    )


def test_pyplot_is_not_imported():
    need("matplotlib")
    code = """if 1:
        import sys
        from lars_tree.report import TrustHistory
        history = TrustHistory()
        assert "matplotlib" not in sys.modules
        history.record({"a": 1.0})
        history.plot()
        assert "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Writers


class Writer:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        assert type(value) is float
        self.written.append((tag, value, step))


def test_scalars_are_written_by_path(library):
    w = {"a": {"k": to_library(library.name, np.full((2, 4), 2.0))}, "none": None}
    writer = Writer()
    log = ScalarCallback(writer, tag="ratios", every=2)
    for step in range(3):
        log(trust_ratios(w, 1.0, 0.1, layer_axis={"a": 0, "none": None}), step)
    names = ["ratios/a/k[0]", "ratios/a/k[1]"]
    assert writer.written == [(name, 2.0, step) for step in (0, 2) for name in names]
    bare = Writer()
    ScalarCallback(bare)(np.float64(3), 5)
    assert bare.written == [("trust_ratio", 3.0, 5)]


def test_steps_between_every_are_not_read():
    class Never:
        def __float__(self):
            raise AssertionError

    ScalarCallback(Writer(), every=10)({"a": Never()}, 5)
    for every in (0, 0.5, None):
        with pytest.raises(OptionError, match="every: expected a whole number >= 1, got"):
            ScalarCallback(Writer(), every=every)
