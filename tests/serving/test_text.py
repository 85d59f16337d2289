"""Answers as text: each part is certain, no part of a stop string is shown, and all parts are the whole."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llama_split.serving.text import AnswerText


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8, as byte-level tokenizers have for rare characters."""

    def decode(self, tokens: list[int], **_options: Any) -> str:
        return bytes(tokens).decode(errors="replace")


class Words:
    """A tokenizer that puts a space between any two tokens, and none before the first."""

    def decode(self, tokens: list[int], **_options: Any) -> str:
        return " ".join(f"w{token}" for token in tokens if token)  # 0 is special, and not shown


def _parts(tokenizer: Any, tokens: list[int], stops: list[str]) -> tuple[list[str], bool]:
    text = AnswerText(tokenizer, stops)
    parts = [text.add(token) for token in tokens]
    return [*parts, text.finish()], text.stopped


def _until_stop(tokenizer: Any, tokens: list[int], stops: list[str]) -> str:
    """The text before the stop string that is complete first, or begins first if several are complete at once."""
    for count in range(len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if found := [text.find(stop) for stop in stops if stop in text]:
            return str(text[: min(found)])
    return str(tokenizer.decode(tokens))


@given(
    st.text(alphabet="abcé漢🙂 ", max_size=30),
    st.lists(st.text(alphabet="abcé漢🙂 ", min_size=1, max_size=4), max_size=3),
)
def test_parts_are_the_text_up_to_the_first_stop(whole: str, stops: list[str]) -> None:
    """Whatever characters take several tokens, and wherever a stop string begins."""
    tokens = list(whole.encode())
    parts, stopped = _parts(Bytes(), tokens, stops)
    assert "".join(parts) == _until_stop(Bytes(), tokens, stops)
    assert stopped == any(stop in whole for stop in stops)


@given(
    st.lists(st.integers(0, 20), max_size=12), st.lists(st.sampled_from(["w1", "w1 w2", " ", "2 w", "w2"]), max_size=2)
)
def test_what_stands_between_two_tokens_is_kept(tokens: list[int], stops: list[str]) -> None:
    """A tokenizer may put something there that no token has by itself."""
    parts, _ = _parts(Words(), tokens, stops)
    assert "".join(parts) == _until_stop(Words(), tokens, stops)


def test_a_part_is_handed_out_as_soon_as_it_is_certain() -> None:
    """Held back is only what may be the beginning of a stop string, or of a character."""
    text = AnswerText(Bytes(), ["stop"])
    assert [text.add(byte) for byte in b"a st"] == ["a", " ", "", ""]
    assert [text.add(byte) for byte in b"ar"] == ["sta", "r"]
    assert [text.add(byte) for byte in "é".encode()] == ["", "é"]
    assert [text.add(byte) for byte in b"stop it"] == [""] * 7
    assert text.stopped


def test_bytes_that_are_no_character_are_shown_at_the_end() -> None:
    """An answer that ends in the middle of a character is not shortened in silence."""
    parts, _ = _parts(Bytes(), [97, 0xC3], [])
    assert "".join(parts) == "a\ufffd"
