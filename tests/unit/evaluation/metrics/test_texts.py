"""Every metric on cases worked out by hand, TER on random ones, protocols, odd texts, and what is missing."""

import math
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odd_texts import ODD
from prefixtune.evaluation.metrics import Unavailable, measure
from prefixtune.evaluation.metrics.alignment import edits, meteor_statistics
from prefixtune.evaluation.metrics.java import treebank_words
from prefixtune.evaluation.metrics.protocols import PROTOCOLS

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java on this machine")
PYTHON_ONLY = ["bleu", "bleu_sound", "nist", "rouge_1", "rouge_2", "chrf", "ter"]


def one(metric, hypotheses, references, protocol="plain"):
    return measure(hypotheses, references, protocol=protocol, metrics=[metric])[metric].score


# --- by hand ---------------------------------------------------------------------------------------------------------


NINE, CASED, FOUR = [["a b c d e f g h i"]], [["the mill is a pub"]], [["x", "y", "z", "a b c d"]]


@pytest.mark.parametrize(
    ("metric", "protocol", "hypotheses", "references", "score"),
    [
        # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, and none of 1, which is smoothed to a half.
        ("bleu", "plain", ["a b c d"], [["a b c e"]], 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25),
        # Nine words are wanted; but the two empty texts that DART's script sees are nearer to four words.
        ("bleu", "dart", ["a b c d"], NINE, 100),
        ("bleu_sound", "dart", ["a b c d"], NINE, 100 * math.exp(1 - 9 / 4)),
        ("bleu", "webnlg", ["a b c d"], NINE, 100 * math.exp(1 - 9 / 4)),
        ("bleu", "plain", ["The Mill Is A Pub"], CASED, 0),
        *(("bleu", protocol, ["The Mill Is A Pub"], CASED, 100) for protocol in ("e2e", "webnlg", "dart")),
        # In WebNLG and DART only three references count.
        ("bleu", "e2e", ["a b c d"], FOUR, 100),
        ("bleu", "webnlg", ["a b c d"], FOUR, 0),
        ("ter", "dart", ["a b c d"], FOUR, 4),
        # Precision 1, recall 2/3; of pairs 1 and 1/2. Stems count, and of several references the best.
        ("rouge_1", "plain", ["the cat"], [["the cat sat"]], 0.8),
        ("rouge_2", "plain", ["the cat"], [["the cat sat"]], 2 / 3),
        ("rouge_l", "summarization", ["the cat"], [["the cat sat"]], 0.8),
        ("rouge_l", "summarization", ["cat the"], [["the cat sat"]], 0.4),
        ("rouge_1", "plain", ["running cats"], [["x y", "run cat"]], 1),
        ("rouge_1", "plain", ["the cat", "dog"], [["the cat"], ["mouse"]], 0.5),
        # One edit for three words, and one shift for five; the fewest edits, over the references' mean length.
        ("ter", "plain", ["a x c"], [["a b c"]], 1 / 3),
        ("ter", "plain", ["d e a b c"], [["a b c d e"]], 1 / 5),
        ("ter", "plain", ["A B"], [["a b c", "a"]], 1 / 2),
        ("ter", "plain", ["", "a"], [["a b"], ["a b"]], 3 / 4),
        ("ter", "plain", ["x y z"], [["a"]], 3),
        # Half of the characters; no pair of them, no word: the mean of three orders. Longer ones do not occur.
        ("chrf", "plain", ["ab"], [["ac"]], 100 * (1 / 2 + 0 + 0) / 3),
    ],
)
def test_scores_of_known_texts(metric, protocol, hypotheses, references, score):
    assert one(metric, hypotheses, references, protocol) == pytest.approx(score)


def test_nist_of_known_texts():
    # All references: a twice, b and c once; "a b" and "a c" half as often as their beginning "a".
    told_by_words, told_by_pairs = (1 + 2 + 1) / 3, 1 / 1
    ratio = 3 / (4 / 1)
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)
    assert one("nist", ["a b", "a"], [["a b"], ["a c"]]) == pytest.approx((told_by_words + told_by_pairs) * penalty)
    # Two references of one item, three words in all: the wanted length is the mean, 1.5 words.
    assert one("nist", ["a"], [["a", "a b"]]) == pytest.approx(
        math.log2(3 / 2) * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(1 / 1.5) ** 2)
    )
    assert one("nist", ["x"], [["a"]]) == 0
    assert one("nist", [""], [["a"]]) == 0


def test_rouge_is_not_given_for_texts_that_it_cannot_read():
    text = "5 кошек"
    with pytest.raises(Unavailable, match=r"letters a to z and digits alone, and \d+% of the references' are others"):
        measure([text], [[text]], metrics=["rouge_1"])
    left_out = {}
    assert list(measure([text], [[text]], metrics=["rouge_l", "chrf"], left_out=left_out)) == ["chrf"]
    assert left_out["rouge_l"].endswith("choose the metric chrf")


@needs_java
def test_captioning_metrics_of_known_texts():
    references = [["The cat sat.", "the dog"], ["five small red trains"]]
    made = measure(["the cat!", "five small red trains"], references, protocol="e2e", metrics=["rouge_l", "cider"])
    # ROUGE-L: precision 1, recall 2/3 (beta 1.2), and a whole one.
    first = (1 + 1.44) * (2 / 3) / (2 / 3 + 1.44)
    assert made["rouge_l"].score == pytest.approx((first + 1) / 2)
    # CIDEr of a text that is its only reference, with words that no other item has: 10. Two such words reach orders 1
    # and 2 of 4 alone.
    assert measure(["a b", "c d"], [["a b"], ["c d"]], metrics=["cider"])["cider"].score == pytest.approx(5)
    assert measure(["a b c d", "x"], [["a b c d"], ["y"]], metrics=["cider"])["cider"].score == pytest.approx(5)


# --- properties ------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.text("abcd .,", min_size=1).filter(str.strip), min_size=1, max_size=4)
ITEMS = st.lists(st.tuples(st.text("abcd .,"), TEXTS), min_size=2, max_size=6)


@given(ITEMS, st.randoms())
@settings(deadline=None, max_examples=20)
def test_scores_do_not_depend_on_the_order_of_items_and_references(items, random):
    moved = [(text, random.sample(references, len(references))) for text, references in items]
    random.shuffle(moved)
    for protocol in ("plain", "e2e"):
        first, second = (
            measure([text for text, _ in rows], [found for _, found in rows], protocol=protocol, metrics=PYTHON_ONLY)
            for rows in (items, moved)
        )
        for name in PYTHON_ONLY:
            if name != "chrf":  # of equally good references the first gives its counts, in sacrebleu
                assert first[name].score == pytest.approx(second[name].score), name


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_empty_outputs_score_nothing(protocol):
    made = measure(["", " "], [["a b c d"], ["e f g h"]], protocol=protocol, metrics=PYTHON_ONLY)
    assert {name: score.score for name, score in made.items()} == {name: int(name == "ter") for name in PYTHON_ONLY}


# --- misuse and what is missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'no memory' >&2; exit 1", "exit code 1.* for 2: no memory"),
        ("echo bad; echo worse", "METEOR wrote 'bad'"),
    ],
)
def test_a_failing_java_is_reported(tmp_path, monkeypatch, script, says):
    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Unavailable, match=says):
        meteor_statistics(["a", "b"], [["a"], ["b"]])


@needs_java
def test_the_tokenizer_accepts_any_text_and_writes_no_file():
    package = Path(str(metadata.distribution("pycocoevalcap").locate_file("pycocoevalcap/tokenizer")))
    before = sorted(package.iterdir())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(treebank_words, [ODD, ODD[::-1]])
    assert first == second[::-1]
    words = dict(zip(ODD, first, strict=True))
    assert words["two\nlines"] == "two lines"
    assert words["a\u2028b\u2029c"] == "a b c"
    assert words["..."] == words[""] == words["  "] == ""
    assert words["snow ☃ and 🚆 £20 café"].endswith("café")
    assert treebank_words(["It isn't Fred's: the pub, near (the) river!"]) == [
        "it is n't fred 's the pub near -lrb- the -rrb- river"
    ]
    assert sorted(package.iterdir()) == before


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
