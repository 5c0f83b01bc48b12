"""For mkdocs: the pages of the repository's root are pages of the site, and links reach them.

A link to a file that is no page (an example, a source file) becomes its path as code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# of the root → of the site
PAGES = {
    "README.md": "overview.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_BACK = {site: root for root, site in PAGES.items()}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for root, site in PAGES.items():
        files.append(File.generated(config, site, content=(ROOT / root).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead where the pages are in the site."""
    site = page.file.src_uri
    folder = "" if site in _BACK else "docs"

    def place(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match.group()
        of_root = posixpath.normpath(posixpath.join(folder, path))
        if of_root in PAGES:
            return f"{image}[{text}]({PAGES[of_root]}{mark}{anchor})"
        if of_root.startswith("docs/"):
            return f"{image}[{text}]({of_root.removeprefix('docs/')}{mark}{anchor})"
        if not (ROOT / of_root).exists():
            return match.group()  # mkdocs says that it leads nowhere
        return text if text.strip("`") == of_root else f"{text} (`{of_root}`)"

    return _LINK.sub(place, markdown)
