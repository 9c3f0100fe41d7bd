"""BLEU: references of unequal number, and misuse. Labels and spans: cases worked out by hand."""

import pytest

from prefixtune.evaluation.metrics import macro_f1, measure, span_f1


def bleu(hypotheses, references):
    return measure(hypotheses, references, protocol="e2e", metrics=["bleu"])["bleu"]


def test_an_absent_reference_counts_as_absent():
    hypotheses = ["a b c d e f", "g h i j k l"]
    lone = bleu(hypotheses, [["a b c d e f"], ["g h i j k x"]]).score
    assert lone < 100
    # A second reference for one item alone, or a blank one, must not change how the other item is measured.
    assert bleu(hypotheses, [["a b c d e f"], ["g h i j k x", " "]]).score == lone
    assert bleu(hypotheses, [["z", "a b c d e f"], ["g h i j k x"]]).score == lone
    assert bleu(hypotheses, [["a b c d e f"], ["g h i j k x", "g h i j k l"]]).score == pytest.approx(100)


def test_a_text_equals_itself_by_all_rules():
    for protocol in ("plain", "webnlg", "dart"):
        texts = ["It lies at 33\u00b0 North, for 5\u20ac.", "no"]
        score = measure(texts, [texts[:1], ["yes"]], protocol=protocol, metrics=["exact_match"])["exact_match"]
        assert score.score == 50


@pytest.mark.parametrize(
    ("predictions", "references", "wanted"),
    [
        # a: precision 2/3, recall 1; b: precision 1, recall 1/2.
        (["a", "a", "a", "b"], ["a", "a", "b", "b"], (4 / 5 + 2 / 3) / 2),
        # A rare label weighs as much as a frequent one; never predicted, it scores 0.
        (["a"] * 10, ["a"] * 9 + ["b"], (18 / 19 + 0) / 2),
        # An invented label is one more, with 0.
        (["a", "what?"], ["a", "b"], (1 + 0 + 0) / 3),
    ],
)
def test_macro_f1_is_the_mean_over_the_labels(predictions, references, wanted):
    score = macro_f1(predictions, references)
    assert (score.name, score.score) == ("macro F1", pytest.approx(100 * wanted))
    assert "predictions or references" in score.implementation


@pytest.mark.parametrize(
    ("predicted", "wanted", "f1"),
    [
        # One of two wanted spans, and nothing else.
        (["B-X I-X O O"], ["B-X I-X O B-Y"], 2 / 3),
        # Too short, too long, or of another type: no part of a span counts.
        (["B-X O"], ["B-X I-X"], 0),
        (["B-X I-X"], ["B-Y I-Y"], 0),
        # Neighbours of one type are two spans, or one.
        (["B-X I-X"], ["B-X B-X"], 0),
        # I- after O, at the start, or after another type begins a span.
        (["O I-X I-X O"], ["O B-X I-X O"], 1),
        (["I-X I-Y"], ["B-X B-Y"], 1),
        # A sentence ends a span; counts add up over sentences: 1 hit, 2 predicted, 3 wanted.
        (["B-X", "I-X"], ["B-X", "O"], 2 / 3),
        (["B-X O", "B-X O", "O"], ["B-X O", "O B-X", "B-X"], 2 / 5),
        # What is no tag is outside; a type may hold a hyphen.
        (["B-X what? I-X"], ["B-X O B-X"], 1),
        (["B-X-1 I-X-2"], ["B-X-1 I-X-1"], 0),
        (["O"], ["O"], 0),
    ],
)
def test_a_span_counts_as_a_whole(predicted, wanted, f1):
    score = span_f1([line.split() for line in predicted], [line.split() for line in wanted])
    assert (score.name, score.score) == ("span F1", pytest.approx(100 * f1))
    assert "seqeval" in score.implementation


def test_e2e_ignores_the_case_of_ascii_letters_alone():
    reference = [["The CAFE at the riverside is cheap"]]
    assert measure(["the cafe AT the RIVERSIDE is cheap"], reference, protocol="e2e", metrics=["bleu"])[
        "bleu"
    ].score == pytest.approx(100)
    accented = (["CAFÉ"], [["café"]])
    assert measure(*accented, protocol="e2e", metrics=["nist"])["nist"].score == 0
    assert "case:lc" in measure(*accented, protocol="e2e", metrics=["bleu"])["bleu"].implementation
