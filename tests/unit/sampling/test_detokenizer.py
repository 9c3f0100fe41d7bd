"""Pieces of a text, whatever the tokenizer; and where a stop string ends it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.sampling.detokenizer import Detokenizer


def by_bytes(ids):
    """One token a byte, as byte-level tokenizers fall back to."""
    return bytes(ids).decode("utf-8", errors="replace")


WORDS = ["\u2581a", "\u2581the", "b", "\u2581", "\u2581\u2581x", "\n", "é", "\u2581end.", "<skipped>"]


def by_words(ids):
    """Words that bring their space along, which is left out at the start; some tokens are not shown at all."""
    text = "".join(WORDS[number] for number in ids if WORDS[number] != "<skipped>").replace("\u2581", " ")
    return text.removeprefix(" ")


def pieces(decode, ids, stop=(), **options):
    text = Detokenizer(decode, stop, **options)
    found = []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            return found
    return [*found, text.finish()]


def cut(text, stop):
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


@pytest.mark.parametrize("verbatim", [False, True])
@pytest.mark.parametrize(("decode", "size"), [(by_bytes, 256), (by_words, len(WORDS))])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole_text(decode, size, verbatim, data):
    # White space is what differs.
    tokens = st.integers(0, size - 1) | st.sampled_from(b" \n" if decode is by_bytes else [3, 5])
    ids = data.draw(st.lists(tokens, max_size=20))
    stop = tuple(data.draw(st.lists(st.sampled_from([" the", "b ", "x", "ab", "é", "\n"]), max_size=2)))
    whole = cut(decode(ids), stop)
    assert "".join(pieces(decode, ids, stop, verbatim=verbatim)) == (whole if verbatim else whole.strip())


def test_words_in_parts_that_are_marked_as_such():
    """As the tokenizers of CTRL and BlenderBot do."""
    parts = ["hel@@", "lo", "world", "are@@", "n't", "!@@"]

    def by_parts(ids):
        return re.sub("@@( |$)", lambda found: "" if found[1] else "@@", " ".join(parts[number] for number in ids))

    assert pieces(by_parts, [0, 1, 2, 3, 4]) == ["", "hello", " world", "", " aren't", ""]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_held_back_is_the_longest_beginning_of_a_stop_string(text, stop):
    found = Detokenizer(by_bytes, stop, verbatim=True)
    returned = found.add(*text.encode())
    if not found.stopped:
        held = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
        assert returned == text[: len(text) - max(held, default=0)]


def test_a_text_is_decoded_a_few_tokens_at_a_time():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return by_bytes(ids)

    pieces(decode, list(b"some long text" * 20))
    assert longest <= 2


# --- verbatim --------------------------------------------------------------------------------------------------------


def test_a_text_goes_on_from_the_prompt():
    # By itself, the first word would lose the space that divides it from the prompt.
    assert "".join(pieces(by_words, [1, 0], verbatim=True)) == "the a"
    assert "".join(pieces(by_words, [1, 0], verbatim=True, context=(2,))) == " the a"
    # A prompt that ends within a character is no place to go on from.
    assert "".join(pieces(by_bytes, [0xA9, *b" x"], verbatim=True, context=(0xC3,))) == "\ufffd x"
