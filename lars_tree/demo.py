"""What `lars-tree demo` does: train a small network on real digits, by LARS and by plain SGD.

The network is plain numpy, forward and backward by hand; all its weights are one Container, which
one `lars_update` a step writes in place. Uses only the public API. `tests/test_cli.py` holds the
gradients to numerical derivatives, and the trust ratios shown to the steps that were taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lars_tree.container import Container

if TYPE_CHECKING:
    from rich.table import Table

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

SIZES = {"hidden1": (64, 128), "hidden2": (128, 64), "head": (64, 10)}
DECAY = 1e-4
SGD_RATES = (0.3, 1.0, 3.0)  # around the best one, near 1 at the default batch: 3 diverges


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], as rows, and the digits they show."""

    images: Floats
    labels: Labels


class Layer(NamedTuple):
    """One array at the last step: its norms before the step, and its trust ratio."""

    path: str
    shape: tuple[int, ...]
    w_norm: float
    g_norm: float
    ratio: float


class Trained(NamedTuple):
    """What one run came to."""

    rate: float
    train_accuracy: float
    held_out_accuracy: float
    layers: list[Layer]


def load(seed: int) -> tuple[Digits, Digits]:
    """The digits that scikit-learn ships: four fifths to train on, one fifth held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    return Digits(*parts[0::2]), Digits(*parts[1::2])


def initial_weights(rng: np.random.Generator) -> Container:
    """Kernels of variance 2 / inputs (He et al. 2015), which ReLU needs, and zero biases."""
    return Container(
        {
            name: {
                "kernel": rng.normal(0, np.sqrt(2 / inputs), (inputs, outputs)),
                "bias": np.zeros(outputs),
            }
            for name, (inputs, outputs) in SIZES.items()
        }
    )


def forward(w: Container, images: Floats) -> list[Floats]:
    """What goes into each layer, and at last the logits."""
    values = [images]
    for name, layer in w.items():
        z = values[-1] @ layer.kernel + layer.bias
        values.append(z if name == "head" else np.maximum(z, 0))
    return values


def gradients(w: Container, digits: Digits) -> Container:
    """The gradient of the mean cross-entropy by backpropagation."""
    *inputs, logits = forward(w, digits.images)
    # exp overflows at large logits; a common shift cancels in the quotient.
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    delta = exp / exp.sum(axis=1, keepdims=True)
    delta[np.arange(len(delta)), digits.labels] -= 1
    delta /= len(delta)
    # Last layer first; lars_update matches gradients to weights by key, in whatever order.
    g = Container()
    for name, x in zip(reversed(w), reversed(inputs), strict=True):
        g[name] = {"kernel": x.T @ delta, "bias": delta.sum(axis=0)}
        delta = (delta @ w[name].kernel.T) * (x > 0)
    return g


def accuracy(w: Container, digits: Digits) -> float:
    """The fraction of the images that are read right."""
    return float(np.mean(forward(w, digits.images)[-1].argmax(axis=1) == digits.labels))


def trust_ratio(w_norm: float, g_norm: float, decay_lambda: float) -> float:
    """The rule of `lars_update` at trust_coefficient = 1 and eps = 0."""
    denominator = g_norm + decay_lambda * w_norm
    return w_norm / denominator if w_norm and g_norm else 1.0


def train(
    digits: Digits,
    held_out: Digits,
    *,
    lars: bool,
    rate: float,
    seed: int,
    epochs: int,
    batch: int,
    track: Callable[[range], Iterable[int]] = iter,
) -> Trained:
    """Train from the weights, and on the batches, that the seed gives.

    Args:
        digits: What to train on.
        held_out: What to test on.
        lars: False for plain SGD: the same call with adapt=False.
        rate: The first rate; it falls linearly to 0.
        seed: Of the first weights and of the order of the images.
        epochs: Passes over all images.
        batch: Images a step.
        track: Is given the epochs to go through, as a progress bar wants.
    """
    rng = np.random.default_rng(seed)
    w = initial_weights(rng)
    kernels = w.map(lambda path, _: path[-1] == "kernel", with_path=True)
    adapt = kernels.map(lambda is_kernel: is_kernel and lars)
    decay = DECAY * kernels  # biases are neither adapted nor decayed, as is usual
    layers: list[Layer] = []
    count = len(digits.labels)
    for epoch in track(range(epochs)):
        order = rng.permutation(count)
        for start in range(0, count, batch):
            picked = order[start : start + batch]
            g = gradients(w, Digits(digits.images[picked], digits.labels[picked]))
            layers = _layers(w, g, adapt, decay)  # now, as the step overwrites w
            lr = rate * (1 - (epoch + start / count) / epochs)
            w.lars_update(g, lr, adapt=adapt, decay_lambda=decay, out=w)
    return Trained(rate, accuracy(w, digits), accuracy(w, held_out), layers)


def _layers(w: Container, g: Container, adapt: Container, decay: Container) -> list[Layer]:
    layers = []
    for path, array in w.to_flat().items():
        w_norm, g_norm = float(np.linalg.norm(array)), float(np.linalg.norm(g[path]))
        ratio = trust_ratio(w_norm, g_norm, decay[path]) if adapt[path] else 1.0
        layers.append(Layer(path, array.shape, w_norm, g_norm, ratio))
    return layers


def run(*, seed: int, epochs: int, batch: int, rate: float) -> tuple[str, dict[str, Any]]:
    """Train by LARS and by SGD: both, and the layers as LARS saw them, as text and as a record.

    These depend on the arguments alone; progress and time go to stderr.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    digits, held_out = load(seed)
    count = len(digits.labels)
    batch = min(batch, count)
    recipe = {"seed": seed, "epochs": epochs, "batch": batch}
    columns = "{task.description}", BarColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        # Matrices this small gain nothing from threads, whose number may change the last bits.
        threadpool_limits(1),
        # Too high a rate ends in infinity and NaN. The accuracy says so; warnings add nothing.
        np.errstate(all="ignore"),
    ):

        def trained(name: str, rate: float) -> Trained:
            track = partial(progress.track, description=f"{name}, rate {rate:g}")
            return train(digits, held_out, lars=name == "LARS", rate=rate, track=track, **recipe)

        lars = trained("LARS", rate)
        sgd = [trained("SGD", each) for each in sorted({rate, *SGD_RATES})]
    weights = sum(math.prod(layer.shape) for layer in lars.layers)
    intro = (
        f"Handwritten digits: {count} images to train on, {len(held_out.labels)} held out.\n"
        f"{weights} weights in one Container. Seed {seed}, epochs {epochs}, batch {batch}."
    )
    tables = _accuracies(lars, sgd), "", _last_step(lars.layers)
    console = Console(highlight=False)
    with console.capture() as printed:
        console.print(intro, "", *tables, sep="\n")
    record = {"rate": rate, **recipe, "parameters": weights, "lars": _record(lars)}
    return printed.get().rstrip("\n"), record | {"sgd": list(map(_record, sgd))}


def _record(trained: Trained) -> dict[str, Any]:
    return trained._asdict() | {"layers": [layer._asdict() for layer in trained.layers]}


def _accuracies(lars: Trained, sgd: list[Trained]) -> Table:
    rates = ", ".join(f"{each.rate:g}" for each in sgd)
    table = _table(
        ("accuracy", "rate", "train", "held out"),
        "SGD is the same call with adapt=False, all else equal. But rates of LARS are relative to "
        f"|w|, those of SGD are not: so SGD also has the best rate of {rates}, picked, like the "
        "default rate of LARS, by held-out accuracy.",
    )
    rows = {
        "LARS": lars,
        "SGD, same rate": next(each for each in sgd if each.rate == lars.rate),
        "SGD, best rate": max(sgd, key=lambda each: each.held_out_accuracy),
    }
    for name, (rate, train_accuracy, held_out_accuracy, _) in rows.items():
        numbers = f"{rate:g}", f"{train_accuracy:.4f}", f"{held_out_accuracy:.4f}"
        table.add_row(name, *numbers, style="bold green" if name == "LARS" else "")
    return table


def _last_step(layers: list[Layer]) -> Table:
    table = _table(
        ("last LARS step", "shape", "|w|", "|g|", "trust ratio"),
        f"trust ratio = |w| / (|g| + {DECAY:g} |w|): a step moves a kernel by at most the rate "
        "times |w|, however large or small its gradient. Biases are not adapted.",
    )
    for path, shape, w_norm, g_norm, ratio in layers:
        size = " x ".join(map(str, shape))
        table.add_row(path, size, f"{w_norm:.4g}", f"{g_norm:.4g}", f"{ratio:.4g}")
    return table


def _table(columns: tuple[str, ...], caption: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left", box=box.ROUNDED, width=72)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table
