"""Memory: overlaps, signals, memory maps, scratch space."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Container, OutError, lars_update
from lars_tree._backends import memory
from lars_tree._core import writes


@st.composite
def views(draw):
    """A view with any strides, and its buffer of 60 elements."""
    shape = draw(st.sampled_from([(), (1,), (4,), (0,), (2, 3), (3, 2)]))
    strides = [draw(st.integers(-4, 4)) for _ in shape]
    buffer = np.arange(60.0)
    start = 30 + draw(st.integers(-6, 6))
    return np.lib.stride_tricks.as_strided(buffer[start:], shape, [8 * s for s in strides]), buffer


def addresses(view):
    start = view.__array_interface__["data"][0]
    return [
        start + sum(i * s for i, s in zip(index, view.strides, strict=True))
        for index in np.ndindex(view.shape)
    ]


@given(views())
def test_a_view_that_overlaps_itself_is_always_found(pair):
    view, _ = pair
    if len(set(addresses(view))) < view.size:
        assert memory.overlaps_itself(view)
    elif view.flags.c_contiguous or view.T.flags.c_contiguous:
        assert not memory.overlaps_itself(view)


@given(st.lists(views(), max_size=5), st.lists(views(), max_size=4))
def test_overlapping_finds_exactly_the_pairs_that_share_an_element(some, others):
    base = np.arange(60.0)  # one buffer for all

    def move(view, buffer):
        start = view.__array_interface__["data"][0] - buffer.ctypes.data
        return np.lib.stride_tricks.as_strided(base[start // 8 :], view.shape, view.strides)

    some, others = ([move(*pair) for pair in pairs] for pairs in (some, others))
    sets = [[set(addresses(x)) for x in xs] for xs in (some, others)]
    pairs = [(i, j) for j in range(len(some)) for i in range(j)]
    expected = {(i, j) for i, j in pairs if sets[0][i] & sets[0][j]}
    assert set(memory.overlapping(some)) == expected
    expected = {(i, j) for i, x in enumerate(sets[0]) for j, y in enumerate(sets[1]) if x & y}
    assert set(memory.overlapping(some, others)) == expected


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_inputs_that_overlap_out_give_the_same_result(a, b, c, negative):
    buffer = np.random.default_rng(0).normal(size=40)
    step = -1 if negative else 1
    w, g, out = (buffer[i : i + 20 : 1] for i in (a, b, c))
    w = w[::step]
    expected = lars_update(w.copy(), g.copy(), 0.1, decay_lambda=0.1)
    lars_update({"w": w}, {"w": g}, 0.1, decay_lambda=0.1, out={"w": out})
    # A negative stride changes the order of the sums, and so perhaps the last bit.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-15)


def test_out_may_be_the_gradients_or_swap_the_leaves():
    w = {"a": np.array([3.0, 4.0]), "b": np.array([5.0, 12.0])}
    g = {"a": np.array([0.4, 0.3]), "b": np.array([1.2, 0.5])}
    expected = lars_update(w, g, 0.1)
    swapped = {"a": w["b"].copy(), "b": w["a"].copy()}
    lars_update(w, g, 0.1, out=g)
    assert {k: v.tolist() for k, v in g.items()} == {k: v.tolist() for k, v in expected.items()}
    cross = {"a": swapped["b"], "b": swapped["a"]}  # cross.a is swapped.b
    lars_update(swapped, {"a": 1.0, "b": 1.0}, 0.1, out=cross)
    assert cross["a"].tolist() == lars_update(np.array([5.0, 12.0]), 1.0, 0.1).tolist()
    assert cross["b"].tolist() == lars_update(np.array([3.0, 4.0]), 1.0, 0.1).tolist()


def test_rates_in_the_memory_of_out_are_read_first():
    w, g, rates = np.array([3.0, 4.0]), np.array([0.4, 0.3]), np.array([0.1, 0.2])
    expected = lars_update(w, g, rates.copy())
    lars_update(w, g, rates, out=rates)
    assert rates.tolist() == expected.tolist()


def test_tied_weights_are_refused_but_interleaved_ones_are_not():
    fused = np.arange(1.0, 13).reshape(3, 4)
    w = Container(q=fused[:, ::2], k=fused[:, 1::2])
    expected = w.lars_update(1.0, 0.1)
    w.lars_update(1.0, 0.1, out=w)
    assert w == expected
    tied = Container(embed=fused, head=fused.T)
    with pytest.raises(OutError, match="head: shares memory with embed"):
        tied.lars_update(1.0, 0.1, out=tied)
    assert tied.lars_update(1.0, 0.1).head.shape == (4, 3)  # new arrays are never tied


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_a_signal_acts_before_or_after_an_update_never_within():
    code = """
    import os, random, signal, threading, time, numpy as np, lars_tree
    caught, done, armed = 0, [], [False]
    def fail(number, frame):
        if armed[0]: raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, fail)
    w = lars_tree.Container({str(i): np.full(2000, 1e6) for i in range(40)})
    def shoot():
        for _ in range(60):
            time.sleep(random.uniform(0.001, 0.006)); os.kill(os.getpid(), signal.SIGALRM)
        done.append(1)
    threading.Thread(target=shoot).start()
    while not done:
        try:
            armed[0] = True
            while not done: w.lars_update(1.0, 1.0, adapt=False, out=w)
        except KeyboardInterrupt:
            armed[0] = False
            caught += 1
            values = set(np.concatenate(w.leaves()))
            assert len(values) == 1, values
        armed[0] = False
    assert caught > 10, caught
    assert signal.getsignal(signal.SIGALRM) is fail
    """
    result = run(code)
    assert result.returncode == 0, result.stderr


def run(code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_memory_map_is_updated_in_the_file(tmp_path):
    rng = np.random.default_rng(0)
    values, g = (rng.normal(size=(300, 200)).astype(np.float32) for _ in range(2))
    values.tofile(tmp_path / "weights")
    w = Container(layer=np.memmap(tmp_path / "weights", np.float32, "r+", shape=values.shape))
    w.lars_update(g, 0.1, out=w)
    expected = lars_update(values, g, 0.1)
    assert isinstance(w.layer, np.memmap)
    w.layer.flush()
    assert np.array_equal(np.fromfile(tmp_path / "weights", np.float32).reshape(300, 200), expected)
    assert type(w.lars_update(g, 0.1).layer) is np.ndarray  # like w.layer * 1
    frozen = Container(layer=np.memmap(tmp_path / "weights", np.float32, "r", shape=values.shape))
    with pytest.raises(OutError, match="read-only"):
        frozen.lars_update(g, 0.1, out=frozen)


def test_an_update_in_place_takes_little_memory(monkeypatch):
    # Without the kernel, results up to this size are buffered before they are written.
    monkeypatch.setattr(writes, "MAX_HELD", 2**19)
    w, g = np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32)
    lars_update(w, g, 0.1, out=w)
    tracemalloc.start()
    try:
        lars_update(w, g, 0.1, decay_lambda=0.1, out=w)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_torch_and_numpy_views_of_one_memory_are_tied():
    torch = need("torch")
    x = np.ones(4)
    w = {"numpy": x, "torch": torch.from_numpy(x)}
    with pytest.raises(OutError, match="shares memory"):
        lars_update(w, 1.0, 0.1, out=w)
