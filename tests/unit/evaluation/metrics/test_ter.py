"""Translation edit rate: cases by hand, and sacrebleu's count on random texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.evaluation.metrics.ter import edits

WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=16)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "count"),
    [
        ("a b c", "a b c", 0),
        ("", "", 0),
        ("a b", "", 2),
        ("", "a b c", 3),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("a b b c", "a b c", 1),
        # A block that moves is one edit, however long it is.
        ("d e a b c", "a b c d e", 1),
        ("c a b", "a b c", 1),
        # Moved, and one word of it is another.
        ("d e a b x", "a b c d e", 2),
        ("a b", "b a", 1),
        ("A b", "a b", 1),
    ],
)
def test_edits_of_known_pairs(hypothesis: str, reference: str, count: int):
    assert edits(hypothesis.split(), reference.split()) == count


@given(WORDS, WORDS)
@settings(max_examples=150, deadline=None)
def test_edits_are_sacrebleus(hypothesis: list[str], reference: list[str]):
    from sacrebleu.metrics.lib_ter import translation_edit_rate

    assert edits(hypothesis, reference) == translation_edit_rate(hypothesis, reference)[0]


@given(WORDS, st.integers(0, 16), st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_edits_of_moved_blocks_are_sacrebleus(words: list[str], first: int, second: int):
    from sacrebleu.metrics.lib_ter import translation_edit_rate

    start, end = sorted((first, second))
    moved = words[end:] + words[start:end] + words[:start]
    assert edits(moved, words) == translation_edit_rate(moved, words)[0]


@given(WORDS, WORDS)
@settings(deadline=None)
def test_edits_are_bounded(hypothesis: list[str], reference: list[str]):
    count = edits(hypothesis, reference)
    assert abs(len(hypothesis) - len(reference)) <= count <= max(len(hypothesis), len(reference))
    assert (count == 0) == (hypothesis == reference)


def test_long_texts_end():
    """Thousands of like words: the number of shifts looked at is limited."""
    assert edits(["a", "b"] * 150, ["b", "a"] * 150) <= 300
    assert edits(["a", "b"] * 1000, ["b", "a"] * 1000) <= 2000


def test_very_long_texts_end():
    words = [str(index) for index in range(50_000)]
    assert edits(words, words) == 0
    # A block that moved is found again word by word: shifts are not looked for.
    assert edits(["moved", *words], [*words, "moved"]) == 2
    assert edits(words, ["x"]) == edits(["x"], words) == 50_000
