"""Hooks of the docs site, which GitHub does not need: order of the sections, and links to files outside of docs/."""

import posixpath
import re
from typing import Any

SECTIONS = ("start", "how to", "explanation", "reference", "diagnoses", "contributing")
"""Sections of the site in order. Pages without a section come first."""

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:]+)\)")


def on_nav(nav: Any, **_: Any) -> Any:
    """Sort the sections by SECTIONS."""

    def rank(item: Any) -> int:
        title = (item.title or "").lower()
        return SECTIONS.index(title) + 1 if title in SECTIONS else 0

    nav.items.sort(key=rank)
    return nav


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite links to files outside of docs/ to links to the repository. Without repo_url, keep only their text."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2]))
        if not path.startswith("../"):
            return found[0]
        if not config.repo_url:
            return found[1]
        return f"[{found[1]}]({config.repo_url.rstrip('/')}/blob/main/{path.removeprefix('../')})"

    return LINK.sub(link, markdown)
