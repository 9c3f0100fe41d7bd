"""Texts as the model wrote them: the white space that the engine leaves out of its pieces is there again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.engine import Output, Token
from prefixtune.engine.request import TextSoFar
from prefixtune.server.writing import Verbatim

Decode = Callable[[list[int]], str]


def by_bytes(ids: list[int]) -> str:
    """One token a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


WORDS = ["\u2581a", "\u2581the", "b", "\u2581", "\u2581\u2581x", "\n", "é", "\u2581end.", "<skipped>"]


def by_words(ids: list[int]) -> str:
    """Words that bring their space along, which is left out at the start; some tokens are not shown at all."""
    text = "".join(WORDS[number] for number in ids if WORDS[number] != "<skipped>").replace("\u2581", " ")
    return text.removeprefix(" ")


def news(decode: Decode, ids: list[int], stop: tuple[str, ...] = ()) -> list[Output]:
    """What the engine tells of a text, token by token."""
    text, told = TextSoFar(decode, stop), []
    for token in ids:
        told.append(Output("r", 0, (Token(token),), text.add(token), "stop" if text.stopped else None))
        if text.stopped:
            return told
    return [*told, Output("r", 0, (), text.end(), "length")]


def pieces(decode: Decode, ids: list[int], before: tuple[int, ...] = (), stop: tuple[str, ...] = ()) -> list[str]:
    text = Verbatim(decode, before, stop)
    return [text.add(each).text for each in news(decode, ids, stop)]


def cut(text: str, stop: tuple[str, ...]) -> str:
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


@pytest.mark.parametrize(("decode", "size"), [(by_bytes, 256), (by_words, len(WORDS))])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole_text(decode: Decode, size: int, data: st.DataObject) -> None:
    tokens = st.integers(0, size - 1) | st.sampled_from(b" \n" if decode is by_bytes else [3, 5])
    ids = data.draw(st.lists(tokens, max_size=20))
    stop = tuple(data.draw(st.lists(st.sampled_from([" the", "b ", "x", "ab", "é", "\n"]), max_size=2)))
    assert "".join(pieces(decode, ids, stop=stop)) == cut(decode(ids), stop)


def test_outer_white_space_is_told() -> None:
    assert "".join(pieces(by_bytes, list(b" \n one two \n"))) == " \n one two \n"
    assert "".join(pieces(by_bytes, list(b" \n "))) == " \n "
    assert "".join(pieces(by_bytes, list(b" one \nEnd"), stop=("End",))) == " one \n"
    # Told as soon as it is certain, and once.
    assert pieces(by_bytes, list(b"  a b ")) == ["", "", "  a", "", " b", "", " "]


def test_a_text_goes_on_from_the_prompt() -> None:
    # By itself, the first word would lose the space that divides it from the prompt.
    assert "".join(pieces(by_words, [1, 0])) == "the a"
    assert "".join(pieces(by_words, [1, 0], before=(2,))) == " the a"
    # A prompt that ends within a character is no place to go on from.
    assert "".join(pieces(by_bytes, [0xA9, *b" x"], before=(0xC3,))) == "\ufffd x"
