"""Parts of layers in chunks, and temporaries for one chunk that are views of one workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, ops

from lars_tree._backends.base import Item
from lars_tree._backends.torch.layers import Layer


class Part(NamedTuple):
    """A part of a layer, and the index of the layer in its group."""

    row: int
    out: Tensor
    w: Tensor
    dcdw: Tensor
    velocity: Any


class Chunks:
    """Layers in chunks, each with some temporaries, which have at most `limit` bytes together.

    Attributes:
        counts: The number of parts of each layer.
        parts: The parts of the layers, as one list for each chunk.
        size: The bytes of the temporaries.
    """

    def __init__(
        self, layers: list[Layer], temporaries: int, itemsize: int, limit: int, others: int = 0
    ) -> None:
        """`others` is the number of temporaries that do not belong to the workspace."""
        longest = limit // ((temporaries + others) * itemsize)
        by_layer = [
            [Part(row, *part) for part in split((x.out, x.w, x.dcdw, x.velocity), longest)]
            for row, x in enumerate(layers)
        ]
        self.counts = [len(parts) for parts in by_layer]
        self.parts = list(chunked(chain(*by_layer), longest, lambda part: part.out.numel()))
        elements = max(sum(part.out.numel() for part in parts) for parts in self.parts)
        self._each = -(-elements * itemsize // 16) * 16  # aligned
        self.size = temporaries * self._each

    def temporaries(self, workspace: Tensor) -> list[Tensor]:
        """The temporaries as tensors of bytes."""
        if not self.size:
            return []
        return list(workspace.narrow(0, 0, self.size).split(self._each))


def split(xs: tuple[Any, ...], limit: int) -> Iterator[tuple[Any, ...]]:
    """Parts of at most `limit` elements of tensors that have one shape; None stays None."""
    x = xs[0]
    if x.numel() <= limit:
        yield xs
        return
    # Cut across the axis with the longest stride, so that the parts of a dense tensor are dense.
    strides = zip((size > 1 for size in x.shape), x.stride(), range(x.ndim), strict=True)
    axis = max(strides)[-1]
    size = x.shape[axis]
    step = max(1, limit * size // x.numel())
    for start in range(0, size, step):
        parts = {id(x): x.narrow(axis, start, min(step, size - start)) for x in xs if x is not None}
        yield from split(tuple(parts.get(id(x)) for x in xs), limit)


def chunked(
    items: Iterable[Item], limit: int, size_of: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Lists of consecutive items, none larger than `limit`, whose sizes add up to at most that."""
    chunk: list[Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if chunk and total + size > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += size
    if chunk:
        yield chunk


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a flat tensor with these shapes, and these strides if they are dense."""
    found, start = [], 0
    for x in like:
        if x.is_contiguous() or ops.aten.is_non_overlapping_and_dense(x):
            found.append(flat.as_strided(x.shape, x.stride(), flat.storage_offset() + start))
        else:
            found.append(flat.narrow(0, start, x.numel()).view(x.shape))
        start += x.numel()
    return found
