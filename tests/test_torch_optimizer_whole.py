"""A step of lars_tree.torch.Lars updates all parameters or none, even if it uses two engines.

Groups with foreach=True imitate groups on an accelerator, which the same engine updates.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from conftest import interrupted_at, need

import lars_tree

torch = need("torch")

from test_torch_optimizer import same  # noqa: E402

from lars_tree._core import execute  # noqa: E402
from lars_tree.torch import Lars  # noqa: E402

FOLDER = str(Path(lars_tree.__path__[0]))
BOTH = pytest.mark.parametrize("steps", [0, 1], ids=["first", "later"])


def mixed(steps=0, **options):
    """Parameters for the native engine and for the foreach engine, with and without momentum."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, generator=generator)) for _ in range(3)]
    groups = [{"params": [p], "foreach": i > 0} for i, p in enumerate(params)]
    groups[1]["momentum"] = 0.0
    opt = Lars(groups, 0.1, dampening=0.5, trust_coefficient=0.1, **options)
    for p in params:
        p.grad = torch.ones(3)
    for _ in range(steps):
        opt.step()
    return params, opt


def snapshot(params, opt):
    return copy.deepcopy([p.detach() for p in params]), copy.deepcopy(opt.state_dict()["state"])


def equal(a, b):
    """Whether two snapshots have the same parameters, buffers, and keys."""
    keys = [{i: list(x) for i, x in state.items()} for _, state in (a, b)]
    return (
        same(a[0], b[0])
        and keys[0] == keys[1]
        and same(*([x["momentum_buffer"] for x in s.values() if x] for _, s in (a, b)))
    )


@BOTH
@pytest.mark.parametrize("native", [False, True], ids=["mixed", "all in CPU memory"])
def test_ctrl_c_interrupts_before_or_after_a_step_of_all_parameters(steps, native):
    def made(steps):
        params, opt = mixed()
        for group in opt.param_groups:
            group["foreach"] = group["foreach"] and not native
        for _ in range(steps):
            opt.step()
        return params, opt

    before, done = snapshot(*made(steps)), snapshot(*made(steps + 1))
    assert not equal(before, done)
    seen = set()
    # Interrupt at every third line of the optimizer, at every eleventh line of the package, and at
    # each line of the module that makes the writes, which the native engine alone does not need.
    every = [((f"{FOLDER}/torch", f"{FOLDER}/_torch"), 3), (FOLDER, 11)]
    for paths, stride in every if native else [*every, (f"{FOLDER}/_core/writes", 1)]:
        line = steps if stride > 1 else 0
        while True:
            params, opt = made(steps)
            if not interrupted_at(line, paths, opt.step):
                break
            found = snapshot(params, opt)
            assert equal(found, done) or equal(found, before), line
            seen.add(equal(found, done))
            line += stride
        assert line > 20
    assert seen == {False, True}


def failing_at(count, monkeypatch):
    """Make the `count`-th operation that needs new memory raise. Returns the operations called.

    After the first quotients, all others find the memory of the first.
    """
    calls = []

    def watched(name, original):
        def operation(*args, **kwargs):
            if name not in calls or name != "_foreach_div":
                calls.append(name)
            if len(calls) == count:
                raise MemoryError(name)
            return original(*args, **kwargs)

        return operation

    for name in ("_foreach_norm", "_foreach_div"):
        monkeypatch.setattr(torch, name, watched(name, getattr(torch, name)))
    return calls


@BOTH
@pytest.mark.parametrize("foreach", [True, None], ids=["all foreach", "mixed"])
def test_an_operation_without_memory_leaves_no_partial_step(steps, foreach, monkeypatch):
    params, opt = mixed(steps)
    if foreach:
        opt.param_groups[0]["foreach"] = True
    before, count = snapshot(params, opt), 0
    while True:
        count += 1
        with monkeypatch.context() as patched:
            calls = failing_at(count, patched)
            try:
                opt.step()
            except MemoryError:
                assert equal(snapshot(params, opt), before), calls[-1]
                continue
            break
    assert count > 4
    assert equal(snapshot(params, opt), snapshot(*mixed(steps + 1)))


@BOTH
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_cpu_memory_leaves_no_partial_step(steps, error, monkeypatch):
    params, opt = mixed(steps)
    before = snapshot(params, opt)

    def failing(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(execute, "_writing", failing)
        with pytest.raises(error):
            opt.step()
    assert equal(snapshot(params, opt), before)
    params[0].grad.untyped_storage().resize_(0)
    with pytest.raises(lars_tree.LarsTreeError, match="freed"):
        opt.step()
    assert equal(snapshot(params, opt), before)
    params[0].grad = torch.ones(3)
    opt.step()
    assert equal(snapshot(params, opt), snapshot(*mixed(steps + 1)))


def test_a_second_exception_leaves_no_new_buffers(monkeypatch):
    """It comes at each line of the code that removes them after the first exception."""

    def failing(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lars_tree.torch.optimizer.execute", failing)
    line = 0
    while True:
        _, opt = mixed()
        if not interrupted_at(line, f"{FOLDER}/torch/rows", opt.step):
            break
        assert not opt.state, line
        line += 1
    assert line > 20


class OnAccelerator(torch.nn.Parameter):
    """A CPU parameter that takes the path of accelerators: foreach updates tensor subclasses."""


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_one_group_may_hold_parameters_of_both_kinds(nonfinite):
    def made(kinds):
        params = [kind(torch.tensor([3.0, 4.0 + i])) for i, kind in enumerate(kinds)]
        for p in params:
            p.grad = torch.tensor([0.4, 0.3])
        return params, Lars(params, 0.1, trust_coefficient=0.1, nonfinite=nonfinite)

    kinds = [torch.nn.Parameter, OnAccelerator, torch.nn.Parameter, OnAccelerator]
    params, opt = made(kinds)
    alike, other = made([torch.nn.Parameter] * 4)
    for _ in range(2):
        opt.step()
        other.step()
    for p, q in zip(params, alike, strict=True):
        torch.testing.assert_close(p.data, q.data)
    before = snapshot(params, opt)
    for index, p in enumerate(params):
        buffer = opt.state[p]["momentum_buffer"]
        opt.state[p]["momentum_buffer"] = torch.zeros(3)
        with pytest.raises(lars_tree.StateError) as caught:
            opt.step()
        assert caught.value.paths == ((f"param_groups[0]['params'][{index}]",),)
        opt.state[p]["momentum_buffer"] = buffer
        assert equal(snapshot(params, opt), before)


# ---- nonfinite


def spoiled(index, **options):
    params, opt = mixed(1, **options)
    params[index].grad = torch.tensor([1.0, float("inf"), 1.0])
    return params, opt


@pytest.mark.parametrize("index", [0, 1, 2], ids=["native", "no momentum", "foreach"])
def test_a_step_that_is_not_finite_is_skipped_as_a_whole_and_counted(index):
    params, opt = spoiled(index, nonfinite="skip")
    before = snapshot(params, opt)
    opt.step()
    opt.step()
    assert equal(snapshot(params, opt), before)
    assert opt.skipped == 2
    assert copy.deepcopy(opt).skipped == 2
    params[index].grad = torch.ones(3)
    opt.step()
    assert opt.skipped == 2
    expected, _ = snapshot(*mixed(2))
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["native", "no momentum", "foreach"])
def test_a_step_that_is_not_finite_is_refused_as_a_whole(index):
    params, opt = spoiled(index, nonfinite="raise")
    before = snapshot(params, opt)
    says = rf"p.grad would make .*\n  param_groups\[{index}\]\['params'\]\[0\]: expected finite"
    with pytest.raises(lars_tree.NonFiniteError, match=says):
        opt.step()
    assert equal(snapshot(params, opt), before)
    assert opt.skipped == 0


def test_only_groups_that_ask_for_it_are_checked():
    """If a group with nonfinite="skip" has a nonfinite result, all groups skip the step."""
    for index, moves in {0: False, 2: True}.items():
        params, opt = spoiled(index)
        opt.param_groups[0]["nonfinite"] = "skip"
        before = snapshot(params, opt)
        opt.step()
        assert equal(snapshot(params, opt), before) is not moves
        assert opt.skipped == (not moves)
        assert bool(params[index].isfinite().all()) is not moves


def test_a_skipped_step_does_not_count_as_the_first():
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = Lars([p], 0.1, dampening=0.5, adapt=False, nonfinite="skip")
    p.grad = torch.tensor([torch.nan, 0.0])
    opt.step()
    assert not opt.state
    assert opt.skipped == 1
    p.grad = torch.tensor([0.4, 0.3])
    opt.step()
    assert p.tolist() == pytest.approx([3 - 0.04, 4 - 0.03])


def test_propagate_writes_nan():
    params, opt = spoiled(0)
    opt.step()
    assert not params[0].isfinite().all()
    assert opt.skipped == 0
