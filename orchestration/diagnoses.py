"""The pages of docs/diagnoses, which the image has, too."""

import posixpath
import re
from pathlib import Path

from orchestration.errors import DiagnosisError

FOLDER = "docs/diagnoses"
"""Where repository and image have the pages."""

_PAGES = Path(__file__).resolve().parents[1] / FOLDER

INDEX = "index"


def names() -> list[str]:
    """Return the names of all diagnoses, sorted."""
    return sorted(each.stem for each in _PAGES.glob("*.md") if each.stem != INDEX)


def path(name: str) -> str:
    """Return the path of a diagnosis's page in the repository."""
    return f"{FOLDER}/{name}.md"


def title(name: str) -> str:
    """Return the title of a diagnosis's page."""
    return _source(name).partition("\n")[0].removeprefix("# ")


def page(name: str) -> str:
    """Return a page as text for a terminal: each link is its text and the path of the linked page in the repository."""

    def shown(link: re.Match[str]) -> str:
        text, target = link.groups()
        if ":" not in target:
            target = posixpath.normpath(posixpath.join(FOLDER, target))
        return f"{text} ({target})"

    return re.sub(r"\[([^]]*)\]\(([^)]*)\)", shown, _source(name))


def find(word: str) -> str:
    """Return the name of the diagnosis that a word means.

    Args:
        word: a diagnosis's name, or what Kubernetes or Prefect call it, such as `OOMKilled`; in any case of letters.

    Raises:
        DiagnosisError: no page has the word, or several pages have it.
    """
    word = word.strip().lower()
    if word in names():
        return word
    found: list[str] = []
    if word[:1].isalnum():
        begins = re.compile(rf"(?<!\w){re.escape(word)}", re.IGNORECASE)
        seen = {name: _source(name).partition("**What it means.**")[0] for name in names()}
        found = [name for name in seen if begins.search(title(name))] or [n for n in seen if begins.search(seen[n])]
    if len(found) == 1:
        return found[0]
    said = f"{len(found)} pages are about {word!r}:" if found else f"No page is about {word!r}. There are:"
    lines = [f"  {name:<14} {title(name)}" for name in found or names()]
    raise DiagnosisError("\n".join([said, *lines, "Name one of them: orchestrate explain NAME"]))


def _source(name: str) -> str:
    return (_PAGES / f"{name}.md").read_text(encoding="utf-8")
