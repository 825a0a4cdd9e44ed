"""MLX: its arrays have no `device`, so they are refused, and shown."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need

from lars_tree import Array, BackendError, Container, Lars, LeafError, lars_update

mx = need("mlx.core")


def test_weights_are_refused_with_their_paths():
    w, g = Container(a=np.ones(2), b=mx.array([3.0, 4.0])), Container(a=np.ones(2), b=np.ones(2))
    text = r"b: expected dense data, got an array of mlx.core, .* convert it with numpy.asarray"
    for call in (
        lambda: lars_update(w, g, 0.1),
        lambda: lars_update(w, g, 0.1, out=w),
        lambda: lars_update(w, {"a": g.a, "b": None}, 0.1),
        lambda: Lars(0.1).init(w),
    ):
        with pytest.raises(LeafError, match=text) as error:
            call()
        assert error.value.paths == (("b",),)
    assert w.a.tolist() == [1, 1]


def test_gradients_and_rates_are_refused():
    w = {"a": np.array([3.0, 4.0])}
    with pytest.raises(
        BackendError, match=r"a: expected a numpy array as in w, got one of mlx\.core"
    ):
        lars_update(w, {"a": mx.array([0.4, 0.3])}, 0.1)
    with pytest.raises(ValueError, match="lr has an invalid value"):
        lars_update(w, w, mx.array(0.1))


def test_a_container_that_holds_one_is_shown():
    w = Container(a=mx.array([3.0, 4.0]), b=np.ones(2))
    assert "a  array that cannot be used" in repr(w)
    assert "array that cannot be used" in w._repr_html_()
    assert repr(Array(w.a)) == "Array([3, 4], dtype=float32)"
    assert w != Container(b=np.ones(2))


def test_converted_arrays_are_updated():
    w = np.asarray(mx.array([3.0, 4.0]))
    new = lars_update(w, np.asarray(mx.array([0.4, 0.3])), 0.1)
    assert mx.array(new).tolist() == pytest.approx([2.6, 3.7])
