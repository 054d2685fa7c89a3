"""The pages of the site: those that lie in the repository already, each under the path that it has there, so that its links hold.

mkdocs wants one folder with all pages in it, and links between pages alone. Nothing is copied for it: pages are handed over from where they
are written. A file of the repository that a page links to (a module, params.yaml, a notebook) becomes a page that shows it, a folder one
that lists it. So a link is dead here exactly when it is dead in the repository.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

PAGES = ("README.md", "SUMMARY.md", "docs/*.md", "docs/posts/*.md", "notebooks/*.md", "reports/**/*.md")
SHOWN = ("docs/**/*.png", "docs/*.webm", "reports/**/*.png", "reports/**/*.json")
LESSON = ".ipynb.md"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")
FENCE = "~" * 8  # longer than any in a file that is shown
UNSEARCHED = "---\nsearch: {exclude: true}\n---\n"


@event_priority(100)  # before the link checker notes which files there are
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All that is in the repository and belongs to the book, and what it links to."""
    root = Path(config.config_file_path).parent
    there = [_path(path, root) for pattern in (*PAGES, *SHOWN) for path in sorted(root.glob(pattern))]
    for path in there:
        files.append(File(path, str(root), config.site_dir, config.use_directory_urls))
    linked = {target for path in there if path.endswith(".md") for target in _links(root, path)}
    shown = {_page_of(target, root): target for target in sorted(linked - set(there))}
    for name in sorted(shown.keys() - set(there)):
        files.append(File.generated(config, name, content=_shown(root, shown[name], there), inclusion=InclusionLevel.NOT_IN_NAV))
    config.nav = navigation([*there, *(name for name in sorted(shown) if name.endswith(LESSON))])
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text, with links to files and folders of the repository turned to the pages that show them."""
    here = page.file.src_uri

    def turned(found: re.Match[str]) -> str:
        pages = (found[0], f"{found[0]}.md", f"{found[0].rstrip('/')}/README.md")
        return next((page for page in pages if files.get_file_from_path(_beside(here, page))), found[0])

    return LINK.sub(turned, markdown)


def navigation(paths: Iterable[str]) -> list[Any]:
    """The book in the order in which it is read; a heading names each page."""
    pages = [path for path in paths if path.endswith(".md")]

    def under(folder: str) -> list[str]:
        return [path for path in pages if posixpath.dirname(path) == folder]

    chapters = {
        "Weeks": under("reports/weeks"),
        "Posts": under("docs/posts"),
        "Lessons": under("notebooks"),
        "Benchmarks": under("reports/benchmarks"),
        "Model cards": under("reports/cards"),
        "Reference": under("docs"),
    }
    front = [{"Home": path} if path == "README.md" else path for path in (*under(""), *under("reports"))]
    return [*front, *({name: found} for name, found in chapters.items() if found)]


def _path(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _beside(page: str, target: str) -> str:
    """The repository path of a link's target as `page` writes it."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _links(root: Path, page: str) -> Iterator[str]:
    """What a page links to and is in the repository."""
    for target in LINK.findall((root / page).read_text(encoding="utf-8")):
        path = _beside(page, target)
        if (root / path).exists() and not path.startswith(".."):
            yield path


def _page_of(target: str, root: Path) -> str:
    return posixpath.normpath(f"{target}/README.md") if (root / target).is_dir() else f"{target}.md"


def _shown(root: Path, target: str, there: Iterable[str]) -> str:
    path = root / target
    if path.is_dir():
        return f"{UNSEARCHED}# {target}/\n\n" + "\n".join(_listed(path, root, set(there))) + "\n"
    if path.suffix == ".ipynb":
        return _lesson(path)
    language = {".py": "python", ".yaml": "yaml", ".yml": "yaml"}.get(path.suffix, "text")
    return f"{UNSEARCHED}# {target}\n\n{FENCE}{language}\n{path.read_text(encoding='utf-8')}\n{FENCE}\n"


def _listed(folder: Path, root: Path, there: set[str]) -> Iterator[str]:
    """A line for each file, with a link where the site has it and, of a module, the sentence that it opens with."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith((".", "__")) and path != root / "docs/site":
            name = path.name + "/" * path.is_dir()
            link = f"[{name}]({path.name})" if _path(path, root) in there else f"`{name}`"
            yield f"* {link} {_opening(path)}".rstrip()


def _opening(path: Path) -> str:
    module = path / "__init__.py" if path.is_dir() else path
    if module.suffix != ".py" or not module.exists():
        return ""
    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[0].replace("<", "&lt;")


def _lesson(path: Path) -> str:
    """A notebook as a page: its words, and its cells as code."""
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source if cell.cell_type == "markdown" else f"{FENCE}python\n{cell.source}\n{FENCE}" for cell in cells]
    return "\n\n".join(texts) + "\n"
