"""`lars-tree demo`: train a small network on images of digits, with LARS and with plain SGD.

The forward and backward passes are written in numpy. All weights are in one Container, which one
call of `lars_update` per step updates in place. Apart from the progress bar, this module uses only
the public API.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lars_tree import report
from lars_tree._commands.output import progress
from lars_tree.container import Container

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

SIZES = {"fc1": (64, 128), "fc2": (128, 64), "head": (64, 10)}
DECAY = 1e-4
SGD_RATES = (0.3, 1.0, 3.0)  # the best rate is near 1 at the default batch; 3 diverges


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], one per row, and the digits they show."""

    images: Floats
    labels: Labels


class Trained(NamedTuple):
    """The results of one run, and the table of the layers at the last step."""

    rate: float
    train_accuracy: float
    held_out_accuracy: float
    layers: report.LayerTable


def load(seed: int) -> tuple[Digits, Digits]:
    """The digits of scikit-learn, for training (four fifths) and held out (one fifth)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    return Digits(*parts[0::2]), Digits(*parts[1::2])


def initial_weights(rng: np.random.Generator) -> Container:
    """Kernels of variance 2 / inputs, for ReLU (He et al. 2015), and zero biases."""
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
    """The inputs of each layer, then the logits."""
    values = [images]
    for name, layer in w.items():
        z = values[-1] @ layer.kernel + layer.bias
        values.append(z if name == "head" else np.maximum(z, 0))
    return values


def gradients(w: Container, digits: Digits) -> Container:
    """The gradient of the mean cross-entropy, by backpropagation."""
    *inputs, logits = forward(w, digits.images)
    # Subtracting the maximum cancels in the quotient. Without it, exp overflows for large logits.
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    delta = exp / exp.sum(axis=1, keepdims=True)
    delta[np.arange(len(delta)), digits.labels] -= 1
    delta /= len(delta)
    # Backpropagation goes from the last layer to the first. lars_update matches keys, not order.
    g = Container()
    for name, x in zip(reversed(w), reversed(inputs), strict=True):
        g[name] = {"kernel": x.T @ delta, "bias": delta.sum(axis=0)}
        delta = (delta @ w[name].kernel.T) * (x > 0)
    return g


def accuracy(w: Container, digits: Digits) -> float:
    """The fraction of the images that are classified correctly."""
    return float(np.mean(forward(w, digits.images)[-1].argmax(axis=1) == digits.labels))


def train(
    digits: Digits,
    held_out: Digits,
    *,
    lars: bool,
    rate: float,
    seed: int,
    epochs: int,
    batch: int,
) -> Trained:
    """Train at a rate that falls linearly to 0; with plain SGD (adapt=False) unless `lars`.

    The seed determines the initial weights and the order of the images.
    """
    rng = np.random.default_rng(seed)
    w = initial_weights(rng)
    kernels = w.map(lambda path, _: path[-1] == "kernel", with_path=True)
    options = {
        "adapt": kernels.map(lambda is_kernel: is_kernel and lars),
        "decay_lambda": DECAY * kernels,  # biases are neither adapted nor decayed, as is usual
    }
    count = len(digits.labels)
    label = f"{'LARS' if lars else 'SGD'}, rate {rate:g}"
    with progress(epochs, label) as advance:
        for epoch in range(epochs):
            order = rng.permutation(count)
            for start in range(0, count, batch):
                picked = order[start : start + batch]
                g = gradients(w, Digits(digits.images[picked], digits.labels[picked]))
                lr = rate * (1 - (epoch + start / count) / epochs)
                if epoch == epochs - 1 and start + batch >= count:
                    layers = report.layer_table(w, g, lr, **options)
                w.lars_update(g, lr, out=w, **options)
            advance(1)
    return Trained(rate, accuracy(w, digits), accuracy(w, held_out), layers)


def run(*, seed: int, epochs: int, batch: int, rate: float) -> tuple[str, dict[str, Any]]:
    """Train with LARS and with SGD; return the results as text and as a record.

    The results depend only on the arguments. Progress goes to stderr.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    digits, held_out = load(seed)
    count = len(digits.labels)
    batch = min(batch, count)
    recipe = {"seed": seed, "epochs": epochs, "batch": batch}
    with (
        # More threads are not faster for such small matrices, and may change the last bits.
        threadpool_limits(1),
        # If a rate is too high, weights become infinite or NaN. The accuracy shows this.
        np.errstate(all="ignore"),
        warnings.catch_warnings(action="ignore", category=report.TrustRatioWarning),
    ):
        lars = train(digits, held_out, lars=True, rate=rate, **recipe)
        rates = sorted({rate, *SGD_RATES})
        sgd = [train(digits, held_out, lars=False, rate=each, **recipe) for each in rates]
    best = max(sgd, key=lambda each: each.held_out_accuracy)
    rows = [
        f"{name:<16}{each.rate:>6g}{each.train_accuracy:>9.4f}{each.held_out_accuracy:>11.4f}"
        for name, each in (
            ("LARS", lars),
            ("SGD, same rate", sgd[rates.index(rate)]),
            ("SGD, best rate", best),
        )
    ]
    table = "\n".join(rows)
    layers = repr(lars.layers).replace("\n  ", "\n")  # without the margin, to fit in 80 columns
    parameters = sum(layer["parameters"] for layer in lars.layers)
    text = f"""\
Handwritten digits: {count} images to train on, {len(held_out.labels)} held out.
{parameters:,} weights in one Container. Seed {seed}, epochs {epochs}, batch {batch}.

accuracy          rate    train   held out
{table}

SGD is the same call with adapt=False, all else equal. The rate of LARS is
relative to |w| and that of SGD is not, so SGD is also run with other rates:
{", ".join(f"{each:g}" for each in rates)}. The best one, like the default rate of LARS, is chosen
by held-out accuracy.

The last LARS step:
{layers}

ratio = |w| / (|g| + {DECAY:g} |w|): a step moves a kernel by at most the rate
times |w|, however large or small its gradient is. Biases are not adapted."""
    record = {"rate": rate, **recipe, "parameters": parameters, "lars": _record(lars)}
    return text, record | {"sgd": [_record(each) for each in sgd]}


def _record(trained: Trained) -> dict[str, Any]:
    return trained._asdict() | {"layers": trained.layers.records}
