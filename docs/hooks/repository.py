"""Pages that live elsewhere in the repository: README, changelog, derivation, results.

A page's links are those of the file it is made from, so that they also work where the repository is
browsed; here they are turned to where the target is on the site.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads a hook by its path

from results_pages import PUBLISHED, directories, directory_page, overview

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # repository path -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "src/capo/core/README.md": "core.md",
}
OVERVIEW = "<!-- results -->"
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", flags=re.DOTALL | re.MULTILINE)


def site_path(repository_path: str) -> str | None:
    """Where a file or directory of the repository is on the site; None where it is not."""
    if repository_path in PAGES:
        return PAGES[repository_path]
    top, _, rest = repository_path.partition("/")
    if top == "docs":
        return rest
    if top == "results":
        path = ROOT / repository_path
        if path.name == "README.md":
            return posixpath.join(posixpath.dirname(repository_path), "index.md")
        if path.is_dir():
            return posixpath.join(repository_path, "index.md") if rest else "results.md"
        return repository_path if path.suffix in PUBLISHED else None
    return None


def repository_path(page_path: str) -> str:
    """The file that a page of the site is made from."""
    for source, page in PAGES.items():
        if page == page_path:
            return source
    if page_path.startswith("results/"):
        return posixpath.join(posixpath.dirname(page_path), "README.md")
    return f"docs/{page_path}"


def turned(markdown: str, page_path: str) -> str:
    """``markdown`` with its relative links leading to pages of the site."""
    source = posixpath.dirname(repository_path(page_path))

    def turn(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        found = site_path(posixpath.normpath(posixpath.join(source, target)))
        if found is None:
            return match[0]  # MkDocs warns, and so fails
        return match[1] + os.path.relpath(found, posixpath.dirname(page_path) or ".") + match[3]

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(turn, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(turn, markdown[end:])])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for directory in directories(ROOT / "results"):
        name = directory.relative_to(ROOT).as_posix()
        page = File.generated(config, f"{name}/index.md", content=directory_page(directory))
        page.inclusion = InclusionLevel.NOT_IN_NAV  # the overview leads there
        files.append(page)
    for path in sorted((ROOT / "results").glob("*/**/*")):
        if path.suffix in PUBLISHED:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the overview of the results in, and turn the links."""
    path = page.file.src_uri
    if OVERVIEW in markdown:
        markdown = markdown.replace(OVERVIEW, overview(ROOT / "results"))
    return turned(markdown, path)
