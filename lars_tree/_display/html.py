"""HTML for notebooks: Containers as collapsible trees, and tables. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lars_tree._display import show
from lars_tree._display.show import Row

_MOST_ROWS = 500
_MOST_CHILDREN = 100

# The colours of JupyterLab or VS Code are used if they are defined. Otherwise both text and
# background are set, so that the contrast is sufficient.
_DARK = "--lt-ink:#e6edf3;--lt-muted:#a3acb6;--lt-line:#3d444d;--lt-page:#0d1117"
_LIGHT = "--lt-ink:#1f2328;--lt-muted:#59636e;--lt-line:#d1d9e0;--lt-page:#ffffff"
_STYLE = f"""<style>
.lars-tree{{{_LIGHT}}}
@media (prefers-color-scheme:dark){{.lars-tree{{{_DARK}}}}}
html[theme=dark] .lars-tree,[data-theme=dark] .lars-tree{{{_DARK}}}
html[theme=light] .lars-tree,[data-theme=light] .lars-tree{{{_LIGHT}}}
.lars-tree{{
color:var(--jp-content-font-color1,var(--vscode-editor-foreground,var(--lt-ink)));
background:var(--jp-layout-color0,var(--vscode-editor-background,var(--lt-page)));
font:13px/1.6 var(--jp-code-font-family,ui-monospace,Menlo,Consolas,monospace);
padding:.4em .6em;max-width:64em;overflow-x:auto}}
.lars-tree i{{font-style:normal;
color:var(--jp-content-font-color2,var(--vscode-descriptionForeground,var(--lt-muted)))}}
.lars-tree summary{{cursor:pointer;display:list-item;white-space:pre}}
.lars-tree div{{white-space:pre}}
.lars-tree details>*:not(summary){{margin-left:.45em;padding-left:1em;
border-left:1px solid var(--jp-border-color2,var(--lt-line))}}
.lars-tree details>div{{padding-left:2.1em!important}}
.lars-tree b{{margin-right:1em}}
.lars-tree i{{margin-left:1em}}
.lars-tree table{{border-collapse:collapse;margin:0;font:inherit;color:inherit}}
.lars-tree th,.lars-tree td{{padding:.1em .8em;text-align:right;background:none;color:inherit;
white-space:pre}}
.lars-tree th{{border-bottom:1px solid var(--jp-border-color2,var(--lt-line))}}
.lars-tree .text{{text-align:left}}
</style>"""


def tree(container: Any) -> str:
    """A Container as a tree in which only the root is expanded."""
    try:
        root = show.rows(container, _MOST_ROWS, _MOST_CHILDREN)
        return _scoped(_details(root, "<details open>"))
    except RecursionError:
        return _scoped(f"<div>{escape(show.text(container))}</div>")


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[bool], below: str
) -> str:
    """A table. `texts` says which columns are text: aligned to the left. `below` is a last line."""
    classes = [' class="text"' if is_text else "" for is_text in texts]

    def line(cells: Sequence[str], tag: str) -> str:
        pairs = zip(cells, classes, strict=True)
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in pairs)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    more = f"<div><i>{escape(below)}</i></div>" if below else ""
    return _scoped(
        f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>{more}"
    )


def _scoped(body: str) -> str:
    return f'{_STYLE}<div class="lars-tree">{body}</div>'


def _details(row: Row, tag: str = "<details>") -> str:
    parts = [tag, "<summary>", _label(row), "</summary>"]
    for child in row.children or ():
        is_leaf = child.children is None
        parts.append(f"<div>{_label(child)}</div>" if is_leaf else _details(child))
    if row.hidden:
        parts += ["<div><i>", row.more, "</i></div>"]
    return "".join([*parts, "</details>"])


def _label(row: Row) -> str:
    size = f"<i>{escape(row.size)}</i>" if row.size else ""
    return f"<b>{escape(row.name)}</b>{escape(row.what)}{size}"
