"""Updates of dask arrays are lazy."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import need

from lars_tree import Container, lars_update

da = need("dask.array")


def lazy(log, x):
    """A dask array that logs when a chunk is computed."""

    def note(block):
        log.append(block.shape)
        return block

    return da.from_array(x, chunks=5).map_blocks(note, dtype=x.dtype, meta=np.empty((0,), x.dtype))


def test_nothing_is_computed_until_asked():
    log = []
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=17).astype(np.float32) for _ in range(2))
    trees = [Container(a=lazy(log, x)) for x in (w, g)]
    new = trees[0].lars_update(trees[1], 0.1, decay_lambda=0.1, nonfinite="skip", trust_clip=True)
    assert log == []
    assert new.a.chunks == trees[0].a.chunks
    assert new.a.dtype == np.float32
    expected = lars_update(w, g, 0.1, decay_lambda=0.1, trust_clip=True)
    np.testing.assert_allclose(new.a.compute(), expected, rtol=1e-7)
    assert log


def test_gradients_broadcast_and_empty_arrays_pass():
    w = {"a": da.ones((3, 4), chunks=2), "b": da.ones((0, 3)), "c": da.ones(())}
    new = lars_update(w, {"a": da.ones(4), "b": da.ones(3), "c": 1.0}, 0.1)
    assert {key: x.shape for key, x in new.items()} == {"a": (3, 4), "b": (0, 3), "c": ()}
    assert float(new["c"].compute()) == pytest.approx(0.9)
