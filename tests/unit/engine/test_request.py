"""A text in pieces, whatever the tokenizer; and what a token is drawn from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.engine.request import Request, SamplingParams, Token
from prefixtune.engine.sampler import sample
from prefixtune.engine.sequence import Detokenizer, TokenSequence
from prefixtune.errors import RequestError

Decode = Callable[[list[int]], str]


def by_bytes(ids: list[int]) -> str:
    """One token a byte, as byte-level tokenizers fall back to."""
    return bytes(ids).decode("utf-8", errors="replace")


WORDS = ["\u2581a", "\u2581the", "b", "\u2581", "\u2581\u2581x", "\n", "é", "\u2581end.", "<skipped>"]


def by_words(ids: list[int]) -> str:
    """Words that bring their space along, which is left out at the start; some tokens are not shown at all."""
    text = "".join(WORDS[number] for number in ids if WORDS[number] != "<skipped>").replace("\u2581", " ")
    return text.removeprefix(" ")


def pieces(decode: Decode, ids: list[int], stop: tuple[str, ...] = (), **options: Any) -> list[str]:
    text = Detokenizer(decode, stop, **options)
    found = []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            return found
    return [*found, text.end()]


def cut(text: str, stop: tuple[str, ...]) -> str:
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


@pytest.mark.parametrize(("decode", "size"), [(by_bytes, 256), (by_words, len(WORDS))])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole_text(decode: Decode, size: int, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    stop = tuple(data.draw(st.lists(st.sampled_from([" the", "b ", "x", "ab", "é"]), max_size=2)))
    assert "".join(pieces(decode, ids, stop)) == cut(decode(ids), stop).strip()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=12))
def test_a_character_is_never_told_in_parts(text: str):
    found = pieces(by_bytes, list(text.encode()))
    assert "".join(found) == text.strip()
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


def test_what_may_still_be_a_stop_string_is_held_back():
    assert pieces(by_bytes, list(b"one </s> two"), ("</s>",)) == ["o", "n", "e", "", "", "", "", ""]
    assert pieces(by_bytes, list(b"a </b>"), ("</s>",)) == ["a", "", "", "", " </b", ">", ""]
    assert pieces(by_bytes, list(b"a <"), ("</s>",)) == ["a", "", "", " <"]


def test_a_text_is_decoded_a_few_tokens_at_a_time():
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return by_bytes(ids)

    pieces(decode, list(b"some long text" * 20))
    assert longest <= 2


# --- drawing ---------------------------------------------------------------------------------------------------------


def sequence(**rules: object) -> TokenSequence:
    return TokenSequence(Request((0,), None, SamplingParams(**{"seed": 5, **rules})), 0, Detokenizer(by_bytes))


def drawn(logits: list[float], count: int = 4000, **rules: object) -> Counter[int]:
    one = sequence(**rules)
    row = torch.tensor([logits])
    found: Counter[int] = Counter()
    for _ in range(count):
        (token,) = sample(row, [one], eos_id=0)
        assert isinstance(token, Token)
        found[token.id] += 1
    return found


LOGITS = [math.log(p) for p in (0.4, 0.05, 0.3, 0.2, 0.05)]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"temperature": 1.0}, {0: 0.4, 1: 0.05, 2: 0.3, 3: 0.2, 4: 0.05}),
        ({"temperature": 0.5}, {0: 16 / 29.5, 1: 0.25 / 29.5, 2: 9 / 29.5, 3: 4 / 29.5, 4: 0.25 / 29.5}),
        ({"temperature": 1.0, "top_k": 2}, {0: 4 / 7, 2: 3 / 7}),
        # The first that reaches 0.75 stays: 0.4 + 0.3 do not, 0.4 + 0.3 + 0.2 do.
        ({"temperature": 1.0, "top_p": 0.75}, {0: 4 / 9, 2: 3 / 9, 3: 2 / 9}),
        ({"temperature": 1.0, "top_p": 0.3}, {0: 1.0}),
        ({"temperature": 1.0, "banned": (0, 2)}, {1: 1 / 6, 3: 4 / 6, 4: 1 / 6}),
        ({"temperature": 1.0, "min_new_tokens": 1}, {1: 1 / 12, 2: 6 / 12, 3: 4 / 12, 4: 1 / 12}),
        ({"temperature": 1e-9}, {0: 1.0}),
        ({"temperature": 0.0}, {0: 1.0}),
    ],
)
def test_tokens_come_as_often_as_they_should(rules: dict[str, object], expected: dict[int, float]):
    count = 4000
    found = drawn(LOGITS, count, **rules)
    assert found.keys() == expected.keys()
    for token, share in expected.items():
        # Five standard deviations.
        assert abs(found[token] - count * share) <= 5 * math.sqrt(count * share * (1 - share)) + 1e-9


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.integers(0, 30))
def test_what_is_drawn_is_among_the_likeliest(seed: int, top_p: float, top_k: int):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 3
    order = logits.argsort(descending=True)[: top_k or None].tolist()
    weights = logits[order].double().softmax(-1).tolist()
    allowed, total = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if total >= top_p:
            break
        allowed.add(token)
        total += weight
    assert set(drawn(logits.tolist(), 20, temperature=1.0, top_p=top_p, top_k=top_k, seed=seed)) <= allowed


def test_numbers_that_are_not_finite_are_that_rows_trouble():
    logits = torch.tensor([[1.0, 2.0], [1.0, float("nan")], [float("inf"), 0.0], [float("-inf"), 3.0], [3.0, 1.0]])
    asked = [sequence() for _ in logits]
    found = sample(logits, asked, eos_id=0)
    assert [token.id if isinstance(token, Token) else None for token in found] == [1, None, None, 1, 0]
    assert "finite" in str(found[1])


def test_texts_without_a_seed_differ():
    row = torch.zeros(1, 1000)
    found = {sample(row, [sequence(seed=None, temperature=1.0)], eos_id=0)[0] for _ in range(5)}
    assert len(found) > 1


def test_drawing_leaves_the_random_state_of_others_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn(LOGITS, 3, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_all_faults_of_a_request_at_once():
    with pytest.raises(RequestError, match=r"max_new_tokens.*top_k.*banned.*logprobs") as error:
        SamplingParams(max_new_tokens=0, top_k=-1, logprobs=21, banned=(-1,))
    assert error.value.hint


# --- verbatim --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decode", "size"), [(by_bytes, 256), (by_words, len(WORDS))])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_verbatim_pieces_joined_are_the_whole_text(decode: Decode, size: int, data: st.DataObject) -> None:
    tokens = st.integers(0, size - 1) | st.sampled_from(b" \n" if decode is by_bytes else [3, 5])
    ids = data.draw(st.lists(tokens, max_size=20))
    stop = tuple(data.draw(st.lists(st.sampled_from([" the", "b ", "x", "ab", "é", "\n"]), max_size=2)))
    assert "".join(pieces(decode, ids, stop, verbatim=True)) == cut(decode(ids), stop)


def test_outer_white_space_is_told_where_it_is_wanted() -> None:
    assert "".join(pieces(by_bytes, list(b" \n one two \n"), verbatim=True)) == " \n one two \n"
    assert "".join(pieces(by_bytes, list(b" \n "), verbatim=True)) == " \n "
    assert "".join(pieces(by_bytes, list(b" one \nEnd"), stop=("End",), verbatim=True)) == " one \n"
    # Told as soon as it is certain, and once.
    assert pieces(by_bytes, list(b"  a b "), verbatim=True) == [" ", " ", "a", " ", "b", " ", ""]


def test_a_text_goes_on_from_the_prompt() -> None:
    # By itself, the first word would lose the space that divides it from the prompt.
    assert "".join(pieces(by_words, [1, 0], verbatim=True)) == "the a"
    assert "".join(pieces(by_words, [1, 0], verbatim=True, before=(2,))) == " the a"
    # A prompt that ends within a character is no place to go on from.
    assert "".join(pieces(by_bytes, [0xA9, *b" x"], verbatim=True, before=(0xC3,))) == "\ufffd x"
