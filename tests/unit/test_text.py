"""Foreign text: one line, and nothing in it that drives a terminal, hides or reorders."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from shmtransport.text import printable, traceback_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("naïve 漢字 Ω 🙂", "naïve 漢字 Ω 🙂"),
        ("two\nlines\r\nand\ttabs", "two lines  and tabs"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("C1: \x9b31m\x85", r"C1: \x9b31m "),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("zero\u200b\u200d\ufeffwidth", r"zero\u200b\u200d\ufeffwidth"),
        ("\u2028\u2029\u00a0\u3000", "    "),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("\U000e0041\u3164\ufe0f", r"\U000e0041\u3164\ufe0f"),
        ("", ""),
    ],
)
def test_a_foreign_text_becomes_one_line_that_shows_all_of_it(text: str, shown: str) -> None:
    """White space becomes spaces; what can't be seen is escaped; letters of any script stay."""
    assert printable(text) == shown


def test_no_character_stays_that_is_a_control_a_format_or_a_line_break() -> None:
    """For every code point that there is: categories C and Z are gone, but for the space."""
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    for one in set(printable(everything)):
        assert one == " " or unicodedata.category(one)[0] not in "CZ", hex(ord(one))


def test_what_is_to_be_kept_stays() -> None:
    """Text of several lines keeps its breaks, and nothing else that could be harmful."""
    assert printable("a\n\tb\x1b\r", keep="\n\t") == "a\n\tb\\x1b "


def test_a_shown_text_shows_the_same_when_it_is_shown_again() -> None:
    """It may go through several hands that each make it printable."""
    once = printable("\x1b[0m\u202e\n\ud800")
    assert printable(once) == once


def test_a_traceback_shows_where_and_each_text_on_one_line() -> None:
    """The whole chain, oldest first; groups too; and texts that can't be had."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def fail() -> None:
        try:
            raise MuteError
        except MuteError as inner:
            raise ValueError("a\nb\x1b") from inner

    with pytest.raises(ValueError, match="a") as caught:
        fail()
    lines = traceback_text(caught.value).split("\n")
    assert [line for line in lines if not line.startswith(" ")] == [
        "Traceback (most recent call last):",
        f"{MuteError.__qualname__}: its text can't be shown",
        "Traceback (most recent call last):",
        r"ValueError: a b\x1b",
    ]
    assert sum("in fail" in line for line in lines) == 2


def test_a_chain_that_goes_round_is_told_once() -> None:
    """However exceptions refer to each other."""
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert traceback_text(one) == "ValueError: other\nValueError: one"
