"""MkDocs hooks: generate the reference pages from the package and insert computed tables."""

import configparser
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from roadwork_dist.planning.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "roadwork_dist"


def public_modules(package: Path = PACKAGE) -> Iterator[str]:
    """Dotted names of all public modules, packages before their modules."""
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent, p.name != "__init__.py", p.name)):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def pages() -> dict[str, list[str]]:
    """Modules of each reference page, by page name: one page per top-level subpackage."""
    grouped: dict[str, list[str]] = {}
    for module in public_modules():
        package, _, below = module.partition(".")
        grouped.setdefault(below.split(".")[0] or package, []).append(module)
    return grouped


def on_config(config: Any) -> Any:
    """Append the reference pages to the navigation, from the lowest import layer up."""
    names = sorted(pages(), key=lambda name: (_height(name), name))
    config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in names]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Write the reference pages."""
    for name, modules in pages().items():
        body = "\n\n".join(f"::: {module}" + _options(module) for module in modules)
        title = "roadwork_dist" if name == "roadwork_dist" else f"roadwork_dist.{name}"
        files.append(File.generated(config, f"reference/{name}.md", content=f"# {title}\n\n{body}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Insert the tables of :mod:`roadwork_dist.planning.tables` at a page's placeholders."""
    return re.sub(r"<!-- planning: (\w+) -->", lambda found: TABLES[found[1]](), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Remove the roles of Sphinx references, which docstrings use and Markdown does not support."""
    return re.sub(r":(?:func|class|meth|mod|attr|data|exc):<code>~?([^<]*)</code>", r"<code>\1</code>", html)


def _options(module: str) -> str:
    # For a package show only its docstring; its members are documented in the modules that define them.
    is_package = (ROOT / module.replace(".", "/") / "__init__.py").is_file()
    return "\n    options:\n      members: false" if is_package else ""


def _height(name: str) -> int:
    """Layer of a subpackage in the import contract, counted from the lowest; the package itself is -1."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    layers = contract["importlinter:contract:rooms"]["layers"].strip().splitlines()
    heights = {
        room.strip().removeprefix("roadwork_dist."): height
        for height, layer in enumerate(reversed(layers))
        for room in layer.split("|")
    }
    return heights[name] if name != "roadwork_dist" else -1
