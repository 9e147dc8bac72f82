"""Safe output on a terminal: text of other programs cannot control the terminal."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

COLOUR = r"\x1b\[(?:[0-4]|3[1-7]|9[1-7])?(?:;(?:[0-4]|3[1-7]|9[1-7]))*m"
"""The escape sequences that colour text. Sequences that hide text or move the cursor do not match."""

CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
"""Characters that control a terminal, except tab and newline: C0, C1, line separators, the order of right-to-left text.

Surrogates have no form in UTF-8. YAML and JSON have none of these characters as they are.
"""

MAX_LINE_CHARACTERS = 10_000
"""A longer message is cut where a person reads it. The UI and the API have all of it."""

_FOUND = re.compile(f"({COLOUR})|{CONTROL}")


def printable(text: str, *, is_coloured: bool = False) -> str:
    r"""Return text with its control characters as escapes, such as `\x1b`.

    Args:
        text: text from any source.
        is_coloured: whether sequences that colour text stay.
    """

    def escape(found: re.Match[str]) -> str:
        if found[1]:
            return found[1] if is_coloured else f"\\x1b{found[1][1:]}"
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _FOUND.sub(escape, text)


def one_line(text: str) -> str:
    r"""Return text with `\n` in place of its newlines: a name or message for one line of a table or log."""
    return text.replace("\n", "\\n")


def cut(text: str) -> str:
    """Return a message without what is beyond `MAX_LINE_CHARACTERS`, and how much that is."""
    left = len(text) - MAX_LINE_CHARACTERS
    return f"{text[:MAX_LINE_CHARACTERS]}... ({left:,} more characters)" if left > 0 else text


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return a value as JSON in ASCII that `printable_output` leaves unchanged. Objects of other types become text."""
    # JSON escapes all control characters but this one, and `\\x7f` is no escape of JSON.
    return json.dumps(value, indent=indent, default=str).replace("\x7f", "\\u007f")


class _Printable:
    """Writes text to a stream in its printable form."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        safe = printable(text, is_coloured=self._stream.isatty())
        # A terminal of another encoding shows an escape for what it does not have.
        encoding = self._stream.encoding or "utf-8"
        return self._stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Write printable text only to stdout and stderr, during the block."""
    out: Any = _Printable(sys.stdout)
    error: Any = _Printable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield
