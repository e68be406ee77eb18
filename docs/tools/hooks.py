"""MkDocs hooks: the generated reference pages, and the pages and files outside docs/ that docs link to."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\[[^\]\n]*\])\(([^)\s#]+)(#[^)\s]*)?\)")


def site_path(path: str) -> str:
    """Where a file of the repository is in the site's sources: README.md is the index."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/")


def repository_path(uri: str) -> str:
    """The inverse of `site_path`."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def local_targets(path: str) -> list[str]:
    """Paths, relative to the repository, of the files that a Markdown file links to."""
    text = (ROOT / path).read_text(encoding="utf-8")
    links = [found[2] for found in LINK.finditer(text) if "://" not in found[2]]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links]


def outside_docs() -> set[str]:
    """README.md and every file outside docs/ that can be reached from it or from docs/ by links."""
    seen: set[str] = set()
    pending = ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
    while pending:
        path = pending.pop()
        if path not in seen and (ROOT / path).is_file():
            seen.add(path)
            pending += local_targets(path) if path.endswith(".md") else []
    return {path for path in seen if not path.startswith("docs/")}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the linked files outside docs/."""
    for path in sorted(outside_docs()):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    for uri, content in reference.pages().items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Rewrite relative links of the repository to those of the site."""
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(repository_path(uri))

    def rewritten(found: re.Match[str]) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        if "://" in link:
            return found[0]
        target = posixpath.normpath(posixpath.join(folder, link))
        if (ROOT / target).is_dir():  # the site has no page for it
            return text[1:-1]
        relative = posixpath.relpath(site_path(target), posixpath.dirname(uri) or ".")
        return f"{text}({relative}{anchor})"

    return LINK.sub(rewritten, markdown)
