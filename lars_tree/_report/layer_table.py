"""LayerTable, the table that `report.layer_table` returns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lars_tree import errors

_MOST_LINES = 60
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&~$#])")


class _Column(NamedTuple):
    key: str
    head: str
    is_text: bool = False


_COLUMNS = [
    _Column("path", "path", True),
    _Column("shape", "shape", True),
    _Column("dtype", "dtype", True),
    _Column("parameters", "parameters"),
    _Column("w_norm", "|w|"),
    _Column("g_norm", "|g|"),
    _Column("ratio", "ratio"),
    _Column("relative_step", "|u| / |w|"),
]


class LayerTable:
    """The layers of a tree in a table, for a terminal, a notebook, rich and Markdown.

    >>> from lars_tree.report import layer_table
    >>> w, g = {"kernel": np.array([3.0, 4.0])}, {"kernel": np.array([0.0, 10.0])}
    >>> table = layer_table(w, g, 0.1)                  # ratio 5 / 10: a step of 0.05 * [0, 10]
    >>> [(layer["path"], layer["ratio"], layer["relative_step"]) for layer in table.records]
    [('kernel', 0.5, 0.1)]
    >>> print(table.to_text())
    1 layer, 2 parameters
      path    shape  dtype    parameters  |w|  |g|  ratio  |u| / |w|
      kernel  (2,)   float64           2    5   10    0.5        0.1

    The ratio of a layer that is not adapted is shown as "1 (SGD)".

    Attributes:
        records: One dict for each layer, ready for a data frame: `path`, `shape`, `dtype`,
            `parameters` (the number of elements), `w_norm` (in the units of the weights), `g_norm`
            (in the units of the gradient, without the loss scale), the pure numbers `ratio` and
            `relative_step` (|u| / |w|), and the bools `clipped` and `adapted`. Norms, ratio and
            step are None for a layer without a gradient.
    """

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __repr__(self) -> str:
        return self.to_text(_MOST_LINES)

    def to_text(self, most: int | None = None) -> str:
        """The table as text, with all layers or the first `most` layers."""
        lines = [_HEAD, *self._cells(most)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                f"{cell:<{width}}" if column.is_text else f"{cell:>{width}}"
                for cell, width, column in zip(line, widths, _COLUMNS, strict=True)
            ).rstrip()
            for line in lines
        ]
        below = filter(None, [self._more(most)])
        return "\n".join([self._title(), *(f"  {line}" for line in [*shown, *below])])

    def _repr_html_(self) -> str:
        from lars_tree._display import html

        is_text = [column.is_text for column in _COLUMNS]
        return html.table(_HEAD, self._cells(_MOST_LINES), is_text, self._more(_MOST_LINES))

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self._title(), box=box.SIMPLE_HEAD, caption=self._more(_MOST_LINES) or None
        )
        for column in _COLUMNS:
            is_path = column.key == "path"  # only paths wrap in a narrow terminal
            table.add_column(
                Text(column.head),
                justify="left" if column.is_text else "right",
                overflow="fold",
                no_wrap=not is_path,
            )
        for cells in self._cells(_MOST_LINES):
            table.add_row(*map(Text, cells))  # rich would parse plain strings as markup
        return table

    def to_markdown(self) -> str:
        """The table in Markdown, with all layers."""
        rules = [":---" if column.is_text else "---:" for column in _COLUMNS]
        lines = [[_escaped(cell) for cell in line] for line in (_HEAD, *self._cells())]
        lines.insert(1, rules)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _title(self) -> str:
        parameters = sum(record["parameters"] for record in self.records)
        layers = errors.counted(len(self.records), "layer")
        return f"{layers}, {errors.counted(parameters, 'parameter')}"

    def _cells(self, most: int | None = None) -> list[list[str]]:
        """The rows of the table: all, or the first `most`."""
        shown = self.records[:most]
        return [[_cell(record, column.key) for column in _COLUMNS] for record in shown]

    def _more(self, most: int | None) -> str:
        """The line below a table of at most `most` layers."""
        hidden = len(self) - len(self.records[:most])
        return f"... and {hidden:,} more; `records` has all" if hidden else ""


_HEAD = [column.head for column in _COLUMNS]


def _cell(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if value is None:
        return "-"
    if key == "parameters":
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if key == "ratio" and not record["adapted"]:
        return f"{text} (SGD)"
    return f"{text} (clipped)" if key == "ratio" and record["clipped"] else text


def _escaped(cell: str) -> str:
    return _MARKDOWN.sub(r"\\\1", cell)
