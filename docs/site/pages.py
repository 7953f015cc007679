"""Hooks of MkDocs: pages that are made from sources, and links that work on the site as they do in the repository.

* README.md, CONTRIBUTING.md and CHANGELOG.md become pages; reference/c.md is made from core/pyruntime.h, troubleshooting.md from
  pyruntime/errors.py and docs/site/symptoms.toml.
* A link to a file outside docs/ leads to a copy of it in the site, one to a folder of docs/ to a list of its pages.
* "adr/*" in the navigation stands for all pages of the folder.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import catalogue  # noqa: E402
import header  # noqa: E402

# Page of the site: file of the repository.
MOVED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FOLDERS = {"adr": "Decisions", "kernels": "Kernel notes"}
MADE = {"reference/c.md": header.page, "troubleshooting.md": catalogue.page}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]+src=["']?https?:[^"' >]+"""
    r"""|<link\b[^>]+rel=["']?(?:stylesheet|preconnect|icon)\b[^>]+https?:[^"' >]+"""
    r"""|@import[^;]+https?:[^;]+|url\(["']?https?:[^)]+"""
)
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _expanded(config.nav)
    config.watch += [str(ROOT / name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "core/pyruntime.h", "pyruntime")]
    return config


def _expanded(item: Any) -> Any:
    if isinstance(item, dict):
        return {title: _expanded(value) for title, value in item.items()}
    if isinstance(item, list):
        return [_expanded(value) for value in item]
    if item.endswith("/*"):
        folder = ROOT / "docs" / item[:-2]
        return [f"{item[:-1]}{path.name}" for path in sorted(folder.glob("*.md"))]
    return item


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in MOVED.items()}
    made |= {page: make(ROOT) for page, make in MADE.items()}
    made |= {f"{folder}/index.md": _contents(folder, title) for folder, title in FOLDERS.items()}
    for page, text in made.items():
        inclusion = InclusionLevel.NOT_IN_NAV if page.endswith("/index.md") else InclusionLevel.INCLUDED
        files.append(File.generated(config, page, content=text, inclusion=inclusion))
    todo = [(_folder(file.src_uri), file.content_string) for file in files.documentation_pages()]
    while todo:  # a copied page has links, too
        here, text = todo.pop()
        for path in (posixpath.normpath(posixpath.join(here, found[1])) for part in _prose(text) for found in _LINK.finditer(part)):
            copy = _page_of(path)
            if copy.startswith("source/") and (ROOT / path).is_file() and not files.get_file_from_path(copy):
                files.append(File.generated(config, copy, content=(ROOT / path).read_bytes(), inclusion=InclusionLevel.NOT_IN_NAV))
                if copy.endswith(".md"):
                    todo.append((posixpath.dirname(path), (ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri

    def rewrite(found: re.Match[str]) -> str:
        target = _page_of(posixpath.normpath(posixpath.join(_folder(name), found[1])))
        return posixpath.relpath(target, posixpath.dirname(name) or ".") + (found[2] or "")

    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in _FENCE.split(markdown))


def on_post_build(config: MkDocsConfig) -> None:
    """Nothing of the site may come from elsewhere: it is read offline, and tells nobody that it is read."""
    for path in Path(config.site_dir).rglob("*"):
        found = _FOREIGN.search(path.read_text(encoding="utf-8")) if path.suffix in (".html", ".css") else None
        if found:
            raise PluginError(f"{path}: uses {found[0]!r}, which is not in the site")


def _contents(folder: str, title: str) -> str:
    lines = [f"# {title}", ""]
    for path in sorted((ROOT / "docs" / folder).glob("*.md")):
        lines.append(f"* [{path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}]({path.name})")
    return "\n".join(lines) + "\n"


def _prose(text: str) -> list[str]:
    """The parts of a page outside its code blocks, where brackets are something else."""
    return [part for part in _FENCE.split(text) if not part.startswith("```")]


def _folder(page: str) -> str:
    """Where the source of a page lies in the repository; its links are relative to that."""
    return posixpath.dirname(MOVED.get(page) or (page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}"))


def _page_of(path: str) -> str:
    """Where a file or folder of the repository is on the site. What is nowhere stays as it is, and fails the build."""
    for page, source in MOVED.items():
        if path == source:
            return page
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside}/index.md" if inside in FOLDERS else inside
    return f"source/{path}"
