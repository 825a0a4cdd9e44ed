"""`python -m tests.reliability`: attack the package, and write docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from tests.reliability.attack import PARTS, Attack, Result, as_json, attacks, run, run_here


def main(arguments: list[str]) -> int:
    """Run the command line; return 1 if a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PART[.ATTACK]", help="default: all")
    parser.add_argument("--count", type=int, help="attempts of each attack")
    parser.add_argument("--seconds", type=float, help="time limit of each attack")
    parser.add_argument("--short", action="store_true", help="few attempts, as in the tests")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the results in a file")
    parser.add_argument("--json", action="store_true", help="run one attack in this process")
    options = parser.parse_args(arguments)
    if options.write and options.names:
        parser.error("--write needs all attacks: omit the names")
    named = {name.partition(".")[0] for name in options.names}
    parts = [part for part in PARTS if part in named or not named]  # others are not imported
    every = (attack for part in parts for attack in attacks(part))
    chosen = [attack for attack in every if _is_named(attack, options)]
    unknown = [name for name in options.names if not any(_matches(x, name) for x in chosen)]
    if unknown:
        parser.error(f"there is no attack {', '.join(unknown)}")
    if options.json:
        print(as_json(run_here(chosen[0], *_limits(chosen[0], options))))
        return 0
    missing = {name for attack in chosen for name in attack.needs if not find_spec(name)}
    if missing:
        parser.error(f"not installed: {', '.join(sorted(missing))}")
    results = _resumed(options.resume)
    for attack in chosen:
        if attack.key not in results:
            results[attack.key] = run(attack, *_limits(attack, options))
            _keep(options.resume, attack.key, results[attack.key])
        _report(attack, results[attack.key])
    if options.write:
        from tests.reliability import page  # needs the benchmarks

        page.write(results)
    return 0 if all(results[attack.key].ok for attack in chosen) else 1


def _is_named(attack: Attack, options: argparse.Namespace) -> bool:
    if options.json and attack.kernel is (os.environ.get("LARS_TREE_NATIVE") == "0"):
        return False
    return not options.names or any(_matches(attack, name) for name in options.names)


def _matches(attack: Attack, name: str) -> bool:
    return name in (attack.part, f"{attack.part}.{attack.name}")


def _limits(attack: Attack, options: argparse.Namespace) -> tuple[int, float]:
    count = options.count or (attack.short if options.short else attack.count)
    return count, options.seconds or attack.seconds


def _resumed(file: Path | None) -> dict[str, Result]:
    if file is None or not file.exists():
        return {}
    lines = map(json.loads, file.read_text().splitlines())
    return {key: Result(**result) for key, result in lines}


def _keep(file: Path | None, key: str, result: Result) -> None:
    if file is not None:
        with file.open("a") as stream:
            stream.write(json.dumps([key, asdict(result)]) + "\n")


def _report(attack: Attack, result: Result) -> None:
    count = f"{result.survived:,} of {result.tried:,} survived"
    worst = "" if result.worst is None else f", within {result.worst} ulp"
    print(f"{attack.key}: {count}{worst}, {result.seconds:.0f} s", flush=True)
    for failure in result.failures:
        print(f"  {failure}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
