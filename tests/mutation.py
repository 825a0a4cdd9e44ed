"""`python -m tests.mutation`: change the package in one place at a time; do the tests notice?

A mutant is a module with one change: another operator, comparison, constant, condition or return
value, or a statement, keyword or filter that is left out. It is killed if a test fails, or if the
tests do not end. A survivor is printed with its name, which also works as an argument. Types, texts
(strings with a space) and the source files are not changed.

The tests of each module, see `TESTS`, are imported once. Each mutant is a forked process that
replaces the code of one function, and runs the tests that reach it, the fastest first. With
--import, it imports the changed module and runs all these tests, as it must if the change is
outside of functions.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import coverage
import jax  # noqa: F401 (this import and that of torch take seconds: not in each process)
import pytest
import torch  # noqa: F401
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
RULE = ["_numerics.formula", "_backends.cpu.norms", "_backends.cpu.twin"]
OPTIONS = ["_core.options", "_core.values", "_core.checks", "_core.operands", "_tree.by_path"]
TREE = [
    f"_tree.{name}" for name in ("structure", "nodes", "kinds", "paths", "conversion", "operators")
]
TESTS = [  # modules, files that test them, and whether to test with the kernel
    (RULE, "formula sums checks laws report numbers native native_momentum writes", (False, True)),
    (
        OPTIONS,
        "options optimizer_options by_path options_by_path checks check_messages leaves",
        (True,),
    ),
    (
        TREE,
        "tree nodes registered_nodes registering kinds rebuilding paths container container_merge "
        "array changing depth errors testing_assertions torch_load",
        (False, True),
    ),
]
SWAPS = {
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult], ast.Pow: [ast.Mult], ast.BitOr: [ast.BitAnd],
    ast.BitAnd: [ast.BitOr], ast.And: [ast.Or], ast.Or: [ast.And], ast.USub: [ast.UAdd],
}  # fmt: skip
MEMORY = 8 << 30
OUT = os.fdopen(os.dup(1), "w")  # the output of tests is not shown
TYPES = ("TypeVar", "ParamSpec", "Literal", "cast")

Put = Callable[[ast.AST], None]


class Mutant(NamedTuple):
    """A change of a module; `code` is compiled from the changed module."""

    name: str
    change: str
    module: str
    lines: range
    in_function: bool
    code: CodeType | None = None


def file_of(module: str) -> str:
    return str(ROOT / "lars_tree" / f"{module.replace('.', '/')}.py")


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one change."""

    def changed(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    match node:
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.BinOp() | ast.BoolOp() | ast.UnaryOp():
            yield from (changed(op=op()) for op in SWAPS.get(type(node.op), []))
        case ast.Compare():
            for i, old in enumerate(node.ops):
                for op in SWAPS[type(old)]:
                    yield changed(ops=[*node.ops[:i], op(), *node.ops[i + 1 :]])
        case ast.If() | ast.IfExp() | ast.While():
            yield changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension():
            for x in node.ifs:
                yield changed(ifs=[other for other in node.ifs if other is not x])
        case ast.Constant(value=bool()):
            yield changed(value=not node.value)
        case ast.Constant(value=int() | float()):
            yield changed(value=node.value + 1)
        case ast.Constant(value=str()) if " " not in node.value:  # not the text of a message
            yield changed(value=f"{node.value}~")
        case ast.Call():
            for x in node.keywords:
                yield changed(keywords=[other for other in node.keywords if other is not x])
        case ast.Return(value=ast.AST()) if ast.unparse(node) != "return None":
            yield changed(value=ast.Constant(None))
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()


def places(parent: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, Put, bool]]:
    """The nodes below a node that may change, each with a function that puts another in place.

    Also whether it is in the body of a function.
    """
    for field, value in ast.iter_fields(parent):
        is_type = field in ("annotation", "returns")
        if is_type or (field == "keywords" and isinstance(parent, ast.ClassDef)):
            continue
        is_body = field == "body" and isinstance(parent, ast.FunctionDef)
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            name = getattr(getattr(child, "func", getattr(child, "value", None)), "id", None)
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not isinstance(child, ast.AST) or is_text or name in TYPES:
                continue
            is_list = isinstance(value, list)
            put = partial(value.__setitem__, i) if is_list else partial(setattr, parent, field)
            yield child, put, in_function or is_body
            yield from places(child, in_function or is_body)


def mutants(module: str, chosen: Container[str] = ()) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its source; with the code of the chosen ones."""
    tree = ast.parse(Path(file_of(module)).read_text())
    number = 0
    for old, put, in_function in list(places(tree)):
        for new in variants(old):
            number += 1
            put(new)
            node = getattr(old, "iter", old) if isinstance(old, ast.comprehension) else old
            change = f"line {node.lineno}: {ast.unparse(old)} -> {ast.unparse(new)}"
            lines = range(node.lineno, node.end_lineno + 1)
            mutant = Mutant(f"{module}:{number}", change, module, lines, in_function)
            if mutant.name in chosen:
                code = compile(ast.fix_missing_locations(tree), file_of(module), "exec")
                mutant = mutant._replace(code=code)
            yield mutant
            put(old)


def forked(function: Callable[[], Any], limit: int) -> Any:
    """The result of a function in a forked process; None if it fails, or takes too long."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, 1)
                os.dup2(nothing, 2)
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                pickle.dump(function(), file)
                file.flush()
            finally:
                os._exit(0)
        end = time.monotonic() + 30 * limit  # for tests that wait for ever
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # the processes that tests have started
        file.seek(0)
        content = file.read()
    return pickle.loads(content) if content else None


def say(text: str) -> None:
    print(text, file=OUT, flush=True)


def survives(mutant: Mutant, tests_pass: Callable[[], bool], limit: int) -> bool:
    passed = bool(forked(tests_pass, limit))
    say(f"{mutant.name}: the tests {'pass' if passed else 'fail'}")
    return passed


def unchanged(module: str) -> CodeType:
    return compile(Path(file_of(module)).read_bytes(), file_of(module), "exec")


def functions_of(module: str) -> list[FunctionType]:
    """All functions of a module that exist, also those that are hidden by decorators."""
    found = [x for x in gc.get_objects() if type(x) is FunctionType]
    return [x for x in found if x.__code__.co_filename == file_of(module)]


def put_in_place(code: CodeType, functions: list[FunctionType]) -> None:
    """Give these functions the code of the changed module."""

    def codes(code: CodeType) -> Iterator[CodeType]:
        for x in code.co_consts:
            if isinstance(x, CodeType):
                yield x
                yield from codes(x)

    new = {(x.co_qualname, x.co_firstlineno): x for x in codes(code)}
    for x in functions:
        x.__code__ = new[x.__code__.co_qualname, x.__code__.co_firstlineno]


class NoShrinking:
    """A pytest plugin: hypothesis does not simplify the examples that fail."""

    def pytest_collection(self) -> None:
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", settings(), phases=phases, max_examples=20)
        settings.load_profile("mutation")


class Tester:
    """A pytest plugin: find the survivors among mutants that change functions."""

    def __init__(self, modules: list[str], todo: list[Mutant]) -> None:
        self.modules, self.todo = modules, todo
        self.survivors: list[str] = []
        self.for_import: list[str] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        seconds, reached = forked(partial(self.measure, session), 3600)
        if not seconds:
            say(f"the tests fail without a change: {reached}")
            sys.exit(1)
        functions = {module: functions_of(module) for module in self.modules}
        gc.collect()
        gc.freeze()  # so that forked processes share the memory
        for mutant in self.todo:
            lines = reached[mutant.module]
            names = {name for line in mutant.lines for name in lines.get(line, [])}
            items = [item for item in session.items if item.nodeid in names]
            items.sort(key=lambda item: seconds[item.nodeid])
            limit = 60 + int(2 * sum(seconds[name] for name in names))
            if not items:  # only imports reach it
                self.for_import.append(mutant.name)
                continue
            try:
                put_in_place(mutant.code, functions[mutant.module])
            except (KeyError, ValueError):  # a function has other free variables, or is missing
                self.for_import.append(mutant.name)
            else:
                if survives(mutant, partial(all_pass, session, items), limit):
                    self.survivors.append(mutant.name)
            put_in_place(unchanged(mutant.module), functions[mutant.module])
        return True

    def measure(self, session: pytest.Session) -> tuple[dict[str, float], Any]:
        """The seconds of each test, and the tests that reach each line of the modules."""
        files = {module: file_of(module) for module in self.modules}
        measured = coverage.Coverage(data_file=None, config_file=False, include=[*files.values()])
        seconds = {}
        for module in files:
            put_in_place(unchanged(module), functions_of(module))  # this must have no effect
        measured.start()
        for item in session.items:
            measured.switch_context(item.nodeid)
            start = time.process_time()
            if not passes(session, item):
                return {}, item.nodeid
            seconds[item.nodeid] = time.process_time() - start
        measured.stop()
        data = measured.get_data()
        return seconds, {m: data.contexts_by_lineno(file) for m, file in files.items()}


def passes(session: pytest.Session, item: pytest.Item) -> bool:
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    return not session.testsfailed


def all_pass(session: pytest.Session, items: list[pytest.Item]) -> bool:
    return all(passes(session, item) for item in items)


def run_pytest(files: str, kernel: bool, plugins: list[Any], mutant: Mutant | None = None) -> bool:
    os.environ |= {"LARS_TREE_NATIVE": str(int(kernel)), "HYPOTHESIS_PROFILE": "repeatable"}
    if mutant:
        read = SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> Any:
            return mutant.code if name == f"lars_tree.{mutant.module}" else read(loader, name)

        SourceFileLoader.get_code = get_code
    options = ["-oaddopts=", "-xs", "-pno:cacheprovider", "-pno:terminal"]
    options += ["-Wignore::pytest.PytestAssertRewriteWarning"]
    paths = [f"tests/test_{name}.py" for name in files.split()]
    return pytest.main([*options, *paths], [*plugins, NoShrinking()]) == 0


def survivors(
    modules: list[str], files: str, kernels: tuple[bool, ...], todo: list[Mutant], by_import: bool
) -> list[Mutant]:
    """The mutants of these modules that the tests in these files do not kill."""

    def test(fast: list[Mutant], kernel: bool) -> tuple[list[str], list[str]]:
        tester = Tester(modules, fast)
        if not run_pytest(files, kernel, [tester]):
            sys.exit(1)
        return tester.survivors, tester.for_import

    for kernel in kernels:
        slow = [x for x in todo if by_import or not x.in_function]
        fast = [x for x in todo if x not in slow]
        found = forked(partial(test, fast, kernel), 10**6) if fast else ([], [])
        if found is None:
            sys.exit(f"these tests cannot run: {files}")
        survived, more = found
        slow += [x for x in fast if x.name in more]
        run = partial(run_pytest, files, kernel, [])
        survived += [x.name for x in slow if survives(x, partial(run, x), 600)]
        todo = [x for x in todo if x.name in survived]
    return todo


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODULE[:NUMBER]", help="default: all modules")
    parser.add_argument("--count", type=int, help="only those of a random sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--import", dest="by_import", action="store_true", help="see above")
    parser.add_argument("--tests", metavar="NAMES", help='other test files, as in "tree nodes"')
    given = parser.parse_args(arguments)
    names = [mutant.name for modules, *_ in TESTS for x in modules for mutant in mutants(x)]
    if given.count:
        names = random.Random(given.seed).sample(names, given.count)
    if given.names:
        names = [x for x in names if {x, x.split(":")[0]} & {*given.names}]
    os.chdir(ROOT)
    killed = 0
    for modules, files, kernels in TESTS:
        todo = [x for module in modules for x in mutants(module, names) if x.code]
        if not todo:
            continue
        left = survivors(modules, given.tests or files, kernels, todo, given.by_import)
        killed += len(todo) - len(left)
        for module in modules:
            tried, survived = (sum(x.module == module for x in found) for found in (todo, left))
            say(f"{module}: {tried - survived} of {tried} killed")
        for mutant in left:
            say(f"  {mutant.name} survived: {mutant.change}")
    say(f"{killed} of {len(names)} mutants killed ({killed / len(names):.1%})")


if __name__ == "__main__":
    main(sys.argv[1:])
