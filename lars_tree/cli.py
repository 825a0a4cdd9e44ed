"""The `lars-tree` command: what it takes and what it returns. Each subcommand lives elsewhere.

To add one: a function from its arguments to the exit status, and a parser that names it.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence

import lars_tree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: The arguments; None takes those of the process.

    Raises:
        SystemExit: 0 after --help and --version, 2 on bad arguments.
    """
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lars-tree", description="Layer-wise Adaptive Rate Scaling over nests of weights."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {lars_tree.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="train a network on handwritten digits",
        description="Train a small network on handwritten digits, by LARS and by plain SGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    seed = _number(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1")
    count = _number(int, lambda x: x > 0, "a whole number above 0")
    rate = _number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
    for name, kind, default, meaning in (
        ("--seed", seed, 0, "seed of the split, the first weights and the order of the images"),
        ("--epochs", count, 40, "passes over the training images"),
        ("--batch", count, 512, "images a step; there are 1437"),
        ("--rate", rate, 0.1, "first learning rate; it falls linearly to 0"),
    ):
        demo.add_argument(name, type=kind, default=default, help=meaning, metavar="X")
    return parser


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
            raise argparse.ArgumentTypeError(f"expected {meaning}, got {text!r}")
        return value

    return parse


def _demo(arguments: argparse.Namespace) -> int:
    from lars_tree import demo

    try:
        for library in ("rich", "sklearn"):
            importlib.import_module(library)
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"lars-tree demo: {error.name} is not installed: pip install 'lars-tree[demo]'\n"
        )
        return 2
    demo.run(
        seed=arguments.seed, epochs=arguments.epochs, batch=arguments.batch, rate=arguments.rate
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
