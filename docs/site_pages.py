"""A hook of mkdocs that adds pages to the site and sets their order.

The navigation follows the list in docs/index.md. README, CONTRIBUTING and CHANGELOG in the
repository's root are pages too. Links between them and this folder work on a forge, and this hook
rewrites them for the site. Each public module has a page with its docstrings. The site reads the
module's source and never imports it.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OF_THE_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PACKAGES = {"sngpt_jax": ROOT, "sngpt_kernels": ROOT / "kernels"}  # and the folder of each


def public_modules(package: str) -> list[str]:
    """Dotted names of the package and of its modules, without those that begin with an underscore.

    Each package comes before its modules.
    """
    root = PACKAGES[package]
    paths = (
        path.relative_to(root).with_suffix("").parts for path in (root / package).rglob("*.py")
    )
    names = [parts[:-1] if parts[-1] == "__init__" else parts for parts in paths]
    return [
        ".".join(parts)
        for parts in sorted(names)
        if not any(part.startswith("_") for part in parts)
    ]


def navigation(index: str) -> list[Any]:
    """The sections and pages that the index lists, with paths as on the site.

    The index lists them as lines `## Section` and `- [Title](page.md): …`.
    """
    sections: list[Any] = [{"Index": "index.md"}]
    for heading, title, target in re.findall(
        r"^(?:## (.+)|- \[(.+?)\]\(([^)]+\.md)\).*)$", turned(index), flags=re.MULTILINE
    ):
        if heading:
            sections.append({heading: []})
        else:
            next(iter(sections[-1].values())).append({title: target})
    return sections


def turned(markdown: str) -> str:
    """The text with links and pictures that are right when docs/ and the root are one folder."""
    return re.sub(
        r"\]\((?:\.\./|docs/)?([\w.-]+\.md[#)]|images/)",
        lambda link: f"]({_uri(link[1])}",
        markdown,
    )


def _uri(name: str) -> str:
    return name.replace("README", "readme")  # README.md would be a folder's index to mkdocs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Sets the navigation: the index's sections, then one section of reference per package."""
    reference = [
        {package: [{name: f"api/{name}.md"} for name in public_modules(package)]}
        for package in PACKAGES
    ]
    config.nav = [*navigation((ROOT / "docs/index.md").read_text()), {"API": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the root's pages and one page per public module."""
    for name in OF_THE_ROOT:
        files.append(File.generated(config, _uri(name), abs_src_path=str(ROOT / name)))
    for module in (name for package in PACKAGES for name in public_modules(package)):
        files.append(
            File.generated(config, f"api/{module}.md", content=f"# `{module}`\n\n::: {module}\n")
        )
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Rewrites a page's links."""
    return turned(markdown)
