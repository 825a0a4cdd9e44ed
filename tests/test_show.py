"""The display of a Container as text, as HTML and by rich: contents, limits, escaping."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import need
from hypothesis import given
from hypothesis import strategies as st

from lars_tree import Array, Container
from lars_tree._display.show import rows
from lars_tree.errors import path_string
from lars_tree.report import layer_table


class Reader(HTMLParser):
    """Parses a page into rows of (depth, *texts), and checks that all tags are known and closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.rows = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in {"style", "div", "details", "summary", "b", "i"}
        assert dict(attrs) in ({}, {"open": None}, {"class": "lars-tree"})
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"div", "summary"} and self.texts:
            depth = self.open.count("details") - (tag == "summary")
            self.rows.append((depth, *self.texts))
            self.texts = []

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def handle_entityref(self, name):
        raise AssertionError(name)  # called only for unknown entities


def html_rows(container):
    return Reader(container._repr_html_()).rows


def rich_lines(x):
    console = need("rich.console").Console(width=200, record=True, file=io.StringIO())
    console.print(x)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def w():
    return Container(
        encoder={"kernel": np.ones((3, 4)), "bias": np.zeros(4, np.float32)},
        blocks=[{"w": np.ones(2)}, None],
        note="text",
        wrapped=Array(np.ones(3)),
    )


def test_repr_has_a_header_and_a_line_for_each_leaf(w):
    assert repr(w).splitlines() == [
        "Container: 5 leaves, 21 parameters, 152 bytes",
        "  encoder/kernel  float64 (3, 4)",
        "  encoder/bias    float32 (4,)",
        "  blocks/0/w      float64 (2,)",
        "  blocks/1        None",
        "  note            'text'",
        "  wrapped         float64 (3,)",
    ]
    assert (w.num_leaves(), w.num_parameters(), w.num_bytes()) == (5, 21, 152)


def test_repr_counts_one_in_the_singular():
    assert repr(Container(a=np.ones(1, bool))).startswith(
        "Container: 1 leaf, 1 parameter, 1 byte\n"
    )


def test_repr_has_a_limited_number_of_lines():
    lines = repr(Container({f"k{i}": np.ones(1) for i in range(100_000)})).splitlines()
    assert lines[0] == "Container: 100,000 leaves, 100,000 parameters, 800 kB"
    assert lines[-1] == "  ... and 99,960 more"
    assert len(lines) == 42
    assert len(repr(Container(a="x" * 10_000))) < 200


@given(st.dictionaries(st.text(), st.text(), min_size=1, max_size=3))
def test_keys_and_values_cannot_add_lines_to_the_repr(texts):
    assert len(repr(Container(texts)).splitlines()) == 1 + len(texts)


def test_html_has_a_row_for_each_node_and_leaf(w):
    assert html_rows(w) == [
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


def test_html_expands_only_the_root(w):
    page = w._repr_html_()
    assert (page.count("<details open>"), page.count("<details>")) == (1, 3)


@given(st.text(min_size=1, max_size=5), st.text(max_size=10))
def test_html_escapes_keys_and_values(key, value):
    found = html_rows(Container({key: {"<b>&'": "<i>" + value}}))
    assert [row[1] for row in found] == ["Container", path_string((key,)), "<b>&'"]
    assert found[2][2].startswith(("'<i>", '"<i>'))


@given(st.text(min_size=1, max_size=5))
def test_rich_does_not_interpret_markup_in_keys(key):
    lines = rich_lines(Container({key: {"[red]x[/red]": np.ones(1)}}))
    name = path_string((key,))
    assert len(lines) == 3
    assert lines[1].startswith(f"└── {name}  1 leaf")
    assert "[red]x[/red]" in lines[2]


def test_rich_shows_the_same_tree(w):
    del w["blocks"], w["note"]
    assert rich_lines(w) == [
        "Container  3 leaves, 19 parameters  136 bytes",
        "├── encoder  2 leaves, 16 parameters  112 bytes",
        "│   ├── kernel  float64 (3, 4)  96 bytes",
        "│   └── bias  float32 (4,)  16 bytes",
        "└── wrapped  float64 (3,)  24 bytes",
    ]


@pytest.mark.parametrize("shape", [(100_000,), (1000, 100), (10, 10_000), (2,) * 12], ids=str)
def test_of_large_trees_only_rows_near_the_root_are_shown(shape):
    def grow(shape):
        return {f"k{i}": grow(shape[1:]) if shape[1:] else i for i in range(shape[0])}

    w = Container(grow(shape))
    found = html_rows(w)
    # A large subtree does not displace its siblings, and hidden children are counted.
    hidden = [row for row in found if "not shown" in row[-1] or " more" in row[-1]]
    assert 100 <= len(found) - len(hidden) <= 500
    assert sum(row[0] == 1 for row in found) == min(100, shape[0]) + (shape[0] > 100)
    assert hidden
    assert f"{np.prod(shape):,} leaves" in found[0][2]
    assert len(w._repr_html_()) < 100_000
    assert len(rich_lines(w)) < 100


@given(
    st.recursive(st.none() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_each_node_shows_the_totals_of_its_leaves_also_of_hidden_ones(tree):
    def check(row, node):
        leaves = Container({"": node}).num_leaves()
        assert row.what.startswith(f"{leaves} lea")
        children = list(node.values() if isinstance(node, dict) else node)
        assert len(row.children) + row.hidden == len(children)
        for below, child in zip(row.children, children, strict=False):
            if isinstance(child, (dict, list)):
                check(below, child)

    w = Container(tree=tree)
    check(rows(w, 8, 3), w)


def test_long_keys_are_clipped():
    key = "k" * 10_000
    assert len(Container({key: 1})._repr_html_()) < 3000
    assert max(map(len, rich_lines(Container({key: 1})))) < 100


def test_rich_shows_a_cyclic_container():
    w = Container(a=1)
    dict.__setitem__(w, "self", w)
    assert rich_lines(w) == ["Container: contains itself, or is deeper than the recursion limit"]


def test_sizes_are_declared_sizes():
    torch = need("torch")
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    lazy = torch.nn.UninitializedParameter()
    w = Container(
        freed=freed, meta=torch.ones(2, device="meta"), lazy=lazy, half=torch.ones(3).half()
    )
    w |= {"parameter": torch.nn.Parameter(torch.ones(5)), "numpy": np.float32(1), "none": None}
    assert (w.num_leaves(), w.num_parameters(), w.num_bytes()) == (6, 15, 54)


def test_a_table_escapes_its_keys():
    key = "<b>|`*_[x]"
    table = layer_table({key: np.ones(1)}, 1.0, 0.1)
    assert "&lt;b&gt;|`*_[x]" in table._repr_html_()
    assert "<b>" not in table._repr_html_()
    assert r"\<b\>\|\`\*\_\[x\]" in table.to_markdown()
    assert any(key in line for line in rich_lines(table))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1 MB"),
        (10**9 - 1, "1 GB"),
        (50 * 10**12, "50 TB"),
        (2**63 - 1, "9.223 EB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(count, text):
    w = Container(a=np.broadcast_to(np.zeros(1, np.uint8), count))
    assert repr(w).splitlines()[0].endswith(f"parameter{'s' * (count != 1)}, {text}")
