"""What the site shows of files outside docs/, and the pages of the API.

README, CHANGELOG and CONTRIBUTING become pages as they are; links between them and docs/ lead to
the same place on the site as in the repository. Each public module has a page with the names in its
`__all__`, each documented once. The build fails for a name without a docstring, and for a module
that is neither public nor known to be part of another one. Nothing is imported: Griffe reads the
sources, so torch is not needed.
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

# Modules without a page: what is public in them is a name of lars_tree, or the command.
INNER = {"array", "cli", "container", "demo", "optimizer", "update"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Find the public modules; put their pages where the navigation has the API."""
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
    """Add the pages that are made."""
    root = Path(config.config_file_path).parent
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(root / source).read_text("utf-8")))
    for target, content in config.extra["api"].items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn links between the repository's files into those between the pages of the site."""
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
        PluginError: It is not clear whether a module is public, or a name has no docstring.
    """
    inner = {name for name in package.modules if name.startswith("_")} | INNER
    found = [package, *(x for name, x in sorted(package.modules.items()) if name not in inner)]
    for module in found:
        if module.exports is None:
            raise PluginError(f"{module.path} has no __all__: give it one, or add it to INNER here")
    missing = [path for module in found for path in undocumented(module)]
    if missing:
        raise PluginError(f"no docstring, or not there: {', '.join(missing)}")
    return found


def undocumented(module: griffe.Module) -> Iterator[str]:
    """The module, its public names, and their public methods, where they have no docstring."""
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
    """What a module exports."""
    return sorted(str(name) for name in module.exports or [])


def target(item: griffe.Object | griffe.Alias) -> griffe.Object:
    """What a name stands for."""
    return item.final_target if item.is_alias else item


def page(module: griffe.Module, modules: list[griffe.Module]) -> str:
    """The page of a module; names that are at home in another of these modules are left to that."""
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
        lines += [f"Also here, documented in modules of their own: {', '.join(elsewhere)}.", ""]
    return "\n".join([*lines, *ours])


class DoctestFences(griffe.Extension):
    """Doctests in docstrings, which Markdown would take for quotations, become blocks of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put fences around the doctests of one docstring."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with fences around its doctests: from a prompt to the next empty line."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        f"```pycon\n{block}\n```" if block.startswith(">>> ") else block for block in blocks
    )
