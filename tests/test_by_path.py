"""Options as mappings of paths and patterns: which key decides, and what is refused."""

from __future__ import annotations

from collections import namedtuple
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import (
    Container,
    Lars,
    OptionError,
    StructureError,
    lars_update,
)
from lars_tree._tree import by_path
from lars_tree.testing import shuffled

Pair = namedtuple("Pair", "kernel bias")

ONE = np.array([3.0, 4.0])


def model():
    """Weights with every kind of node, None, and a bias at the root."""
    layer = {"kernel": ONE, "bias": ONE / 2}
    return Container(
        encoder={"l0": layer, "l1": dict(layer), "norm": {"scale": ONE, "frozen": None}},
        blocks=[Pair(ONE, ONE), (ONE,)],
        bias=ONE,
    )


PATHS = ["/".join(map(str, path)) for path in model().paths()]
NODES = sorted({name[:i] for name in PATHS for i, x in enumerate(name) if x == "/"} | set(PATHS))
PATTERNS = [
    "*/bias",
    "**/bias",
    "*kernel",
    "enc*",
    "blocks/?",
    "blocks/[0]",
    "encoder/l[!1]",
    "*/norm",
]


def rates(given):
    """The rate of each leaf: an update of ONE by the gradient 1 with adapt=False."""
    w = model()
    new = lars_update(w, 1.0, given, adapt=False)
    return {
        name: None if x is None else round(float((x - y)[0]), 6)
        for name, x, y in zip(PATHS, w.leaves(), new.leaves(), strict=True)
    }


# ---- Patterns


def stands_for(given, name):
    """The value of one leaf in a mapping, by the rules of the documentation; None if refused."""
    if name in given:
        return given[name]
    parents = [x for x in given if name.startswith(f"{x}/")]
    values = {given[max(parents, key=len)]} if parents else set()
    ancestors = [name, *(name[:i] for i, x in enumerate(name) if x == "/")]
    for pattern in given:
        if pattern not in NODES and pattern != "*":
            short = pattern.lstrip("*").removeprefix("/") if pattern[:1] == "*" else pattern
            either = {pattern, short} if pattern.lstrip("*")[:1] == "/" else {pattern}
            if any(fnmatchcase(x, p) for x in ancestors for p in either):
                values.add(given[pattern])
    values = values or {given.get("*")}
    return values.pop() if len(values) == 1 else None


@given(
    mapping=st.dictionaries(st.sampled_from([*NODES, *PATTERNS]), st.sampled_from([0.1, 0.2])),
    default=st.sampled_from([None, 0.3, 0.3, 0.3]),
    data=st.data(),
)
def test_a_mapping_stands_for_a_full_tree(mapping, default, data):
    mapping |= {} if default is None else {"*": default}
    leaves = zip(PATHS, model().leaves(), strict=True)
    expected = {name: stands_for(mapping, name) for name, leaf in leaves if leaf is not None}
    is_prefix = not any(by_path.is_pattern(key) for key in mapping)
    unused = [
        key
        for key in mapping
        if not any(stands_for({key: 1.0}, name) for name in PATHS) and key != "*"
    ]
    mapping = data.draw(shuffled(mapping))
    if None in expected.values() or unused or (is_prefix and any("/" in key for key in mapping)):
        with pytest.raises(StructureError) as caught:
            rates(mapping)
        if not is_prefix:
            wrong = {name for name, value in expected.items() if value is None} | set(unused)
            assert {"/".join(map(str, path)) for path in caught.value.paths} == wrong
    else:
        assert rates(mapping) == expected | {"encoder/norm/frozen": None}


@pytest.mark.parametrize(
    ("given", "name", "rate"),
    [
        ({"*/bias": 0.1, "*": 1}, "encoder/l0/bias", 0.1),
        ({"*/bias": 0.1, "*": 1}, "bias", 0.1),  # a leading */ matches no parents, too
        ({"*/bias": 0.1, "*": 1}, "blocks/0/bias", 0.1),  # the field of a namedtuple
        ({"*/bias": 0.1, "*": 1}, "encoder/l0/kernel", 1),
        ({"encoder": 0.1, "*": 1}, "encoder/l0/bias", 0.1),
        ({"encoder": 0.1, "encoder/l0": 0.2, "*": 1}, "encoder/l0/bias", 0.2),
        ({"encoder": 0.1, "encoder/l0": 0.2, "*": 1}, "encoder/l1/bias", 0.1),
        ({"encoder/l?": 0.2, "*": 1}, "encoder/l1/bias", 0.2),  # a pattern may match a node
        ({"blocks/1": 0.2, "*": 1}, "blocks/1/0", 0.2),
        ({"blocks": [0.1, 0.2], "*": 1}, "blocks/1/0", 0.2),
        ({"encoder": {"*/bias": 0.1, "*": 0.2}, "*": 1}, "encoder/l0/bias", 0.1),
        ({"encoder": {"*/bias": 0.1, "*": 0.2}, "*": 1}, "bias", 1),
        ({"encoder": {"*/bias": 0.1, "*": 0.2}, "*/bias": 0.3, "*": 1}, "encoder/l1/bias", 0.1),
        (
            {"encoder": {"*/bias": 0.1, "*": 0.2}, "blocks": 0.3, "bias": 0.4},
            "encoder/l0/bias",
            0.1,
        ),
        ({"encoder/l0/bias": 0.1, "*/bias": 0.2, "*": 1}, "encoder/l0/bias", 0.1),
        ({"encoder": 0.2, "*/bias": 0.2, "*": 1}, "encoder/l0/bias", 0.2),  # they agree
        (Container({"*/bias": 0.1, "*": 1}), "bias", 0.1),
    ],
)
def test_which_key_decides(given, name, rate):
    assert rates(given)[name] == rate


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {"*/bias": 0.1, "*kernel": 1, "blocks/1": 1},
            ["encoder/norm/scale: no key matches it: add the key '*' for all other leaves"],
        ),
        ({"*/bais": 0.1, "*": 1}, ["'*/bais': this key matches no leaf (did you mean 'bias'?)"]),
        (
            {"encodr/l0": 0.1, "*": 1},
            ["'encodr/l0': this key matches no leaf (did you mean 'encoder/l0'?)"],
        ),
        (
            {"*/l0/*": 0.1, "*kernel": 0.2, "*": 1},
            [
                "encoder/l0/kernel: expected one value, got '*/l0/*': 0.1, '*kernel': 0.2: "
                "add a key for 'encoder/l0/kernel' itself"
            ],
        ),
        (
            {"encoder/l0": 0.1, "encoder": 0.2, "*/l0/bias": 0.3, "*": 1},
            [
                "encoder/l0/bias: expected one value, got '*/l0/bias': 0.3, 'encoder/l0': 0.1: "
                "add a key for 'encoder/l0/bias' itself"
            ],
        ),
        (
            {"encoder": {"l?": 0.1}, "*": 1},
            [
                "encoder/norm/scale: no key matches it: "
                "add the key '*' for all other leaves of encoder"
            ],
        ),
        (
            {"encoder": {"*/bais": 0.1, "*": 0.2}, "*": 1},
            ["encoder/'*/bais': this key matches no leaf (did you mean 'l1/bias'?)"],
        ),
        (
            {"enc*": {"*": 0.1}, "bias": 1, "blocks": 1},
            [
                f"{name}: expected one value for 'enc*', got a dict with keys '*'"
                for name in PATHS
                if name.startswith("enc") and "frozen" not in name
            ],
        ),
        (
            {"bias": {"x": 0.1}, "*": 1},
            ["bias: expected one value, got keys 'x'", "bias/x: this key matches no leaf"],
        ),
        (
            {"blocks": {0: 0.1, "0": 0.2, "*": 1}, "*": 1},
            ["blocks: expected keys with different names, got two with the same"],
        ),
        (
            {"enc*": {}, "bias": 1, "blocks": 1},
            [
                f"{name}: expected one value for 'enc*', got an empty dict"
                for name in PATHS
                if name.startswith("enc") and "frozen" not in name
            ],
        ),
        (
            {"/enc*": 0.1, "*~/enc*": 0.1, "*": 1},
            ["'/enc*': this key matches no leaf", "'*~/enc*': this key matches no leaf"],
        ),
    ],
)
def test_what_is_refused(given, lines):
    with pytest.raises(StructureError) as caught:
        rates(given)
    assert str(caught.value).splitlines() == ["lr does not match w", *(f"  {x}" for x in lines)]
    assert caught.value.argument == "lr"
    assert len(caught.value.paths) == len(lines)


def test_a_partial_mapping_without_a_default_suggests_one():
    with pytest.raises(StructureError) as caught:
        rates({"encoder": 0.1, "bias": 1})
    assert str(caught.value) == (
        "lr does not match w\n  lr: missing 'blocks'\n  for all other leaves, add the key '*'"
    )


@pytest.mark.parametrize(
    ("given", "is_suggested"),
    [
        ({"missing": 0.1}, True),
        ({"missing": 0.1, "unexpected": {"a": 0.1}}, True),
        ({"missing": 0.1, "unexpected": {"c": 0.1}}, False),
        ({"missing": {"a": 0.1}}, False),
        ({"missing": 0.1, "unexpected": [0.1]}, False),
        ([0.1, 0.2], False),
    ],
)
def test_a_default_is_suggested_if_only_keys_are_missing(given, is_suggested):
    w = {"missing": ONE, "unexpected": {"a": ONE, "b": ONE}}
    with pytest.raises(StructureError) as caught:
        lars_update(w, w, given)
    assert ("add the key '*'" in str(caught.value)) == is_suggested


def test_the_characters_of_patterns():
    assert [x for x in map(chr, range(128)) if by_path.is_pattern(f"a{x}b")] == ["*", "?", "["]
    assert not by_path.is_pattern(0)


@pytest.mark.parametrize(
    ("x", "y"),
    [(0.5, 0.5), (1, 1.0), ("ab", "".join("ab")), (ONE, ONE), (frozenset("x"), frozenset("x"))],
)
def test_matching_keys_may_have_equal_values(x, y):
    assert by_path.resolve("lr", {"a*": x, "*b": y}, [(("ab",), 1.0)])[0] in (x, y)


@pytest.mark.parametrize(
    ("x", "y"),
    [(0.1, 0.2), (True, 1), (1, True), ("1", 1), (0, None), (ONE, ONE.copy()), (ONE, 1), (1, ONE)],
)
def test_matching_keys_with_other_values_are_refused(x, y):
    """True is not 1, and arrays are compared by identity, because they may be traced."""
    with pytest.raises(StructureError) as caught:
        by_path.resolve("lr", {"a*": x, "*b": y}, [(("ab",), 1.0)])
    x, y = ("an array of shape (2,)" if isinstance(z, np.ndarray) else repr(z) for z in (x, y))
    expected = f"ab: expected one value, got '*b': {y}, 'a*': {x}: add a key for 'ab' itself"
    assert str(caught.value) == f"lr does not match w\n  {expected}"


def test_keys_with_characters_of_patterns_are_keys_first():
    w = {"layer[0]": ONE, "layer0": ONE, "*": ONE}
    new = lars_update(w, 1.0, {"layer[0]": 0.1, "layer0": 0.2, "*": 0.3}, adapt=False)
    assert [round(float(x[0]), 6) for x in new.values()] == [2.9, 2.8, 2.7]  # an exact prefix
    new = lars_update(w, 1.0, {"layer[0]": 0.1, "*": 0.3}, adapt=False)
    assert [round(float(x[0]), 6) for x in new.values()] == [2.9, 2.7, 2.7]


def test_the_values_of_a_mapping_are_checked_even_if_no_leaf_uses_them():
    with pytest.raises(OptionError, match=r"\*: expected a finite number >= 0, got -1"):
        rates({"encoder": 0.1, "blocks": 0.1, "bias": 0.1, "*": -1})
    with pytest.raises(OptionError, match=r"'\*/bias': expected True or False, got 1") as caught:
        Lars(0.1, adapt={"*/bias": 1, "*": True})
    assert (caught.value.argument, caught.value.paths) == ("adapt", (("*/bias",),))


def test_one_array_takes_the_default():
    assert lars_update(ONE, 1.0, {"*": 0.1}, adapt=False)[0] == 2.9
    for key in ("*/bias", "?"):
        with pytest.raises(StructureError) as caught:
            lars_update(ONE, 1.0, {key: 1.0, "*": 0.1})
        assert caught.value.paths == ((key,),)


def test_names_with_another_separator():
    rows = [(tuple(name.split(".")), 1) for name in ("0.weight", "0.bias", "1.weight", "bias")]
    values = by_path.resolve(
        "adapt", {"*.bias": False, "1": 2, "*": True}, rows, sep=".", to="model"
    )
    assert values == [True, False, 2, False]
    with pytest.raises(StructureError) as caught:
        by_path.resolve("adapt", {"*.bias": False, "*/bias": 1}, rows, sep=".", to="model")
    assert str(caught.value).splitlines()[:2] == [
        "adapt does not match model",
        "  0.weight: no key matches it: add the key '*' for all other leaves",
    ]
