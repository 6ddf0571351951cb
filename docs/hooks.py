"""Hooks of the documentation's build: reference pages from the packages that are there, worked-out tables."""

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
    """Dotted names of all modules that are public and say something, packages before their modules."""
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent, p.name != "__init__.py", p.name)):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def pages() -> dict[str, list[str]]:
    """Modules of each reference page, by the page's name: one page per package of the first level."""
    grouped: dict[str, list[str]] = {}
    for module in public_modules():
        package, _, below = module.partition(".")
        grouped.setdefault(below.split(".")[0] or package, []).append(module)
    return grouped


def on_config(config: Any) -> Any:
    """Append the reference to the navigation, from the lowest layer of imports up."""
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
    """Put the tables of :mod:`roadwork_dist.planning.tables` where a page asks for them."""
    return re.sub(r"<!-- planning: (\w+) -->", lambda found: TABLES[found[1]](), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Drop the role of Sphinx references, which docstrings use and Markdown does not know."""
    return re.sub(r":(?:func|class|meth|mod|attr|data|exc):<code>~?([^<]*)</code>", r"<code>\1</code>", html)


def _options(module: str) -> str:
    # A package's own page part shows its docstring; what it re-exports is shown where it is written.
    is_package = (ROOT / module.replace(".", "/") / "__init__.py").is_file()
    return "\n    options:\n      members: false" if is_package else ""


def _height(name: str) -> int:
    """Layer of the import contract that a room is in, from the lowest; the package itself comes first."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    layers = contract["importlinter:contract:rooms"]["layers"].strip().splitlines()
    heights = {
        room.strip().removeprefix("roadwork_dist."): height
        for height, layer in enumerate(reversed(layers))
        for room in layer.split("|")
    }
    return heights[name] if name != "roadwork_dist" else -1
