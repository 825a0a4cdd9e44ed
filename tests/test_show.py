"""Container as a tree, in HTML and in rich: what is in it, what is left out, what cannot get in."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Array, Container
from lars_tree._show import rows
from lars_tree.errors import path_string
from lars_tree.report import layer_table


class Reader(HTMLParser):
    """The rows of a page: how deep each is, and its words; no tag but ours, and all closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.rows = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in {"style", "div", "details", "summary", "b", "i"}
        assert dict(attrs) in ({}, {"open": None}, {"class": "lars-tree"})
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"div", "summary"} and self.words:
            depth = self.open.count("details") - (tag == "summary")
            self.rows.append((depth, *self.words))
            self.words = []

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)

    def handle_entityref(self, name):
        raise AssertionError(name)  # all that is escaped becomes data


def shown(container):
    return Reader(container._repr_html_()).rows


@pytest.fixture
def w():
    return Container(
        encoder={"kernel": np.ones((3, 4)), "bias": np.zeros(4, np.float32)},
        blocks=[{"w": np.ones(2)}, None],
        note="text",
        wrapped=Array(np.ones(3)),
    )


def test_html_has_a_row_for_each_node_and_leaf_with_what_it_is_and_its_bytes(w):
    assert shown(w) == [
        (0, "Container", "5 leaves, 21 parameters", "152 bytes"),
        (1, "encoder", "2 leaves, 16 parameters", "112 bytes"),
        (2, "kernel", "float64 (3, 4)", "96 bytes"),
        (2, "bias", "float32 (4,)", "16 bytes"),
        (1, "blocks", "1 leaf, 2 parameters", "16 bytes"),
        (2, "0", "1 leaf, 2 parameters", "16 bytes"),
        (3, "w", "float64 (2,)", "16 bytes"),
        (2, "1", "None"),
        (1, "note", "'text'"),
        (1, "wrapped", "float64 (3,)", "24 bytes"),
    ]


def test_html_is_unfolded_at_the_root_alone(w):
    page = w._repr_html_()
    assert (page.count("<details open>"), page.count("<details>")) == (1, 3)


@given(st.text(min_size=1, max_size=5), st.text(max_size=10))
def test_html_escapes_keys_and_values(key, value):
    found = shown(Container({key: {"<b>&'": "<i>" + value}}))
    assert [row[1] for row in found] == ["Container", path_string((key,)), "<b>&'"]
    assert found[2][2].startswith(("'<i>", '"<i>'))


@given(st.text(min_size=1, max_size=5))
def test_rich_reads_no_markup_in_keys(key):
    lines = printed(Container({key: {"[red]x[/red]": np.ones(1)}}))
    name = path_string((key,))
    assert len(lines) == 3
    assert lines[1].startswith(f"└── {name}  1 leaf")
    assert "[red]x[/red]" in lines[2]


def printed(x, width=200):
    console = need("rich.console").Console(width=width, record=True, file=io.StringIO())
    console.print(x)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_rich_shows_the_same_tree(w):
    del w["blocks"], w["note"]
    assert printed(w) == [
        "Container  3 leaves, 19 parameters  136 bytes",
        "├── encoder  2 leaves, 16 parameters  112 bytes",
        "│   ├── kernel  float64 (3, 4)  96 bytes",
        "│   └── bias  float32 (4,)  16 bytes",
        "└── wrapped  float64 (3,)  24 bytes",
    ]


@pytest.mark.parametrize("shape", [(100_000,), (1000, 100), (10, 10_000), (2,) * 12], ids=str)
def test_large_trees_are_capped_near_the_root(shape):
    def grow(shape):
        return {f"k{i}": grow(shape[1:]) if shape[1:] else i for i in range(shape[0])}

    w = Container(grow(shape))
    found = shown(w)
    # No subtree takes the room of its siblings, and what is hidden is told.
    hidden = [row for row in found if "not shown" in row[-1] or " more" in row[-1]]
    assert 100 <= len(found) - len(hidden) <= 500
    assert sum(row[0] == 1 for row in found) == min(100, shape[0]) + (shape[0] > 100)
    assert hidden
    assert f"{np.prod(shape):,} leaves" in found[0][2]
    assert len(w._repr_html_()) < 100_000
    assert len(printed(w)) < 100


@given(
    st.recursive(st.none() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_each_node_has_the_sums_of_what_is_below_it_shown_or_not(tree):
    def check(row, node):
        leaves = Container({"": node}).num_leaves()
        assert row.what.startswith(f"{leaves} lea")
        children = list(node.values() if isinstance(node, dict) else node)
        assert len(row.children) + row.hidden == len(children)
        for below, child in zip(row.children, children, strict=False):
            if isinstance(child, (dict, list)):
                check(below, child)

    w = Container({"tree": tree})
    check(rows(w, 8, 3), w)


def test_long_keys_are_clipped():
    key = "k" * 10_000
    assert len(Container({key: 1})._repr_html_()) < 3000
    assert max(map(len, printed(Container({key: 1})))) < 100


def test_what_holds_itself_is_shown_in_rich_too():
    w = Container(a=1)
    dict.__setitem__(w, "self", w)
    assert printed(w) == ["Container: holds itself, or deeper than the recursion limit"]


def test_sizes_are_those_that_arrays_declare():
    torch = need("torch")
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    lazy = torch.nn.UninitializedParameter()
    w = Container(
        freed=freed, meta=torch.ones(2, device="meta"), lazy=lazy, half=torch.ones(3).half()
    )
    w |= {"parameter": torch.nn.Parameter(torch.ones(5)), "numpy": np.float32(1), "none": None}
    assert (w.num_leaves(), w.num_parameters(), w.num_bytes()) == (6, 15, 54)


def test_a_table_escapes_what_its_keys_hold():
    key = "<b>|`*_[x]"
    table = layer_table({key: np.ones(1)}, 1.0, 0.1)
    assert "&lt;b&gt;|`*_[x]" in table._repr_html_()
    assert "<b>" not in table._repr_html_()
    assert r"\<b\>\|\`\*\_\[x\]" in table.to_markdown()
    assert any(key in line for line in printed(table))
