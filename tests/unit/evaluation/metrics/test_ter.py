"""Translation edit rate: sacrebleu's count on random texts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.evaluation.metrics.alignment import edits

WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=16)


@given(WORDS, WORDS)
@settings(max_examples=150, deadline=None)
def test_edits_are_sacrebleus(hypothesis, reference):
    from sacrebleu.metrics.lib_ter import translation_edit_rate

    assert edits(hypothesis, reference) == translation_edit_rate(hypothesis, reference)[0]


def test_very_long_texts_end():
    words = [str(index) for index in range(50_000)]
    assert edits(words, words) == 0
    # A block that moved is found again word by word: shifts are not looked for.
    assert edits(["moved", *words], [*words, "moved"]) == 2
    assert edits(words, ["x"]) == edits(["x"], words) == 50_000
