"""What `lars-tree` takes: its table of contents. What a subcommand does is in a module of its own.

To add one: a function here with its arguments, decorated like the others, which returns `Output`.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import click

import lars_tree
from lars_tree import errors
from lars_tree._commands.output import Output

_LIBRARIES = {"cli": ("ml_dtypes", "rich", "safetensors"), "demo": ("rich", "sklearn"), "": ()}


def _pair(text: str) -> tuple[str, float]:
    """A pattern and a rate."""
    pattern, _, rate = text.rpartition("=")
    try:
        return pattern, float(rate)
    except ValueError:
        raise click.BadParameter(f"expected PATTERN=RATE, got {text!r}") from None


def _number(
    kind: type[int] | type[float], holds: Callable[[float], bool], meaning: str
) -> Callable[[str], float]:
    """A type of arguments: numbers for which something holds."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise click.BadParameter(f"expected {meaning}, got {text!r}")
        return value

    return parse


_FILE = click.Path()
_COUNT = _number(int, lambda x: x > 0, "a whole number above 0")
_SEED = _number(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1")
_RATE = _number(float, lambda x: 0 < x < math.inf, "a finite number above 0")


def _subcommand(group: click.Group, extra: str = "cli") -> Callable[[Callable[..., Output]], Any]:
    """Make a function a subcommand with --json, which prints what it returns."""

    def made(function: Callable[..., Output]) -> click.Command:
        @wraps(function)
        def run(as_json: bool, **arguments: Any) -> int:
            output = _run(function, extra, arguments)
            text = output.as_json() if as_json else output.text
            if text:
                click.echo(text, sys.stdout)
            return output.status

        option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        return group.command(context_settings={"show_default": True})(option(run))

    return made


def _run(function: Callable[..., Output], extra: str, arguments: dict[str, Any]) -> Output:
    context = click.get_current_context()
    try:
        for library in _LIBRARIES[extra]:
            importlib.import_module(library)
        return function(**arguments)
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed: pip install 'lars-tree[{extra}]'"
        raise click.UsageError(text, context) from None
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise click.UsageError(text, context) from None
    except (errors.LarsTreeError, MemoryError, RecursionError) as error:
        raise click.UsageError(str(error) or type(error).__name__, context) from None


@click.group(
    no_args_is_help=False,
    epilog="Completion of commands, options and files: put the output of "
    "_LARS_TREE_COMPLETE=bash_source lars-tree (or zsh_source, fish_source) where your shell "
    "reads it at its start.",
)
@click.version_option(lars_tree.__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Layer-wise Adaptive Rate Scaling over trees of weights.

    FILEs are .safetensors or .npz. The exit status is 2 after an error, and nothing was written.
    """


def _with_rates(required: bool) -> Callable[[Any], Any]:
    """The options of the rule, gathered to `rates`."""
    lr: dict[str, Any] = {"required": True} if required else {"default": 1.0}
    shared = ("decay_lambda", "trust_coefficient", "eps", "grad_scale", "trust_clip", "joint_norm")
    options = [
        click.option("--lr", type=float, help="Rate: the step is in proportion to it.", **lr),
        click.option("--decay-lambda", type=float, default=0.0, help="Weight decay."),
        click.option("--trust-coefficient", type=float, default=1.0, help="The paper's eta."),
        click.option("--eps", type=float, default=0.0, help="Added to the denominator."),
        click.option("--grad-scale", type=float, default=1.0, help="Of the loss; divided out."),
        click.option("--trust-clip", is_flag=True, help="LARC: lr bounds the local rate."),
        click.option("--joint-norm", is_flag=True, help="Norm of g + decay * w, not of each."),
        click.option(
            "--lr-for",
            type=_pair,
            multiple=True,
            metavar="PATTERN=RATE",
            help="Rate of the leaves that match, such as 'encoder/*=0.1'. Repeatable; the last "
            "match counts. * matches / too.",
        ),
        click.option(
            "--no-adapt",
            multiple=True,
            metavar="PATTERN",
            help="Leaves with ratio 1, plain SGD, such as '*/bias'. Repeatable.",
        ),
    ]

    def decorated(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def run(
            lr: float, lr_for: Sequence[tuple[str, float]], no_adapt: Sequence[str], **rest: Any
        ) -> Any:
            from lars_tree._commands.steps import Rates

            rates = Rates(lr, lr_for, no_adapt, {name: rest.pop(name) for name in shared})
            return function(rates=rates, **rest)

        wrapped: Any = run
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorated


@_subcommand(commands)
@click.argument("file", type=_FILE)
@click.option("--grads", type=_FILE, help="Show the layers beside the step of these gradients.")
@_with_rates(required=False)
def show(file: str, grads: str | None, rates: Any) -> Output:
    """Show the tree in FILE, or with --grads the table of its layers.

    The table has what `update` would do with the same options. Without --grads they do not count.
    """
    from lars_tree._commands import show

    return show.tree(file) if grads is None else show.table(file, grads, rates)


@_subcommand(commands)
@click.argument("weights", type=_FILE)
@click.argument("grads", type=_FILE)
@_with_rates(required=True)
@click.option("-o", "--out", type=_FILE, help="Where to write the new weights.")
@click.option("--in-place", is_flag=True, help="Replace WEIGHTS by them.")
def update(weights: str, grads: str, rates: Any, out: str | None, in_place: bool) -> Output:
    """Take one LARS step on the weights in a file.

    GRADS has the gradients. Messages call WEIGHTS w, and GRADS dcdw.

    Leaf by leaf: memory is bounded by the largest one. The new weights go to a temporary file
    beside OUT, which takes its place in one step: a kill at any moment leaves the old file or the
    new one. --in-place does the same for WEIGHTS, and needs disk space for a copy of it. Metadata
    is kept.
    """
    from lars_tree._commands import update

    if (out is not None) == in_place:
        raise click.UsageError("expected one of -o OUT and --in-place")
    return update.update(weights, grads, weights if out is None else out, rates)


@_subcommand(commands)
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
def diff(a: str, b: str) -> Output:
    """Say where the trees in two files differ.

    Compared are keys, shapes, dtypes and elements, for which it says the largest |b - a| / |a|;
    not metadata, nor the order of keys. The exit status is 0 if all is equal, 1 if something
    differs.
    """
    from lars_tree._commands import diff

    return diff.diff(a, b)


@_subcommand(commands, extra="")
@click.option("--rounds", type=_COUNT, default=20, metavar="N", help="How often each is timed.")
def bench(rounds: int) -> Output:
    """Time an update beside the limit of this machine's memory.

    It is one in place of the weights of ResNet-50. The limit is what it takes to move the same
    bytes and no more.
    """
    from lars_tree._commands import bench

    return bench.bench(rounds)


@_subcommand(commands, extra="demo")
@click.option("--seed", type=_SEED, default=0, metavar="X", help="Of split, weights and order.")
@click.option("--epochs", type=_COUNT, default=40, metavar="X", help="Passes over the images.")
@click.option("--batch", type=_COUNT, default=512, metavar="X", help="Images a step, of 1437.")
@click.option("--rate", type=_RATE, default=0.1, metavar="X", help="First rate; it falls to 0.")
def demo(seed: int, epochs: int, batch: int, rate: float) -> Output:
    """Train on handwritten digits, by LARS and by plain SGD."""
    from lars_tree import demo

    return Output(*demo.run(seed=seed, epochs=epochs, batch=batch, rate=rate))
