"""Text of other programs cannot control the terminal on which a command prints the text."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.terminal import MAX_LINE_CHARACTERS, cut, json_text, one_line, printable, printable_output

COLOURED = "\x1b[32mgreen\x1b[0m, \x1b[1;31mred\x1b[m"


class Terminal(io.StringIO):
    """Reports that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[H", "\\x1b[2J\\x1b[H"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x08", "a\\x0db\\x08"),
        ("\x9b31m", "\\x9b31m"),
        ("\x1b[8mhidden", "\\x1b[8mhidden"),
        ("a\u202eb\u2028c\u2066", "a\\u202eb\\u2028c\\u2066"),
        ("\ud800", "\\ud800"),
        ("tab\t, line\n, a[/]b, é, 飞", "tab\t, line\n, a[/]b, é, 飞"),
    ],
)
def test_control_characters_are_printed_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == printable(text, is_coloured=True) == shown


def test_colours_are_kept_only_on_a_terminal() -> None:
    assert printable(COLOURED, is_coloured=True) == COLOURED
    assert "\x1b" not in printable(COLOURED)


@given(st.text(st.sampled_from("\x1b[]0123456789;mJHK\r\n\x07\x9ba") | st.characters(), max_size=40))
def test_output_holds_no_control_character_but_those_that_colour(text: str) -> None:
    for stream in (io.StringIO(), Terminal()):
        with redirect_stdout(stream), printable_output():
            print("-", text, end="-")
        left = re.sub(r"\x1b\[[0-79;]*m", "", stream.getvalue()) if stream.isatty() else stream.getvalue()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", left)


@given(st.text(st.sampled_from('\x7f\x1b\u202e\ud800"\\') | st.characters()))
def test_json_is_printed_unchanged(text: str) -> None:
    written = json_text({text: [text]})
    assert printable(written) == written
    assert json.loads(written) == {text: [text]}


def test_long_messages_are_cut() -> None:
    assert cut("a" * MAX_LINE_CHARACTERS) == "a" * MAX_LINE_CHARACTERS
    assert cut("a" * (MAX_LINE_CHARACTERS + 1_000)) == f"{'a' * MAX_LINE_CHARACTERS}... (1,000 more characters)"


def test_names_with_newlines_stay_on_their_line() -> None:
    assert one_line("a\nb") == "a\\nb"
