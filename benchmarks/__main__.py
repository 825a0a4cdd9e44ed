"""`python -m benchmarks`: measure lars_tree and its peers, and report the results."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from time import perf_counter

import lars_tree
from benchmarks import plots, report
from benchmarks.contestants import CONTESTANTS, MOMENTUM, OPTIMIZERS, check, present
from benchmarks.sections import SECTIONS, Plan, Results


def main(arguments: list[str]) -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, to try it out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="leave peers out")
    parser.add_argument("--write", action="store_true", help="write the page and its plots")
    options = parser.parse_args(arguments)
    if options.write and set(options.only) != set(SECTIONS):
        parser.error("--write needs all sections: omit --only")

    for module in ("torch", "ml_dtypes", *(["matplotlib"] if options.write else [])):
        if importlib.util.find_spec(module) is None:
            parser.error(f"{module} is not installed: see benchmarks/requirements.txt")

    contestants = present(CONTESTANTS, options.without)
    check(contestants)
    optimizers = present(OPTIMIZERS, options.without)
    check(optimizers, MOMENTUM)
    if not lars_tree.native_available():
        _say("The native kernel is not built: lars_tree is measured without it.")
    for name in CONTESTANTS.keys() - contestants.keys():
        _say(f"{name}: {'left out' if CONTESTANTS[name].installed else 'not installed'}")
    rounds, few = (3, 2) if options.quick else (25, 11)
    plan = Plan(contestants, optimizers, rounds, few)
    results = Results()
    for name in options.only:
        start = perf_counter()
        SECTIONS[name](plan, results)
        _say(f"{name}: measured in {perf_counter() - start:.0f} s")
    sys.stdout.write(report.text(results) + "\n")
    if options.write:
        command = " ".join(["python -m benchmarks", *arguments])
        plots.write(results, report.DOCS / "images")
        (report.DOCS / "performance.md").write_text(report.page(results, command))


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
