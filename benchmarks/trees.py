"""The weights of the benchmarks: names and shapes of real models, with random values.

Here a tree is a flat dict from path to array; each contestant converts it to its own tree type.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

Shapes = dict[str, tuple[int, ...]]
Flat = dict[str, np.ndarray]


def resnet50() -> Shapes:
    """ResNet-50 with the names of torchvision: 161 leaves, 25.6 M parameters."""
    shapes: Shapes = dict(_convolution("conv1", "bn1", 3, 64, 7))
    channels = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            path = f"layer{stage}/{block}/"
            shapes |= _convolution(path + "conv1", path + "bn1", channels, width, 1)
            shapes |= _convolution(path + "conv2", path + "bn2", width, width, 3)
            shapes |= _convolution(path + "conv3", path + "bn3", width, 4 * width, 1)
            if block == 0:
                down = path + "downsample/"
                shapes |= _convolution(down + "0", down + "1", channels, 4 * width, 1)
            channels = 4 * width
    return shapes | {"fc/weight": (1000, channels), "fc/bias": (1000,)}


def _convolution(
    kernel: str, norm: str, inputs: int, outputs: int, size: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{kernel}/weight", (outputs, inputs, size, size)
    yield f"{norm}/weight", (outputs,)
    yield f"{norm}/bias", (outputs,)


def gpt2() -> Shapes:
    """GPT-2 small with the names of transformers: 148 leaves, 124 M parameters."""
    d = 768
    shapes: Shapes = {"wte/weight": (50257, d), "wpe/weight": (1024, d)}
    for layer in range(12):
        for name, shape in {
            "ln_1": (d,),
            "attn/c_attn": (d, 3 * d),
            "attn/c_proj": (d, d),
            "ln_2": (d,),
            "mlp/c_fc": (d, 4 * d),
            "mlp/c_proj": (4 * d, d),
        }.items():
            shapes[f"h/{layer}/{name}/weight"] = shape
            shapes[f"h/{layer}/{name}/bias"] = shape[-1:]
    return shapes | {"ln_f/weight": (d,), "ln_f/bias": (d,)}


def small(leaves: int = 1000) -> Shapes:
    """Pairs of a 16x16 kernel and a bias of 16, to measure the cost per leaf."""
    shapes: Shapes = {}
    for pair in range(leaves // 2):
        shapes[f"layer{pair}/kernel"] = (16, 16)
        shapes[f"layer{pair}/bias"] = (16,)
    return shapes


TREES = {"resnet": resnet50, "gpt2": gpt2, "small": small}
TITLES = {"resnet": "ResNet-50", "gpt2": "GPT-2 small", "small": "1000 small leaves"}


def values(shapes: Shapes, scale: float, seed: int) -> Flat:
    """Random float32 arrays of these shapes."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in shapes.items():
        flat[path] = rng.standard_normal(shape, dtype=np.float32)
        flat[path] *= scale
    return flat


def weights_and_gradients(shapes: Shapes) -> tuple[Flat, Flat]:
    """Weights of about 0.05 and gradients of about 0.01."""
    return values(shapes, 0.05, seed=1), values(shapes, 0.01, seed=2)


def least_traffic(shapes: Shapes, *, velocity: bool = False) -> int:
    """The bytes that any step must move: read w and g, write w; read and write the velocity.

    A leaf of more than 4 M elements is read twice, because it does not fit into a cache.
    """
    streams = 5 if velocity else 3
    sizes = [prod(shape) for shape in shapes.values()]
    return sum((streams + 2 * (size > 4_000_000)) * size * 4 for size in sizes)
