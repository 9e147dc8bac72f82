"""Safe output on a terminal: text of other programs cannot control the terminal."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

COLOUR = r"\x1b\[(?:[0-4]|3[1-7]|9[1-7])?(?:;(?:[0-4]|3[1-7]|9[1-7]))*m"
"""The escape sequences that colour text. Sequences that hide text or move the cursor do not match."""

CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
"""Characters that control a terminal, except tab and newline. No YAML or JSON has them."""

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
        return f"\\x{ord(found[0]):02x}"

    return _FOUND.sub(escape, text)


def one_line(text: str) -> str:
    r"""Return text with `\n` in place of its newlines: a name or message for one line of a table or log."""
    return text.replace("\n", "\\n")


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return a value as JSON in ASCII that `printable_output` leaves unchanged. Objects of other types become text."""
    # JSON escapes all control characters but this one, and `\\x7f` is no escape of JSON.
    return json.dumps(value, indent=indent, default=str).replace("\x7f", "\\u007f")


class _Printable:
    """Writes text to a stream in its printable form."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text, is_coloured=self._stream.isatty()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Write printable text only to stdout and stderr, during the block."""
    out: Any = _Printable(sys.stdout)
    error: Any = _Printable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield
