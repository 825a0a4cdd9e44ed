"""Adds pages to the site: files outside docs/, and the API.

README, CHANGELOG and CONTRIBUTING become pages, and links between them and docs/ are adapted. Each
public module has a page with the names in its `__all__`; each name is documented once. The build
fails for a name without a docstring, and for a module without `__all__` that is not in INNER.
Nothing is imported: Griffe reads the sources, so torch is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PACKAGE = "lars_tree"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
}

# Modules without a page: their public names are exported by lars_tree, or they are the command.
INNER = {"array", "cli", "container", "optimizer", "update"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Find the public modules, and add their pages to the navigation."""
    root = Path(config.config_file_path).parent
    loader = griffe.GriffeLoader(search_paths=[root])
    package = loader.load(PACKAGE)
    loader.resolve_aliases()
    modules = public(package)
    config.extra["api"] = {f"api/{x.path}.md": page(x, modules) for x in modules}
    for entry in config.nav or []:
        if isinstance(entry, dict) and entry.get("API") == "api.md":
            entry["API"] = ["api.md", *config.extra["api"]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    root = Path(config.config_file_path).parent
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(root / source).read_text("utf-8")))
    for target, content in config.extra["api"].items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    for source, target in PAGES.items():
        up = "" if page.file.src_uri in PAGES.values() else "../"
        markdown = re.sub(rf"\]\({re.escape(up + source)}(?=[#)])", f"]({target}", markdown)
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    if page.file.src_uri == "api.md":
        names = [Path(target).stem for target in config.extra["api"]]
        markdown += "\n" + "".join(f"* [{name}](api/{name}.md)\n" for name in names)
    return markdown


def public(package: griffe.Module) -> list[griffe.Module]:
    """The public modules, the package first.

    Raises:
        PluginError: A module has no `__all__`, or a name has no docstring or does not exist.
    """
    inner = {name for name in package.modules if name.startswith("_")} | INNER
    found = [package, *(x for name, x in sorted(package.modules.items()) if name not in inner)]
    for module in found:
        if module.exports is None:
            raise PluginError(f"{module.path} has no __all__: give it one, or add it to INNER here")
    missing = [path for module in found for path in undocumented(module)]
    if missing:
        raise PluginError(f"no docstring, or not defined: {', '.join(missing)}")
    return found


def undocumented(module: griffe.Module) -> Iterator[str]:
    """The public names of a module, and their public methods, that have no docstring."""
    if not module.has_docstring:
        yield module.path
    for name in names(module):
        if name not in module.members:
            yield f"{module.path}.{name}"
            continue
        item = target(module[name])
        if not item.has_docstring:
            yield f"{module.path}.{name}"
        if item.is_class:
            for method in item.members.values():
                is_method = method.is_function or "property" in method.labels
                if is_method and not method.name.startswith("_") and not method.has_docstring:
                    yield method.path


def names(module: griffe.Module) -> list[str]:
    """The names that a module exports."""
    return sorted(str(name) for name in module.exports or [])


def target(item: griffe.Object | griffe.Alias) -> griffe.Object:
    """The object that a name refers to."""
    return item.final_target if item.is_alias else item


def page(module: griffe.Module, modules: list[griffe.Module]) -> str:
    """The page of a module; a name defined in another public module is only linked."""
    ours, elsewhere = [], []
    homes = {other.path for other in modules} - {module.path}
    for name in names(module):
        home = target(module[name]).path
        if home in homes:
            elsewhere.append(f"[{name}]({home}.md)")
        elif (parent := home.rpartition(".")[0]) in homes:
            elsewhere.append(f"[{name}]({parent}.md#{home})")
        else:
            ours.append(f"::: {module.path}.{name}\n")
    lines = [f"# {module.path}", "", fenced(module.docstring.value), ""]
    if elsewhere:
        lines += [f"Also exported here: {', '.join(elsewhere)}.", ""]
    return "\n".join([*lines, *ours])


class DoctestFences(griffe.Extension):
    """Fences the doctests in docstrings, which Markdown would show as quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the doctests of one docstring."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with fences around its doctests, each up to the next empty line."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        f"```pycon\n{block}\n```" if block.startswith(">>> ") else block for block in blocks
    )
