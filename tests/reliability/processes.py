"""Processes: a step works in a forked child, in a new process, and until the interpreter exits.

Arrays that a thread was writing to at the moment of a fork may contain a part of that step in the
child, as all memory does; the child can step all others, and those too.

Operations of torch are no part of the claim about exits: in Python 3.11, torch itself ends the
process with SIGABRT if a daemon thread is inside `x.add(y)` while the interpreter exits. So let
threads that step tensors end before the exit. A sub-interpreter can
import numpy only if the main interpreter did not, and only if it shares the GIL: see numpy's
documentation. The package then works; otherwise its import raises numpy's ImportError.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from lars_tree import Array, Container, Lars, schedules, set_num_threads
from tests.reliability import shared
from tests.reliability.attack import ROOT, Attempts, attack
from tests.reliability.shared import THREADS, by_threads, cycled, little_room, one_by_one

PATIENCE = 120  # seconds until a process that hangs is killed


# ---- Forks


@attack(
    "A forked child can step, even if other threads were stepping",
    "forks while 4 other threads step; the child steps all their weights, and weights of its own "
    "in 4 threads, with the right bytes",
    count=1000,
    short=25,
    seconds=250,
    plain=True,
    needs=("torch",),
)
def forks(rng: np.random.Generator) -> Attempts:
    little_room()
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
    for mode in shared.BY_NAME:
        one_by_one(mode, 0, THREADS, False)
    sys.setswitchinterval(1e-4)
    modes = ["chunks", "lars_schedules", "mixed", "torch_lars"]
    others = [shared.forever(mode, 1, pause=1e-4) for mode in modes]
    for mode in cycled(rng, list(shared.BY_NAME)):
        time.sleep(float(rng.uniform(0, 2e-3)))
        yield _in_child(mode, partial(_stepped_in_child, mode, others))


def _stepped_in_child(mode: str, others: list[shared.Shared]) -> int:
    for other in others:
        other.steps[0]()
    failure = by_threads(mode, 0, THREADS, False)
    if failure:
        print(failure, file=sys.stderr, flush=True)
    return int(failure is not None)


def _in_child(what: str, work: Callable[[], int], ends: Callable[[int], Any] = os._exit) -> Any:
    """Fork; the child passes the result of `work` to `ends`. None if it is 0, without output."""
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            os.dup2(errors.fileno(), 2)
            os.dup2(errors.fileno(), 1)
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=2)
            ends(work())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    if status == 0 and not text:
        return None
    return f"{what}: status {status}; {text[-2000:]}"


# ---- New processes


@attack(
    "Trees and optimizers can be sent to processes of every start method",
    "processes (forkserver and spawn) that get weights, optimizer and state by pickle, and step",
    count=60,
    short=4,
    seconds=60.0,
    needs=("torch",),
)
def started(rng: np.random.Generator) -> Attempts:
    multiprocessing.set_forkserver_preload(["torch", "lars_tree", __name__])
    cases = list(product(["forkserver", "forkserver", "forkserver", "spawn"], _SENT))
    set_num_threads(3)
    for method, sent in cycled(rng, cases):
        given = sent(rng)
        expected = pickle.loads(_sent_back(pickle.dumps(given)))
        yield _wrong(f"{method}, {sent.__name__}", _elsewhere(method, given), expected)


def _tree(rng: np.random.Generator) -> tuple[Any, ...]:
    w = Container(a=rng.normal(size=(3, 4)), b=[rng.normal(size=5).astype("f4"), None])
    w["c"] = Array(rng.normal(size=3))
    optimizer = Lars(schedules.Cosine(0.5, total_steps=9), nesterov=True, weight_decay={"*": 0.1})
    return optimizer, w, w.map(lambda x: x * 0.5)


def _fortran(rng: np.random.Generator) -> tuple[Any, ...]:
    w = {"a": np.asfortranarray(rng.normal(size=(30, 4))), "b": rng.normal(size=400_000)}
    return Lars(0.1, joint_norm=True), w, {k: x * 0.5 for k, x in w.items()}


def _tensors(rng: np.random.Generator) -> tuple[Any, ...]:
    import torch

    w = {"a": torch.from_numpy(rng.normal(size=7)), "b": torch.ones(3, dtype=torch.bfloat16)}
    return Lars(0.1, nonfinite="skip"), w, {k: x * 0.5 for k, x in w.items()}


_SENT = (_tree, _fortran, _tensors)


def _elsewhere(method: str, given: Any) -> Any:
    context: Any = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        return pickle.loads(pool.apply_async(_sent_back, (pickle.dumps(given),)).get(PATIENCE))


def _sent_back(given: bytes) -> bytes:
    """Step three times, the last time in place."""
    optimizer, w, g = pickle.loads(given)
    state = optimizer.init(w)
    for _ in range(2):
        w, state = optimizer.update(w, g, state)
    optimizer.update(w, g, state, out=w)
    return pickle.dumps((optimizer, w, state))


def _wrong(what: str, actual: Any, expected: Any) -> str | None:
    (optimizer, w, state), (expected_optimizer, *trees) = actual, expected
    if optimizer != expected_optimizer and "<lambda>" not in repr(optimizer):
        return f"{what}: {optimizer!r} instead of {expected_optimizer!r}"
    if repr(type(w)) != repr(type(trees[0])) or type(state) is not Container:
        return f"{what}: {type(w)} and {type(state)}"
    contents = [shared.Shared(x, []).contents() for x in ([w, state], trees)]
    return None if contents[0] == contents[1] else f"{what}: other bytes than in this process"


# ---- Exits

_EXITS = [mode.__name__ for mode in shared.NUMPY_MODES]


@attack(
    "The interpreter exits while daemon threads step",
    "exits while 1 to 3 daemon threads step the same weights, in 12 modes: status 0, no output",
    count=1000,
    short=40,
    plain=True,
)
def exits(rng: np.random.Generator) -> Attempts:
    """The children are forked, so that they need not import anything."""
    little_room()
    set_num_threads(3)
    for mode in _EXITS:
        shared.made(mode, 0).steps[0]()  # imports what the mode needs
    for mode in cycled(rng, _EXITS):
        threads, delay = int(rng.integers(1, 4)), float(rng.exponential(1e-3))
        text = f"{mode}, {threads} threads, after {delay:.6f} s"
        yield _in_child(text, partial(_start, mode, threads, delay), sys.exit)


def _start(mode: str, threads: int, delay: float) -> int:
    sys.setswitchinterval(1e-4)
    shared.forever(mode, threads)
    time.sleep(delay)
    return 0


@attack(
    "The interpreter exits while daemon threads step on the OpenMP team of torch",
    "new processes that import torch and exit while daemon threads step arrays of numpy",
    count=40,
    short=3,
    needs=("torch",),
)
def exits_with_torch(rng: np.random.Generator) -> Attempts:
    for mode in cycled(rng, ["native_threads", "native_threads", "lars_schedules", "chunks"]):
        threads, delay = int(rng.integers(1, 4)), float(rng.exponential(2e-3))
        code = f"""if 1:
            import torch
            from tests.reliability import processes, shared
            torch.set_num_threads(3)
            shared.little_room()
            processes._start({mode!r}, {threads}, {delay})"""
        yield _in_process(code, f"{mode}, {threads} threads, after {delay:.6f} s", "")


def _in_process(code: str, what: str, *printed: str) -> str | None:
    """Run code in a new process; None if it prints one of the texts, and nothing else."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{what}: hangs"
    if done.returncode == 0 and not done.stderr and done.stdout.strip() in printed:
        return None
    return f"{what}: status {done.returncode}; {done.stdout[-500:]} {done.stderr[-2000:]}"


# ---- Sub-interpreters

_IN_SUB_INTERPRETER = """if 1:
    try:
        import numpy as np
    except ImportError:
        print("numpy refuses")
    else:
        import lars_tree
        w = {"a": np.ones(3)}
        optimizer = lars_tree.Lars(0.5, 0.5, adapt=False)
        state = optimizer.init(w)
        for _ in range(2):
            optimizer.update(w, {"a": np.ones(3)}, state, out=w)
        print(w["a"].tolist(), int(state.step), flush=True)
"""


@attack(
    "A sub-interpreter can step, or numpy refuses to be imported there",
    "sub-interpreters (legacy or isolated, the first or the second) in a process that has imported "
    "nothing, numpy, or the package",
    count=36,
    short=6,
)
def sub_interpreters(rng: np.random.Generator) -> Attempts:
    first = ["pass", "import numpy", "import lars_tree"]
    for imported, isolated, number in cycled(rng, list(product(first, [False, True], [1, 2]))):
        code = f"""if 1:
            import sys
            {imported}
            new = sys.version_info >= (3, 13)
            interpreters = __import__("_interpreters" if new else "_xxsubinterpreters")
            run = interpreters.exec if new else interpreters.run_string
            for _ in range({number}):
                kind = ("isolated" if {isolated} else "legacy",) if new else ()
                made = interpreters.create(*kind, **({{}} if new else {{"isolated": {isolated}}}))
                failure = run(made, {_IN_SUB_INTERPRETER!r})
                assert failure is None, failure
                interpreters.destroy(made)"""
        what = f"{imported}, isolated: {isolated}, {number} interpreters"
        stepped, refused = "[-0.25, -0.25, -0.25] 2", "numpy refuses"
        if imported == "pass":
            # Numpy can be imported once in a process; an isolated interpreter does not get it.
            printed = [stepped, refused] if number == 1 else [f"{stepped}\n{refused}"]
        else:
            printed = [refused]
        expected = [*printed, "\n".join([refused] * number)]
        yield _in_process(code, what, *expected)
