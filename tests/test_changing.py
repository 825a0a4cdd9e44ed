"""Trees that change while a call reads them, for example because another thread writes to them."""

from __future__ import annotations

import numbers
import sys
import threading
from collections import OrderedDict

import numpy as np
import pytest

from lars_tree import Container, Lars, ShapeError, StructureError, _native, lars_update, report


class Rate:
    """A rate whose conversion to float changes a tree, between two traversals of the tree."""

    def __init__(self, change):
        self.change = change

    def __float__(self):
        self.change()
        return 0.1


numbers.Real.register(Rate)


def arrays():
    return [np.array([x]) for x in (1.0, 2.0, 3.0)]


MAKE = {
    "list": arrays,
    "dict": lambda: dict(zip("abc", arrays(), strict=True)),
    "OrderedDict": lambda: OrderedDict(zip("abc", arrays(), strict=True)),
    "inner list": lambda: {"x": arrays(), "y": np.array([4.0])},
}


def grow(tree):
    inner = tree.get("x", tree) if isinstance(tree, dict) else tree
    inner.append(np.array([9.0])) if isinstance(inner, list) else inner.update(z=np.array([9.0]))


def shrink(tree):
    inner = tree.get("x", tree) if isinstance(tree, dict) else tree
    inner.pop(0) if isinstance(inner, list) else inner.pop("a")


CHANGES = {"grow": grow, "shrink": shrink, "clear": lambda tree: tree.clear()}


@pytest.fixture(params=["kernel", "python"])
def walk(request, monkeypatch):
    """Run the test with the tree traversal of the kernel, and with the traversal in Python."""
    if request.param == "python":
        monkeypatch.setattr(_native, "kernel", None)


@pytest.mark.usefixtures("walk")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", MAKE)
def test_a_tree_that_changes_is_refused_or_the_leaves_found_first_are_updated(make, change):
    def call(function, g=None):
        w = MAKE[make]()
        rate = Rate(lambda: CHANGES[change](w))
        return function(w, MAKE[make]() if g is None else g, rate)

    for function in (
        lars_update,
        report.trust_ratios,
        report.layer_table,
        lambda w, g, lr: Lars(lambda step: lr).update(w, g, Lars(0.1).init(w)),
    ):
        with pytest.raises(StructureError, match=r"was changed while|does not match") as caught:
            call(function)
        assert caught.value.argument in ("w", "dcdw", "lr", "state")
    invalid = MAKE[make]()
    invalid[{"list": 2, "inner list": "y"}.get(make, "c")] = np.ones(5)
    with pytest.raises((StructureError, ShapeError)):
        call(lars_update, invalid)
    kept = []
    call(lambda w, g, lr: (kept.extend(flat(w)), lars_update(w, g, lr, out=w)))
    assert [x.item() for x in kept] == pytest.approx([0.9 * n for n in range(1, len(kept) + 1)])


def flat(tree):
    if not isinstance(tree, (dict, list)):
        return [tree]
    return [x for child in (tree.values() if isinstance(tree, dict) else tree) for x in flat(child)]


def test_a_list_that_another_thread_changes_gives_only_structure_errors(monkeypatch):
    monkeypatch.setattr(_native, "kernel", None)  # only the traversal in Python lets threads switch
    w, g, done = [np.ones(1) for _ in range(50)], np.zeros(1), threading.Event()

    def change():
        while not done.is_set():
            w.append(np.ones(1))
            w.pop(0)
            del w[40:]
            w.extend(np.ones(1) for _ in range(50 - len(w)))

    thread = threading.Thread(target=change)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    refused = 0
    try:
        for i in range(150):
            try:
                lars_update(w, g, [0.1] * 50 if i % 2 else 0.1, out=w if i % 3 == 0 else None)
            except StructureError:
                refused += 1
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert refused > 0


TAKE_A_FUNCTION = {
    "map": lambda w, fn: w.map(fn),
    "map with a prefix": lambda w, fn: w.map(fn, 1),
    "filter": Container.filter,
    "partition": Container.partition,
}


@pytest.mark.parametrize("act", TAKE_A_FUNCTION)
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.x.append(5),
        lambda w: w.x.pop(),
        lambda w: w.y.update(u=5),
        lambda w: w.y.pop("z"),
        lambda w: w.update(u=5),
        lambda w: w.pop("last"),
    ],
)
def test_a_function_that_changes_the_container_is_refused(walk, act, change):
    w = Container(x=[1, 2], y={"z": 3}, last=4)
    with pytest.raises(StructureError, match=r"^(self|w) was changed while it was read"):
        TAKE_A_FUNCTION[act](w, lambda *given: change(w) if 4 in given else 1)


def test_rates_that_change_while_they_are_converted(walk):
    rates = [0.1]
    rates.append(Rate(lambda: rates.append(0.1)))
    with pytest.raises(StructureError, match="lr was changed while it was read"):
        lars_update(arrays()[:2], 1.0, rates)


def test_gradients_that_change_while_they_are_matched(walk):
    class Changing(dict):
        def items(self):
            for item in super().items():
                self[len(self)] = item
                yield item

    w = {"a": {"b": np.ones(1), "c": np.ones(1)}}
    with pytest.raises(StructureError, match="w or dcdw was changed while it was read"):
        lars_update(w, {"a": Changing(w["a"])}, 0.1)
    with pytest.raises(StructureError, match=r"^w was changed while it was read"):
        lars_update({"a": Changing(w["a"])}, 1.0, 0.1)
