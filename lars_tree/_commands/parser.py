"""The arguments of `lars-tree` and its subcommands. Other modules implement the subcommands.

To add a subcommand, add a function here that is decorated with `_subcommand` and returns `Output`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

import lars_tree
from lars_tree import errors
from lars_tree._commands.output import Output
from lars_tree._core.options import DEFAULTS, check

_LIBRARIES = {"cli": ("ml_dtypes", "safetensors"), "demo": ("sklearn",)}  # required by each extra


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="To complete commands, options and files in your shell, add the output of "
    "_LARS_TREE_COMPLETE=bash_source lars-tree (or zsh_source, fish_source) to its startup file.",
)
@click.version_option(lars_tree.__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Layer-wise Adaptive Rate Scaling over trees of weights.

    FILEs are .safetensors or .npz, or sharded checkpoints (an index, or a folder that has one),
    which are only read. After an error the exit status is 2, and nothing was written.
    """


def _subcommand(extra: str) -> Callable[[Callable[..., Output]], click.Command]:
    """Make a function a subcommand that prints its `Output`, and has the option --json."""

    def decorated(function: Callable[..., Output]) -> click.Command:
        @wraps(function)
        def run(as_json: bool, **arguments: Any) -> int:
            output = _run(function, extra, arguments)
            text = output.as_json() if as_json else output.text
            try:
                if text:
                    click.echo(text, sys.stdout)
            except OSError as error:
                written = f"; {output.written} was written" if output.written else ""
                raise OSError(
                    error.errno, f"{error.strerror}{written}", "standard output"
                ) from None
            return output.status

        option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        return commands.command(context_settings={"show_default": True})(option(run))

    return decorated


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
    except (errors.LarsTreeError, RecursionError) as error:
        raise click.UsageError(str(error) or type(error).__name__, context) from None
    except MemoryError as error:
        files = ", ".join(str(x) for x in arguments.values() if isinstance(x, str))
        text = f"{files}: not enough memory{f': {error}' if str(error) else ''}"
        raise click.UsageError(text, context) from None


def _pattern_and_value(text: str) -> tuple[str, float]:
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, float(value)
    except ValueError:
        raise click.BadParameter(f"expected PATTERN=VALUE, got {text!r}") from None


_SHARED = {
    "decay_lambda": "Weight decay.",
    "trust_coefficient": "The paper's eta.",
    "eps": "Added to the denominator.",
    "grad_scale": "Loss scale: gradients are divided by it.",
    "trust_clip": "LARC: lr bounds the local rate.",
    "joint_norm": "Divide by the norm of g + decay * w.",
}


def _step_options(**lr: Any) -> Callable[[Any], Any]:
    """Add the options of a step. `lr` is `required` or `default` for the option --lr."""
    options = [
        click.option("--lr", type=float, help="Rate: the step is proportional to it.", **lr),
        *(
            click.option(
                f"--{name.replace('_', '-')}",
                default=default if isinstance(default, bool) else float(default),
                is_flag=isinstance(default, bool),
                help=_SHARED[name],
            )
            for name, default in DEFAULTS.items()
            if name in _SHARED
        ),
        *(
            click.option(
                f"--{name}-for",
                type=_pattern_and_value,
                multiple=True,
                metavar="PATTERN=VALUE",
                help=text,
            )
            for name, text in (
                ("lr", "Rate of the leaves that match, such as 'encoder.*=0.1'. Repeatable."),
                ("decay", "Weight decay of the leaves that match, such as '*.bias=0'. Repeatable."),
            )
        ),
        click.option(
            "--no-adapt",
            multiple=True,
            metavar="PATTERN",
            help="Leaves updated by plain SGD (ratio 1), such as '*.bias'. Repeatable.",
        ),
        click.option(
            "--keep-missing",
            is_flag=True,
            help="Leave weights that have no gradient, such as buffers, unchanged.",
        ),
        click.option(
            "--broadcast",
            is_flag=True,
            help="Repeat gradients that are smaller than their weights, or that are for a node.",
        ),
    ]

    def decorated(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


@_subcommand("cli")
@click.argument("file", type=click.Path())
@click.argument("patterns", nargs=-1)
@click.option("--depth", type=click.IntRange(1), help="Show one line for all leaves below a level.")
@click.option("--grads", type=click.Path(), help="Show the table of a step with these gradients.")
@_step_options(default=1.0)
def show(
    file: str, patterns: tuple[str, ...], depth: int | None, grads: str | None, **options: Any
) -> Output:
    """Show the tree in FILE, or with --grads the table of its layers.

    PATTERNS select leaves, such as 'encoder.*'. The table shows the step that `update` would take
    with the same options. Without --grads the options of a step have no effect.
    """
    from lars_tree._commands import show

    if grads is None:
        return show.tree(file, patterns, depth)
    if depth is not None:
        raise click.UsageError("expected one of --depth and --grads")
    return show.table(file, patterns, grads, options)


@_subcommand("cli")
@click.argument("weights", type=click.Path())
@click.argument("grads", type=click.Path())
@_step_options(required=True)
@click.option(
    "--nonfinite",
    type=click.Choice(["raise", "skip", "propagate"]),
    default="raise",
    help="If new weights would be NaN or infinite: write nothing, write the old weights, or write "
    "NaN and infinity.",
)
@click.option("-o", "--out", type=click.Path(), help="The file of the new weights.")
@click.option("--in-place", is_flag=True, help="Replace WEIGHTS by the new weights.")
def update(
    weights: str, grads: str, nonfinite: str, out: str | None, in_place: bool, **options: Any
) -> Output:
    """Take one LARS step on the weights in a file.

    GRADS has the gradients, under the same names. In PATTERNs, '.' and '/' are the same and '*'
    matches both; a pattern of a node selects all leaves below it; the last match counts.

    The new weights are written to a temporary file beside OUT; then the file is renamed. A kill at
    any moment leaves the complete old or new file. --in-place does the same for WEIGHTS, and needs
    disk space for a copy. .safetensors files are mapped and may be larger than memory; gradients
    in .npz files are loaded. Metadata is kept.
    """
    from lars_tree._commands import update

    if (out is not None) == in_place:
        raise click.UsageError("expected one of -o OUT and --in-place")
    return update.update(weights, grads, weights if out is None else out, nonfinite, options)


@_subcommand("cli")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
def diff(a: str, b: str) -> Output:
    """Compare the trees in two files.

    Compares names, shapes, dtypes and elements, and reports |b - a| / |a| for each leaf. Ignores
    metadata and the order of names. The exit status is 0 if the trees are equal, 1 if they differ.
    """
    from lars_tree._commands import diff

    return diff.diff(a, b)


@_subcommand("demo")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Seed of the split, the weights and the order of the images.",
)
@click.option("--epochs", type=click.IntRange(1), default=40, help="Passes over the images.")
@click.option("--batch", type=click.IntRange(1), default=512, help="Images per step, of 1437.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    help="First rate; it falls to 0.",
)
def demo(seed: int, epochs: int, batch: int, rate: float) -> Output:
    """Train on handwritten digits, with LARS and with plain SGD."""
    from lars_tree._commands import demo

    check({"lr": rate})  # FloatRange accepts NaN and infinity
    return Output(*demo.run(seed=seed, epochs=epochs, batch=batch, rate=rate))
