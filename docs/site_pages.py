"""What `mkdocs build` needs beyond the pages: the README as the first, files outside docs/ that pages link to, and
examples of docstrings as code."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
AS_THEY_ARE = (".png", ".csv", ".svg")
"""Files that a browser shows itself; any other is served as text."""


def place(source: Path, link: str) -> str | None:
    """Where in the site a link from a file of the repository leads; None where there is no such file."""
    target = (source.parent / link).resolve()
    if target.is_dir():
        target = next((f for f in (target / "README.md", target / "__init__.py") if f.is_file()), target)
    if not target.is_file() or not target.is_relative_to(ROOT):
        return None
    if target == ROOT / "README.md":
        return "index.md"
    if target.is_relative_to(DOCS) and target.suffix != ".py":
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    return f"source/{name}" if target.suffix in AS_THEY_ARE else f"source/{name}.txt"


def source_of(uri: str) -> Path:
    """The file of the repository that a page is made of."""
    return ROOT / "README.md" if uri == "index.md" else DOCS / uri


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page that `nav` does not name stands before the last that it does."""
    pages = sorted(p.name for p in DOCS.glob("*.md"))
    config.nav[-1:-1] = [page for page in pages if page not in config.nav]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README and what pages link to."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for uri in [f.src_uri for f in files.documentation_pages()]:
        source = source_of(uri)
        for link in LINK.findall(source.read_text()):
            there = place(source, link)
            if there and there.startswith("source/") and files.get_file_from_path(there) is None:
                text = (ROOT / there.removeprefix("source/").removesuffix(".txt")).read_bytes()
                files.append(File.generated(config, there, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to where things are in the site."""
    uri = page.file.src_uri

    def moved(match: re.Match) -> str:
        there = place(source_of(uri), match[1])
        return match[1] if there is None else posixpath.relpath(there, posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


class Examples(griffe.Extension):
    """Lines of a docstring that begin with `>>>` are an example, also without a heading."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put the heading there, as Google's style has it."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)(?:^>>> .*\n?(?:^(?!$).*\n?)*)+", _section, obj.docstring.value)


def _section(match: re.Match) -> str:
    lines = "".join(f"    {line}\n" for line in match[0].splitlines())
    return f"Examples:\n{lines}"
