"""The pages of docs/diagnoses. The image has them, too."""

import posixpath
import re
from pathlib import Path

from orchestration.errors import DiagnosisError

FOLDER = "docs/diagnoses"
"""The folder of the pages in the repository and in the image."""

_PAGES = Path(__file__).resolve().parents[1] / FOLDER

INDEX = "index"


def names() -> list[str]:
    """Return the names of all diagnoses, sorted."""
    return sorted(file.stem for file in _PAGES.glob("*.md") if file.stem != INDEX)


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
        word: the name of a diagnosis, or a term of Kubernetes or Prefect such as `OOMKilled`; letters of either case.

    Raises:
        DiagnosisError: no page has the word, or several pages have it.
    """
    word = word.strip().lower()
    if word in names():
        return word
    found: list[str] = []
    if word[:1].isalnum():
        word_start = re.compile(rf"(?<!\w){re.escape(word)}", re.IGNORECASE)
        heads = {name: _source(name).partition("**What it means.**")[0] for name in names()}
        found = [name for name in heads if word_start.search(title(name))]
        found = found or [name for name, head in heads.items() if word_start.search(head)]
    if len(found) == 1:
        return found[0]
    heading = f"{len(found)} pages are about {word!r}:" if found else f"No page is about {word!r}. There are:"
    lines = [f"  {name:<14} {title(name)}" for name in found or names()]
    raise DiagnosisError("\n".join([heading, *lines, "Name one of them: orchestrate explain NAME"]))


def _source(name: str) -> str:
    return (_PAGES / f"{name}.md").read_text(encoding="utf-8")
